// What the handlers of all platforms share for layer_norm, add_norm and norm_add: from a custom call's
// buffers and attributes to a checked layer_norm::Call, or BackwardCall.
//
// Operands: x (..., C), with an addition also residual (..., C), scale (..., C) and bias (..., C). What
// precedes the parameters' own axis also precedes x's, and says which rows use which parameters: `vmap` over
// them adds an axis to all. The gradients' are x (..., N, H, W, C), scale, dy and, of a sum's norm, what else
// the sum's gradient is, and their results dx and (..., N, parts, 2, C).
#pragma once

#include <cstdint>
#include <string>

#include "ffi_types.h"
#include "norm_call.h"
#include "xla/ffi/api/ffi.h"

namespace layer_norm {

namespace ffi = xla::ffi;

using xla_ops::kVersion;
using xla_ops::same;
using xla_ops::type_of;

using Operand = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

inline ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "internimage_layer_norm: " + message);
}

inline ffi::Error describe(Operand x, Operand scale, Operand bias, Result y, double epsilon, int64_t version,
                           Call* call) {
  if (version != kVersion) {
    return invalid("expected attributes of version " + std::to_string(kVersion));
  }
  const auto xs = x.dimensions(), ps = scale.dimensions();
  if (ps.size() < 1 || ps.size() >= xs.size() || ps.back() != xs.back() || xs.back() < 1 ||
      !same(scale, bias)) {
    return invalid("expected x (..., C), scale (C,) and bias (C,)");
  }
  Call& s = *call;
  s.channels = xs.back(), s.epsilon = epsilon;
  s.rows = static_cast<int64_t>(x.element_count()) / s.channels;
  int64_t sets = 1;
  for (size_t i = 0; i + 1 < ps.size(); ++i) {
    if (ps[i] != xs[i]) return invalid("the leading axes of x and the parameters differ");
    sets *= ps[i];
  }
  s.shared = sets > 0 ? s.rows / sets : 1;
  if (!type_of(x.element_type(), &s.type) || !type_of(scale.element_type(), &s.parameters_type)) {
    return invalid("expected float32, float64, bfloat16 or float16");
  }
  if (s.type != s.parameters_type && (s.type == Type::kFloat64 || s.parameters_type != Type::kFloat32)) {
    return invalid("expected parameters of the dtype of x, or float32");
  }
  if (!same(*y, x)) return invalid("the result does not fit");
  s.x = x.untyped_data(), s.scale = scale.untyped_data(), s.bias = bias.untyped_data();
  s.y = y->untyped_data();
  return ffi::Error::Success();
}

// The same for norm_add.
inline ffi::Error describe(Operand x, Operand residual, Operand scale, Operand bias, Result y, double epsilon,
                           int64_t version, Call* call) {
  ffi::Error error = describe(x, scale, bias, y, epsilon, version, call);
  if (error.failure()) return error;
  if (!same(residual, x)) return invalid("the residual does not fit");
  call->residual = residual.untyped_data();
  return ffi::Error::Success();
}

// The same for add_norm.
inline ffi::Error describe(Operand x, Operand residual, Operand scale, Operand bias, Result total, Result y,
                           double epsilon, int64_t version, Call* call) {
  ffi::Error error = describe(x, residual, scale, bias, y, epsilon, version, call);
  if (error.failure()) return error;
  if (!same(*total, x)) return invalid("the sum does not fit");
  call->total = total->untyped_data();
  return ffi::Error::Success();
}

// The gradients' call, without a sum's.
inline ffi::Error describe_backward(Operand x, Operand scale, Operand dy, Result dx, Result dparameters,
                                    double epsilon, int64_t version, BackwardCall* call) {
  if (version != kVersion) {
    return invalid("expected attributes of version " + std::to_string(kVersion));
  }
  const auto xs = x.dimensions(), ss = scale.dimensions(), ps = dparameters->dimensions();
  if (ss.size() < 1 || xs.size() < ss.size() + 3 || ss.back() != xs.back() || xs.back() < 1) {
    return invalid("expected x (..., N, H, W, C) and scale (C,)");
  }
  BackwardCall& s = *call;
  const size_t batch = xs.size() - 3;  // axes
  int64_t images = 1, sets = 1;
  bool fits = ps.size() == batch + 3 && ps[batch] >= 1 && ps[batch + 1] == 2 && ps[batch + 2] == xs.back();
  for (size_t i = 0; i < batch; ++i) {
    fits = fits && ps[i] == xs[i];
    images *= xs[i];
    if (i + 1 < ss.size() && ss[i] != xs[i]) return invalid("the leading axes of x and scale differ");
    if (i + 1 < ss.size()) sets *= ss[i];
  }
  if (!fits || !same(*dx, x)) return invalid("the results do not fit");
  if (!same(dy, x)) return invalid("dy does not fit");
  s.parts_of_image = ps[batch], s.parts = images * s.parts_of_image;
  s.image_rows = xs[batch] * xs[batch + 1], s.channels = xs.back(), s.epsilon = epsilon;
  s.shared = sets > 0 ? s.parts / sets : 1;
  Type sums;
  if (!type_of(x.element_type(), &s.type) || !type_of(scale.element_type(), &s.parameters_type)) {
    return invalid("expected float32, float64, bfloat16 or float16");
  }
  if (s.type != s.parameters_type && (s.type == Type::kFloat64 || s.parameters_type != Type::kFloat32)) {
    return invalid("expected scale of the dtype of x, or float32");
  }
  if (!type_of(dparameters->element_type(), &sums) ||
      sums != (s.type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32)) {
    return invalid("expected sums of at least float32");
  }
  s.x = x.untyped_data(), s.scale = scale.untyped_data(), s.dy = dy.untyped_data();
  s.dx = dx->untyped_data(), s.dparameters = dparameters->untyped_data();
  return ffi::Error::Success();
}

}  // namespace layer_norm
