#include "core/scratch.h"

#include <stdlib.h>

#include <mutex>

#include "core/large_pages.h"

namespace tilewise {
namespace {

constexpr size_t alignment = 64, kept_at_most = size_t(64) << 20;

std::mutex spare_mutex;
void *spare = nullptr;
size_t spare_bytes = 0;

} // namespace

Scratch::Scratch(size_t bytes) : memory_(nullptr), bytes_((bytes + alignment - 1) / alignment * alignment + alignment) {
    {
        std::lock_guard<std::mutex> lock(spare_mutex);
        if (spare && spare_bytes >= bytes_) {
            memory_ = spare;
            bytes_ = spare_bytes;
            spare = nullptr;
        }
    }
    if (memory_) return;
    memory_ = aligned_alloc(alignment, bytes_);
    if (memory_) prefer_large_pages(memory_, bytes_);
}

Scratch::~Scratch() {
    void *unwanted = memory_;
    if (bytes_ <= kept_at_most) {
        std::lock_guard<std::mutex> lock(spare_mutex);
        if (!spare || spare_bytes < bytes_) {
            unwanted = spare;
            spare = memory_;
            spare_bytes = bytes_;
        }
    }
    free(unwanted);
}

} // namespace tilewise
