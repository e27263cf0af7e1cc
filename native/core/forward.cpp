// tw_forward: cuts the problem into items and runs them on the page in use.
//
// An item is up to 16 tiles of query rows of one (batch, kv head). Neither the cut nor the order changes a row's bits.
// Where a kv head has few rows (decode), its keys are cut too, at fixed places that depend on the sizes of the problem
// alone, and the pieces are merged in key order. Where rows must not depend on their number, every item sums so.
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>

#include "core/problem_check.h"
#include "core/scratch.h"
#include "core/threads.h"

namespace tilewise {
namespace {

constexpr int64_t split_rows_at_most = 64; // more rows than this fill the threads without splits

// Bytes for the tiles of an item, whose state should stay in a second-level cache beside a chunk of keys. How many tiles
// an item has changes no bit.
size_t tiles_bytes() {
    static const size_t bytes = [] {
        long cache = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        cache = sysconf(_SC_LEVEL2_CACHE_SIZE); // 0 or -1 where the system does not know
#endif
        return size_t(cache > 0 ? std::clamp(cache, 256L << 10, 4096L << 10) : 1024L << 10) * 3 / 8;
    }();
    return bytes;
}

struct Call {
    const tw_problem *problem;
    const tw_kernels *kernels;
    tw_item *items;
    int64_t tiles, splits;
    size_t scratch_bytes; // of a worker
    char *scratch;
};

// Keys that one row's ranges hold.
int64_t keys_of_row(const tw_problem &p, int64_t b, int64_t h, int64_t i) {
    const tw_ranges &ranges = p.ranges;
    if (!ranges.count) return p.k_len;
    const int64_t at = b * ranges.stride_b + h * ranges.stride_h + i * ranges.count;
    int64_t keys = 0;
    for (int r = 0; r < ranges.count; ++r)
        keys += ranges.wide ? static_cast<const int64_t *>(ranges.stops)[at + r] - static_cast<const int64_t *>(ranges.starts)[at + r]
                            : static_cast<const int32_t *>(ranges.stops)[at + r] - static_cast<const int32_t *>(ranges.starts)[at + r];
    return keys;
}

void run_item(void *context, int64_t index, int worker) {
    const Call &call = *static_cast<const Call *>(context);
    call.kernels->forward(call.problem, call.items + index, call.tiles, call.scratch + size_t(worker) * call.scratch_bytes);
}

void merge_item(void *context, int64_t index, int) {
    const Call &call = *static_cast<const Call *>(context);
    const tw_item *first = call.items + index * call.splits;
    call.kernels->merge(call.problem, first, first->partial, call.splits);
}

// How a call is cut, and the memory that takes.
struct Cut {
    int64_t rows = 0, heads = 0, group = 1, tiles = 0, splits = 1, rows_per_item = 0, cuts = 0, count = 0;
    int threads = 1;
    size_t items_bytes = 0, scratch_bytes = 0, partial_bytes = 0; // of all items; of a worker; of one split
    bool empty() const { return count == 0; }
    size_t bytes() const {
        return items_bytes + scratch_bytes * size_t(threads) + partial_bytes * size_t(heads * splits);
    }
};

Cut cut_of(const tw_problem &p, const tw_kernels &kernels) {
    Cut c;
    const int64_t per_head = p.row_end - p.row_begin;
    c.heads = p.batch * p.kv_heads;
    if (!c.heads || !p.q_heads || !per_head) return c;
    c.group = p.q_heads / p.kv_heads;
    c.rows = c.group * per_head;
    c.threads = p.threads > 0 ? p.threads : default_threads();

    // As many tiles as fit the cache, fewer where that leaves threads without work.
    const int64_t tiles_in_all = (c.rows + kernels.tile_rows - 1) / kernels.tile_rows;
    const size_t tile_bytes = std::max<size_t>(1, kernels.scratch_bytes(&p, 2) - kernels.scratch_bytes(&p, 1));
    c.tiles = std::clamp<int64_t>(int64_t(tiles_bytes() / tile_bytes), 1, most_tiles_of_item);
    c.tiles = std::min(c.tiles, std::max<int64_t>(1, c.heads * tiles_in_all / (4 * int64_t(c.threads))));
    c.tiles = std::min(c.tiles, tiles_in_all);

    const bool split = c.group * p.q_len <= split_rows_at_most && p.k_len > split_keys;
    if (split) {
        c.splits = (p.k_len + split_keys - 1) / split_keys;
        c.tiles = tiles_in_all;
    }
    c.rows_per_item = c.tiles * kernels.tile_rows;
    c.cuts = (c.rows + c.rows_per_item - 1) / c.rows_per_item;
    c.count = c.heads * c.cuts * c.splits;

    const double pairs = double(c.heads) * double(c.rows) * double(p.k_len);
    const double operations = 2.0 * pairs * double(p.head_dim + p.value_dim);
    if (operations < serial_operations) c.threads = 1;
    c.threads = int(std::min<int64_t>(c.threads, c.count));

    c.items_bytes = (size_t(c.count) * sizeof(tw_item) + 63) / 64 * 64;
    c.scratch_bytes = (kernels.scratch_bytes(&p, c.tiles) + 127) / 128 * 128;
    c.partial_bytes = split ? size_t(c.rows) * size_t(p.value_dim + 3) * (p.dtype == TW_FLOAT64 ? 8 : 4) : 0;
    return c;
}

} // namespace

int run_forward(const tw_problem &p, const char **message) {
    int status;
    const tw_kernels *kernels = kernels_for(p, &status, message);
    if (!kernels) return status;
    const Cut cut = cut_of(p, *kernels);
    if (cut.empty()) return TW_OK;
    Scratch memory(cut.bytes());
    if (!memory.memory()) {
        *message = "workspace: out of memory";
        return TW_OUT_OF_MEMORY;
    }
    Call call{&p, kernels, static_cast<tw_item *>(memory.memory()), cut.tiles, cut.splits, cut.scratch_bytes,
              static_cast<char *>(memory.memory()) + cut.items_bytes};
    char *partial = call.scratch + cut.scratch_bytes * size_t(cut.threads);
    const bool split = cut.splits > 1;
    const int64_t per_head = p.row_end - p.row_begin;

    tw_item *item = call.items;
    for (int64_t head = 0; head < cut.heads; ++head)
        for (int64_t c = 0; c < cut.cuts; ++c)
            for (int64_t s = 0; s < cut.splits; ++s, ++item) {
                const int64_t b = head / p.kv_heads, kv_head = head % p.kv_heads;
                const int64_t begin = c * cut.rows_per_item, end = std::min(cut.rows, begin + cut.rows_per_item);
                const int64_t h = kv_head * cut.group + begin / per_head;
                const int64_t key_end = split ? std::min(p.k_len, (s + 1) * split_keys) : p.k_len;
                *item = {b, kv_head, begin, end, s * split_keys, key_end, 0,
                         split ? partial + size_t(item - call.items) * cut.partial_bytes : nullptr};
                const int64_t last = kv_head * cut.group + (end - 1) / per_head;
                item->cost = double(end - begin) *
                             double(keys_of_row(p, b, h, p.row_begin + begin % per_head) +
                                    keys_of_row(p, b, last, p.row_begin + (end - 1) % per_head));
            }
    // The longest first, so that no thread is left with a long one at the end. Splits stay in key order.
    if (p.ranges.count && !split && cut.threads > 1)
        std::stable_sort(call.items, item, [](const tw_item &a, const tw_item &b) { return a.cost > b.cost; });

    parallel_for(cut.count, cut.threads, run_item, &call);
    if (split) parallel_for(cut.heads, cut.threads, merge_item, &call);
    return TW_OK;
}

} // namespace tilewise

int tw_forward(const tw_problem *problem, const char **message) {
    *message = "";
    try {
        return tilewise::run_forward(*problem, message);
    } catch (...) { // only allocation can fail here
        *message = "workspace: out of memory";
        return TW_OUT_OF_MEMORY;
    }
}

int tw_describe(const tw_problem *problem, tw_description *description, const char **message) {
    *message = "";
    int status;
    const tw_kernels *kernels = tilewise::kernels_for(*problem, &status, message);
    if (!kernels) return status;
    const tilewise::Cut cut = tilewise::cut_of(*problem, *kernels);
    const bool split = cut.splits > 1 || (problem->row_invariant && problem->k_len > split_keys);
    *description = {kernels->tile_rows, kernels->chunk_keys, split ? split_keys : 0, int64_t(cut.bytes())};
    return TW_OK;
}
