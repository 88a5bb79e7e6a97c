// The CUDA handlers of XLA's foreign function interface for DCNv3.
#include "cuda_handlers.h"
#include "cuda_module.h"
#include "dcnv3_cuda.h"
#include "dcnv3_ffi.h"

namespace dcnv3::cuda {
namespace {

using namespace xla_ops::cuda;

ffi::Error start_forward(cudaStream_t stream, const Call& call) {
  if (const char* why = refusal(call)) return invalid(why);
  return check("internimage_dcnv3", forward(stream, call));
}

ffi::Error start_backward(cudaStream_t stream, const Call& call, Result scratch) {
  if (const char* why = refusal(call)) return invalid(why);
  const Problem& s = call.problem;
  const int64_t bytes = s.batch * (s.height * s.width + 1) * s.channels() * 8;
  if (!is_small(call) && static_cast<int64_t>(scratch->size_bytes()) != bytes) {
    return invalid("the scratch does not fit");
  }
  return check("internimage_dcnv3", backward(stream, call, scratch->untyped_data()));
}

ffi::Error forward_on_stream(cudaStream_t stream, Buffer x, Buffer offset, Buffer mask, Result y,
                             Geometry geometry, double offset_scale) {
  Call call = {};
  auto error = forward_call(x, offset, mask, y, geometry, offset_scale, &call);
  return error.failure() ? error : start_forward(stream, call);
}

ffi::Error backward_on_stream(cudaStream_t stream, Buffer x, Buffer offset, Buffer mask, Buffer dy, Result dx,
                              Result doffset, Result dmask, Result scratch, Geometry geometry,
                              double offset_scale) {
  Call call = {};
  auto error = backward_call(x, offset, mask, dy, dx, doffset, dmask, geometry, offset_scale, &call);
  return error.failure() ? error : start_backward(stream, call, scratch);
}

ffi::Error fused_forward_on_stream(cudaStream_t stream, Buffer x, Buffer record, Result y, Geometry geometry,
                                   double offset_scale, bool centre) {
  Call call = {};
  auto error = fused_forward_call(x, record, y, geometry, offset_scale, centre, &call);
  return error.failure() ? error : start_forward(stream, call);
}

ffi::Error fused_backward_on_stream(cudaStream_t stream, Buffer x, Buffer record, Buffer dy, Result dx,
                                    Result drecord, Result scratch, Geometry geometry, double offset_scale,
                                    bool centre) {
  Call call = {};
  auto error = fused_backward_call(x, record, dy, dx, drecord, geometry, offset_scale, centre, &call);
  return error.failure() ? error : start_backward(stream, call, scratch);
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_on_stream,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // offset
                           .Arg<Buffer>()  // mask
                           .Ret<Buffer>()  // y
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kBackward, backward_on_stream,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // offset
                           .Arg<Buffer>()  // mask
                           .Arg<Buffer>()  // dy
                           .Ret<Buffer>()  // dx
                           .Ret<Buffer>()  // doffset
                           .Ret<Buffer>()  // dmask
                           .Ret<Buffer>()  // scratch
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kFusedForward, fused_forward_on_stream,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // record
                           .Ret<Buffer>()  // y
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale")
                           .Attr<bool>("center_feature_scale"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kFusedBackward, fused_backward_on_stream,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // record
                           .Arg<Buffer>()  // dy
                           .Ret<Buffer>()  // dx
                           .Ret<Buffer>()  // drecord
                           .Ret<Buffer>()  // scratch
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale")
                           .Attr<bool>("center_feature_scale"),
                       TRAITS);

}  // namespace

XLA_FFI_Handler* forward_handler() {
  return kForward;
}
XLA_FFI_Handler* backward_handler() {
  return kBackward;
}
XLA_FFI_Handler* fused_forward_handler() {
  return kFusedForward;
}
XLA_FFI_Handler* fused_backward_handler() {
  return kFusedBackward;
}

}  // namespace dcnv3::cuda
