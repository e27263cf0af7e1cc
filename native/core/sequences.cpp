#include "core/sequences.h"

#include "core/problem_check.h"

namespace tilewise {
namespace {

int64_t begin_of(const int64_t *begins, int64_t n) { return begins ? begins[n] : 0; }

template <class T> void advance(T *&data, int64_t bytes) {
    if (data) data = reinterpret_cast<T *>(reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes));
}

// To row `begin` of batch row n.
void advance(tw_tensor &x, int64_t n, int64_t begin, int64_t element_bytes) {
    advance(x.data, (n * x.stride_b + begin * x.stride_s) * element_bytes);
}

} // namespace

const tw_problem &problem_of(const tw_problem &p, int64_t n, tw_problem &own) {
    const tw_sequences &s = p.sequences;
    if (!s.q_len) return p;
    own = p;
    own.sequences = {};
    own.batch = 1;
    own.q_len = own.row_end = s.q_len[n];
    own.row_begin = 0;
    own.k_len = s.k_len[n];
    const int64_t q_begin = begin_of(s.q_begin, n), k_begin = begin_of(s.k_begin, n), element = bytes_of(p.dtype);
    const int64_t accumulator = accumulator_bytes(p);
    advance(own.q, n, q_begin, element);
    advance(own.out, n, q_begin, p.part ? accumulator : element);
    advance(own.lse, (n * p.lse_stride_b + q_begin) * accumulator);
    if (p.pages.table) {
        own.pages.table += n * p.pages.stride_b;
    } else {
        advance(own.k, n, k_begin, element);
        advance(own.v, n, k_begin, element);
    }
    const int64_t range = (n * p.ranges.stride_b + q_begin * p.ranges.count) * (p.ranges.wide ? 8 : 4);
    advance(own.ranges.starts, range);
    advance(own.ranges.stops, range);
    if (own.labels.q) {
        own.labels.q += n * p.labels.q_stride_b;
        own.labels.k += n * p.labels.k_stride_b;
    }
    advance(own.mask.data, n * p.mask.stride_b);
    for (int t = 0; t < p.bias_count; ++t)
        advance(own.bias[t].data, n * p.bias[t].stride_b * bytes_of(p.bias[t].dtype));
    advance(own.table.data, (n * p.table.stride_b + begin_of(s.table_begin, n)) * accumulator);
    own.dropout.stream += uint64_t(n) << 32;
    return own;
}

tw_gradients gradients_of(const tw_problem &p, const tw_gradients &g, int64_t n) {
    const tw_sequences &s = p.sequences;
    const int64_t q_begin = begin_of(s.q_begin, n), k_begin = begin_of(s.k_begin, n), element = bytes_of(p.dtype);
    const int64_t accumulator = accumulator_bytes(p);
    tw_gradients own = g;
    advance(own.d_out, n, q_begin, element);
    advance(own.d_lse, (n * p.lse_stride_b + q_begin) * accumulator);
    advance(own.d_q, n, q_begin, p.part ? accumulator : element);
    advance(own.d_k, n, k_begin, p.part || g.adds ? accumulator : element);
    advance(own.d_v, n, k_begin, p.part || g.adds ? accumulator : element);
    return own;
}

} // namespace tilewise
