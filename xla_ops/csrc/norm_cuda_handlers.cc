// The CUDA handlers of XLA's foreign function interface for LayerNorm and what is added to it.
#include "cuda_handlers.h"
#include "cuda_module.h"
#include "norm_cuda.h"
#include "norm_ffi.h"

namespace layer_norm::cuda {
namespace {

using namespace xla_ops::cuda;

ffi::Error forward_on_stream(cudaStream_t stream, Operand x, Operand scale, Operand bias, Result y,
                             double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = describe(x, scale, bias, y, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(why);
  return check("internimage_layer_norm", forward(stream, call));
}

ffi::Error norm_add_on_stream(cudaStream_t stream, Operand x, Operand residual, Operand scale, Operand bias,
                              Result y, double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = describe(x, residual, scale, bias, y, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(why);
  return check("internimage_norm_add", forward(stream, call));
}

ffi::Error add_norm_on_stream(cudaStream_t stream, Operand x, Operand residual, Operand scale, Operand bias,
                              Result total, Result y, double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = describe(x, residual, scale, bias, total, y, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(why);
  return check("internimage_add_norm", forward(stream, call));
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_on_stream,
                       bind()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // scale
                           .Arg<Operand>()  // bias
                           .Ret<Operand>()  // y
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kNormAdd, norm_add_on_stream,
                       bind()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // residual
                           .Arg<Operand>()  // scale
                           .Arg<Operand>()  // bias
                           .Ret<Operand>()  // y
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kAddNorm, add_norm_on_stream,
                       bind()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // residual
                           .Arg<Operand>()  // scale
                           .Arg<Operand>()  // bias
                           .Ret<Operand>()  // total
                           .Ret<Operand>()  // y
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"),
                       TRAITS);

}  // namespace

XLA_FFI_Handler* forward_handler() {
  return kForward;
}
XLA_FFI_Handler* norm_add_handler() {
  return kNormAdd;
}
XLA_FFI_Handler* add_norm_handler() {
  return kAddNorm;
}

}  // namespace layer_norm::cuda
