// What the handlers of all platforms share for dwconv_norm_gelu: from a custom call's buffers and
// attributes to a checked dwconv::Call.
//
// Operands: x (..., N, H, W, C), kernel (..., K, K, C), bias, scale, offset (..., C). What precedes the
// parameters' own axes also precedes x's, and says which images use which parameters: `vmap` over the
// parameters adds an axis to all of them.
#pragma once

#include <utility>

#include "dwconv_call.h"
#include "ffi_types.h"

namespace dwconv {

using namespace xla_ops;

constexpr char kName[] = "internimage_dwconv_norm_gelu";

inline ffi::Error describe(Operand x, Operand kernel, Operand bias, Operand scale, Operand offset,
                           double epsilon, int64_t version, Call* call) {
  if (ffi::Error error = check_version(kName, version); error.failure()) return error;
  const Shape xs = x.dimensions(), ks = kernel.dimensions();
  if (xs.size() < 4 || ks.size() < 3 || ks.size() >= xs.size())
    return invalid(kName, "expected operands (..., C)");
  const size_t leading = ks.size() - 3;
  const int64_t sets = sets_of(xs, ks, 3);
  if (sets < 0) return invalid(kName, "the leading axes of x and kernel differ");
  Call& s = *call;
  s.batch = 1;
  for (size_t i = 0; i + 3 < xs.size(); ++i) s.batch *= xs[i];
  s.shared = sets > 0 ? s.batch / sets : 1;
  s.height = xs[xs.size() - 3], s.width = xs[xs.size() - 2], s.channels = xs[xs.size() - 1];
  s.size = ks[leading];
  if (s.height < 1 || s.width < 1 || s.channels < 1) return invalid(kName, "an empty map");
  if (s.size < 1 || s.size % 2 == 0 || ks[leading + 1] != s.size || ks[leading + 2] != s.channels) {
    return invalid(kName, "expected a kernel (K, K, C) with K odd");
  }
  for (const Operand& vector : {bias, scale, offset}) {
    if (!holds(vector, sets * s.channels, kernel.element_type())) {
      return invalid(kName, "bias, scale or offset does not fit");
    }
  }
  if (!types_of(x, kernel, &s.type, &s.parameters_type)) return invalid(kName, kTypes);
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
  if (!same(*y, x)) return invalid(kName, "the result does not fit");
  call->y = y->untyped_data();
  return ffi::Error::Success();
}

// `partial` is (..., N, chunks, 3 + K * K, C).
inline ffi::Error backward_call(Operand x, Operand kernel, Operand bias, Operand scale, Operand offset,
                                Operand dy, Result dx, Result partial, double epsilon, int64_t version,
                                Call* call) {
  ffi::Error error = describe(x, kernel, bias, scale, offset, epsilon, version, call);
  if (error.failure()) return error;
  if (!same(dy, x) || !same(*dx, x)) return invalid(kName, "dy or dx does not fit");
  const auto dims = partial->dimensions();
  const int64_t each = (3 + call->size * call->size) * call->channels;
  call->chunks = dims.size() < 3 ? 0 : dims[dims.size() - 3];
  const ffi::DataType real = call->type == Type::kFloat64 ? ffi::F64 : ffi::F32;
  if (call->chunks < 1 || !holds(*partial, call->batch * call->chunks * each, real)) {
    return invalid(kName, "the parameters' gradients do not fit");
  }
  call->dy = dy.untyped_data(), call->dx = dx->untyped_data(), call->partial = partial->untyped_data();
  return ffi::Error::Success();
}

template <class Binding>
auto bind_operands(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()   // x
      .template Arg<Operand>()   // kernel
      .template Arg<Operand>()   // bias
      .template Arg<Operand>()   // scale
      .template Arg<Operand>();  // offset
}

template <class Binding>
auto bind_forward(Binding&& binding) {
  return bind_operands(std::move(binding))
      .template Ret<Operand>()  // y
      .template Attr<double>("epsilon")
      .template Attr<int64_t>("version");
}

template <class Binding>
auto bind_backward(Binding&& binding) {
  return bind_operands(std::move(binding))
      .template Arg<Operand>()  // dy
      .template Ret<Operand>()  // dx
      .template Ret<Operand>()  // partial
      .template Attr<double>("epsilon")
      .template Attr<int64_t>("version");
}

}  // namespace dwconv
