// tw_forward: checks the problem, cuts it into items, and runs them on the page in use.
//
// An item is up to 16 tiles of query rows of one (batch, kv head). Neither the cut nor the order changes a row's bits.
// Where a kv head has few rows (decode), its keys are cut too, at fixed places that depend on the sizes of the problem
// alone, and the pieces are merged in key order.
#include <stdlib.h>

#include <algorithm>

#include "core/dispatch.h"
#include "core/scratch.h"
#include "core/threads.h"

namespace tilewise {
namespace {

constexpr int64_t split_keys = 1024;      // keys of a split: a multiple of the kernels' chunk
constexpr int64_t split_rows_at_most = 64; // more rows than this fill the threads without splits
constexpr size_t tiles_bytes = size_t(384) << 10; // of an item: its state should stay in a second-level cache
constexpr double serial_operations = 4e6; // below about 50 microseconds, waking threads costs more than it brings

struct Call {
    const tw_problem *problem;
    const tw_kernels *kernels;
    tw_item *items;
    int64_t tiles, splits;
    size_t scratch_bytes, partial_bytes; // of a worker; of one split
    char *scratch;
};

const char *fault(const tw_problem &p) {
    if (p.dtype < 0 || p.dtype >= TW_DTYPES) return "dtype: unknown code";
    if (p.batch < 0 || p.q_heads < 0 || p.kv_heads < 0 || p.q_len < 0 || p.k_len < 0) return "q, k: negative size";
    if (p.head_dim < 1) return "q: head size must be at least 1";
    if (p.value_dim < 1) return "v: head size must be at least 1";
    if (p.q_heads && (!p.kv_heads || p.q_heads % p.kv_heads)) return "k: its heads must divide q's heads";
    if (p.row_begin < 0 || p.row_end > p.q_len || p.row_begin > p.row_end) return "row_begin, row_end: outside the rows";
    if (p.ranges.count < 0 || p.ranges.count > TW_MAX_RANGES) return "ranges: at most 4 per row";
    if (p.bias_count < 0 || p.bias_count > TW_MAX_BIASES) return "bias: at most 4 dense biases";
    for (int t = 0; t < p.bias_count; ++t)
        if (p.bias[t].dtype < 0 || p.bias[t].dtype >= TW_DTYPES) return "bias: unknown dtype code";
    if (p.bits.index && (p.bits.q_offset % TW_BIT_TILE || p.bits.q_offset > p.row_begin)) return "bits: q_offset must be a multiple of 64 at or before row_begin";
    return nullptr;
}

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

} // namespace

int run_forward(const tw_problem &p, const char **message) {
    if ((*message = fault(p))) return TW_INVALID;
    const tw_kernel_table *table = page_in_use(message);
    if (!table) return TW_UNSUPPORTED;
    const tw_kernels &kernels = table->kernels[p.dtype];
    if (!kernels.tile_rows) {
        *message = "dtype: the kernel page in use has no kernel for it";
        return TW_UNSUPPORTED;
    }
    const int64_t per_head = p.row_end - p.row_begin, heads = p.batch * p.kv_heads;
    if (!heads || !p.q_heads || !per_head) return TW_OK;
    const int64_t group = p.q_heads / p.kv_heads, rows = group * per_head;
    int threads = p.threads > 0 ? p.threads : default_threads();

    // As many tiles as fit the cache, fewer where that leaves threads without work.
    const int64_t tiles_in_all = (rows + kernels.tile_rows - 1) / kernels.tile_rows;
    const size_t tile_bytes = kernels.scratch_bytes(&p, 1);
    int64_t tiles = std::clamp<int64_t>(int64_t(tiles_bytes / tile_bytes), 1, most_tiles_of_item);
    tiles = std::min(tiles, std::max<int64_t>(1, heads * tiles_in_all / (4 * int64_t(threads))));
    tiles = std::min(tiles, tiles_in_all);

    const bool split = group * p.q_len <= split_rows_at_most && p.k_len > split_keys;
    const int64_t splits = split ? (p.k_len + split_keys - 1) / split_keys : 1;
    if (split) tiles = tiles_in_all;
    const int64_t rows_per_item = tiles * kernels.tile_rows, cuts = (rows + rows_per_item - 1) / rows_per_item;
    const int64_t count = heads * cuts * splits;

    double operations = 2.0 * double(heads) * double(rows) * double(p.k_len) * double(p.head_dim + p.value_dim);
    if (operations < serial_operations) threads = 1;
    threads = int(std::min<int64_t>(threads, count));

    Call call{&p, &kernels, nullptr, tiles, splits, 0, 0, nullptr};
    call.scratch_bytes = (kernels.scratch_bytes(&p, tiles) + 127) / 128 * 128;
    const size_t number = p.dtype == TW_FLOAT64 ? 8 : 4;
    call.partial_bytes = split ? size_t(rows) * size_t(p.value_dim + 3) * number : 0;
    const size_t items_bytes = (size_t(count) * sizeof(tw_item) + 63) / 64 * 64;
    Scratch memory(items_bytes + call.scratch_bytes * size_t(threads) + call.partial_bytes * size_t(heads * splits));
    if (!memory.memory()) {
        *message = "workspace: out of memory";
        return TW_OUT_OF_MEMORY;
    }
    call.items = static_cast<tw_item *>(memory.memory());
    call.scratch = static_cast<char *>(memory.memory()) + items_bytes;
    char *partial = call.scratch + call.scratch_bytes * size_t(threads);

    tw_item *item = call.items;
    for (int64_t head = 0; head < heads; ++head)
        for (int64_t cut = 0; cut < cuts; ++cut)
            for (int64_t s = 0; s < splits; ++s, ++item) {
                const int64_t b = head / p.kv_heads, kv_head = head % p.kv_heads;
                const int64_t begin = cut * rows_per_item, end = std::min(rows, begin + rows_per_item);
                const int64_t h = kv_head * group + begin / per_head;
                *item = {b, kv_head, begin, end, s * split_keys, split ? std::min(p.k_len, (s + 1) * split_keys) : p.k_len,
                         0, split ? partial + size_t(item - call.items) * call.partial_bytes : nullptr};
                item->cost = double(end - begin) *
                             double(keys_of_row(p, b, h, p.row_begin + begin % per_head) +
                                    keys_of_row(p, b, kv_head * group + (end - 1) / per_head, p.row_begin + (end - 1) % per_head));
            }
    // The longest first, so that no thread is left with a long one at the end. Splits stay in key order.
    if (p.ranges.count && !split && threads > 1)
        std::stable_sort(call.items, item, [](const tw_item &a, const tw_item &b) { return a.cost > b.cost; });

    parallel_for(count, threads, run_item, &call);
    if (split) parallel_for(heads, threads, merge_item, &call);
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
