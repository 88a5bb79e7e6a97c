// The CPU handlers of XLA's foreign function interface for bias_gelu.
//
// Operands: x (..., C) and bias (..., C). What precedes the bias's own axis also precedes x's, and says
// which rows use which bias: `vmap` over the bias adds an axis to both.
#include <string>

#include "cpu_handlers.h"
#include "cpu_layers.h"
#include "gelu_cpu.h"

namespace gelu::cpu {
namespace {

using namespace ::cpu;

using Operand = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "internimage_bias_gelu: " + message);
}

ffi::Future start(ffi::ThreadPool pool, Operand x, Operand bias, const Operand* dy, Result result,
                  int64_t version) {
  if (version != kVersion) {
    return failed(invalid("expected attributes of version " + std::to_string(kVersion)));
  }
  const auto xs = x.dimensions(), bs = bias.dimensions();
  if (bs.size() < 1 || bs.size() >= xs.size() || bs.back() != xs.back() || xs.back() < 1) {
    return failed(invalid("expected x (..., C) and bias (C,)"));
  }
  Call s = {};
  s.channels = xs.back();
  s.rows = static_cast<int64_t>(x.element_count()) / s.channels;
  int64_t sets = 1;
  for (size_t i = 0; i + 1 < bs.size(); ++i) {
    if (bs[i] != xs[i]) return failed(invalid("the leading axes of x and bias differ"));
    sets *= bs[i];
  }
  s.shared = sets > 0 ? s.rows / sets : 1;
  if (!type_of(x.element_type(), &s.type) || !type_of(bias.element_type(), &s.bias_type)) {
    return failed(invalid("expected float32, float64, bfloat16 or float16"));
  }
  if (s.type != s.bias_type && (s.type == Type::kFloat64 || s.bias_type != Type::kFloat32)) {
    return failed(invalid("expected a bias of the dtype of x, or float32"));
  }
  if (!same(*result, x) || (dy && !same(*dy, x))) return failed(invalid("dy or the result does not fit"));
  s.x = x.untyped_data(), s.bias = bias.untyped_data();
  s.dy = dy ? dy->untyped_data() : nullptr;
  s.result = result->untyped_data();
  const int64_t pieces = pieces_of(pool, s.rows, 5.0 * double(s.rows) * double(s.channels));
  return run(pool, pieces,
             [s, pieces](int64_t i) { compute(s, i * s.rows / pieces, (i + 1) * s.rows / pieces); });
}

ffi::Future forward_call(ffi::ThreadPool pool, Operand x, Operand bias, Result y, int64_t version) {
  return start(pool, x, bias, nullptr, y, version);
}

ffi::Future backward_call(ffi::ThreadPool pool, Operand x, Operand bias, Operand dy, Result dx,
                          int64_t version) {
  return start(pool, x, bias, &dy, dx, version);
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_call,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // bias
                           .Ret<Operand>()  // y
                           .Attr<int64_t>("version"));
XLA_FFI_DEFINE_HANDLER(kBackward, backward_call,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // bias
                           .Arg<Operand>()  // dy
                           .Ret<Operand>()  // dx
                           .Attr<int64_t>("version"));

}  // namespace

XLA_FFI_Handler* forward_handler() {
  return kForward;
}
XLA_FFI_Handler* backward_handler() {
  return kBackward;
}

}  // namespace gelu::cpu
