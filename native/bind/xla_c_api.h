// XLA's foreign-function interface, version 0.1, as far as it is used here. The structs are declared by hand because building
// against newer headers would report a newer version, which older XLA refuses; 0.1 is taken by all since jaxlib 0.4.31.
// tests/native compares them with jaxlib's own headers.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace tw_xla {

// Every struct begins with its size and a list of extensions.
struct Extension {
    size_t struct_size;
    int type;
    Extension *next;
};
struct Head {
    size_t struct_size;
    Extension *extensions;
};
struct Buffer {
    Head head;
    int dtype;
    void *data;
    int64_t rank;
    int64_t *dims;
};
struct Span {
    const char *text;
    size_t length;
};
struct Scalar {
    int dtype;
    void *value;
};
struct Buffers {
    Head head;
    int64_t size;
    int *types;
    Buffer **items;
};
struct Attributes {
    Head head;
    int64_t size;
    int *types;
    Span **names;
    void **items;
};
struct ErrorRequest {
    Head head;
    const char *message;
    int code;
};
struct Version {
    Head head;
    int major, minor;
};
struct Metadata {
    size_t struct_size;
    Version version;
    uint32_t traits;
};
struct MetadataExtension {
    Extension base;
    Metadata *metadata;
};
struct Api {
    Head head;
    Version version;
    const void *internal;
    void *(*create_error)(ErrorRequest *);
};

enum { ARGUMENT_BUFFER = 1, ATTRIBUTE_SCALAR = 3, STAGE_EXECUTE = 3, EXTENSION_METADATA = 1 };
enum { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8, UNIMPLEMENTED = 12 };
enum { PRED = 1, S32 = 4, S64 = 5, U32 = 8, U64 = 9, F16 = 10, F32 = 11, F64 = 12, BF16 = 16 };

} // namespace tw_xla

struct tw_xla_call_frame {
    tw_xla::Head head;
    const tw_xla::Api *api;
    void *context;
    int stage;
    tw_xla::Buffers arguments, results;
    tw_xla::Attributes attributes;
};
