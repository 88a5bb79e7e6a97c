// What the handlers of all platforms share for layer_norm, add_norm and norm_add: from a custom call's
// buffers and attributes to a checked layer_norm::Call, or BackwardCall.
//
// Operands: x (..., C), with an addition also residual (..., C), scale (..., C) and bias (..., C). What
// precedes the parameters' own axis also precedes x's, and says which rows use which parameters: `vmap` over
// them adds an axis to all. The gradients' are x (..., N, H, W, C), scale, dy and, of a sum's norm, what else
// the sum's gradient is, and their results dx and (..., N, parts, 2, C).
#pragma once

#include <utility>

#include "ffi_types.h"
#include "norm_call.h"

namespace layer_norm {

using namespace xla_ops;

constexpr char kNorm[] = "internimage_layer_norm";
constexpr char kAddNorm[] = "internimage_add_norm";
constexpr char kNormAdd[] = "internimage_norm_add";

inline ffi::Error describe(const char* name, Operand x, Operand scale, Operand bias, Result y, double epsilon,
                           int64_t version, Call* call) {
  if (ffi::Error error = check_version(name, version); error.failure()) return error;
  const Shape xs = x.dimensions(), ps = scale.dimensions();
  if (ps.size() < 1 || ps.size() >= xs.size() || ps.back() != xs.back() || xs.back() < 1 ||
      !same(scale, bias)) {
    return invalid(name, "expected x (..., C), scale (C,) and bias (C,)");
  }
  Call& s = *call;
  s.channels = xs.back(), s.epsilon = epsilon;
  s.rows = static_cast<int64_t>(x.element_count()) / s.channels;
  const int64_t sets = sets_of(xs, ps, 1);
  if (sets < 0) return invalid(name, "the leading axes of x and the parameters differ");
  s.shared = sets > 0 ? s.rows / sets : 1;
  if (!types_of(x, scale, &s.type, &s.parameters_type)) return invalid(name, kTypes);
  if (!same(*y, x)) return invalid(name, "the result does not fit");
  s.x = x.untyped_data(), s.scale = scale.untyped_data(), s.bias = bias.untyped_data();
  s.y = y->untyped_data();
  return ffi::Error::Success();
}

// The same for norm_add.
inline ffi::Error describe(const char* name, Operand x, Operand residual, Operand scale, Operand bias,
                           Result y, double epsilon, int64_t version, Call* call) {
  ffi::Error error = describe(name, x, scale, bias, y, epsilon, version, call);
  if (error.failure()) return error;
  if (!same(residual, x)) return invalid(name, "the residual does not fit");
  call->residual = residual.untyped_data();
  return ffi::Error::Success();
}

// The same for add_norm.
inline ffi::Error describe(const char* name, Operand x, Operand residual, Operand scale, Operand bias,
                           Result total, Result y, double epsilon, int64_t version, Call* call) {
  ffi::Error error = describe(name, x, residual, scale, bias, y, epsilon, version, call);
  if (error.failure()) return error;
  if (!same(*total, x)) return invalid(name, "the sum does not fit");
  call->total = total->untyped_data();
  return ffi::Error::Success();
}

// The gradients' call, without a sum's.
inline ffi::Error describe_backward(const char* name, Operand x, Operand scale, Operand dy, Result dx,
                                    Result dparameters, double epsilon, int64_t version, BackwardCall* call) {
  if (ffi::Error error = check_version(name, version); error.failure()) return error;
  const Shape xs = x.dimensions(), ss = scale.dimensions(), ps = dparameters->dimensions();
  if (ss.size() < 1 || xs.size() < ss.size() + 3 || ss.back() != xs.back() || xs.back() < 1) {
    return invalid(name, "expected x (..., N, H, W, C) and scale (C,)");
  }
  BackwardCall& s = *call;
  const size_t batch = xs.size() - 3;  // axes
  const int64_t sets = sets_of(xs, ss, 1);
  if (sets < 0) return invalid(name, "the leading axes of x and scale differ");
  int64_t images = 1;
  bool fits = ps.size() == batch + 3 && ps[batch] >= 1 && ps[batch + 1] == 2 && ps[batch + 2] == xs.back();
  for (size_t i = 0; i < batch; ++i) {
    fits = fits && ps[i] == xs[i];
    images *= xs[i];
  }
  if (!fits || !same(*dx, x)) return invalid(name, "the results do not fit");
  if (!same(dy, x)) return invalid(name, "dy does not fit");
  s.parts_of_image = ps[batch], s.parts = images * s.parts_of_image;
  s.image_rows = xs[batch] * xs[batch + 1], s.channels = xs.back(), s.epsilon = epsilon;
  s.shared = sets > 0 ? s.parts / sets : 1;
  Type sums;
  if (!types_of(x, scale, &s.type, &s.parameters_type)) return invalid(name, kTypes);
  if (!type_of(dparameters->element_type(), &sums) ||
      sums != (s.type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32)) {
    return invalid(name, "expected sums of at least float32");
  }
  s.x = x.untyped_data(), s.scale = scale.untyped_data(), s.dy = dy.untyped_data();
  s.dx = dx->untyped_data(), s.dparameters = dparameters->untyped_data();
  return ffi::Error::Success();
}

template <class Binding>
auto bind_forward(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // scale
      .template Arg<Operand>()  // bias
      .template Ret<Operand>()  // y
      .template Attr<double>("epsilon")
      .template Attr<int64_t>("version");
}

template <class Binding>
auto bind_norm_add(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // residual
      .template Arg<Operand>()  // scale
      .template Arg<Operand>()  // bias
      .template Ret<Operand>()  // y
      .template Attr<double>("epsilon")
      .template Attr<int64_t>("version");
}

template <class Binding>
auto bind_add_norm(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // residual
      .template Arg<Operand>()  // scale
      .template Arg<Operand>()  // bias
      .template Ret<Operand>()  // total
      .template Ret<Operand>()  // y
      .template Attr<double>("epsilon")
      .template Attr<int64_t>("version");
}

template <class Binding>
auto bind_backward(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // scale
      .template Arg<Operand>()  // dy
      .template Ret<Operand>()  // dx
      .template Ret<Operand>()  // dparameters
      .template Attr<double>("epsilon")
      .template Attr<int64_t>("version");
}

template <class Binding>
auto bind_add_norm_backward(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // total
      .template Arg<Operand>()  // scale
      .template Arg<Operand>()  // dtotal
      .template Arg<Operand>()  // dy
      .template Ret<Operand>()  // dx
      .template Ret<Operand>()  // dparameters
      .template Attr<double>("epsilon")
      .template Attr<int64_t>("version");
}

}  // namespace layer_norm
