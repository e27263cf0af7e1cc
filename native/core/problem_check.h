// What both passes ask before they start.
#pragma once

#include "core/kernel_table.h"

namespace tilewise {

inline int64_t bytes_of(int32_t dtype) { return dtype == TW_FLOAT64 ? 8 : dtype == TW_FLOAT32 ? 4 : 2; }
inline int64_t accumulator_bytes(const tw_problem &p) { return p.dtype == TW_FLOAT64 ? 8 : 4; }

// How long a call of so many operations takes, counted in operations: to read a byte of keys and values takes as long as 5.
inline double work_of(const tw_problem &p, double operations) {
    const double numbers = double(p.batch * p.kv_heads) * double(p.k_len) * double(p.head_dim + p.value_dim);
    return operations + 5 * numbers * double(bytes_of(p.dtype));
}

// The kernels of the page in use for a sound problem; NULL, with *status and *message set, otherwise.
const tw_kernels *kernels_for(const tw_problem &p, int *status, const char **message);

} // namespace tilewise
