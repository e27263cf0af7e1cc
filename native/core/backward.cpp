// tw_backward: the keys of each (batch, kv head) are cut into segments, and each runs over all tiles of the head.
//
// A segment owns the gradients to its keys and values. What tiles gather (d_q, row sums) they gather segment after
// segment in key order: a segment that comes too early waits at that tile. Segments are started in that order, so the
// one waited for is always running, and no sum depends on how many segments or threads there are. A sum along a
// diagonal has later rows in later segments: when a segment comes to a tile, those before it have passed that tile, and
// so every earlier row, too. Heads that add to the same array (a bias broadcast over them) do so in their order, by the
// same rule; so that few wait, a segment of one head runs beside the segment before of the next head.
// Many short heads that add to arrays of their own run from beginning to end on one thread each, and their tiles stay in
// its cache.
#include <string.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "core/problem_check.h"
#include "core/scratch.h"
#include "core/sequences.h"
#include "core/threads.h"

namespace tilewise {
namespace {

constexpr int64_t segment_keys = 512, shortest_segment = 128, most_segments = 64; // a bit each in tw_segment.done
constexpr size_t wave_bytes = size_t(32) << 20;      // records of the heads that run together
constexpr size_t short_head_bytes = size_t(2) << 20; // records of a head that stays in a thread's caches, or about

// Heads run in waves, so that records take bounded memory; or one by one on each thread, each a wave of its own.
struct Call {
    const tw_problem *problem;
    const tw_gradients *gradients;
    const tw_kernels *kernels;
    bool shared_b, shared_h;       // whether batch rows, or kv heads, add to the same array
    int64_t first_head, last_head; // of the wave; head = b * kv_heads + kv_head
    int64_t tiles, segments, keys;
    size_t record_bytes, scratch_bytes;
    uint64_t *done;
    int64_t *order; // of the wave's segments: number * heads + head
    char *records, *scratch;

    char *record(int64_t head, int64_t tile) const {
        return records + size_t((head - first_head) * tiles + tile) * record_bytes;
    }
    // How many heads of those that add to the same array come before this one.
    int64_t rank(int64_t head) const {
        const int64_t kv_heads = problem->kv_heads;
        if (shared_b) return shared_h ? head : head / kv_heads;
        return shared_h ? head % kv_heads : 0;
    }
    uint64_t *done_of(int64_t head) const { return done + (head - first_head) * tiles; }
    // The same of the head of this wave that adds to the same array before `head`, or NULL.
    const uint64_t *done_before(int64_t head) const {
        const int64_t before = head - (shared_h ? 1 : problem->kv_heads);
        return rank(head) == 0 || before < first_head ? nullptr : done_of(before);
    }
};

void rest(int tries) {
    if (tries > 100) std::this_thread::yield();
}

void open_tile(void *context, int64_t index, int worker) {
    const Call &c = *static_cast<const Call *>(context);
    const int64_t head = c.first_head + index / c.tiles, tile = index % c.tiles;
    const int64_t b = head / c.problem->kv_heads, kv_head = head % c.problem->kv_heads;
    c.kernels->open_tile(c.problem, c.gradients, b, kv_head, tile, c.record(head, tile), c.keys,
                         c.scratch + size_t(worker) * c.scratch_bytes);
}

void run_segment(void *context, int64_t index, int worker) {
    const Call &c = *static_cast<const Call *>(context);
    const int64_t heads = c.last_head - c.first_head, item = c.order[index], head = c.first_head + item % heads;
    const int64_t number = item / heads, begin = number * c.keys, kv_heads = c.problem->kv_heads;
    const tw_segment segment = {head / kv_heads,
                                head % kv_heads,
                                begin,
                                std::min(c.problem->k_len, begin + c.keys),
                                c.record(head, 0),
                                c.done_of(head),
                                c.done_before(head),
                                number,
                                c.tiles,
                                rest};
    c.kernels->run_segment(c.problem, c.gradients, &segment, c.scratch + size_t(worker) * c.scratch_bytes);
}

void close_tile(void *context, int64_t index, int) {
    const Call &c = *static_cast<const Call *>(context);
    const int64_t head = c.first_head + index / c.tiles;
    c.kernels->close_tile(c.problem, c.gradients, head / c.problem->kv_heads, c.record(head, index % c.tiles));
}

void close_sinks(void *context, int64_t kv_head, int) {
    const Call &c = *static_cast<const Call *>(context);
    for (int64_t head = c.first_head; head < c.last_head; ++head)
        for (int64_t tile = 0; tile < c.tiles && head % c.problem->kv_heads == kv_head; ++tile)
            c.kernels->close_sinks(c.problem, c.gradients, c.record(head, tile));
}

size_t whole_lines(int64_t numbers) { return (size_t(numbers) * sizeof(int64_t) + 63) / 64 * 64; }

// A wave of one head, on one thread.
void run_head(void *context, int64_t head, int worker) {
    Call c = *static_cast<const Call *>(context);
    c.first_head = head;
    c.last_head = head + 1;
    c.done += size_t(worker) * whole_lines(c.tiles) / sizeof(uint64_t);
    c.records += size_t(worker) * size_t(c.tiles) * c.record_bytes;
    memset(c.done, 0, size_t(c.tiles) * sizeof(uint64_t));
    for (int64_t t = 0; t < c.tiles; ++t) open_tile(&c, t, worker);
    for (int64_t n = 0; n < c.segments && c.problem->k_len; ++n) run_segment(&c, n, worker);
    for (int64_t t = 0; t < c.tiles && c.gradients->d_q.data; ++t) close_tile(&c, t, worker);
}

// Gradients of keys and values that no query sees.
void write_zeros(const tw_problem &p, const tw_tensor &x, int64_t width) {
    const int64_t element = p.part ? accumulator_bytes(p) : bytes_of(p.dtype);
    for (int64_t row = 0; x.data && row < p.batch * p.kv_heads * p.k_len; ++row) {
        const int64_t head = row / p.k_len, b = head / p.kv_heads, h = head % p.kv_heads, key = row % p.k_len;
        memset(static_cast<char *>(x.data) + (b * x.stride_b + h * x.stride_h + key * x.stride_s) * element, 0,
               size_t(width * element));
    }
}

int run_backward(const tw_problem &p, const tw_gradients &g, const char **message) {
    int status;
    const tw_kernels *kernels = kernels_for(p, &status, message);
    if (!kernels) return status;
    const int64_t heads = p.batch * p.kv_heads, per_head = p.row_end - p.row_begin;
    if (!heads || !p.q_heads || !per_head) {
        if (!g.adds) write_zeros(p, g.d_k, p.head_dim), write_zeros(p, g.d_v, p.value_dim);
        return TW_OK;
    }

    Call c = {};
    c.problem = &p;
    c.gradients = &g;
    c.kernels = kernels;
    for (int t = 0; t < g.gather_count; ++t) {
        c.shared_b |= p.batch > 1 && g.gather[t].stride_b == 0;
        c.shared_h |= p.kv_heads > 1 && g.gather[t].stride_h == 0;
    }
    const int64_t rows = p.q_heads / p.kv_heads * per_head;
    c.tiles = (rows + kernels->tile_rows - 1) / kernels->tile_rows;
    c.record_bytes = kernels->record_bytes(&p);
    const size_t head_bytes = size_t(c.tiles) * c.record_bytes;

    int threads = p.threads > 0 ? p.threads : default_threads();
    const double operations = 5.0 * double(heads) * double(rows) * double(p.k_len) * double(p.head_dim + p.value_dim);
    threads = threads_worth(threads, work_of(p, operations));

    // Heads one by one, where it does not matter that a thread may have one more than another.
    const bool even = threads == 1 || heads >= (heads % threads ? 8 : 4) * int64_t(threads);
    const bool alone = even && head_bytes <= short_head_bytes && !c.shared_b && !c.shared_h && !g.sinks;
    const int64_t wave = alone ? threads : std::clamp<int64_t>(int64_t(wave_bytes / head_bytes), 1, heads);

    // Short segments where heads alone do not fill the threads.
    const auto segments_of = [&p](int64_t keys) { return std::max<int64_t>(1, (p.k_len + keys - 1) / keys); };
    c.keys = segment_keys;
    while (!alone && c.keys > shortest_segment && wave * segments_of(c.keys) < 4 * int64_t(threads)) c.keys /= 2;
    const int64_t fewest = (p.k_len + most_segments - 1) / most_segments;
    c.keys = std::max(c.keys, (fewest + TW_BIT_TILE - 1) / TW_BIT_TILE * TW_BIT_TILE);
    c.segments = segments_of(c.keys);
    c.scratch_bytes = (kernels->segment_bytes(&p, std::min(c.keys, p.k_len)) + 127) / 128 * 128;

    const size_t done_bytes = size_t(wave) * whole_lines(c.tiles), order_bytes = whole_lines(wave * c.segments);
    Scratch memory(done_bytes + order_bytes + size_t(wave) * head_bytes + c.scratch_bytes * size_t(threads));
    if (!memory.memory()) {
        *message = "workspace: out of memory";
        return TW_OUT_OF_MEMORY;
    }
    c.done = static_cast<uint64_t *>(memory.memory());
    c.order = reinterpret_cast<int64_t *>(static_cast<char *>(memory.memory()) + done_bytes);
    c.records = static_cast<char *>(memory.memory()) + done_bytes + order_bytes;
    c.scratch = c.records + size_t(wave) * head_bytes;

    if (alone) {
        std::iota(c.order, c.order + c.segments, int64_t(0));
        parallel_for(heads, threads, run_head, &c);
        return TW_OK;
    }
    for (c.first_head = 0; c.first_head < heads; c.first_head = c.last_head) {
        c.last_head = std::min(heads, c.first_head + wave);
        const int64_t wave_heads = c.last_head - c.first_head, tiles = wave_heads * c.tiles;
        memset(c.done, 0, size_t(tiles) * sizeof(uint64_t));
        parallel_for(tiles, threads, open_tile, &c);
        int64_t *const end = c.order + c.segments * wave_heads;
        std::iota(c.order, end, int64_t(0));
        if (c.shared_b || c.shared_h)
            std::sort(c.order, end, [&](int64_t a, int64_t b) {
                const auto turn = [&](int64_t item) {
                    return item / wave_heads + c.rank(c.first_head + item % wave_heads);
                };
                return std::make_pair(turn(a), a) < std::make_pair(turn(b), b);
            });
        if (p.k_len) parallel_for(end - c.order, threads, run_segment, &c);
        if (g.d_q.data) parallel_for(tiles, threads, close_tile, &c);
        if (g.sinks) parallel_for(p.kv_heads, threads, close_sinks, &c);
    }
    return TW_OK;
}

// Sequences one by one with all threads where they are long or add to the same sums; the others, each on one thread.
struct Sequences {
    const tw_problem *problem;
    const tw_gradients *gradients;
    const int64_t *numbers; // those that run on a thread each, the longest first
    std::atomic<int> *status;
    std::atomic<const char *> *message;
};

int run_sequence(const tw_problem &p, const tw_gradients &g, int64_t n, int threads, const char **message) {
    tw_problem own;
    problem_of(p, n, own);
    own.threads = threads;
    return run_backward(own, gradients_of(p, g, n), message);
}

void run_alone(void *context, int64_t index, int) {
    const Sequences &s = *static_cast<const Sequences *>(context);
    const char *message = "";
    const int status = run_sequence(*s.problem, *s.gradients, s.numbers[index], 1, &message);
    if (status == TW_OK) return;
    s.message->store(message);
    s.status->store(status);
}

int run_sequences(const tw_problem &p, const tw_gradients &g, const char **message) {
    const int threads = p.threads > 0 ? p.threads : default_threads();
    const bool shared = g.sinks || g.gather_count;
    const auto pairs = [&p](int64_t n) { return double(p.sequences.q_len[n]) * double(p.sequences.k_len[n]); };
    double all = 0;
    for (int64_t n = 0; n < p.batch; ++n) all += pairs(n);
    std::vector<int64_t> small;
    for (int64_t n = 0; n < p.batch; ++n) {
        if (!shared && threads > 1 && pairs(n) * 4 * threads < all) {
            small.push_back(n);
            continue;
        }
        const int status = run_sequence(p, g, n, threads, message);
        if (status != TW_OK) return status;
    }
    std::stable_sort(small.begin(), small.end(), [&](int64_t a, int64_t b) { return pairs(a) > pairs(b); });
    std::atomic<int> status(TW_OK);
    std::atomic<const char *> found(*message);
    Sequences context{&p, &g, small.data(), &status, &found};
    parallel_for(int64_t(small.size()), threads, run_alone, &context);
    *message = found;
    return status;
}

} // namespace
} // namespace tilewise

int tw_backward(const tw_problem *problem, const tw_gradients *gradients, const char **message) {
    *message = "";
    try {
        if (problem->pages.table) {
            *message = "pages: have no backward pass";
            return TW_UNSUPPORTED;
        }
        if (problem->sequences.q_len) return tilewise::run_sequences(*problem, *gradients, message);
        return tilewise::run_backward(*problem, *gradients, message);
    } catch (...) { // only allocation can fail here
        *message = "workspace: out of memory";
        return TW_OUT_OF_MEMORY;
    }
}
