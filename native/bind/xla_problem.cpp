#include "bind/xla_problem.h"

namespace tw_xla {
namespace {

int dtype_of(int xla) {
    return xla == F32 ? TW_FLOAT32 : xla == F64 ? TW_FLOAT64 : xla == F16 ? TW_FLOAT16 : xla == BF16 ? TW_BFLOAT16 : -1;
}

tw_tensor tensor_of(const Buffer &buffer, int64_t layout) {
    const int64_t *n = buffer.dims;
    return layout ? tw_tensor{buffer.data, n[1] * n[2] * n[3], n[3], n[2] * n[3]}
                  : tw_tensor{buffer.data, n[1] * n[2] * n[3], n[2] * n[3], n[3]};
}

void read_mask(Reader &r, int64_t present, tw_problem &p) {
    if (present & RANGES) {
        const Buffer *starts = r.operand(4, "starts: expected (b, h, Sq, R)"),
                     *stops = r.operand(4, "stops: expected (b, h, Sq, R)");
        if (!r.want(starts && stops && (starts->dtype == S32 || starts->dtype == S64) &&
                        stops->dtype == starts->dtype && !memcmp(starts->dims, stops->dims, 4 * sizeof(int64_t)) &&
                        fits(starts->dims[0], p.batch) && fits(starts->dims[1], p.q_heads) &&
                        starts->dims[2] == p.q_len && starts->dims[3] >= 1,
                    "starts, stops: expected two s32 or s64 arrays (b, h, Sq, R)"))
            return;
        const Outer outer = outer_of(*starts, p.q_len * starts->dims[3]);
        p.ranges = {starts->data, stops->data, starts->dtype == S64, int32_t(starts->dims[3]), outer.b, outer.h};
    }
    if (present & LABELS) {
        const Buffer *q = r.operand(3, "q_labels: expected (b, h, Sq)"),
                     *k = r.operand(3, "k_labels: expected (b, h, Sk)");
        if (!r.want(q && k && q->dtype == S32 && k->dtype == S32 && q->dims[2] == p.q_len && k->dims[2] == p.k_len &&
                        fits(q->dims[0], p.batch) && fits(k->dims[0], p.batch) && fits(q->dims[1], p.q_heads) &&
                        fits(k->dims[1], p.q_heads),
                    "q_labels, k_labels: expected s32 arrays (b, h, Sq) and (b, h, Sk)"))
            return;
        const Outer of_q = outer_of(*q, p.q_len), of_k = outer_of(*k, p.k_len);
        p.labels = {static_cast<int32_t *>(q->data), static_cast<int32_t *>(k->data), of_q.b, of_q.h, of_k.b, of_k.h};
    }
    if (present & MASK) {
        const Buffer *mask = r.operand(4, "mask: expected (b, h, i, j)");
        if (!r.want(mask && mask->dtype == PRED && fits(mask->dims[0], p.batch) && fits(mask->dims[1], p.q_heads) &&
                        fits(mask->dims[2], p.q_len) && fits(mask->dims[3], p.k_len),
                    "mask: expected booleans (b, h, i, j)"))
            return;
        const int64_t *n = mask->dims;
        const Outer outer = outer_of(*mask, n[2] * n[3]);
        p.mask = {static_cast<uint8_t *>(mask->data), outer.b, outer.h, n[2] > 1 ? n[3] : 0, n[3] > 1 ? 1 : 0};
    }
    if (present & BITS) {
        const Buffer *index = r.operand(4, "index: expected (b, h, nq, nk)"), *words = r.operand(-1, "words: missing");
        if (!r.want(index && words && index->dtype == S32 && fits(index->dims[0], p.batch) &&
                        fits(index->dims[1], p.q_heads) && index->dims[3] == (p.k_len + TW_BIT_TILE - 1) / TW_BIT_TILE,
                    "index: expected s32 (b, h, nq, nk)") ||
            !r.want((words->dtype == U64 && words->rank == 2) ||
                        (words->dtype == U32 && words->rank == 3 && words->dims[2] == 2),
                    "words: expected u64 (n, 64) or u32 (n, 64, 2)") ||
            !r.want(words->dims[1] == TW_BIT_TILE, "words: expected 64 per tile"))
            return;
        const Outer outer = outer_of(*index, index->dims[2] * index->dims[3]);
        p.bits = {static_cast<int32_t *>(index->data),
                  static_cast<uint64_t *>(words->data),
                  outer.b,
                  outer.h,
                  index->dims[2],
                  index->dims[3],
                  r.integer("bits_q_offset")};
    }
}

void read_additions(Reader &r, int64_t present, int accumulator, tw_problem &p) {
    const int64_t biases = r.integer("bias_count");
    if (!r.want(biases >= 0 && biases <= TW_MAX_BIASES, "bias: at most 4 dense biases")) return;
    while (p.bias_count < biases) read_bias(r, p, p.bias[p.bias_count++]);
    if (present & TABLE) p.table = read_table(r, p, accumulator);
    if (present & SINKS) p.sinks = read_sinks(r, p, accumulator);
    if (present & DROPOUT) {
        const Buffer *seed = r.operand(1, "seed: expected (4,)");
        if (!r.want(seed && seed->dtype == U32 && seed->dims[0] == 4, "seed: expected u32 (4,)")) return;
        const uint32_t *words = static_cast<const uint32_t *>(seed->data);
        p.dropout = {1,
                     uint64_t(r.integer("dropout_threshold")),
                     uint64_t(words[1]) << 32 | words[0],
                     uint64_t(r.integer("dropout_stream")),
                     r.number("dropout_inverse_keep"),
                     uint64_t(words[3]) << 32 | words[2],
                     uint64_t(r.integer("dropout_stride_b")),
                     uint64_t(r.integer("dropout_stride_h")),
                     uint64_t(r.integer("dropout_stride_i")),
                     uint64_t(r.integer("dropout_stride_j"))};
    }
}

} // namespace

int xla_of(int32_t dtype) {
    return dtype == TW_FLOAT32 ? F32 : dtype == TW_FLOAT64 ? F64 : dtype == TW_FLOAT16 ? F16 : BF16;
}

int accumulator_of(const tw_problem &p) { return p.dtype == TW_FLOAT64 ? F64 : F32; }

Outer outer_of(const Buffer &buffer, int64_t each) {
    return {buffer.dims[0] > 1 ? buffer.dims[1] * each : 0, buffer.dims[1] > 1 ? each : 0};
}

void read_bias(Reader &r, const tw_problem &p, tw_bias &to) {
    const Buffer *bias = r.operand(4, "bias: expected (b, h, i, j)");
    if (!r.want(bias && dtype_of(bias->dtype) >= 0 && fits(bias->dims[0], p.batch) && fits(bias->dims[1], p.q_heads) &&
                    fits(bias->dims[2], p.q_len) && fits(bias->dims[3], p.k_len),
                "bias: expected floats (b, h, i, j)"))
        return;
    const int64_t *n = bias->dims;
    const Outer outer = outer_of(*bias, n[2] * n[3]);
    to = {bias->data, dtype_of(bias->dtype), outer.b, outer.h, n[2] > 1 ? n[3] : 0, n[3] > 1 ? 1 : 0};
}

tw_table read_table(Reader &r, const tw_problem &p, int accumulator) {
    const Buffer *table = r.operand(3, "table: expected (b, h, Sq + Sk - 1)");
    if (!r.want(table && table->dtype == accumulator && fits(table->dims[0], p.batch) &&
                    fits(table->dims[1], p.q_heads) && table->dims[2] == p.q_len + p.k_len - 1,
                "table: expected the accumulator's type, (b, h, Sq + Sk - 1)"))
        return {};
    const Outer outer = outer_of(*table, table->dims[2]);
    return {table->data, outer.b, outer.h};
}

const void *read_sinks(Reader &r, const tw_problem &p, int accumulator) {
    const Buffer *sinks = r.operand(1, "sinks: expected (Hq,)");
    const bool fit = sinks && sinks->dtype == accumulator && sinks->dims[0] == p.q_heads;
    return r.want(fit, "sinks: expected the accumulator's type, (Hq,)") ? sinks->data : nullptr;
}

int64_t read_problem(Reader &r, tw_problem &p) {
    const Buffer *q = r.operand(4, "q: expected 4 axes"), *k = r.operand(4, "k: expected 4 axes"),
                 *v = r.operand(4, "v: expected 4 axes");
    if (r.complaint) return 0;
    const int64_t layout = r.integer("layout"), present = r.integer("present");
    const int heads = layout ? 2 : 1, positions = layout ? 1 : 2;
    p.dtype = dtype_of(q->dtype);
    p.batch = q->dims[0];
    p.q_heads = q->dims[heads];
    p.q_len = p.row_end = q->dims[positions];
    p.lse_stride_h = p.q_len;
    p.lse_stride_b = p.q_heads * p.q_len;
    p.head_dim = q->dims[3];
    p.kv_heads = k->dims[heads];
    p.k_len = k->dims[positions];
    p.value_dim = v->dims[3];
    if (!r.want(p.dtype >= 0, "q: expected floats") ||
        !r.want(k->dtype == q->dtype && v->dtype == q->dtype, "k, v: expected q's dtype") ||
        !r.want(k->dims[0] == p.batch && k->dims[3] == p.head_dim, "k: its batch or head size is not q's") ||
        !r.want(v->dims[0] == p.batch && v->dims[heads] == p.kv_heads && v->dims[positions] == p.k_len,
                "v: its shape does not fit k's"))
        return layout;
    p.q = tensor_of(*q, layout);
    p.k = tensor_of(*k, layout);
    p.v = tensor_of(*v, layout);
    p.scale = r.number("scale");
    p.softcap = r.number("softcap");
    p.threads = int32_t(r.integer("threads"));
    p.part = int32_t(r.integer("part"));
    p.row_invariant = r.integer("row_invariant") != 0;
    read_mask(r, present, p);
    if (!r.complaint) read_additions(r, present, accumulator_of(p), p);
    return layout;
}

tw_tensor read_tensor(Reader &r, const Buffer *buffer, int64_t layout, int dtype, const tw_problem &p, int64_t heads,
                      int64_t length, int64_t width, const char *otherwise) {
    if (!r.want(buffer && buffer->dtype == dtype && buffer->dims[0] == p.batch &&
                    buffer->dims[layout ? 2 : 1] == heads && buffer->dims[layout ? 1 : 2] == length &&
                    buffer->dims[3] == width,
                otherwise))
        return {};
    return tensor_of(*buffer, layout);
}

void *read_rows(Reader &r, const Buffer *buffer, const tw_problem &p, const char *otherwise) {
    const bool fit = buffer && buffer->dtype == accumulator_of(p) && buffer->dims[0] == p.batch &&
                     buffer->dims[1] == p.q_heads && buffer->dims[2] == p.q_len;
    return r.want(fit, otherwise) ? buffer->data : nullptr;
}

} // namespace tw_xla
