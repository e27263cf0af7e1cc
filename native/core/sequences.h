// Batch rows of different lengths (tw_sequences): each is a problem of its own, cut and summed as if it came alone, so
// its rows have the bits that they have alone.
#pragma once

#include "core/problem.h"

namespace tilewise {

// How many problems a problem stands for: its batch rows, or itself alone.
inline int64_t problems_in(const tw_problem &p) { return p.sequences.q_len ? p.batch : 1; }

// Number n of them. What is no sequence is returned itself; else `own` is filled and returned.
const tw_problem &problem_of(const tw_problem &p, int64_t n, tw_problem &own);

// The gradients of sequence n, for a problem that has sequences.
tw_gradients gradients_of(const tw_problem &p, const tw_gradients &g, int64_t n);

} // namespace tilewise
