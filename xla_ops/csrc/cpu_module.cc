// The CPU handlers of XLA's foreign function interface, and the Python module that hands them over.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "cpu_handlers.h"
#include "cpu_layers.h"
#include "dcnv3_cpu.h"
#include "dcnv3_ffi.h"

namespace dcnv3::cpu {
namespace {

using namespace ::cpu;

ffi::Future start_forward(ffi::ThreadPool& pool, const Call& call, Result& y) {
  prefer_large_pages(y);
  const Problem& s = call.problem;
  const int64_t pairs = s.batch * s.positions() * s.group;
  const int64_t pieces = pieces_of(pool, pairs, 4.0 * pairs * s.points * (s.depth + 8));
  return run(pool, pieces, [call, pairs, pieces](int64_t i) {
    // A multiple of 32 pairs, so that no vector of lanes is split without need.
    const int64_t each = ((pairs + pieces - 1) / pieces + 31) / 32 * 32;
    forward(call, std::min(i * each, pairs), std::min((i + 1) * each, pairs));
  });
}

template <class... Results>
ffi::Future start_backward(ffi::ThreadPool& pool, const Call& call, Results&... results) {
  prefer_large_pages(results...);
  const Problem& s = call.problem;
  // Each image in as few parts as keep the threads busy; all of it is one piece where all is small.
  const double cost = 12.0 * s.batch * s.positions() * s.group * s.points * (s.depth + 8);
  const int64_t pieces = pieces_of(pool, s.batch * s.group, cost);
  const bool small = pieces <= 1;
  const int64_t parts = small ? 1 : std::min((pieces + s.batch - 1) / s.batch, s.group);
  return run(pool, small ? 1 : s.batch * parts, [call, small, parts](int64_t i) {
    const Problem& s = call.problem;
    const int64_t part = i % parts, first = part * s.group / parts, last = (part + 1) * s.group / parts;
    if (!small) return backward(call, i / parts, first, last);
    for (int64_t image = 0; image < s.batch; ++image) backward(call, image, 0, s.group);
  });
}

ffi::Future forward_handler(ffi::ThreadPool pool, Buffer x, Buffer offset, Buffer mask, Result y,
                            Geometry geometry, double offset_scale) {
  Call call = {};
  auto error = forward_call(x, offset, mask, y, geometry, offset_scale, &call);
  return error.failure() ? failed(error) : start_forward(pool, call, y);
}

ffi::Future backward_handler(ffi::ThreadPool pool, Buffer x, Buffer offset, Buffer mask, Buffer dy, Result dx,
                             Result doffset, Result dmask, Geometry geometry, double offset_scale) {
  Call call = {};
  auto error = backward_call(x, offset, mask, dy, dx, doffset, dmask, geometry, offset_scale, &call);
  return error.failure() ? failed(error) : start_backward(pool, call, dx, doffset, dmask);
}

ffi::Future fused_forward_handler(ffi::ThreadPool pool, Buffer x, Buffer record, Result y, Geometry geometry,
                                  double offset_scale, bool centre) {
  Call call = {};
  auto error = fused_forward_call(x, record, y, geometry, offset_scale, centre, &call);
  return error.failure() ? failed(error) : start_forward(pool, call, y);
}

ffi::Future fused_backward_handler(ffi::ThreadPool pool, Buffer x, Buffer record, Buffer dy, Result dx,
                                   Result drecord, Geometry geometry, double offset_scale, bool centre) {
  Call call = {};
  auto error = fused_backward_call(x, record, dy, dx, drecord, geometry, offset_scale, centre, &call);
  return error.failure() ? failed(error) : start_backward(pool, call, dx, drecord);
}

auto bind() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>();
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // offset
                           .Arg<Buffer>()  // mask
                           .Ret<Buffer>()  // y
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale"));
XLA_FFI_DEFINE_HANDLER(kBackward, backward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // offset
                           .Arg<Buffer>()  // mask
                           .Arg<Buffer>()  // dy
                           .Ret<Buffer>()  // dx
                           .Ret<Buffer>()  // doffset
                           .Ret<Buffer>()  // dmask
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale"));
XLA_FFI_DEFINE_HANDLER(kFusedForward, fused_forward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // record
                           .Ret<Buffer>()  // y
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale")
                           .Attr<bool>("center_feature_scale"));
XLA_FFI_DEFINE_HANDLER(kFusedBackward, fused_backward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // record
                           .Arg<Buffer>()  // dy
                           .Ret<Buffer>()  // dx
                           .Ret<Buffer>()  // drecord
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale")
                           .Attr<bool>("center_feature_scale"));

pybind11::capsule capsule(XLA_FFI_Handler* handler) {
  return pybind11::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace
}  // namespace dcnv3::cpu

PYBIND11_MODULE(_cpu, m) {
  using namespace dcnv3::cpu;
  m.doc() = "Handlers of the CPU custom calls, by target name.";
  m.def("targets", [] {
    pybind11::dict targets;
    targets["internimage_dcnv3_forward"] = capsule(kForward);
    targets["internimage_dcnv3_backward"] = capsule(kBackward);
    targets["internimage_dcnv3_fused_forward"] = capsule(kFusedForward);
    targets["internimage_dcnv3_fused_backward"] = capsule(kFusedBackward);
    targets["internimage_dwconv_norm_gelu_forward"] = capsule(dwconv::cpu::forward_handler());
    targets["internimage_dwconv_norm_gelu_backward"] = capsule(dwconv::cpu::backward_handler());
    targets["internimage_bias_gelu_forward"] = capsule(gelu::cpu::forward_handler());
    targets["internimage_bias_gelu_backward"] = capsule(gelu::cpu::backward_handler());
    targets["internimage_layer_norm_forward"] = capsule(layer_norm::cpu::forward_handler());
    targets["internimage_add_norm_forward"] = capsule(layer_norm::cpu::add_norm_handler());
    targets["internimage_norm_add_forward"] = capsule(layer_norm::cpu::norm_add_handler());
    // Without vector instructions for it XLA's own products are as good.
    if (::cpu::instruction_set() != ::cpu::InstructionSet::kBaseline) {
      targets["internimage_linear_forward"] = capsule(linear::cpu::forward_handler());
      targets["internimage_linear_gelu_forward"] = capsule(linear::cpu::gelu_forward_handler());
      targets["internimage_convolution_forward"] = capsule(linear::cpu::convolution_handler());
      targets["internimage_mlp_forward"] = capsule(linear::cpu::mlp_handler());
    }
    return targets;
  });
  m.def("instruction_set", &instruction_set_name);
  m.attr("version") = xla_ops::kVersion;
}
