// The XLA FFI handlers of targets "tilewise_forward", "tilewise_backward" and "tilewise_tangent"; their operands and
// attributes are listed in xla_ffi.cpp.
#pragma once

struct tw_xla_call_frame;
extern "C" void *tw_xla_forward(tw_xla_call_frame *frame);
extern "C" void *tw_xla_backward(tw_xla_call_frame *frame);
extern "C" void *tw_xla_tangent(tw_xla_call_frame *frame);
