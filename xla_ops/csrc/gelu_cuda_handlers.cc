// The CUDA handlers of XLA's foreign function interface for bias_gelu.
#include "cuda_handlers.h"
#include "cuda_module.h"
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
  if (const char* why = refusal(call)) return invalid(why);
  return check("internimage_bias_gelu", compute(stream, call));
}
ffi::Error forward_on_stream(cudaStream_t stream, Operand x, Operand bias, Result y, int64_t version) {
  return start(stream, x, bias, nullptr, y, version);
}
ffi::Error backward_on_stream(cudaStream_t stream, Operand x, Operand bias, Operand dy, Result dx,
                              int64_t version) {
  return start(stream, x, bias, &dy, dx, version);
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_on_stream,
                       bind()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // bias
                           .Ret<Operand>()  // y
                           .Attr<int64_t>("version"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kBackward, backward_on_stream,
                       bind()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // bias
                           .Arg<Operand>()  // dy
                           .Ret<Operand>()  // dx
                           .Attr<int64_t>("version"),
                       TRAITS);

}  // namespace

XLA_FFI_Handler* forward_handler() {
  return kForward;
}
XLA_FFI_Handler* backward_handler() {
  return kBackward;
}

}  // namespace gelu::cuda
