// tw_forward: cuts the problem into items and runs them on the page in use.
//
// An item is up to 32 tiles of query rows of one (batch, kv head). Neither the cut nor the order changes a row's bits.
// Where a kv head has few rows (decode), its keys are cut too, at fixed places that depend on the sizes of the problem
// alone, and the pieces are merged in key order. Where rows must not depend on their number, every item sums so.
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>

#include "core/problem_check.h"
#include "core/scratch.h"
#include "core/sequences.h"
#include "core/threads.h"

namespace tilewise {
namespace {

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
    tw_item *items, *merges; // merges: the first split of each (batch, kv head) whose keys are split
    int64_t tiles;           // of an item at most
    size_t scratch_bytes;    // of a worker
    char *scratch;
};

// Keys that one row's ranges hold.
int64_t keys_of_row(const tw_problem &p, int64_t b, int64_t h, int64_t i) {
    const tw_ranges &ranges = p.ranges;
    if (!ranges.count) return p.k_len;
    const int64_t at = b * ranges.stride_b + h * ranges.stride_h + i * ranges.count;
    int64_t keys = 0;
    for (int r = 0; r < ranges.count; ++r)
        keys += ranges.wide ? static_cast<const int64_t *>(ranges.stops)[at + r] -
                                  static_cast<const int64_t *>(ranges.starts)[at + r]
                            : static_cast<const int32_t *>(ranges.stops)[at + r] -
                                  static_cast<const int32_t *>(ranges.starts)[at + r];
    return keys;
}

void run_item(void *context, int64_t index, int worker) {
    const Call &call = *static_cast<const Call *>(context);
    const tw_item &item = call.items[index];
    tw_problem own;
    call.kernels->forward(&problem_of(*call.problem, item.number, own), &item, call.tiles,
                          call.scratch + size_t(worker) * call.scratch_bytes);
}

void merge_item(void *context, int64_t index, int) {
    const Call &call = *static_cast<const Call *>(context);
    const tw_item &first = call.merges[index];
    tw_problem own;
    call.kernels->merge(&problem_of(*call.problem, first.number, own), &first, first.partial, first.splits);
}

// Tiles that hold all query rows of all problems.
int64_t tiles_of(const tw_problem &p, const tw_kernels &kernels) {
    if (!p.q_heads || !p.kv_heads) return 0;
    int64_t tiles = 0;
    tw_problem own;
    for (int64_t n = 0; n < problems_in(p); ++n) {
        const tw_problem &one = problem_of(p, n, own);
        const int64_t rows = one.q_heads / one.kv_heads * (one.row_end - one.row_begin);
        tiles += one.batch * one.kv_heads * ((rows + kernels.tile_rows - 1) / kernels.tile_rows);
    }
    return tiles;
}

// Tiles of an item, at most `most` and at least half of it, so that as many items fall on one thread as on another: `heads`
// heads of `tiles` tiles each are cut alike. An item's own cost, above all to bring its keys, is taken for that of a tile.
int64_t even_tiles(int64_t tiles, int64_t most, int64_t heads, int threads) {
    int64_t best = most;
    double least = 0;
    const int64_t fewest = (tiles + most - 1) / most;
    for (int64_t cuts = fewest; cuts <= std::min(2 * fewest, tiles); ++cuts) {
        const double cost = double((heads * cuts + threads - 1) / threads) * (double(tiles) / double(cuts) + 1);
        if (least == 0 || cost < least) {
            least = cost;
            best = (tiles + cuts - 1) / cuts;
        }
    }
    return best;
}

// How a problem is cut. The cut into splits depends on its own sizes alone; that into items changes no bit.
struct Cut {
    int64_t rows = 0, heads = 0, group = 1, tiles = 0, splits = 1, rows_per_item = 0, cuts = 0, count = 0;
    double work = 0;
    size_t partial_bytes = 0; // of one split
    bool split() const { return splits > 1; }
};

// `tiles_in_call`: those of all problems of the call, which `threads` threads share.
Cut cut_of(const tw_problem &p, const tw_kernels &kernels, int64_t tiles_in_call, int threads) {
    Cut c;
    const int64_t per_head = p.row_end - p.row_begin;
    c.heads = p.batch * p.kv_heads;
    if (!c.heads || !p.q_heads || !per_head) return c;
    c.group = p.q_heads / p.kv_heads;
    c.rows = c.group * per_head;

    // As many tiles as fit the cache, fewer where that leaves threads without work.
    const int64_t tiles_in_all = (c.rows + kernels.tile_rows - 1) / kernels.tile_rows;
    const size_t tile_bytes = std::max<size_t>(1, kernels.scratch_bytes(&p, 2) - kernels.scratch_bytes(&p, 1));
    c.tiles = std::clamp<int64_t>(int64_t(tiles_bytes() / tile_bytes), 1, most_tiles_of_item);
    c.tiles = std::min(c.tiles, std::max<int64_t>(1, tiles_in_call / (4 * int64_t(threads))));
    c.tiles = std::min(c.tiles, tiles_in_all);

    const bool split = c.group * p.q_len <= split_rows_at_most && p.k_len > split_keys;
    if (split) {
        c.splits = (p.k_len + split_keys - 1) / split_keys;
        c.tiles = tiles_in_all;
    } else if (tiles_in_call == c.heads * tiles_in_all) {
        c.tiles = even_tiles(tiles_in_all, c.tiles, c.heads, threads);
    }
    c.rows_per_item = c.tiles * kernels.tile_rows;
    c.cuts = (c.rows + c.rows_per_item - 1) / c.rows_per_item;
    c.count = c.heads * c.cuts * c.splits;

    const double pairs = double(c.heads) * double(c.rows) * double(p.k_len);
    c.work = work_of(p, 2 * pairs * double(p.head_dim + p.value_dim));
    c.partial_bytes = split ? size_t(c.rows) * size_t(p.value_dim + 3) * size_t(accumulator_bytes(p)) : 0;
    return c;
}

// The cuts of all problems of a call together, and the memory they take.
struct Whole {
    int64_t tiles_in_call = 0, tiles = 0, count = 0, merges = 0;
    int threads_asked = 1, threads = 1;
    size_t scratch_bytes = 0, partials = 0; // of a worker; of all splits
    size_t items_bytes() const { return (size_t(count + merges) * sizeof(tw_item) + 63) / 64 * 64; }
    size_t bytes() const { return items_bytes() + scratch_bytes * size_t(threads) + partials; }
};

Whole whole_of(const tw_problem &p, const tw_kernels &kernels) {
    Whole w;
    w.threads_asked = p.threads > 0 ? p.threads : default_threads();
    w.tiles_in_call = tiles_of(p, kernels);
    double work = 0;
    tw_problem own;
    for (int64_t n = 0; n < problems_in(p); ++n) {
        const Cut c = cut_of(problem_of(p, n, own), kernels, w.tiles_in_call, w.threads_asked);
        w.tiles = std::max(w.tiles, c.tiles);
        w.count += c.count;
        w.merges += c.split() ? c.heads : 0;
        w.partials += c.partial_bytes * size_t(c.heads * c.splits);
        work += c.work;
    }
    for (int64_t n = 0; n < problems_in(p) && w.tiles; ++n) // for the tiles of any item, with the sizes of each
        w.scratch_bytes =
            std::max(w.scratch_bytes, (kernels.scratch_bytes(&problem_of(p, n, own), w.tiles) + 127) / 128 * 128);
    w.threads = int(std::min<int64_t>(threads_worth(w.threads_asked, work), w.count));
    return w;
}

// Appends the items of problem number n to `item` and what has to be merged to `merge`; partial states lie at `partial`.
void add_items(const tw_problem &p, const Cut &cut, int64_t n, tw_item *&item, tw_item *&merge, char *&partial) {
    const int64_t per_head = p.row_end - p.row_begin;
    for (int64_t head = 0; head < cut.heads; ++head)
        for (int64_t c = 0; c < cut.cuts; ++c)
            for (int64_t s = 0; s < cut.splits; ++s, ++item) {
                const int64_t b = head / p.kv_heads, kv_head = head % p.kv_heads;
                const int64_t begin = c * cut.rows_per_item, end = std::min(cut.rows, begin + cut.rows_per_item);
                const int64_t h = kv_head * cut.group + begin / per_head;
                const int64_t key_end = cut.split() ? std::min(p.k_len, (s + 1) * split_keys) : p.k_len;
                *item = {b, kv_head,    begin,  end, s * split_keys, key_end, 0, cut.split() ? partial : nullptr,
                         n, cut.splits, nullptr};
                partial += cut.partial_bytes;
                const int64_t last = kv_head * cut.group + (end - 1) / per_head;
                item->cost =
                    double(end - begin) *
                    double(std::min(key_end - item->key_begin, keys_of_row(p, b, h, p.row_begin + begin % per_head)) +
                           std::min(key_end - item->key_begin,
                                    keys_of_row(p, b, last, p.row_begin + (end - 1) % per_head)));
                if (cut.split() && s == 0) *merge++ = *item;
            }
}

bool share_keys(const tw_item &a, const tw_item &b) {
    return a.number == b.number && a.b == b.b && a.kv_head == b.kv_head;
}

// The items of a head follow one another, since they share its keys and values in the caches, the longest first. So that
// no thread is left with a long one at the end, the last heads are mixed: as many as give each thread the work of two
// items as long as the longest of them.
void order_items(tw_item *items, tw_item *end, int threads) {
    const auto longer = [](const tw_item &a, const tw_item &b) { return a.cost > b.cost; };
    double work = 0, longest = 0;
    tw_item *mixed = end;
    while (mixed != items && (mixed == end || work < 2 * threads * longest || share_keys(mixed[-1], *mixed))) {
        --mixed;
        work += mixed->cost;
        longest = std::max(longest, mixed->cost);
    }
    for (tw_item *head = items, *next; head != mixed; head = next) {
        next = std::find_if(head, mixed, [head](const tw_item &item) { return !share_keys(*head, item); });
        std::stable_sort(head, next, longer);
    }
    std::stable_sort(mixed, end, longer);
}

} // namespace

int run_forward(const tw_problem &p, const char **message) {
    int status;
    const tw_kernels *kernels = kernels_for(p, &status, message);
    if (!kernels) return status;
    const Whole whole = whole_of(p, *kernels);
    if (!whole.count) return TW_OK;
    Scratch memory(whole.bytes());
    if (!memory.memory()) {
        *message = "workspace: out of memory";
        return TW_OUT_OF_MEMORY;
    }
    tw_item *items = static_cast<tw_item *>(memory.memory());
    char *scratch = static_cast<char *>(memory.memory()) + whole.items_bytes();
    Call call{&p, kernels, items, items + whole.count, whole.tiles, whole.scratch_bytes, scratch};

    tw_item *item = call.items, *merge = call.merges;
    char *partial = scratch + whole.scratch_bytes * size_t(whole.threads);
    tw_problem own;
    for (int64_t n = 0; n < problems_in(p); ++n) {
        const tw_problem &one = problem_of(p, n, own);
        add_items(one, cut_of(one, *kernels, whole.tiles_in_call, whole.threads_asked), n, item, merge, partial);
    }
    if ((p.ranges.count || p.sequences.q_len) && whole.threads > 1) order_items(call.items, item, whole.threads);
    for (int64_t i = 0; i + whole.threads < whole.count; ++i) call.items[i].next = call.items + i + whole.threads;

    parallel_for(whole.count, whole.threads, run_item, &call);
    if (whole.merges) parallel_for(whole.merges, whole.threads, merge_item, &call);
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
    const tilewise::Whole whole = tilewise::whole_of(*problem, *kernels);
    const bool split = whole.merges || (problem->row_invariant && problem->k_len > split_keys);
    *description = {kernels->tile_rows, kernels->chunk_keys(problem), split ? split_keys : 0,
                    int64_t(whole.count ? whole.bytes() : 0), kernels->parts(problem)};
    return TW_OK;
}
