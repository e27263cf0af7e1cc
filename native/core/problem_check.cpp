#include "core/problem_check.h"

#include "core/dispatch.h"

namespace tilewise {
namespace {

const char *fault(const tw_problem &p) {
    if (p.dtype < 0 || p.dtype >= TW_DTYPES) return "dtype: unknown code";
    if (p.batch < 0 || p.q_heads < 0 || p.kv_heads < 0 || p.q_len < 0 || p.k_len < 0) return "q, k: negative size";
    if (p.head_dim < 1) return "q: head size must be at least 1";
    if (p.value_dim < 1) return "v: head size must be at least 1";
    if (p.q_heads && (!p.kv_heads || p.q_heads % p.kv_heads)) return "k: its heads must divide q's heads";
    if (p.row_begin < 0 || p.row_end > p.q_len || p.row_begin > p.row_end)
        return "row_begin, row_end: outside the rows";
    if (p.ranges.count < 0 || p.ranges.count > TW_MAX_RANGES) return "ranges: at most 4 per row";
    if (p.bias_count < 0 || p.bias_count > TW_MAX_BIASES) return "bias: at most 4 dense biases";
    for (int t = 0; t < p.bias_count; ++t)
        if (p.bias[t].dtype < 0 || p.bias[t].dtype >= TW_DTYPES) return "bias: unknown dtype code";
    if (p.bits.index && (p.bits.q_offset % TW_BIT_TILE || p.bits.q_offset > p.row_begin))
        return "bits: q_offset must be a multiple of 64 at or before row_begin";
    if (p.pages.table && p.pages.size < 1) return "pages: a page must hold at least 1 row";
    if (p.sequences.q_len && p.bits.index) return "bits: unknown to sequences";
    return nullptr;
}

} // namespace

const tw_kernels *kernels_for(const tw_problem &p, int *status, const char **message) {
    *status = TW_INVALID;
    if ((*message = fault(p))) return nullptr;
    *status = TW_UNSUPPORTED;
    const tw_kernel_table *table = page_for(p.dtype, message);
    return table ? &table->kernels[p.dtype] : nullptr;
}

} // namespace tilewise
