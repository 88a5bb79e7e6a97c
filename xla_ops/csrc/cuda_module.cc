// The CUDA handlers of XLA's foreign function interface, and the Python module that hands them over.
//
// A handler checks the call and puts kernels on XLA's stream: it allocates nothing and waits for nothing,
// so XLA may record it into a command buffer. Scratch comes as a result that nobody reads.
#include <pybind11/pybind11.h>

#include <string>

#include "dcnv3_cuda.h"
#include "dcnv3_ffi.h"

namespace dcnv3::cuda {
namespace {

ffi::Error check(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string("internimage_dcnv3: CUDA: ") + cudaGetErrorString(error));
}

ffi::Error start_forward(cudaStream_t stream, const Call& call) {
  if (const char* why = refusal(call)) return invalid(why);
  return check(forward(stream, call));
}

ffi::Error start_backward(cudaStream_t stream, const Call& call, Result scratch) {
  if (const char* why = refusal(call)) return invalid(why);
  const Problem& s = call.problem;
  const int64_t bytes = s.batch * (s.height * s.width + 1) * s.channels() * 8;
  if (!is_small(call) && static_cast<int64_t>(scratch->size_bytes()) != bytes) {
    return invalid("the scratch does not fit");
  }
  return check(backward(stream, call, scratch->untyped_data()));
}

ffi::Error forward_handler(cudaStream_t stream, Buffer x, Buffer offset, Buffer mask, Result y,
                           Geometry geometry, double offset_scale) {
  Call call = {};
  auto error = forward_call(x, offset, mask, y, geometry, offset_scale, &call);
  return error.failure() ? error : start_forward(stream, call);
}

ffi::Error backward_handler(cudaStream_t stream, Buffer x, Buffer offset, Buffer mask, Buffer dy, Result dx,
                            Result doffset, Result dmask, Result scratch, Geometry geometry,
                            double offset_scale) {
  Call call = {};
  auto error = backward_call(x, offset, mask, dy, dx, doffset, dmask, geometry, offset_scale, &call);
  return error.failure() ? error : start_backward(stream, call, scratch);
}

ffi::Error fused_forward_handler(cudaStream_t stream, Buffer x, Buffer record, Result y, Geometry geometry,
                                 double offset_scale, bool centre) {
  Call call = {};
  auto error = fused_forward_call(x, record, y, geometry, offset_scale, centre, &call);
  return error.failure() ? error : start_forward(stream, call);
}

ffi::Error fused_backward_handler(cudaStream_t stream, Buffer x, Buffer record, Buffer dy, Result dx,
                                  Result drecord, Result scratch, Geometry geometry, double offset_scale,
                                  bool centre) {
  Call call = {};
  auto error = fused_backward_call(x, record, dy, dx, drecord, geometry, offset_scale, centre, &call);
  return error.failure() ? error : start_backward(stream, call, scratch);
}

auto bind() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>();
}

// In the handler itself: registered beside it, on CUDA, they do not count.
#define TRAITS {ffi::Traits::kCmdBufferCompatible}

XLA_FFI_DEFINE_HANDLER(kForward, forward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // offset
                           .Arg<Buffer>()  // mask
                           .Ret<Buffer>()  // y
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kBackward, backward_handler,
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
XLA_FFI_DEFINE_HANDLER(kFusedForward, fused_forward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // record
                           .Ret<Buffer>()  // y
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale")
                           .Attr<bool>("center_feature_scale"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kFusedBackward, fused_backward_handler,
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

pybind11::capsule capsule(XLA_FFI_Handler* handler) {
  return pybind11::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace
}  // namespace dcnv3::cuda

PYBIND11_MODULE(_cuda, m) {
  using namespace dcnv3::cuda;
  m.doc() = "Handlers of the CUDA custom calls, by target name.";
  m.def("targets", [] {
    pybind11::dict targets;
    targets["internimage_dcnv3_forward"] = capsule(kForward);
    targets["internimage_dcnv3_backward"] = capsule(kBackward);
    targets["internimage_dcnv3_fused_forward"] = capsule(kFusedForward);
    targets["internimage_dcnv3_fused_backward"] = capsule(kFusedBackward);
    return targets;
  });
  m.def("instruction_set", [] { return INTERNIMAGE_CUDA_ARCHS; });  // those it was built for
  m.attr("version") = xla_ops::kVersion;
}
