// The CPU handlers of XLA's foreign function interface for layer_norm, add_norm and norm_add.
#include "cpu_handlers.h"
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
  ffi::Error error = describe(kNorm, x, scale, bias, y, epsilon, version, &s);
  return error.failure() ? failed(error) : start(pool, s, y);
}

ffi::Future norm_add_call(ffi::ThreadPool pool, Operand x, Operand residual, Operand scale, Operand bias,
                          Result y, double epsilon, int64_t version) {
  Call s = {};
  ffi::Error error = describe(kNormAdd, x, residual, scale, bias, y, epsilon, version, &s);
  return error.failure() ? failed(error) : start(pool, s, y);
}

ffi::Future add_norm_call(ffi::ThreadPool pool, Operand x, Operand residual, Operand scale, Operand bias,
                          Result total, Result y, double epsilon, int64_t version) {
  Call s = {};
  ffi::Error error = describe(kAddNorm, x, residual, scale, bias, total, y, epsilon, version, &s);
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
  ffi::Error error = describe_backward(kNorm, x, scale, dy, dx, dparameters, epsilon, version, &s);
  return error.failure() ? failed(error) : start(pool, s, dx);
}

ffi::Future add_norm_backward_call(ffi::ThreadPool pool, Operand total, Operand scale, Operand dtotal,
                                   Operand dy, Result dx, Result dparameters, double epsilon,
                                   int64_t version) {
  BackwardCall s = {};
  ffi::Error error = describe_backward(kAddNorm, total, scale, dy, dx, dparameters, epsilon, version, &s);
  if (error.failure()) return failed(error);
  if (!same(dtotal, total)) return failed(invalid(kAddNorm, "the sum's gradient does not fit"));
  s.dtotal = dtotal.untyped_data();
  return start(pool, s, dx);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_layer_norm_forward, forward_call, bind_forward(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_norm_add_forward, norm_add_call, bind_norm_add(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_add_norm_forward, add_norm_call, bind_add_norm(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_layer_norm_backward, backward_call, bind_backward(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_add_norm_backward, add_norm_backward_call,
                              bind_add_norm_backward(bind()));

}  // namespace layer_norm::cpu
