// The core without Python: answers requests from standard input on standard output, so that an emulated processor runs
// the kernels alone (tools/qemu.sh; the other side is tools/qemu/emulated.py).
//
// A request is a Request, the places of its pointers, and a block of memory. The block begins with the structs of
// core/problem.h; each pointer in it is an offset into the block, 0 for NULL. The answer is an Answer, text, and the block
// as the call left it.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "core/dispatch.h"
#include "core/threads.h"

namespace {

enum Operation : int64_t { FORWARD, BACKWARD, TANGENT, DESCRIBE, PAGES, PAGE_IN_USE, THREADS, PHILOX };

struct Request {
    int64_t operation, pointers, bytes; // how many pointers; bytes of the block
    char page[40];                      // TILEWISE_ISA for this request
};

struct Answer {
    int64_t status, text_bytes;
};

// Pages as two lists, compiled and supported, and the sizes of the structs that both sides must agree on.
std::string pages() {
    std::string compiled, supported;
    int count;
    const tilewise::Page *list = tilewise::pages(&count);
    for (int i = 0; i < count; ++i) {
        compiled += std::string(" ") + list[i].table->name;
        if (list[i].host_runs) supported += std::string(" ") + list[i].table->name;
    }
    return compiled + ";" + supported + ";" + std::to_string(sizeof(tw_problem)) + " " +
           std::to_string(sizeof(tw_gradients)) + " " + std::to_string(sizeof(tw_tangents));
}

int64_t answer(int64_t operation, char *block, std::string &text) {
    tw_problem *problem = reinterpret_cast<tw_problem *>(block);
    void *second = problem + 1;
    uint64_t *numbers = reinterpret_cast<uint64_t *>(block);
    const char *message = "";
    int64_t status = TW_OK;
    switch (operation) {
    case FORWARD: status = tw_forward(problem, &message); break;
    case BACKWARD: status = tw_backward(problem, static_cast<tw_gradients *>(second), &message); break;
    case TANGENT: status = tw_tangent(problem, static_cast<tw_tangents *>(second), &message); break;
    case DESCRIBE: status = tw_describe(problem, static_cast<tw_description *>(second), &message); break;
    case PAGES: text = pages(); return TW_OK;
    case THREADS: // the number before; then it is set, unless it is to stay
        text = std::to_string(tilewise::default_threads());
        if (int64_t(numbers[0]) >= 0) tilewise::set_default_threads(int(numbers[0]));
        return TW_OK;
    default: {
        const tw_kernel_table *page = tilewise::page_in_use(&message);
        if (!page)
            status = TW_UNSUPPORTED;
        else if (operation == PHILOX) // seed, stream, index
            page->philox(numbers[0], numbers[1], numbers + 2, 1, reinterpret_cast<uint32_t *>(numbers + 3));
        else
            message = page->name;
    }
    }
    text = message ? message : ""; // a sound problem leaves it NULL
    return status;
}

bool read_all(void *to, size_t bytes) { return !bytes || fread(to, bytes, 1, stdin) == 1; }

} // namespace

int main() {
    Request request;
    while (read_all(&request, sizeof request)) {
        std::vector<int64_t> places(size_t(request.pointers));
        const size_t bytes = (size_t(request.bytes) + 63) / 64 * 64 + 64;
        char *block = static_cast<char *>(aligned_alloc(64, bytes));
        if (!block || !read_all(places.data(), places.size() * sizeof(int64_t)) ||
            !read_all(block, size_t(request.bytes)))
            return 1;
        for (int64_t place : places) {
            uint64_t offset;
            memcpy(&offset, block + place, sizeof offset);
            const uint64_t address = offset ? reinterpret_cast<uint64_t>(block) + offset : 0;
            memcpy(block + place, &address, sizeof address);
        }
        setenv("TILEWISE_ISA", request.page, 1);
        std::string text;
        const int64_t status = answer(request.operation, block, text);
        const Answer head = {status, int64_t(text.size())};
        fwrite(&head, sizeof head, 1, stdout);
        fwrite(text.data(), 1, text.size(), stdout);
        fwrite(block, 1, size_t(request.bytes), stdout);
        fflush(stdout);
        free(block);
    }
}
