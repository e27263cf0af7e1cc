// What the operands and attributes of a call from XLA say, as a problem of the core. Shapes are checked against each other;
// what is wrong goes to the reader as its complaint.
#pragma once

#include "bind/xla_reader.h"
#include "core/problem.h"

namespace tw_xla {

// Bits of `present`; of `wanted` and `moving` too are TABLE and SINKS, beside those of the next line.
enum { RANGES = 1, LABELS = 2, MASK = 4, BITS = 8, TABLE = 16, SINKS = 32, DROPOUT = 64 };
enum { D_Q = 1, D_K = 2, D_V = 4, FIRST_BIAS = 256 };

int xla_of(int32_t dtype);
int accumulator_of(const tw_problem &p);

// Whether an axis is full or broadcast.
inline bool fits(int64_t got, int64_t full) { return got == full || got == 1; }

// Strides over (b, h) of a row-major buffer with the given elements per (b, h); 0 where an axis is broadcast.
struct Outer {
    int64_t b, h;
};
Outer outer_of(const Buffer &buffer, int64_t each);

// Everything but out and lse; returns the layout.
int64_t read_problem(Reader &r, tw_problem &p);

void read_bias(Reader &r, const tw_problem &p, tw_bias &to);
tw_table read_table(Reader &r, const tw_problem &p, int accumulator);
const void *read_sinks(Reader &r, const tw_problem &p, int accumulator);

// A (B, heads, length, width) array of the given type.
tw_tensor read_tensor(Reader &r, const Buffer *buffer, int64_t layout, int dtype, const tw_problem &p, int64_t heads,
                      int64_t length, int64_t width, const char *otherwise);

// A (B, Hq, Sq) array of the accumulator's type.
void *read_rows(Reader &r, const Buffer *buffer, const tw_problem &p, const char *otherwise);

} // namespace tw_xla
