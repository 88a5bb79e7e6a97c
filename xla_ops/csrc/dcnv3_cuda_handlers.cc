// The CUDA handlers of XLA's foreign function interface for DCNv3.
#include "cuda_handlers.h"
#include "dcnv3_cuda.h"
#include "dcnv3_ffi.h"

namespace dcnv3::cuda {
namespace {

using namespace xla_ops::cuda;

ffi::Error start_forward(cudaStream_t stream, const Call& call) {
  if (const char* why = refusal(call)) return invalid(kName, why);
  return check(kName, forward(stream, call));
}

ffi::Error start_backward(cudaStream_t stream, const Call& call, Result scratch) {
  if (const char* why = refusal(call)) return invalid(kName, why);
  const Problem& s = call.problem;
  const int64_t bytes = s.batch * (s.height * s.width + 1) * s.channels() * 8;
  if (!is_small(call) && static_cast<int64_t>(scratch->size_bytes()) != bytes) {
    return invalid(kName, "the scratch does not fit");
  }
  return check(kName, backward(stream, call, scratch->untyped_data()));
}

ffi::Error forward_on_stream(cudaStream_t stream, Operand x, Operand offset, Operand mask, Result y,
                             Geometry geometry, double offset_scale) {
  Call call = {};
  auto error = forward_call(x, offset, mask, y, geometry, offset_scale, &call);
  return error.failure() ? error : start_forward(stream, call);
}

ffi::Error backward_on_stream(cudaStream_t stream, Operand x, Operand offset, Operand mask, Operand dy,
                              Result dx, Result doffset, Result dmask, Geometry geometry, double offset_scale,
                              Result scratch) {
  Call call = {};
  auto error = backward_call(x, offset, mask, dy, dx, doffset, dmask, geometry, offset_scale, &call);
  return error.failure() ? error : start_backward(stream, call, scratch);
}

ffi::Error fused_forward_on_stream(cudaStream_t stream, Operand x, Operand record, Result y,
                                   Geometry geometry, double offset_scale, bool centre) {
  Call call = {};
  auto error = fused_forward_call(x, record, y, geometry, offset_scale, centre, &call);
  return error.failure() ? error : start_forward(stream, call);
}

ffi::Error fused_backward_on_stream(cudaStream_t stream, Operand x, Operand record, Operand dy, Result dx,
                                    Result drecord, Geometry geometry, double offset_scale, bool centre,
                                    Result scratch) {
  Call call = {};
  auto error = fused_backward_call(x, record, dy, dx, drecord, geometry, offset_scale, centre, &call);
  return error.failure() ? error : start_backward(stream, call, scratch);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_dcnv3_forward, forward_on_stream, bind_forward(bind()), TRAITS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_dcnv3_backward, backward_on_stream,
                              bind_backward(bind()).Ret<Operand>(), TRAITS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_dcnv3_fused_forward, fused_forward_on_stream,
                              bind_fused_forward(bind()), TRAITS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_dcnv3_fused_backward, fused_backward_on_stream,
                              bind_fused_backward(bind()).Ret<Operand>(), TRAITS);

}  // namespace dcnv3::cuda
