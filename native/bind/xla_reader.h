// Reads a call frame of XLA's field by field.
#pragma once

#include <stdint.h>
#include <string.h>

#include "bind/xla_c_api.h"

namespace tw_xla {

// Keeps the first complaint.
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

} // namespace tw_xla
