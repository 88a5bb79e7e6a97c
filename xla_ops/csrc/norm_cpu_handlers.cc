// The CPU handler of XLA's foreign function interface for layer_norm, add_norm and norm_add.
#include "cpu_handlers.h"
#include "cpu_module.h"
#include "norm_cpu.h"
#include "norm_ffi.h"

namespace layer_norm::cpu {
namespace {

using namespace ::cpu;

template <class... Results>
ffi::Future start(ffi::ThreadPool& pool, const Call& s, Results&... results) {
  prefer_large_pages(results...);
  constexpr double kCost = 6;  // of a number: mostly of its way from memory and back
  const int64_t pieces = pieces_of(pool, s.rows, kCost * double(s.rows) * double(s.channels));
  return run(pool, pieces,
             [s, pieces](int64_t i) { forward(s, i * s.rows / pieces, (i + 1) * s.rows / pieces); });
}

ffi::Future forward_call(ffi::ThreadPool pool, Operand x, Operand scale, Operand bias, Result y,
                         double epsilon, int64_t version) {
  Call s = {};
  ffi::Error error = describe(x, scale, bias, y, epsilon, version, &s);
  return error.failure() ? failed(error) : start(pool, s, y);
}

ffi::Future norm_add_call(ffi::ThreadPool pool, Operand x, Operand residual, Operand scale, Operand bias,
                          Result y, double epsilon, int64_t version) {
  Call s = {};
  ffi::Error error = describe(x, residual, scale, bias, y, epsilon, version, &s);
  return error.failure() ? failed(error) : start(pool, s, y);
}

ffi::Future add_norm_call(ffi::ThreadPool pool, Operand x, Operand residual, Operand scale, Operand bias,
                          Result total, Result y, double epsilon, int64_t version) {
  Call s = {};
  ffi::Error error = describe(x, residual, scale, bias, total, y, epsilon, version, &s);
  return error.failure() ? failed(error) : start(pool, s, total, y);
}

ffi::Future start(ffi::ThreadPool& pool, const BackwardCall& s, Result& dx) {
  prefer_large_pages(dx);
  // The parts are the caller's, so that sums do not depend on threads; small ones go together.
  const double numbers = double(s.parts / s.parts_of_image) * double(s.image_rows) * double(s.channels);
  constexpr double kCost = 12;  // of a number: two maps to read, and twice the sums
  const int64_t pieces = pieces_of(pool, s.parts, kCost * numbers);
  return run(pool, pieces, [s, pieces](int64_t i) {
    for (int64_t part = i * s.parts / pieces; part < (i + 1) * s.parts / pieces; ++part) backward(s, part);
  });
}

ffi::Future backward_call(ffi::ThreadPool pool, Operand x, Operand scale, Operand dy, Result dx,
                          Result dparameters, double epsilon, int64_t version) {
  BackwardCall s = {};
  ffi::Error error = describe_backward(x, scale, dy, dx, dparameters, epsilon, version, &s);
  return error.failure() ? failed(error) : start(pool, s, dx);
}

ffi::Future add_norm_backward_call(ffi::ThreadPool pool, Operand total, Operand scale, Operand dtotal,
                                   Operand dy, Result dx, Result dparameters, double epsilon,
                                   int64_t version) {
  BackwardCall s = {};
  ffi::Error error = describe_backward(total, scale, dy, dx, dparameters, epsilon, version, &s);
  if (error.failure()) return failed(error);
  if (!same(dtotal, total)) return failed(invalid("the sum's gradient does not fit"));
  s.dtotal = dtotal.untyped_data();
  return start(pool, s, dx);
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
XLA_FFI_DEFINE_HANDLER(kNormAdd, norm_add_call,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // residual
                           .Arg<Operand>()  // scale
                           .Arg<Operand>()  // bias
                           .Ret<Operand>()  // y
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"));
XLA_FFI_DEFINE_HANDLER(kAddNorm, add_norm_call,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // residual
                           .Arg<Operand>()  // scale
                           .Arg<Operand>()  // bias
                           .Ret<Operand>()  // total
                           .Ret<Operand>()  // y
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"));

XLA_FFI_DEFINE_HANDLER(kBackward, backward_call,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // scale
                           .Arg<Operand>()  // dy
                           .Ret<Operand>()  // dx
                           .Ret<Operand>()  // dparameters
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"));
XLA_FFI_DEFINE_HANDLER(kAddNormBackward, add_norm_backward_call,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Operand>()  // total
                           .Arg<Operand>()  // scale
                           .Arg<Operand>()  // dtotal
                           .Arg<Operand>()  // dy
                           .Ret<Operand>()  // dx
                           .Ret<Operand>()  // dparameters
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"));

}  // namespace

XLA_FFI_Handler* forward_handler() {
  return kForward;
}
XLA_FFI_Handler* backward_handler() {
  return kBackward;
}
XLA_FFI_Handler* add_norm_backward_handler() {
  return kAddNormBackward;
}
XLA_FFI_Handler* add_norm_handler() {
  return kAddNorm;
}
XLA_FFI_Handler* norm_add_handler() {
  return kNormAdd;
}

}  // namespace layer_norm::cpu
