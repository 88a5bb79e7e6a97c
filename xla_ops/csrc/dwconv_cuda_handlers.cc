// The CUDA handlers of XLA's foreign function interface for dwconv_norm_gelu.
#include "cuda_handlers.h"
#include "cuda_module.h"
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
  if (const char* why = refusal(call)) return invalid(why);
  return check("internimage_dwconv_norm_gelu", forward(stream, call));
}

ffi::Error backward_on_stream(cudaStream_t stream, Operand x, Operand kernel, Operand bias, Operand scale,
                              Operand offset, Operand dy, Result dx, Result partial, Result scratch,
                              double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = backward_call(x, kernel, bias, scale, offset, dy, dx, partial, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(why);
  if (call.chunks != call.height) return invalid("expected a chunk for each row");
  if (scratch->element_count() != x.element_count() || scratch->element_type() != partial->element_type()) {
    return invalid("the scratch does not fit");
  }
  return check("internimage_dwconv_norm_gelu", backward(stream, call, scratch->untyped_data()));
}

auto bind_operands() {
  return bind()
      .Arg<Operand>()   // x
      .Arg<Operand>()   // kernel
      .Arg<Operand>()   // bias
      .Arg<Operand>()   // scale
      .Arg<Operand>();  // offset
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_on_stream,
                       bind_operands()
                           .Ret<Operand>()  // y
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kBackward, backward_on_stream,
                       bind_operands()
                           .Arg<Operand>()  // dy
                           .Ret<Operand>()  // dx
                           .Ret<Operand>()  // partial
                           .Ret<Operand>()  // scratch
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"),
                       TRAITS);

}  // namespace

XLA_FFI_Handler* forward_handler() {
  return kForward;
}
XLA_FFI_Handler* backward_handler() {
  return kBackward;
}

}  // namespace dwconv::cuda
