// The CUDA handlers of XLA's foreign function interface for LayerNorm and what is added to it.
#include "cuda_handlers.h"
#include "norm_cuda.h"
#include "norm_ffi.h"

namespace layer_norm::cuda {
namespace {

using namespace xla_ops::cuda;

ffi::Error forward_on_stream(cudaStream_t stream, Operand x, Operand scale, Operand bias, Result y,
                             double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = describe(kNorm, x, scale, bias, y, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(kNorm, why);
  return check(kNorm, forward(stream, call));
}

ffi::Error norm_add_on_stream(cudaStream_t stream, Operand x, Operand residual, Operand scale, Operand bias,
                              Result y, double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = describe(kNormAdd, x, residual, scale, bias, y, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(kNormAdd, why);
  return check(kNormAdd, forward(stream, call));
}

ffi::Error add_norm_on_stream(cudaStream_t stream, Operand x, Operand residual, Operand scale, Operand bias,
                              Result total, Result y, double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = describe(kAddNorm, x, residual, scale, bias, total, y, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(kAddNorm, why);
  return check(kAddNorm, forward(stream, call));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_layer_norm_forward, forward_on_stream, bind_forward(bind()),
                              TRAITS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_norm_add_forward, norm_add_on_stream, bind_norm_add(bind()),
                              TRAITS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_add_norm_forward, add_norm_on_stream, bind_add_norm(bind()),
                              TRAITS);

}  // namespace layer_norm::cuda
