// The CUDA handlers of XLA's foreign function interface for whole layers.
#include "cuda_handlers.h"
#include "layer_cuda.h"
#include "layer_ffi.h"

namespace layer::cuda {
namespace {

using namespace xla_ops::cuda;

ffi::Error forward_on_stream(cudaStream_t stream, Operand x, ffi::RemainingArgs parameters, Result y,
                             Result scratch, int64_t group, double offset_scale, double epsilon,
                             bool post_norm, bool early, int64_t version) {
  Call call = {};
  int64_t sets;
  const Settings settings = {group, offset_scale, epsilon, post_norm, early, version};
  ffi::Error error = describe(x, parameters, y, scratch, settings, &call, &sets);
  if (error.failure()) return error;
  bool serving = false;
  if (cudaError_t error = serves(&serving)) return check(kName, error);
  if (!serving) return invalid(kName, "this GPU has not the instructions for it, or no code is built for it");
  for (int64_t i = 0; i < sets; ++i) {
    const Call one = of_set(call, i);
    if (const char* why = refusal(one)) return invalid(kName, why);
    if (cudaError_t error = forward(stream, one)) return check(kName, error);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_layers_forward, forward_on_stream,
                              bind()
                                  .Arg<Operand>()  // x
                                  .RemainingArgs()
                                  .Ret<Operand>()  // y
                                  .Ret<Operand>()  // scratch
                                  .Attr<int64_t>("group")
                                  .Attr<double>("offset_scale")
                                  .Attr<double>("epsilon")
                                  .Attr<bool>("post_norm")
                                  .Attr<bool>("early")
                                  .Attr<int64_t>("version"),
                              TRAITS);

}  // namespace layer::cuda
