// The CPU handlers of XLA's foreign function interface for dwconv_norm_gelu.
#include <algorithm>

#include "cpu_handlers.h"
#include "dwconv_cpu.h"
#include "dwconv_ffi.h"

namespace dwconv::cpu {
namespace {

using namespace ::cpu;

// Multiply-adds of a forward call; the norm and GELU count as some twenty of them.
double cost_of(const Call& s) {
  return double(s.batch * s.height * s.width) * double(s.channels) * double(s.size * s.size + 20) / 4;
}

ffi::Future forward_handler_call(ffi::ThreadPool pool, Operand x, Operand kernel, Operand bias, Operand scale,
                                 Operand offset, Result y, double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = forward_call(x, kernel, bias, scale, offset, y, epsilon, version, &call);
  if (error.failure()) return failed(error);
  prefer_large_pages(y);
  const int64_t rows = call.batch * call.height, pieces = pieces_of(pool, rows, cost_of(call));
  return run(pool, pieces,
             [call, rows, pieces](int64_t i) { forward(call, i * rows / pieces, (i + 1) * rows / pieces); });
}

ffi::Future backward_handler_call(ffi::ThreadPool pool, Operand x, Operand kernel, Operand bias,
                                  Operand scale, Operand offset, Operand dy, Result dx, Result partial,
                                  double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = backward_call(x, kernel, bias, scale, offset, dy, dx, partial, epsilon, version, &call);
  if (error.failure()) return failed(error);
  prefer_large_pages(dx, partial);
  // The chunks are the caller's, so that sums do not depend on threads; small ones go together.
  const int64_t units = call.batch * call.chunks, pieces = pieces_of(pool, units, 4 * cost_of(call));
  return run(pool, pieces, [call, units, pieces](int64_t i) {
    for (int64_t unit = i * units / pieces; unit < (i + 1) * units / pieces; ++unit) backward(call, unit);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_dwconv_norm_gelu_forward, forward_handler_call,
                              bind_forward(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_dwconv_norm_gelu_backward, backward_handler_call,
                              bind_backward(bind()));

}  // namespace dwconv::cpu
