// What a kernel page offers: one table of plain functions per instruction set.
#pragma once

#include "core/problem.h"

extern "C" {

// split_keys: keys of a split, whose states are joined in key order; a multiple of the kernels' chunk.
// split_rows_at_most: where a kv head has more rows, these fill the threads without splits.
enum { most_tiles_of_item = 32, split_keys = 1024, split_rows_at_most = 64 };

// A piece of work: query rows [row_begin, row_end) of one (batch, kv head), against keys [key_begin, key_end).
// Rows count through the kv head's whole group of query heads: row = g * (problem rows) + (i - problem.row_begin).
struct tw_item {
    int64_t b, kv_head, row_begin, row_end, key_begin, key_end;
    double cost; // estimated pairs, for the order of work
    // Where not NULL, the unnormalised state goes here instead of to out and lse: for each row, accumulator's type,
    // value_dim sums, then the reference exponent (log2), the denominator, and whether any key was seen (0 or 1).
    void *partial;
    // For the caller alone: which of its problems this belongs to, and how many splits of the keys there are.
    int64_t number, splits;
    const tw_item *next; // what the same thread will most likely run next, or NULL
};

// A segment of the keys of one (batch, kv head), for the backward pass: all its tiles in order, against these keys.
struct tw_segment {
    int64_t b, kv_head, key_begin, key_end;
    char *records;           // of the head's tiles, record_bytes each
    uint64_t *done;          // for each tile, a bit per segment of the head that has added to what the tile gathers
    const uint64_t *before;  // the same of the head before, where that adds to the same array of a bias, or NULL
    int64_t number, tiles;   // of this segment; of the head
    void (*rest)(int tries); // called while waiting for a segment that comes before this one
};

// Whether the call that this thread works for was given up: then a kernel leaves off, and what it wrote is of no use.
// Kernels that may run for a tenth of a second ask it now and then; most often it costs reading a clock.
int tw_given_up(void);

// From how many places at once this processor reads memory fastest, its own prefetchers helping: 1 or 4.
int tw_read_streams(void);

// The kernels of one element type; none, where a page leaves it to the next one.
struct tw_kernels {
    int64_t tile_rows;                         // query rows of one tile
    int64_t (*chunk_keys)(const tw_problem *); // keys that all tiles of an item use before the next
    int64_t (*parts)(const tw_problem *);      // in which an operand's number is multiplied, forward
    size_t (*scratch_bytes)(const tw_problem *, int64_t tiles);
    // Runs an item of at most `tiles` tiles in `scratch` (64-byte aligned, as large as scratch_bytes says).
    void (*forward)(const tw_problem *, const tw_item *, int64_t tiles, void *scratch);
    // Merges `splits` partial states of `rows` rows, in key order, and writes out and lse. Item: the rows meant.
    void (*merge)(const tw_problem *, const tw_item *, void *partials, int64_t splits);
    // The backward pass: a record is opened for each tile, in the scratch of a segment of `keys` keys, segments run, and
    // each record is closed: its d_q is written.
    size_t (*record_bytes)(const tw_problem *);
    size_t (*segment_bytes)(const tw_problem *, int64_t keys);
    void (*open_tile)(const tw_problem *, const tw_gradients *, int64_t b, int64_t kv_head, int64_t tile, void *record,
                      int64_t keys, void *scratch);
    void (*run_segment)(const tw_problem *, const tw_gradients *, const tw_segment *, void *scratch);
    void (*close_tile)(const tw_problem *, const tw_gradients *, int64_t b, void *record);
    void (*close_sinks)(const tw_problem *, const tw_gradients *, void *record);
    // Tangents of an item's rows, as `forward`: at most `tiles` tiles, in scratch as large as tangent_bytes says.
    size_t (*tangent_bytes)(const tw_problem *, int64_t tiles);
    void (*tangent)(const tw_problem *, const tw_tangents *, const tw_item *, int64_t tiles, void *scratch);
};

struct tw_kernel_table {
    const char *name;
    tw_kernels kernels[TW_DTYPES];
    // For each type: keeps the units that its products run on busy for `steps` rounds on twelve numbers; returns the
    // operations done.
    double (*peak_probes[TW_DTYPES])(int64_t steps, float *twelve);
    // Reads `count` numbers as fast as plain loads do, and returns something of them.
    float (*read_probe)(const float *numbers, int64_t count);
    // The first Philox word of `count` counters (index[l], stream): the dropout of the kernels, for tests.
    void (*philox)(uint64_t seed, uint64_t stream, const uint64_t *index, int count, uint32_t *words);
};

extern const tw_kernel_table tw_page_scalar, tw_page_avx2, tw_page_avx512, tw_page_avx512_bf16, tw_page_amx_bf16;
extern const tw_kernel_table tw_page_neon, tw_page_neon_bf16;
}
