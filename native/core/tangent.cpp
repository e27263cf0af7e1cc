// tw_tangent: cuts the query rows of each (batch, kv head) into items and runs them on the page in use. Every row is
// summed over all its keys in one order, so the cut changes no bit.
#include <algorithm>

#include "core/problem_check.h"
#include "core/scratch.h"
#include "core/threads.h"

namespace tilewise {
namespace {

// Memory for the tiles of an item: within a second-level cache, beside a block of keys.
constexpr size_t tiles_bytes = size_t(256) << 10;

struct Call {
    const tw_problem *problem;
    const tw_tangents *tangents;
    const tw_kernels *kernels;
    int64_t heads, rows, cuts, tiles; // of the call; of a kv head; of those; of an item at most
    size_t scratch_bytes;             // of a worker
    char *scratch;
};

// The last rows first: under a causal mask they have the most keys, and no thread is left with a long item at the end.
void run_item(void *context, int64_t index, int worker) {
    const Call &c = *static_cast<const Call *>(context);
    const int64_t head = index % c.heads, cut = c.cuts - 1 - index / c.heads, each = c.tiles * c.kernels->tile_rows;
    const int64_t kv_heads = c.problem->kv_heads, begin = cut * each;
    const tw_item item = {
        head / kv_heads, head % kv_heads, begin, std::min(c.rows, begin + each), 0, c.problem->k_len, 0, nullptr, 0, 1,
        nullptr};
    c.kernels->tangent(c.problem, c.tangents, &item, c.tiles, c.scratch + size_t(worker) * c.scratch_bytes);
}

int run_tangent(const tw_problem &p, const tw_tangents &t, const char **message) {
    int status;
    const tw_kernels *kernels = kernels_for(p, &status, message);
    if (!kernels) return status;
    const int64_t per_head = p.row_end - p.row_begin;
    Call c = {&p, &t, kernels, p.batch * p.kv_heads, 0, 0, 0, 0, nullptr};
    if (!c.heads || !p.q_heads || !per_head) return TW_OK;
    c.rows = p.q_heads / p.kv_heads * per_head;

    int threads = p.threads > 0 ? p.threads : default_threads();
    const double operations =
        5.0 * double(c.heads) * double(c.rows) * double(p.k_len) * double(p.head_dim + p.value_dim);
    threads = threads_worth(threads, work_of(p, operations));

    // As many tiles as fit the cache, fewer where that leaves threads without work.
    const int64_t tiles_of_head = (c.rows + kernels->tile_rows - 1) / kernels->tile_rows;
    const size_t tile_bytes = kernels->tangent_bytes(&p, 2) - kernels->tangent_bytes(&p, 1);
    c.tiles = std::clamp<int64_t>(int64_t(tiles_bytes / tile_bytes), 1, most_tiles_of_item);
    c.tiles = std::min(c.tiles, std::max<int64_t>(1, c.heads * tiles_of_head / (4 * int64_t(threads))));
    c.tiles = std::min(c.tiles, tiles_of_head);
    c.cuts = (tiles_of_head + c.tiles - 1) / c.tiles;
    threads = int(std::min<int64_t>(threads, c.heads * c.cuts));

    c.scratch_bytes = (kernels->tangent_bytes(&p, c.tiles) + 127) / 128 * 128;
    Scratch memory(c.scratch_bytes * size_t(threads));
    if (!memory.memory()) {
        *message = "workspace: out of memory";
        return TW_OUT_OF_MEMORY;
    }
    c.scratch = static_cast<char *>(memory.memory());
    parallel_for(c.heads * c.cuts, threads, run_item, &c);
    return TW_OK;
}

} // namespace
} // namespace tilewise

int tw_tangent(const tw_problem *problem, const tw_tangents *tangents, const char **message) {
    *message = "";
    if (problem->pages.table || problem->sequences.q_len) {
        *message = "pages, sequences: have no tangents";
        return TW_UNSUPPORTED;
    }
    if (tangents->bias_count < 0 || tangents->bias_count > TW_MAX_BIASES) {
        *message = "bias: at most 4 dense biases";
        return TW_INVALID;
    }
    if (tangents->bias_count > problem->bias_count || (tangents->table.data && !problem->table.data) ||
        (tangents->sinks && !problem->sinks)) {
        *message = "bias, table, sinks: a tangent of what is not there";
        return TW_INVALID;
    }
    return tilewise::run_tangent(*problem, *tangents, message);
}
