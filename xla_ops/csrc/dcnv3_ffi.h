// What the handlers of all platforms share: from a custom call's buffers and attributes to a checked
// dcnv3::Call. Any number of leading axes is the batch: `vmap` adds to them.
#pragma once

#include <cstdint>
#include <utility>

#include "dcnv3_call.h"
#include "ffi_types.h"

namespace dcnv3 {

using namespace xla_ops;

using Geometry = ffi::Span<const int64_t>;  // see describe

constexpr char kName[] = "internimage_dcnv3";

constexpr int64_t kLargestSide = 1 << 24;  // whose pixels float32 tells apart

// Fills the call's problem from the attributes and the shapes of x and of a tensor (N, Ho, Wo, ...).
// `geometry`: kernel, stride, pad, dilation, each (h, w), then group, remove_center, version.
inline ffi::Error describe(Geometry geometry, double offset_scale, Operand x, Operand points, Call* call) {
  const int64_t version = geometry.size() == 11 ? geometry[10] : 0;
  if (ffi::Error error = check_version(kName, version); error.failure()) return error;
  const size_t rank = x.dimensions().size();
  if (rank < 3 || points.dimensions().size() != rank)
    return invalid(kName, "expected operands (..., H, W, channels)");
  const auto xs = x.dimensions().last(3), ps = points.dimensions().last(3);
  Problem& s = call->problem;
  s.kernel_h = geometry[0], s.kernel_w = geometry[1], s.stride_h = geometry[2], s.stride_w = geometry[3];
  s.pad_h = geometry[4], s.pad_w = geometry[5], s.dilation_h = geometry[6], s.dilation_w = geometry[7];
  s.group = geometry[8], s.remove_center = geometry[9] != 0;
  s.offset_scale = offset_scale;
  s.batch = 1;
  for (size_t i = 0; i + 3 < rank; ++i) {
    if (x.dimensions()[i] != points.dimensions()[i]) return invalid(kName, "the batches differ");
    s.batch *= x.dimensions()[i];
  }
  s.height = xs[0], s.width = xs[1], s.out_height = ps[0], s.out_width = ps[1];
  if (s.group < 1 || s.height < 1 || s.width < 1 || xs[2] % s.group)
    return invalid(kName, "group does not divide channels");
  if (s.out_height < 1 || s.out_width < 1) return invalid(kName, "no positions");
  if (s.height * s.width > INT32_MAX) return invalid(kName, "a map of more than 2^31 pixels");
  s.depth = xs[2] / s.group;
  s.points = s.kernel_h * s.kernel_w - (s.remove_center ? 1 : 0);
  if (!type_of(x.element_type(), &call->type) || !type_of(points.element_type(), &call->points_type)) {
    return invalid(kName, "expected float32, float64, bfloat16 or float16");
  }
  const bool mixed = call->type != call->points_type;
  if (call->type != Type::kFloat64 && (s.height > kLargestSide || s.width > kLargestSide)) {
    return invalid(kName, "a side of more than 2^24 pixels");
  }
  if (mixed && (call->type == Type::kFloat64 || call->points_type == Type::kFloat64)) {
    return invalid(kName, "float64 does not mix with another dtype");
  }
  call->x = x.untyped_data();
  return ffi::Error::Success();
}

inline ffi::Error separate(Geometry geometry, double offset_scale, Operand x, Operand offset, Operand mask,
                           Call* call) {
  if (ffi::Error error = describe(geometry, offset_scale, x, offset, call); error.failure()) return error;
  const Problem& s = call->problem;
  const int64_t n = s.group * s.points, positions = s.batch * s.positions();
  if (offset.dimensions().back() != 2 * n || !holds(mask, positions * n, offset.element_type())) {
    return invalid(kName, "offset or mask does not fit");
  }
  call->offset = {offset.untyped_data(), 2 * n, 2 * s.points};
  call->weight = {mask.untyped_data(), n, s.points};
  return ffi::Error::Success();
}

inline ffi::Error fused(Geometry geometry, double offset_scale, bool centre, Operand x, Operand record,
                        Call* call) {
  if (ffi::Error error = describe(geometry, offset_scale, x, record, call); error.failure()) return error;
  const Problem& s = call->problem;
  const int64_t each = (3 * s.points + 1 + 3) / 4 * 4, width = record.dimensions().back();
  if (width != (s.group * each + 7) / 8 * 8) return invalid(kName, "the record's width does not fit");
  if (centre && (s.out_height != s.height || s.out_width != s.width))
    return invalid(kName, "a centre needs equal maps");
  call->fused = true;
  call->centre = centre;
  call->offset = {record.untyped_data(), width, each};
  return ffi::Error::Success();
}

// The calls of the four targets.
inline ffi::Error output(Operand x, Result y, Call* call) {
  const Problem& s = call->problem;
  if (!holds(*y, s.batch * s.positions() * s.channels(), x.element_type())) {
    return invalid(kName, "the result does not fit");
  }
  call->y = y->untyped_data();
  return ffi::Error::Success();
}

inline ffi::Error gradients(Operand x, Operand dy, Result dx, Call* call) {
  const Problem& s = call->problem;
  if (!holds(dy, s.batch * s.positions() * s.channels(), x.element_type()) || !same(*dx, x)) {
    return invalid(kName, "dy or dx does not fit");
  }
  call->dy = dy.untyped_data();
  call->dx = dx->untyped_data();
  return ffi::Error::Success();
}

inline ffi::Error forward_call(Operand x, Operand offset, Operand mask, Result y, Geometry geometry,
                               double offset_scale, Call* call) {
  ffi::Error error = separate(geometry, offset_scale, x, offset, mask, call);
  return error.failure() ? error : output(x, y, call);
}

inline ffi::Error backward_call(Operand x, Operand offset, Operand mask, Operand dy, Result dx,
                                Result doffset, Result dmask, Geometry geometry, double offset_scale,
                                Call* call) {
  ffi::Error error = separate(geometry, offset_scale, x, offset, mask, call);
  if (error.failure()) return error;
  if (!same(*doffset, offset) || !same(*dmask, mask)) {
    return invalid(kName, "the gradients do not fit");
  }
  call->doffset = doffset->untyped_data();
  call->dweight = dmask->untyped_data();
  return gradients(x, dy, dx, call);
}

inline ffi::Error fused_forward_call(Operand x, Operand record, Result y, Geometry geometry,
                                     double offset_scale, bool centre, Call* call) {
  ffi::Error error = fused(geometry, offset_scale, centre, x, record, call);
  return error.failure() ? error : output(x, y, call);
}

inline ffi::Error fused_backward_call(Operand x, Operand record, Operand dy, Result dx, Result drecord,
                                      Geometry geometry, double offset_scale, bool centre, Call* call) {
  ffi::Error error = fused(geometry, offset_scale, centre, x, record, call);
  if (error.failure()) return error;
  if (!same(*drecord, record)) return invalid(kName, "the gradients do not fit");
  call->doffset = drecord->untyped_data();
  return gradients(x, dy, dx, call);
}

template <class Binding>
auto bind_forward(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // offset
      .template Arg<Operand>()  // mask
      .template Ret<Operand>()  // y
      .template Attr<Geometry>("geometry")
      .template Attr<double>("offset_scale");
}

template <class Binding>
auto bind_backward(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // offset
      .template Arg<Operand>()  // mask
      .template Arg<Operand>()  // dy
      .template Ret<Operand>()  // dx
      .template Ret<Operand>()  // doffset
      .template Ret<Operand>()  // dmask
      .template Attr<Geometry>("geometry")
      .template Attr<double>("offset_scale");
}

template <class Binding>
auto bind_fused_forward(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // record
      .template Ret<Operand>()  // y
      .template Attr<Geometry>("geometry")
      .template Attr<double>("offset_scale")
      .template Attr<bool>("center_feature_scale");
}

template <class Binding>
auto bind_fused_backward(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // record
      .template Arg<Operand>()  // dy
      .template Ret<Operand>()  // dx
      .template Ret<Operand>()  // drecord
      .template Attr<Geometry>("geometry")
      .template Attr<double>("offset_scale")
      .template Attr<bool>("center_feature_scale");
}

}  // namespace dcnv3
