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
//   dropout_stride_{b,h,i,j}, threads, part, row_invariant (i64); scale, softcap, dropout_inverse_keep (f64).
// Results of forward: out as q with Dv for D (the accumulator's type where `part` is 1, as d_q then); lse (B,Hq,Sq),
// accumulator's type.
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

#include "bind/xla_problem.h"

using namespace tw_xla;

namespace {

void read_forward(Reader &r, tw_problem &p) {
    const char *out = "out: expected q's dtype or, in a part, the accumulator's, (B, Hq, Sq, Dv)",
               *lse = "lse: expected the accumulator's type, (B, Hq, Sq)";
    const int64_t layout = read_problem(r, p);
    if (r.complaint) return;
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
    const char *as_keys = "d_k, d_v: expected the shapes of k and v, and their dtype or, in a part, the accumulator's";
    const auto read_given = [&](int64_t width) {
        return read_tensor(r, r.result(4, as_keys), layout, p.part ? accumulator : dtype, p, p.kv_heads, p.k_len, width,
                           as_keys);
    };
    if (wanted & D_K) g.d_k = read_given(p.head_dim);
    if (wanted & D_V) g.d_v = read_given(p.value_dim);
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
