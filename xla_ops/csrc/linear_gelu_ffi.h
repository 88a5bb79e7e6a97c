// The handlers' part of linear_bias_gelu that knows no platform: from a custom call's buffers and attributes
// to checked calls.
//
// Operands: x (..., C), kernel (..., C, K) and bias (..., K). What precedes the parameters' own axes also
// precedes x's, and says which rows use which parameters: `vmap` over them adds an axis to all.
#pragma once

#include <cstdint>
#include <string>

#include "ffi_types.h"
#include "linear_gelu_call.h"
#include "xla/ffi/api/ffi.h"

namespace linear_gelu {

namespace ffi = xla::ffi;

using xla_ops::kVersion;
using xla_ops::type_of;

using Operand = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

inline ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "internimage_linear_bias_gelu: " + message);
}

// The call of the first set of parameters; there are `sets`, one after the other in all buffers.
inline ffi::Error describe(Operand x, Operand kernel, Operand bias, Result y, int64_t version, Call* call,
                           int64_t* sets) {
  if (version != kVersion) return invalid("expected attributes of version " + std::to_string(kVersion));
  const auto xs = x.dimensions(), ks = kernel.dimensions(), bs = bias.dimensions();
  if (ks.size() < 2 || xs.size() < ks.size() || bs.size() != ks.size() - 1) {
    return invalid("expected x (..., C), kernel (C, K) and bias (K,)");
  }
  Call& s = *call;
  s.inputs = ks[ks.size() - 2], s.outputs = ks.back();
  if (xs.back() != s.inputs || bs.back() != s.outputs || s.inputs < 1 || s.outputs < 1) {
    return invalid("expected x (..., C), kernel (C, K) and bias (K,)");
  }
  *sets = 1;
  for (size_t i = 0; i + 2 < ks.size(); ++i) {
    if (ks[i] != xs[i] || bs[i] != xs[i]) return invalid("the leading axes of x, kernel and bias differ");
    *sets *= ks[i];
  }
  const int64_t rows = static_cast<int64_t>(x.element_count()) / s.inputs;
  s.rows = *sets > 0 ? rows / *sets : 0;
  if (!type_of(x.element_type(), &s.type) || !type_of(bias.element_type(), &s.bias_type) ||
      kernel.element_type() != x.element_type() || (s.type != s.bias_type && s.bias_type != Type::kFloat32)) {
    return invalid("expected a kernel of the dtype of x, and a bias of that or float32");
  }
  if (static_cast<int64_t>(y->element_count()) != rows * s.outputs || y->element_type() != x.element_type()) {
    return invalid("the result does not fit");
  }
  s.x = x.untyped_data(), s.kernel = kernel.untyped_data(), s.bias = bias.untyped_data();
  s.y = y->untyped_data();
  return ffi::Error::Success();
}

// The call of the next set of parameters.
inline Call next_set(Call s) {
  const auto bytes = [](Type type) { return type == Type::kFloat32 ? 4 : 2; };
  const auto after = [](const void* p, int64_t size) { return static_cast<const char*>(p) + size; };
  s.x = after(s.x, s.rows * s.inputs * bytes(s.type));
  s.kernel = after(s.kernel, s.inputs * s.outputs * bytes(s.type));
  s.bias = after(s.bias, s.outputs * bytes(s.bias_type));
  s.y = static_cast<char*>(s.y) + s.rows * s.outputs * bytes(s.type);
  return s;
}

}  // namespace linear_gelu
