// What the handlers of all platforms share for bias_gelu: from a custom call's buffers and attributes to a
// checked gelu::Call.
//
// Operands: x (..., C) and bias (..., C). What precedes the bias's own axis also precedes x's, and says
// which rows use which bias: `vmap` over the bias adds an axis to both.
#pragma once

#include <cstdint>
#include <string>

#include "ffi_types.h"
#include "gelu_call.h"
#include "xla/ffi/api/ffi.h"

namespace gelu {

namespace ffi = xla::ffi;

using xla_ops::kVersion;
using xla_ops::same;
using xla_ops::type_of;

using Operand = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

inline ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "internimage_bias_gelu: " + message);
}

// The call of the forward, or of the backward if there is a dy.
inline ffi::Error describe(Operand x, Operand bias, const Operand* dy, Result result, int64_t version,
                           Call* call) {
  if (version != kVersion) {
    return invalid("expected attributes of version " + std::to_string(kVersion));
  }
  const auto xs = x.dimensions(), bs = bias.dimensions();
  if (bs.size() < 1 || bs.size() >= xs.size() || bs.back() != xs.back() || xs.back() < 1) {
    return invalid("expected x (..., C) and bias (C,)");
  }
  Call& s = *call;
  s.channels = xs.back();
  s.rows = static_cast<int64_t>(x.element_count()) / s.channels;
  int64_t sets = 1;
  for (size_t i = 0; i + 1 < bs.size(); ++i) {
    if (bs[i] != xs[i]) return invalid("the leading axes of x and bias differ");
    sets *= bs[i];
  }
  s.shared = sets > 0 ? s.rows / sets : 1;
  if (!type_of(x.element_type(), &s.type) || !type_of(bias.element_type(), &s.bias_type)) {
    return invalid("expected float32, float64, bfloat16 or float16");
  }
  if (s.type != s.bias_type && (s.type == Type::kFloat64 || s.bias_type != Type::kFloat32)) {
    return invalid("expected a bias of the dtype of x, or float32");
  }
  if (!same(*result, x) || (dy && !same(*dy, x))) return invalid("dy or the result does not fit");
  s.x = x.untyped_data(), s.bias = bias.untyped_data();
  s.dy = dy ? dy->untyped_data() : nullptr;
  s.result = result->untyped_data();
  return ffi::Error::Success();
}

}  // namespace gelu
