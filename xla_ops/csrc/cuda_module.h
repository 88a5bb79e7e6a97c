// The handlers of all operators, for the module to hand over.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace dcnv3::cuda {
XLA_FFI_Handler* forward_handler();
XLA_FFI_Handler* backward_handler();
XLA_FFI_Handler* fused_forward_handler();
XLA_FFI_Handler* fused_backward_handler();
}  // namespace dcnv3::cuda

namespace dwconv::cuda {
XLA_FFI_Handler* forward_handler();
XLA_FFI_Handler* backward_handler();
}  // namespace dwconv::cuda

namespace gelu::cuda {
XLA_FFI_Handler* forward_handler();
XLA_FFI_Handler* backward_handler();
}  // namespace gelu::cuda

namespace layer::cuda {
XLA_FFI_Handler* forward_handler();
}  // namespace layer::cuda

namespace linear::cuda {
XLA_FFI_Handler* forward_handler();
XLA_FFI_Handler* gelu_forward_handler();
XLA_FFI_Handler* mlp_handler();
}  // namespace linear::cuda

namespace layer_norm::cuda {
XLA_FFI_Handler* forward_handler();
XLA_FFI_Handler* norm_add_handler();
XLA_FFI_Handler* add_norm_handler();
}  // namespace layer_norm::cuda
