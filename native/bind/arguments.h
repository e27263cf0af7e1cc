// The keywords of a call from Python, as a problem of the core: arrays are tuples of an address and strides in elements,
// facts are tuples of numbers, None where there is none. The Python side (kernels/native) has checked them.
#pragma once

#include <nanobind/nanobind.h>

#include "core/problem.h"

namespace tilewise {

namespace nb = nanobind;

// The numbers of a tuple, in order.
class Fields {
  public:
    explicit Fields(nb::handle tuple) : tuple_(nb::cast<nb::tuple>(tuple)) {}
    int64_t next() { return nb::cast<int64_t>(tuple_[at_++]); }
    uint64_t next_unsigned() { return nb::cast<uint64_t>(tuple_[at_++]); }
    double next_number() { return nb::cast<double>(tuple_[at_++]); }
    template <class P> P pointer() { return reinterpret_cast<P>(nb::cast<uintptr_t>(tuple_[at_++])); }

  private:
    nb::tuple tuple_;
    size_t at_ = 0;
};

inline tw_tensor tensor_of(nb::handle tuple) {
    Fields f(tuple);
    void *data = f.pointer<void *>();
    int64_t b = f.next(), h = f.next(), s = f.next();
    return {data, b, h, s};
}

inline tw_problem problem_of(int dtype, int threads, nb::tuple sizes, nb::tuple rows, nb::tuple q, nb::tuple k,
                             nb::tuple v, nb::tuple out, uintptr_t lse, double scale, double softcap) {
    tw_problem p = {};
    p.dtype = dtype;
    p.threads = threads;
    Fields size(sizes), row(rows);
    for (int64_t *field : {&p.batch, &p.q_heads, &p.kv_heads, &p.q_len, &p.k_len, &p.head_dim, &p.value_dim})
        *field = size.next();
    p.row_begin = row.next();
    p.row_end = row.next();
    p.q = tensor_of(q);
    p.k = tensor_of(k);
    p.v = tensor_of(v);
    p.out = tensor_of(out);
    p.lse = reinterpret_cast<void *>(lse);
    p.lse_stride_h = p.q_len;
    p.lse_stride_b = p.q_heads * p.q_len;
    p.scale = scale;
    p.softcap = softcap;
    return p;
}

// The keywords that say what is visible and what is added, for all passes.
struct Facts {
    nb::object ranges, labels, mask, bits;
    nb::tuple biases;
    nb::object table;
    uintptr_t sinks;
    nb::object dropout, pages, sequences;
};

// Fills `to`, and returns how many there are.
inline int32_t read_biases(nb::tuple biases, tw_bias *to) {
    if (nb::len(biases) > TW_MAX_BIASES) throw nb::value_error("bias: at most 4 dense biases");
    for (nb::handle bias : biases) {
        Fields f(bias);
        tw_bias &own = *to++;
        own.data = f.pointer<const void *>();
        own.dtype = int32_t(f.next());
        for (int64_t *field : {&own.stride_b, &own.stride_h, &own.stride_i, &own.stride_j}) *field = f.next();
    }
    return int32_t(nb::len(biases));
}

inline tw_table table_of(nb::object table) {
    if (table.is_none()) return {};
    Fields f(table);
    const void *data = f.pointer<const void *>();
    int64_t b = f.next(), h = f.next();
    return {data, b, h};
}

inline void read_facts(const Facts &facts, tw_problem &p) {
    if (!facts.ranges.is_none()) {
        Fields f(facts.ranges);
        p.ranges.starts = f.pointer<const void *>();
        p.ranges.stops = f.pointer<const void *>();
        p.ranges.wide = int32_t(f.next());
        p.ranges.count = int32_t(f.next());
        p.ranges.stride_b = f.next();
        p.ranges.stride_h = f.next();
    }
    if (!facts.labels.is_none()) {
        Fields f(facts.labels);
        p.labels.q = f.pointer<const int32_t *>();
        p.labels.k = f.pointer<const int32_t *>();
        for (int64_t *field : {&p.labels.q_stride_b, &p.labels.q_stride_h, &p.labels.k_stride_b, &p.labels.k_stride_h})
            *field = f.next();
    }
    if (!facts.mask.is_none()) {
        Fields f(facts.mask);
        p.mask.data = f.pointer<const uint8_t *>();
        for (int64_t *field : {&p.mask.stride_b, &p.mask.stride_h, &p.mask.stride_i, &p.mask.stride_j})
            *field = f.next();
    }
    if (!facts.bits.is_none()) {
        Fields f(facts.bits);
        p.bits.index = f.pointer<const int32_t *>();
        p.bits.words = f.pointer<const uint64_t *>();
        for (int64_t *field : {&p.bits.stride_b, &p.bits.stride_h, &p.bits.tiles_q, &p.bits.tiles_k, &p.bits.q_offset})
            *field = f.next();
    }
    p.bias_count = read_biases(facts.biases, p.bias);
    p.table = table_of(facts.table);
    p.sinks = reinterpret_cast<const void *>(facts.sinks);
    if (!facts.dropout.is_none()) {
        Fields f(facts.dropout);
        p.dropout.enabled = 1;
        p.dropout.threshold = f.next_unsigned();
        p.dropout.inverse_keep = f.next_number();
        p.dropout.seed = f.next_unsigned();
        p.dropout.stream = f.next_unsigned();
        for (uint64_t *field :
             {&p.dropout.first, &p.dropout.stride_b, &p.dropout.stride_h, &p.dropout.stride_i, &p.dropout.stride_j})
            *field = f.next_unsigned();
    }
    if (!facts.pages.is_none()) {
        Fields f(facts.pages);
        p.pages.table = f.pointer<const int32_t *>();
        p.pages.stride_b = f.next();
        p.pages.size = f.next();
    }
    if (!facts.sequences.is_none()) {
        Fields f(facts.sequences);
        tw_sequences &s = p.sequences;
        for (const int64_t **array : {&s.q_begin, &s.q_len, &s.k_begin, &s.k_len, &s.table_begin})
            *array = f.pointer<const int64_t *>();
        p.lse_stride_b = f.next();
        p.lse_stride_h = f.next();
    }
}

} // namespace tilewise
