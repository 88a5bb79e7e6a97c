// The CPU handler of XLA's foreign function interface for layer_norm.
//
// Operands: x (..., C), scale (..., C) and bias (..., C). What precedes the parameters' own axis also
// precedes x's, and says which rows use which parameters: `vmap` over them adds an axis to all.
#include <string>

#include "cpu_handlers.h"
#include "cpu_layers.h"
#include "norm_cpu.h"

namespace norm::cpu {
namespace {

using namespace ::cpu;
using xla_ops::same;
using xla_ops::type_of;

using Operand = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

ffi::Error describe(Operand x, Operand scale, Operand bias, Result y, double epsilon, int64_t version,
                    Call* call) {
  const auto invalid = [](const std::string& message) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "internimage_layer_norm: " + message);
  };
  if (version != xla_ops::kVersion) {
    return invalid("expected attributes of version " + std::to_string(xla_ops::kVersion));
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

ffi::Future forward_call(ffi::ThreadPool pool, Operand x, Operand scale, Operand bias, Result y,
                         double epsilon, int64_t version) {
  Call s = {};
  ffi::Error error = describe(x, scale, bias, y, epsilon, version, &s);
  if (error.failure()) return failed(error);
  const int64_t pieces = pieces_of(pool, s.rows, 2.0 * double(s.rows) * double(s.channels));
  return run(pool, pieces,
             [s, pieces](int64_t i) { forward(s, i * s.rows / pieces, (i + 1) * s.rows / pieces); });
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_call,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // scale
                           .Arg<Operand>()  // bias
                           .Ret<Operand>()  // y
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"));

}  // namespace

XLA_FFI_Handler* forward_handler() {
  return kForward;
}

}  // namespace norm::cpu
