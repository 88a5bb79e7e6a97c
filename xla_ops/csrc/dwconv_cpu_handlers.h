// The CPU handlers of XLA's foreign function interface for dwconv_norm_gelu.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace dwconv::cpu {

XLA_FFI_Handler* forward_handler();
XLA_FFI_Handler* backward_handler();

}  // namespace dwconv::cpu
