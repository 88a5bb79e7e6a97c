// The CUDA handlers of XLA's foreign function interface for products of matrices.
#include "cuda_handlers.h"
#include "cuda_module.h"
#include "linear_cuda.h"
#include "linear_ffi.h"
#include "mlp_cuda.h"

namespace linear::cuda {
namespace {

using namespace xla_ops::cuda;

template <Form form>
ffi::Error forward_on_stream(cudaStream_t stream, Operand x, Operand kernel, Operand bias, Result y,
                             int64_t version) {
  constexpr bool gelu = form == Form::kGelu;
  const char* const name = gelu ? "internimage_linear_gelu" : "internimage_linear";
  Call call = {};
  int64_t sets;
  ffi::Error error = describe(x, kernel, bias, *y, version, form, &call, &sets);
  if (error.failure()) return error;
  bool serving = false;
  if (cudaError_t error = gelu ? serves(&serving) : serves_plain(&serving)) return check(name, error);
  if (!serving) return invalid("this GPU has not the instructions for it, or no code is built for it");
  for (int64_t i = 0; i < sets; ++i) {
    const Call one = of_set(call, i);
    if (const char* why = refusal(one)) return invalid(why);
    if (cudaError_t error = forward(stream, one)) return check(name, error);
  }
  return ffi::Error::Success();
}

ffi::Error mlp_on_stream(cudaStream_t stream, Operand x, Operand kernel1, Operand bias1, Operand kernel2,
                         Operand bias2, Result y, int64_t version) {
  Call first = {}, second = {};
  int64_t sets;
  ffi::Error error = describe_mlp(x, kernel1, bias1, kernel2, bias2, y, version, &first, &second, &sets);
  if (error.failure()) return error;
  bool serving = false;
  if (cudaError_t error = mlp_serves(&serving)) return check("internimage_mlp", error);
  if (!serving) return invalid("this GPU is not of compute capability 9.0, or no code is built for it");
  for (int64_t i = 0; i < sets; ++i) {
    const Call one = of_set(first, i), other = of_set(second, i);
    if (const char* why = mlp_refusal(one, other)) return invalid(why);
    if (cudaError_t error = mlp(stream, one, other)) return check("internimage_mlp", error);
  }
  return ffi::Error::Success();
}

auto bind_product() {
  return bind()
      .Arg<Operand>()  // x
      .Arg<Operand>()  // kernel
      .Arg<Operand>()  // bias
      .Ret<Operand>()  // y
      .Attr<int64_t>("version");
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_on_stream<Form::kProduct>, bind_product(), TRAITS);
XLA_FFI_DEFINE_HANDLER(kGeluForward, forward_on_stream<Form::kGelu>, bind_product(), TRAITS);
XLA_FFI_DEFINE_HANDLER(kMlp, mlp_on_stream,
                       bind()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // kernel1
                           .Arg<Operand>()  // bias1
                           .Arg<Operand>()  // kernel2
                           .Arg<Operand>()  // bias2
                           .Ret<Operand>()  // y
                           .Attr<int64_t>("version"),
                       TRAITS);

}  // namespace

XLA_FFI_Handler* forward_handler() {
  return kForward;
}
XLA_FFI_Handler* gelu_forward_handler() {
  return kGeluForward;
}
XLA_FFI_Handler* mlp_handler() {
  return kMlp;
}

}  // namespace linear::cuda
