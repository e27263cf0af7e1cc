// One attention call as plain data: what every kernel page reads, and nothing of Python.
//
// Shapes: q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), out (B, Hq, Sq, Dv), lse (B, Hq, Sq).
// Strides are in elements; the last axis of q, k, v and out has stride 1, as has that of lse.
// "Accumulator" is float, or double where the elements are double.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

enum tw_dtype { TW_FLOAT32 = 0, TW_FLOAT64 = 1, TW_FLOAT16 = 2, TW_BFLOAT16 = 3, TW_DTYPES = 4 };

enum tw_status { TW_OK = 0, TW_INVALID = 1, TW_UNSUPPORTED = 2, TW_OUT_OF_MEMORY = 3 };

enum { TW_MAX_RANGES = 4, TW_MAX_BIASES = 4, TW_BIT_TILE = 64, TW_TILE_EMPTY = -1, TW_TILE_FULL = -2 };

// An array over (b, h, position, last axis); the last axis is contiguous.
struct tw_tensor {
    void *data;
    int64_t stride_b, stride_h, stride_s;
};

// Row i of (b, h) sees the keys of `count` half-open intervals [start, stop): disjoint, in key order, empty ones last,
// inside [0, Sk]. Element r of row i stands at b * stride_b + h * stride_h + i * count + r. count = 0: no ranges.
struct tw_ranges {
    const void *starts, *stops; // int32, or int64 where `wide`
    int32_t wide, count;
    int64_t stride_b, stride_h;
};

// Query i sees key j iff q[b, h, i] == k[b, h, j]. q = NULL: no labels.
struct tw_labels {
    const int32_t *q, *k;
    int64_t q_stride_b, q_stride_h, k_stride_b, k_stride_h;
};

// The caller's own bool array (one byte each, nonzero = visible), read through strides that may be 0. NULL: none.
struct tw_dense_mask {
    const uint8_t *data;
    int64_t stride_b, stride_h, stride_i, stride_j;
};

// Tiles of 64 queries x 64 keys. index[b, h, tq, tk] (contiguous in tq, tk) is TW_TILE_EMPTY, TW_TILE_FULL or the number
// t of a stored tile; bit q of words[t * 64 + key] says whether query q of the tile sees that key.
// Tile row 0 begins at query q_offset, a multiple of 64. index = NULL: no bits.
struct tw_tile_bits {
    const int32_t *index;
    const uint64_t *words;
    int64_t stride_b, stride_h, tiles_q, tiles_k, q_offset;
};

// An array added to the scores, of any tw_dtype, read through strides that may be 0.
struct tw_bias {
    const void *data;
    int32_t dtype;
    int64_t stride_b, stride_h, stride_i, stride_j;
};

// A bias over the distance: table[b, h, j - i + Sq - 1], accumulator's type. NULL: none.
struct tw_table {
    const void *data;
    int64_t stride_b, stride_h;
};

// Philox4x32-10: pair (b, h, i, j) is kept iff word 0 >= threshold (2^32 drops everything). The pair's number is
// first + b * stride_b + h * stride_h + i * stride_i + j * stride_j modulo 2^64, so that a part of a larger call draws
// what the larger call draws. All strides 0: the call is the whole, numbered in the order (b, h, i, j).
struct tw_dropout {
    int32_t enabled;
    uint64_t threshold, seed, stream;
    double inverse_keep;
    uint64_t first, stride_b, stride_h, stride_i, stride_j;
};

// Keys and values in pages of `size` rows: key j of batch row b is row j % size of page table[b * stride_b + j / size], and
// stride_b of k and v is that of pages. Entries beyond a row's keys are not read. table = NULL: k and v are plain arrays.
struct tw_pages {
    const int32_t *table;
    int64_t stride_b, size;
};

// Batch rows of different lengths, in arrays that hold them one after another. Batch row n is the problem of q_len[n]
// queries and k_len[n] keys that begin q_begin[n] and k_begin[n] rows into theirs (so do out, lse, ranges and
// gradients), whose table begins at its element table_begin[n], and whose dropout has the stream n * 2^32 further on.
// Other facts stand at n times their stride_b, in the row's own coordinates. The problem's q_len and k_len are at least
// the longest, row_begin and row_end say nothing, and there are no tile bits. (batch,) each; q_len = NULL: none;
// k_begin, table_begin = NULL: zeros.
struct tw_sequences {
    const int64_t *q_begin, *q_len, *k_begin, *k_len, *table_begin;
};

// A pair is visible iff ranges, labels, dense mask and tile bits all say so and no bias is -inf there.
struct tw_problem {
    int32_t dtype, threads; // tw_dtype; threads <= 0: the default
    int32_t part;           // 1: a part of a larger call: out, its tangent and backward's d_q are accumulators
    int64_t batch, q_heads, kv_heads, q_len, k_len, head_dim, value_dim;
    int64_t row_begin, row_end; // only these query rows are computed and written; 0 and q_len: all
    tw_tensor q, k, v, out;
    void *lse; // (B, Hq, Sq) in the accumulator's type, with these strides over B and Hq
    int64_t lse_stride_b, lse_stride_h;
    double scale, softcap; // softcap 0: none
    tw_ranges ranges;
    tw_labels labels;
    tw_dense_mask mask;
    tw_tile_bits bits;
    tw_bias bias[TW_MAX_BIASES];
    int32_t bias_count;
    tw_table table;
    const void *sinks; // (Hq,) in the accumulator's type, or NULL
    tw_dropout dropout;
    tw_pages pages; // forward only
    tw_sequences sequences;
    // Whether a row of out and lse has the same bits however many rows are computed together: the forward pass then sums
    // in one order for any number of rows, slower where they are few. The other passes make the same scores of it.
    int32_t row_invariant;
};

// Computes out and lse. Returns a tw_status; on failure *message points to static text that begins with the argument.
int tw_forward(const tw_problem *problem, const char **message);

// An array that gathers the gradient of the scores: (b, h, i, j) goes to b * stride_b + h * stride_h + i * stride_i +
// j * stride_j, so that a stride of 0 sums over an axis, and stride_i = -1 along diagonals. stride_j is 0 or 1.
struct tw_gather {
    void *data; // accumulator's type, added to
    int64_t stride_b, stride_h, stride_i, stride_j;
};

// What the backward pass takes beside the problem, whose out and lse are then the results of the forward pass, and what
// it gives. data = NULL: not wanted. What is added to, calls over parts of the rows add up in.
struct tw_gradients {
    tw_tensor d_out;    // as out
    const void *d_lse;  // as lse, or NULL for zeros
    tw_tensor d_q;      // elements (accumulators where the problem is a part), written
    tw_tensor d_k, d_v; // the same for every key; with `adds` accumulators, added to
    int32_t adds;
    tw_gather gather[TW_MAX_BIASES + 1]; // gradients of dense biases and of the table
    int32_t gather_count;
    void *sinks; // (Hq,) in the accumulator's type, added to
};
int tw_backward(const tw_problem *problem, const tw_gradients *gradients, const char **message);

// What forward-mode differentiation takes beside the problem, whose out and lse are then the results of the forward pass,
// and what it gives. A tangent is laid out in its operand's type; data = NULL: the operand does not move.
struct tw_tangents {
    tw_tensor q, k, v;
    tw_bias bias[TW_MAX_BIASES]; // of the dense biases that move, in any order
    int32_t bias_count;
    tw_table table;
    const void *sinks;
    tw_tensor out; // as the problem's out, written
    void *lse;     // as the problem's lse, written
};
int tw_tangent(const tw_problem *problem, const tw_tangents *tangents, const char **message);

// How tw_forward would run a problem, of which it reads sizes, dtype, threads and row_invariant alone.
struct tw_description {
    int64_t tile_rows, chunk_keys, split_keys; // keys that are summed apart, then joined; 0: all are summed together
    int64_t workspace;                         // bytes
    int64_t parts; // bfloat16 numbers that an operand's number is multiplied as; 1: it is multiplied as it is
};
int tw_describe(const tw_problem *problem, tw_description *description, const char **message);
}
