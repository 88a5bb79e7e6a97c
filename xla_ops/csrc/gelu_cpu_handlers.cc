// The CPU handlers of XLA's foreign function interface for bias_gelu.
#include "cpu_handlers.h"
#include "gelu_cpu.h"
#include "gelu_ffi.h"

namespace gelu::cpu {
namespace {

using namespace ::cpu;

ffi::Future start(ffi::ThreadPool pool, Operand x, Operand bias, const Operand* dy, Result result,
                  int64_t version) {
  Call s = {};
  ffi::Error error = describe(x, bias, dy, result, version, &s);
  if (error.failure()) return failed(error);
  prefer_large_pages(result);
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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_bias_gelu_forward, forward_call, bind_forward(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_bias_gelu_backward, backward_call, bind_backward(bind()));

}  // namespace gelu::cpu
