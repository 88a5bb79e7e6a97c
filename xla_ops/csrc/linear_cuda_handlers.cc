// The CUDA handlers of XLA's foreign function interface for products of matrices.
#include "cuda_handlers.h"
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
  constexpr const char* name = name_of(form);
  Call call = {};
  int64_t sets;
  ffi::Error error = describe(name, x, kernel, bias, *y, version, form, &call, &sets);
  if (error.failure()) return error;
  bool serving = false;
  if (cudaError_t error = gelu ? serves(&serving) : serves_plain(&serving)) return check(name, error);
  if (!serving) return invalid(name, "this GPU has not the instructions for it, or no code is built for it");
  for (int64_t i = 0; i < sets; ++i) {
    const Call one = of_set(call, i);
    if (const char* why = refusal(one)) return invalid(name, why);
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
  if (cudaError_t error = mlp_serves(&serving)) return check(kMlp, error);
  if (!serving) return invalid(kMlp, "this GPU is not of compute capability 9.0, or no code is built for it");
  for (int64_t i = 0; i < sets; ++i) {
    const Call one = of_set(first, i), other = of_set(second, i);
    if (const char* why = mlp_refusal(one, other)) return invalid(kMlp, why);
    if (cudaError_t error = mlp(stream, one, other)) return check(kMlp, error);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_linear_forward, forward_on_stream<Form::kProduct>,
                              bind_forward(bind()), TRAITS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_linear_gelu_forward, forward_on_stream<Form::kGelu>,
                              bind_forward(bind()), TRAITS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_mlp_forward, mlp_on_stream, bind_mlp(bind()), TRAITS);

}  // namespace linear::cuda
