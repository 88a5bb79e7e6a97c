// The handlers of all operators, for the module to hand over.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace dcnv3::cpu {
XLA_FFI_Handler* forward_handler();
XLA_FFI_Handler* backward_handler();
XLA_FFI_Handler* fused_forward_handler();
XLA_FFI_Handler* fused_backward_handler();
}  // namespace dcnv3::cpu

namespace dwconv::cpu {
XLA_FFI_Handler* forward_handler();
XLA_FFI_Handler* backward_handler();
}  // namespace dwconv::cpu

namespace gelu::cpu {
XLA_FFI_Handler* forward_handler();
XLA_FFI_Handler* backward_handler();
}  // namespace gelu::cpu

namespace linear::cpu {
XLA_FFI_Handler* forward_handler();
XLA_FFI_Handler* backward_handler();
XLA_FFI_Handler* gelu_forward_handler();
XLA_FFI_Handler* convolution_handler();
XLA_FFI_Handler* convolution_backward_handler();
XLA_FFI_Handler* mlp_handler();
}  // namespace linear::cpu

namespace layer_norm::cpu {
XLA_FFI_Handler* forward_handler();
XLA_FFI_Handler* backward_handler();
XLA_FFI_Handler* add_norm_handler();
XLA_FFI_Handler* add_norm_backward_handler();
XLA_FFI_Handler* norm_add_handler();
}  // namespace layer_norm::cpu
