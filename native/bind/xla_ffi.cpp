// The XLA FFI handlers "tilewise_forward", "tilewise_backward" and "tilewise_tangent".
//
// Operands, in this order; those whose bit of `present` is 0 are left out. Primed sizes are 1 (broadcast) or full.
//   always  q, k, v           layout 0: (B,Hq,Sq,D) (B,Hkv,Sk,D) (B,Hkv,Sk,Dv); 1: (B,Sq,Hq,D) (B,Sk,Hkv,D) (B,Sk,Hkv,Dv)
//   1       starts, stops     (b',h',Sq,R), both s32 or both s64
//   2       q_labels, k_labels (b',h',Sq), (b',h',Sk) s32
//   4       mask              (b',h',i',j') pred
//   8       index, words      (b',h',nq,nk) s32; (n,64) u64 or (n,64,2) u32 as (low, high)
//   -       bias_count biases (b',h',i',j') f32, f64, f16 or bf16
//   16      table             (b',h',Sq+Sk-1), accumulator's type
//   32      sinks             (Hq,), accumulator's type
//   64      seed              (4,) u32: the seed as (low, high), the number of the first pair as (low, high)
// Attributes, all required: present, bias_count, layout, bits_q_offset, dropout_threshold, dropout_stream,
//   dropout_stride_{b,h,i,j}, threads, part (i64); scale, softcap, dropout_inverse_keep (f64).
// Forward has one more attribute, row_invariant (i64). Its results: out as q with Dv for D (the accumulator's type where
// `part` is 1, as d_q then); lse (B,Hq,Sq), accumulator's type.
// Backward takes what both take, then out, lse, d_out (as out) and d_lse (as lse), and one more attribute, wanted (i64). Its
// results are those whose bit of `wanted` is 1, in this order; all but the first in the accumulator's type:
//   1 d_q as q   2 d_k as k   4 d_v as v   16 d_table (B,Hq,Sq+Sk-1)   32 d_sinks (Hq,)
//   256 << n     gradient of bias n, (b',h',i',j'), summed over the axes of size 1
// Tangent takes what all take, then out (as forward's result), lse, the tangents of the operands whose bit of one more
// attribute, moving (i64), is 1, numbered as in `wanted` and typed as the operands: q, k, v, biases, table, sinks. Its
// results: d_out and d_lse, as out and lse.
#include "bind/xla_ffi.h"

#include <stdint.h>
#include <string.h>

#include "bind/xla_c_api.h"
#include "core/problem.h"

using namespace tw_xla;

namespace {

enum { RANGES = 1, LABELS = 2, MASK = 4, BITS = 8, TABLE = 16, SINKS = 32, DROPOUT = 64 };
enum { D_Q = 1, D_K = 2, D_V = 4, FIRST_BIAS = 256 }; // of `wanted` and `moving`, beside TABLE and SINKS

// Reads a frame field by field and keeps the first complaint.
class Reader {
  public:
    explicit Reader(const tw_xla_call_frame &frame) : frame_(frame) {}

    const char *complaint = nullptr;

    bool want(bool holds, const char *otherwise) {
        if (!holds && !complaint) complaint = otherwise;
        return !complaint;
    }

    const Buffer *operand(int64_t rank, const char *otherwise) {
        return take(frame_.arguments, operands_++, rank, otherwise);
    }
    const Buffer *result(int64_t rank, const char *otherwise) {
        return take(frame_.results, results_++, rank, otherwise);
    }
    bool all_read() const { return operands_ == frame_.arguments.size && results_ == frame_.results.size; }

    int64_t integer(const char *name) {
        const void *value = attribute(name, S64);
        int64_t number = 0;
        if (value) memcpy(&number, value, sizeof number);
        return number;
    }
    double number(const char *name) {
        const void *value = attribute(name, F64);
        double number = 0;
        if (value) memcpy(&number, value, sizeof number);
        return number;
    }

  private:
    const Buffer *take(const Buffers &list, int64_t at, int64_t rank, const char *otherwise) {
        if (!want(at < list.size && list.types[at] == ARGUMENT_BUFFER, otherwise)) return nullptr;
        const Buffer *buffer = list.items[at];
        return want(rank < 0 || buffer->rank == rank, otherwise) ? buffer : nullptr; // rank -1: any
    }
    const void *attribute(const char *name, int dtype) {
        const Attributes &all = frame_.attributes;
        for (int64_t at = 0; at < all.size; ++at)
            if (all.types[at] == ATTRIBUTE_SCALAR && all.names[at]->length == strlen(name) &&
                !memcmp(all.names[at]->text, name, all.names[at]->length)) {
                const Scalar *scalar = static_cast<const Scalar *>(all.items[at]);
                if (scalar->dtype == dtype) return scalar->value;
            }
        want(false, "attributes: one is missing or of the wrong type (see xla_ffi.cpp)");
        return nullptr;
    }

    const tw_xla_call_frame &frame_;
    int64_t operands_ = 0, results_ = 0;
};

int dtype_of(int xla) {
    return xla == F32 ? TW_FLOAT32 : xla == F64 ? TW_FLOAT64 : xla == F16 ? TW_FLOAT16 : xla == BF16 ? TW_BFLOAT16 : -1;
}

int xla_of(int32_t dtype) {
    return dtype == TW_FLOAT32 ? F32 : dtype == TW_FLOAT64 ? F64 : dtype == TW_FLOAT16 ? F16 : BF16;
}

bool fits(int64_t got, int64_t full) { return got == full || got == 1; }

// Strides over (b, h) of a row-major buffer with the given elements per (b, h); 0 where an axis is broadcast.
struct Outer {
    int64_t b, h;
};
Outer outer_of(const Buffer &buffer, int64_t each) {
    return {buffer.dims[0] > 1 ? buffer.dims[1] * each : 0, buffer.dims[1] > 1 ? each : 0};
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

int accumulator_of(const tw_problem &p) { return p.dtype == TW_FLOAT64 ? F64 : F32; }

// Everything but out and lse; returns the layout.
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
    read_mask(r, present, p);
    if (!r.complaint) read_additions(r, present, accumulator_of(p), p);
    return layout;
}

// A (B, heads, length, width) array of the given type.
tw_tensor read_tensor(Reader &r, const Buffer *buffer, int64_t layout, int dtype, const tw_problem &p, int64_t heads,
                      int64_t length, int64_t width, const char *otherwise) {
    if (!r.want(buffer && buffer->dtype == dtype && buffer->dims[0] == p.batch &&
                    buffer->dims[layout ? 2 : 1] == heads && buffer->dims[layout ? 1 : 2] == length &&
                    buffer->dims[3] == width,
                otherwise))
        return {};
    return tensor_of(*buffer, layout);
}

// A (B, Hq, Sq) array of the accumulator's type.
void *read_rows(Reader &r, const Buffer *buffer, const tw_problem &p, const char *otherwise) {
    const bool fit = buffer && buffer->dtype == accumulator_of(p) && buffer->dims[0] == p.batch &&
                     buffer->dims[1] == p.q_heads && buffer->dims[2] == p.q_len;
    return r.want(fit, otherwise) ? buffer->data : nullptr;
}

void read_forward(Reader &r, tw_problem &p) {
    const char *out = "out: expected q's dtype or, in a part, the accumulator's, (B, Hq, Sq, Dv)",
               *lse = "lse: expected the accumulator's type, (B, Hq, Sq)";
    const int64_t layout = read_problem(r, p);
    if (r.complaint) return;
    p.row_invariant = r.integer("row_invariant") != 0;
    const int dtype = p.part ? accumulator_of(p) : xla_of(p.dtype);
    p.out = read_tensor(r, r.result(4, out), layout, dtype, p, p.q_heads, p.q_len, p.value_dim, out);
    p.lse = read_rows(r, r.result(3, lse), p, lse);
    r.want(r.all_read(), "operands: more of them than `present` and `bias_count` announce");
}

// The core adds to its sums, and XLA's memory is whatever it was.
void clear(const Buffer *buffer, int accumulator) {
    int64_t count = accumulator == F64 ? 8 : 4;
    for (int64_t n = 0; n < buffer->rank; ++n) count *= buffer->dims[n];
    if (count > 0) memset(buffer->data, 0, size_t(count));
}

void read_sums(Reader &r, int64_t wanted, const tw_problem &p, tw_gradients &g) {
    const int accumulator = accumulator_of(p), bytes = accumulator == F64 ? 8 : 4;
    if (wanted & TABLE) {
        const char *otherwise = "d_table: expected the accumulator's type, (B, Hq, Sq + Sk - 1)";
        const Buffer *sum = r.result(3, otherwise);
        if (!r.want(sum && sum->dtype == accumulator && sum->dims[0] == p.batch && sum->dims[1] == p.q_heads &&
                        sum->dims[2] == p.q_len + p.k_len - 1,
                    otherwise))
            return;
        clear(sum, accumulator);
        const Outer outer = outer_of(*sum, sum->dims[2]);
        // Pair (i, j) stands at j - i + Sq - 1.
        g.gather[g.gather_count++] = {static_cast<char *>(sum->data) + (p.q_len - 1) * bytes, outer.b, outer.h, -1, 1};
    }
    if (wanted & SINKS) {
        const char *otherwise = "d_sinks: expected the accumulator's type, (Hq,)";
        const Buffer *sum = r.result(1, otherwise);
        if (!r.want(sum && sum->dtype == accumulator && sum->dims[0] == p.q_heads, otherwise)) return;
        clear(sum, accumulator);
        g.sinks = sum->data;
    }
    for (int t = 0; t < p.bias_count; ++t) {
        if (!(wanted & int64_t(FIRST_BIAS) << t)) continue;
        const char *otherwise = "d_bias: expected the accumulator's type, (b, h, i, j)";
        const Buffer *sum = r.result(4, otherwise);
        if (!r.want(sum && sum->dtype == accumulator && fits(sum->dims[0], p.batch) && fits(sum->dims[1], p.q_heads) &&
                        fits(sum->dims[2], p.q_len) && fits(sum->dims[3], p.k_len),
                    otherwise))
            return;
        clear(sum, accumulator);
        const int64_t *n = sum->dims;
        const Outer outer = outer_of(*sum, n[2] * n[3]);
        g.gather[g.gather_count++] = {sum->data, outer.b, outer.h, n[2] > 1 ? n[3] : 0, n[3] > 1 ? 1 : 0};
    }
}

void read_backward(Reader &r, tw_problem &p, tw_gradients &g) {
    const int64_t layout = read_problem(r, p);
    if (r.complaint) return;
    const int dtype = xla_of(p.dtype), accumulator = accumulator_of(p);
    const char *out = "out, d_out: expected q's dtype, (B, Hq, Sq, Dv)",
               *lse = "lse, d_lse: expected the accumulator's type, (B, Hq, Sq)";
    p.out = read_tensor(r, r.operand(4, out), layout, dtype, p, p.q_heads, p.q_len, p.value_dim, out);
    p.lse = read_rows(r, r.operand(3, lse), p, lse);
    g.d_out = read_tensor(r, r.operand(4, out), layout, dtype, p, p.q_heads, p.q_len, p.value_dim, out);
    g.d_lse = read_rows(r, r.operand(3, lse), p, lse);
    const int64_t wanted = r.integer("wanted");
    if (wanted & D_Q) {
        const char *as_q = "d_q: expected q's shape, and its dtype or, in a part, the accumulator's";
        g.d_q = read_tensor(r, r.result(4, as_q), layout, p.part ? accumulator : dtype, p, p.q_heads, p.q_len,
                            p.head_dim, as_q);
    }
    // The core adds to these.
    const char *otherwise = "d_k, d_v: expected the accumulator's type and the shapes of k and v";
    const auto read_added = [&](int64_t width) {
        const Buffer *sum = r.result(4, otherwise);
        const tw_tensor to = read_tensor(r, sum, layout, accumulator, p, p.kv_heads, p.k_len, width, otherwise);
        if (!r.complaint) clear(sum, accumulator);
        return to;
    };
    if (wanted & D_K) g.d_k = read_added(p.head_dim);
    if (wanted & D_V) g.d_v = read_added(p.value_dim);
    if (!r.complaint) read_sums(r, wanted, p, g);
    r.want(r.all_read(), "operands: more of them than `present`, `bias_count` and `wanted` announce");
}

void read_tangent(Reader &r, tw_problem &p, tw_tangents &t) {
    const int64_t layout = read_problem(r, p);
    if (r.complaint) return;
    const int dtype = xla_of(p.dtype), accumulator = accumulator_of(p), result = p.part ? accumulator : dtype;
    const char *out = "out, d_out: expected q's dtype or, in a part, the accumulator's, (B, Hq, Sq, Dv)";
    const char *lse = "lse, d_lse: expected the accumulator's type, (B, Hq, Sq)",
               *moved = "d_q, d_k, d_v: expected the shapes and dtype of q, k and v";
    p.out = read_tensor(r, r.operand(4, out), layout, result, p, p.q_heads, p.q_len, p.value_dim, out);
    p.lse = read_rows(r, r.operand(3, lse), p, lse);
    const int64_t moving = r.integer("moving");
    if (moving & D_Q)
        t.q = read_tensor(r, r.operand(4, moved), layout, dtype, p, p.q_heads, p.q_len, p.head_dim, moved);
    if (moving & D_K)
        t.k = read_tensor(r, r.operand(4, moved), layout, dtype, p, p.kv_heads, p.k_len, p.head_dim, moved);
    if (moving & D_V)
        t.v = read_tensor(r, r.operand(4, moved), layout, dtype, p, p.kv_heads, p.k_len, p.value_dim, moved);
    for (int n = 0; n < p.bias_count; ++n)
        if (moving & int64_t(FIRST_BIAS) << n) read_bias(r, p, t.bias[t.bias_count++]);
    if (moving & TABLE) t.table = read_table(r, p, accumulator);
    if (moving & SINKS) t.sinks = read_sinks(r, p, accumulator);
    t.out = read_tensor(r, r.result(4, out), layout, result, p, p.q_heads, p.q_len, p.value_dim, out);
    t.lse = read_rows(r, r.result(3, lse), p, lse);
    r.want(r.all_read(), "operands: more of them than `present`, `bias_count` and `moving` announce");
}

void *error(const tw_xla_call_frame &frame, int code, const char *message) {
    ErrorRequest request = {{sizeof request, nullptr}, message, code};
    return frame.api->create_error(&request);
}

// A frame with the metadata extension asks for the version and nothing else; other stages ask for nothing.
bool only_asks(tw_xla_call_frame &frame) {
    if (frame.head.extensions && frame.head.extensions->type == EXTENSION_METADATA) {
        Metadata *metadata = reinterpret_cast<MetadataExtension *>(frame.head.extensions)->metadata;
        metadata->version.major = 0;
        metadata->version.minor = 1;
        return true;
    }
    return frame.stage != STAGE_EXECUTE;
}

void *answer(const tw_xla_call_frame &frame, int status, const char *message) {
    switch (status) {
    case TW_OK: return nullptr;
    case TW_OUT_OF_MEMORY: return error(frame, RESOURCE_EXHAUSTED, message);
    case TW_UNSUPPORTED: return error(frame, UNIMPLEMENTED, message);
    default: return error(frame, INVALID_ARGUMENT, message);
    }
}

} // namespace

void *tw_xla_forward(tw_xla_call_frame *frame) {
    if (only_asks(*frame)) return nullptr;
    Reader reader(*frame);
    tw_problem problem = {};
    read_forward(reader, problem);
    if (reader.complaint) return error(*frame, INVALID_ARGUMENT, reader.complaint);
    const char *message = nullptr;
    const int status = tw_forward(&problem, &message);
    return answer(*frame, status, message);
}

void *tw_xla_backward(tw_xla_call_frame *frame) {
    if (only_asks(*frame)) return nullptr;
    Reader reader(*frame);
    tw_problem problem = {};
    tw_gradients gradients = {};
    read_backward(reader, problem, gradients);
    if (reader.complaint) return error(*frame, INVALID_ARGUMENT, reader.complaint);
    const char *message = nullptr;
    const int status = tw_backward(&problem, &gradients, &message);
    return answer(*frame, status, message);
}

void *tw_xla_tangent(tw_xla_call_frame *frame) {
    if (only_asks(*frame)) return nullptr;
    Reader reader(*frame);
    tw_problem problem = {};
    tw_tangents tangents = {};
    read_tangent(reader, problem, tangents);
    if (reader.complaint) return error(*frame, INVALID_ARGUMENT, reader.complaint);
    const char *message = nullptr;
    const int status = tw_tangent(&problem, &tangents, &message);
    return answer(*frame, status, message);
}
