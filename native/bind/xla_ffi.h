// The XLA FFI handler of target "tilewise_forward"; its operands and attributes are listed in xla_ffi.cpp.
#pragma once

struct tw_xla_call_frame;
extern "C" void *tw_xla_forward(tw_xla_call_frame *frame);
