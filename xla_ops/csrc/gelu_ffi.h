// What the handlers of all platforms share for bias_gelu: from a custom call's buffers and attributes to a
// checked gelu::Call.
//
// Operands: x (..., C) and bias (..., C). What precedes the bias's own axis also precedes x's, and says
// which rows use which bias: `vmap` over the bias adds an axis to both.
#pragma once

#include <utility>

#include "ffi_types.h"
#include "gelu_call.h"

namespace gelu {

using namespace xla_ops;

constexpr char kName[] = "internimage_bias_gelu";

// The call of the forward, or of the backward if there is a dy.
inline ffi::Error describe(Operand x, Operand bias, const Operand* dy, Result result, int64_t version,
                           Call* call) {
  if (ffi::Error error = check_version(kName, version); error.failure()) return error;
  const Shape xs = x.dimensions(), bs = bias.dimensions();
  if (bs.size() < 1 || bs.size() >= xs.size() || bs.back() != xs.back() || xs.back() < 1) {
    return invalid(kName, "expected x (..., C) and bias (C,)");
  }
  const int64_t sets = sets_of(xs, bs, 1);
  if (sets < 0) return invalid(kName, "the leading axes of x and bias differ");
  Call& s = *call;
  s.channels = xs.back();
  s.rows = static_cast<int64_t>(x.element_count()) / s.channels;
  s.shared = sets > 0 ? s.rows / sets : 1;
  if (!types_of(x, bias, &s.type, &s.bias_type)) return invalid(kName, kTypes);
  if (!same(*result, x) || (dy && !same(*dy, x))) return invalid(kName, "dy or the result does not fit");
  s.x = x.untyped_data(), s.bias = bias.untyped_data();
  s.dy = dy ? dy->untyped_data() : nullptr;
  s.result = result->untyped_data();
  return ffi::Error::Success();
}

template <class Binding>
auto bind_forward(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // bias
      .template Ret<Operand>()  // y
      .template Attr<int64_t>("version");
}

template <class Binding>
auto bind_backward(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // bias
      .template Arg<Operand>()  // dy
      .template Ret<Operand>()  // dx
      .template Attr<int64_t>("version");
}

}  // namespace gelu
