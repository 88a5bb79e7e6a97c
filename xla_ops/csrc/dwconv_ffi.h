// What the handlers of all platforms share for dwconv_norm_gelu: from a custom call's buffers and
// attributes to a checked dwconv::Call.
//
// Operands: x (..., N, H, W, C), kernel (..., K, K, C), bias, scale, offset (..., C). What precedes the
// parameters' own axes also precedes x's, and says which images use which parameters: `vmap` over the
// parameters adds an axis to all of them.
#pragma once

#include <cstdint>
#include <string>

#include "dwconv_call.h"
#include "ffi_types.h"
#include "xla/ffi/api/ffi.h"

namespace dwconv {

namespace ffi = xla::ffi;

using xla_ops::kVersion;
using xla_ops::same;
using xla_ops::type_of;

using Operand = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

inline ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "internimage_dwconv_norm_gelu: " + message);
}

inline ffi::Error describe(Operand x, Operand kernel, Operand bias, Operand scale, Operand offset,
                           double epsilon, int64_t version, Call* call) {
  if (version != kVersion) return invalid("expected attributes of version " + std::to_string(kVersion));
  const auto xs = x.dimensions(), ks = kernel.dimensions();
  if (xs.size() < 4 || ks.size() < 3 || ks.size() >= xs.size()) return invalid("expected operands (..., C)");
  const size_t leading = ks.size() - 3;
  Call& s = *call;
  int64_t sets = 1;
  s.batch = 1;
  for (size_t i = 0; i + 3 < xs.size(); ++i) {
    s.batch *= xs[i];
    if (i >= leading) continue;
    sets *= xs[i];
    if (ks[i] != xs[i]) return invalid("the leading axes of x and kernel differ");
  }
  s.shared = sets > 0 ? s.batch / sets : 1;
  s.height = xs[xs.size() - 3], s.width = xs[xs.size() - 2], s.channels = xs[xs.size() - 1];
  s.size = ks[leading];
  if (s.height < 1 || s.width < 1 || s.channels < 1) return invalid("an empty map");
  if (s.size < 1 || s.size % 2 == 0 || ks[leading + 1] != s.size || ks[leading + 2] != s.channels) {
    return invalid("expected a kernel (K, K, C) with K odd");
  }
  for (const Operand& vector : {bias, scale, offset}) {
    if (static_cast<int64_t>(vector.element_count()) != sets * s.channels ||
        vector.element_type() != kernel.element_type()) {
      return invalid("bias, scale or offset does not fit");
    }
  }
  if (!type_of(x.element_type(), &s.type) || !type_of(kernel.element_type(), &s.parameters_type)) {
    return invalid("expected float32, float64, bfloat16 or float16");
  }
  if (s.type != s.parameters_type && (s.type == Type::kFloat64 || s.parameters_type != Type::kFloat32)) {
    return invalid("expected parameters of the dtype of x, or float32");
  }
  s.epsilon = epsilon;
  s.x = x.untyped_data(), s.kernel = kernel.untyped_data();
  s.bias = bias.untyped_data(), s.scale = scale.untyped_data(), s.offset = offset.untyped_data();
  return ffi::Error::Success();
}

// The calls of the two targets.
inline ffi::Error forward_call(Operand x, Operand kernel, Operand bias, Operand scale, Operand offset,
                               Result y, double epsilon, int64_t version, Call* call) {
  ffi::Error error = describe(x, kernel, bias, scale, offset, epsilon, version, call);
  if (error.failure()) return error;
  if (!same(*y, x)) return invalid("the result does not fit");
  call->y = y->untyped_data();
  return ffi::Error::Success();
}

// `partial` is (..., N, chunks, 3 + K * K, C).
inline ffi::Error backward_call(Operand x, Operand kernel, Operand bias, Operand scale, Operand offset,
                                Operand dy, Result dx, Result partial, double epsilon, int64_t version,
                                Call* call) {
  ffi::Error error = describe(x, kernel, bias, scale, offset, epsilon, version, call);
  if (error.failure()) return error;
  if (!same(dy, x) || !same(*dx, x)) return invalid("dy or dx does not fit");
  const auto dims = partial->dimensions();
  const int64_t each = (3 + call->size * call->size) * call->channels;
  call->chunks = dims.size() < 3 ? 0 : dims[dims.size() - 3];
  const ffi::DataType real = call->type == Type::kFloat64 ? ffi::F64 : ffi::F32;
  if (call->chunks < 1 ||
      static_cast<int64_t>(partial->element_count()) != call->batch * call->chunks * each ||
      partial->element_type() != real) {
    return invalid("the parameters' gradients do not fit");
  }
  call->dy = dy.untyped_data(), call->dx = dx->untyped_data(), call->partial = partial->untyped_data();
  return ffi::Error::Success();
}

}  // namespace dwconv
