// The CUDA handlers of XLA's foreign function interface for dwconv_norm_gelu.
#include "cuda_handlers.h"
#include "dwconv_cuda.h"
#include "dwconv_ffi.h"

namespace dwconv::cuda {
namespace {

using namespace xla_ops::cuda;

ffi::Error forward_on_stream(cudaStream_t stream, Operand x, Operand kernel, Operand bias, Operand scale,
                             Operand offset, Result y, double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = forward_call(x, kernel, bias, scale, offset, y, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(kName, why);
  return check(kName, forward(stream, call));
}

ffi::Error backward_on_stream(cudaStream_t stream, Operand x, Operand kernel, Operand bias, Operand scale,
                              Operand offset, Operand dy, Result dx, Result partial, double epsilon,
                              int64_t version, Result scratch) {
  Call call = {};
  ffi::Error error = backward_call(x, kernel, bias, scale, offset, dy, dx, partial, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(kName, why);
  if (call.chunks != call.height) return invalid(kName, "expected a chunk for each row");
  if (!holds(*scratch, static_cast<int64_t>(x.element_count()), partial->element_type())) {
    return invalid(kName, "the scratch does not fit");
  }
  return check(kName, backward(stream, call, scratch->untyped_data()));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_dwconv_norm_gelu_forward, forward_on_stream, bind_forward(bind()),
                              TRAITS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_dwconv_norm_gelu_backward, backward_on_stream,
                              bind_backward(bind()).Ret<Operand>(), TRAITS);

}  // namespace dwconv::cuda
