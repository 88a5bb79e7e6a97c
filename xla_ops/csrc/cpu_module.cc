// The CPU handlers of XLA's foreign function interface, and the Python module that hands them over.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "cpu_handlers.h"
#include "cpu_layers.h"
#include "dcnv3_cpu.h"

namespace dcnv3::cpu {
namespace {

using namespace ::cpu;

ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "internimage_dcnv3: " + message);
}

// Fills the call's problem from the attributes and the shapes of x and of a tensor (N, Ho, Wo, ...).
// `geometry`: kernel, stride, pad, dilation, each (h, w), then group, remove_center, version.
ffi::Error describe(ffi::Span<const int64_t> geometry, double offset_scale, ffi::AnyBuffer x,
                    ffi::AnyBuffer points, Call* call) {
  if (geometry.size() != 11 || geometry[10] != kVersion) {
    return invalid("expected attributes of version " + std::to_string(kVersion));
  }
  // Any number of leading axes is the batch: `vmap` adds to them.
  const size_t rank = x.dimensions().size();
  if (rank < 3 || points.dimensions().size() != rank)
    return invalid("expected operands (..., H, W, channels)");
  const auto xs = x.dimensions().last(3), ps = points.dimensions().last(3);
  Problem& s = call->problem;
  s.kernel_h = geometry[0], s.kernel_w = geometry[1], s.stride_h = geometry[2], s.stride_w = geometry[3];
  s.pad_h = geometry[4], s.pad_w = geometry[5], s.dilation_h = geometry[6], s.dilation_w = geometry[7];
  s.group = geometry[8], s.remove_center = geometry[9] != 0;
  s.offset_scale = offset_scale;
  s.batch = 1;
  for (size_t i = 0; i + 3 < rank; ++i) {
    if (x.dimensions()[i] != points.dimensions()[i]) return invalid("the batches differ");
    s.batch *= x.dimensions()[i];
  }
  s.height = xs[0], s.width = xs[1], s.out_height = ps[0], s.out_width = ps[1];
  if (s.group < 1 || s.height < 1 || s.width < 1 || xs[2] % s.group)
    return invalid("group does not divide channels");
  if (s.height * s.width > INT32_MAX) return invalid("a map of more than 2^31 pixels");
  s.depth = xs[2] / s.group;
  s.points = s.kernel_h * s.kernel_w - (s.remove_center ? 1 : 0);
  if (!type_of(x.element_type(), &call->type) || !type_of(points.element_type(), &call->points_type)) {
    return invalid("expected float32, float64, bfloat16 or float16");
  }
  const bool same = call->type == call->points_type;
  if (!same && (call->type == Type::kFloat64 || call->points_type == Type::kFloat64)) {
    return invalid("float64 does not mix with another dtype");
  }
  call->x = x.untyped_data();
  return ffi::Error::Success();
}

ffi::Error separate(ffi::Span<const int64_t> geometry, double offset_scale, ffi::AnyBuffer x,
                    ffi::AnyBuffer offset, ffi::AnyBuffer mask, Call* call) {
  if (ffi::Error error = describe(geometry, offset_scale, x, offset, call); error.failure()) return error;
  const Problem& s = call->problem;
  const int64_t n = s.group * s.points, positions = s.batch * s.positions();
  if (offset.dimensions().back() != 2 * n || static_cast<int64_t>(mask.element_count()) != positions * n) {
    return invalid("offset or mask does not fit");
  }
  call->offset = {offset.untyped_data(), 2 * n, 2 * s.points};
  call->weight = {mask.untyped_data(), n, s.points};
  return ffi::Error::Success();
}

ffi::Error fused(ffi::Span<const int64_t> geometry, double offset_scale, bool centre, ffi::AnyBuffer x,
                 ffi::AnyBuffer record, Call* call) {
  if (ffi::Error error = describe(geometry, offset_scale, x, record, call); error.failure()) return error;
  const Problem& s = call->problem;
  const int64_t each = (3 * s.points + 1 + 3) / 4 * 4, width = record.dimensions().back();
  if (width != (s.group * each + 7) / 8 * 8) return invalid("the record's width does not fit");
  if (centre && (s.out_height != s.height || s.out_width != s.width))
    return invalid("a centre needs equal maps");
  call->fused = true;
  call->centre = centre;
  call->offset = {record.untyped_data(), width, each};
  return ffi::Error::Success();
}

ffi::Future start_forward(ffi::ThreadPool& pool, Call call, ffi::Result<ffi::AnyBuffer>& y) {
  const Problem& s = call.problem;
  if (static_cast<int64_t>(y->element_count()) != s.batch * s.positions() * s.channels()) {
    return failed(invalid("the result does not fit"));
  }
  call.y = y->untyped_data();
  const int64_t pairs = s.batch * s.positions() * s.group;
  const int64_t pieces = pieces_of(pool, pairs, 4.0 * pairs * s.points * (s.depth + 8));
  return run(pool, pieces, [call, pairs, pieces](int64_t i) {
    // A multiple of 16 pairs, so that no vector of lanes is split without need.
    const int64_t each = ((pairs + pieces - 1) / pieces + 31) / 32 * 32;
    forward(call, std::min(i * each, pairs), std::min((i + 1) * each, pairs));
  });
}

ffi::Future start_backward(ffi::ThreadPool& pool, Call call, ffi::AnyBuffer dy,
                           ffi::Result<ffi::AnyBuffer>& dx) {
  const Problem& s = call.problem;
  if (static_cast<int64_t>(dy.element_count()) != s.batch * s.positions() * s.channels() ||
      static_cast<int64_t>(dx->element_count()) != s.batch * s.height * s.width * s.channels()) {
    return failed(invalid("dy or dx does not fit"));
  }
  call.dy = dy.untyped_data();
  call.dx = dx->untyped_data();
  // One piece is one group of one image, or all of it where all is small.
  const double cost = 12.0 * s.batch * s.positions() * s.group * s.points * (s.depth + 8);
  const bool small = cost < kSmall;
  return run(pool, small ? 1 : s.batch * s.group, [call, small](int64_t i) {
    const Problem& s = call.problem;
    if (!small) return backward(call, i / s.group, i % s.group, i % s.group + 1);
    for (int64_t image = 0; image < s.batch; ++image) backward(call, image, 0, s.group);
  });
}

using Geometry = ffi::Span<const int64_t>;
using Result = ffi::Result<ffi::AnyBuffer>;

ffi::Future forward_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer offset,
                            ffi::AnyBuffer mask, Result y, Geometry geometry, double offset_scale) {
  Call call = {};
  if (auto error = separate(geometry, offset_scale, x, offset, mask, &call); error.failure())
    return failed(error);
  return start_forward(pool, call, y);
}

ffi::Future backward_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer offset,
                             ffi::AnyBuffer mask, ffi::AnyBuffer dy, Result dx, Result doffset, Result dmask,
                             Geometry geometry, double offset_scale) {
  Call call = {};
  if (auto error = separate(geometry, offset_scale, x, offset, mask, &call); error.failure())
    return failed(error);
  if (doffset->element_count() != offset.element_count() || dmask->element_count() != mask.element_count()) {
    return failed(invalid("the gradients do not fit"));
  }
  call.doffset = doffset->untyped_data();
  call.dweight = dmask->untyped_data();
  return start_backward(pool, call, dy, dx);
}

ffi::Future fused_forward_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer record, Result y,
                                  Geometry geometry, double offset_scale, bool centre) {
  Call call = {};
  if (auto error = fused(geometry, offset_scale, centre, x, record, &call); error.failure())
    return failed(error);
  return start_forward(pool, call, y);
}

ffi::Future fused_backward_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer record,
                                   ffi::AnyBuffer dy, Result dx, Result drecord, Geometry geometry,
                                   double offset_scale, bool centre) {
  Call call = {};
  if (auto error = fused(geometry, offset_scale, centre, x, record, &call); error.failure())
    return failed(error);
  if (drecord->element_count() != record.element_count()) return failed(invalid("the gradients do not fit"));
  call.doffset = drecord->untyped_data();
  return start_backward(pool, call, dy, dx);
}

auto bind() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>();
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_handler,
                       bind()
                           .Arg<ffi::AnyBuffer>()  // x
                           .Arg<ffi::AnyBuffer>()  // offset
                           .Arg<ffi::AnyBuffer>()  // mask
                           .Ret<ffi::AnyBuffer>()  // y
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale"));
XLA_FFI_DEFINE_HANDLER(kBackward, backward_handler,
                       bind()
                           .Arg<ffi::AnyBuffer>()  // x
                           .Arg<ffi::AnyBuffer>()  // offset
                           .Arg<ffi::AnyBuffer>()  // mask
                           .Arg<ffi::AnyBuffer>()  // dy
                           .Ret<ffi::AnyBuffer>()  // dx
                           .Ret<ffi::AnyBuffer>()  // doffset
                           .Ret<ffi::AnyBuffer>()  // dmask
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale"));
XLA_FFI_DEFINE_HANDLER(kFusedForward, fused_forward_handler,
                       bind()
                           .Arg<ffi::AnyBuffer>()  // x
                           .Arg<ffi::AnyBuffer>()  // record
                           .Ret<ffi::AnyBuffer>()  // y
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale")
                           .Attr<bool>("center_feature_scale"));
XLA_FFI_DEFINE_HANDLER(kFusedBackward, fused_backward_handler,
                       bind()
                           .Arg<ffi::AnyBuffer>()  // x
                           .Arg<ffi::AnyBuffer>()  // record
                           .Arg<ffi::AnyBuffer>()  // dy
                           .Ret<ffi::AnyBuffer>()  // dx
                           .Ret<ffi::AnyBuffer>()  // drecord
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
    return targets;
  });
  m.def("instruction_set", &instruction_set_name);
  m.attr("version") = kVersion;
}
