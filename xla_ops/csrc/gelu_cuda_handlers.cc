// The CUDA handlers of XLA's foreign function interface for bias_gelu.
#include "cuda_handlers.h"
#include "gelu_cuda.h"
#include "gelu_ffi.h"

namespace gelu::cuda {
namespace {

using namespace xla_ops::cuda;

ffi::Error start(cudaStream_t stream, Operand x, Operand bias, const Operand* dy, Result result,
                 int64_t version) {
  Call call = {};
  ffi::Error error = describe(x, bias, dy, result, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(kName, why);
  return check(kName, compute(stream, call));
}
ffi::Error forward_on_stream(cudaStream_t stream, Operand x, Operand bias, Result y, int64_t version) {
  return start(stream, x, bias, nullptr, y, version);
}
ffi::Error backward_on_stream(cudaStream_t stream, Operand x, Operand bias, Operand dy, Result dx,
                              int64_t version) {
  return start(stream, x, bias, &dy, dx, version);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_bias_gelu_forward, forward_on_stream, bind_forward(bind()), TRAITS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_bias_gelu_backward, backward_on_stream, bind_backward(bind()),
                              TRAITS);

}  // namespace gelu::cuda
