// DCNv3's CPU handlers: a call in pieces, which threads take.
#include <algorithm>

#include "cpu_handlers.h"
#include "dcnv3_cpu.h"
#include "dcnv3_ffi.h"

namespace dcnv3::cpu {
namespace {

using namespace ::cpu;

ffi::Future start_forward(ffi::ThreadPool& pool, const Call& call, Result& y) {
  prefer_large_pages(y);
  const Problem& s = call.problem;
  const int64_t pairs = s.batch * s.positions() * s.group;
  const int64_t pieces = pieces_of(pool, pairs, 4.0 * pairs * s.points * (s.depth + 8));
  return run(pool, pieces, [call, pairs, pieces](int64_t i) {
    // A multiple of 32 pairs, so that no vector of lanes is split without need.
    const int64_t each = ((pairs + pieces - 1) / pieces + 31) / 32 * 32;
    forward(call, std::min(i * each, pairs), std::min((i + 1) * each, pairs));
  });
}

template <class... Results>
ffi::Future start_backward(ffi::ThreadPool& pool, const Call& call, Results&... results) {
  prefer_large_pages(results...);
  const Problem& s = call.problem;
  // Each image in as few parts as keep the threads busy; all of it is one piece where all is small.
  const double cost = 12.0 * s.batch * s.positions() * s.group * s.points * (s.depth + 8);
  const int64_t pieces = pieces_of(pool, s.batch * s.group, cost);
  const bool small = pieces <= 1;
  const int64_t parts = small ? 1 : std::min((pieces + s.batch - 1) / s.batch, s.group);
  return run(pool, small ? 1 : s.batch * parts, [call, small, parts](int64_t i) {
    const Problem& s = call.problem;
    const int64_t part = i % parts, first = part * s.group / parts, last = (part + 1) * s.group / parts;
    if (!small) return backward(call, i / parts, first, last);
    for (int64_t image = 0; image < s.batch; ++image) backward(call, image, 0, s.group);
  });
}

ffi::Future compute_forward(ffi::ThreadPool pool, Operand x, Operand offset, Operand mask, Result y,
                            Geometry geometry, double offset_scale) {
  Call call = {};
  auto error = forward_call(x, offset, mask, y, geometry, offset_scale, &call);
  return error.failure() ? failed(error) : start_forward(pool, call, y);
}

ffi::Future compute_backward(ffi::ThreadPool pool, Operand x, Operand offset, Operand mask, Operand dy,
                             Result dx, Result doffset, Result dmask, Geometry geometry,
                             double offset_scale) {
  Call call = {};
  auto error = backward_call(x, offset, mask, dy, dx, doffset, dmask, geometry, offset_scale, &call);
  return error.failure() ? failed(error) : start_backward(pool, call, dx, doffset, dmask);
}

ffi::Future compute_fused_forward(ffi::ThreadPool pool, Operand x, Operand record, Result y,
                                  Geometry geometry, double offset_scale, bool centre) {
  Call call = {};
  auto error = fused_forward_call(x, record, y, geometry, offset_scale, centre, &call);
  return error.failure() ? failed(error) : start_forward(pool, call, y);
}

ffi::Future compute_fused_backward(ffi::ThreadPool pool, Operand x, Operand record, Operand dy, Result dx,
                                   Result drecord, Geometry geometry, double offset_scale, bool centre) {
  Call call = {};
  auto error = fused_backward_call(x, record, dy, dx, drecord, geometry, offset_scale, centre, &call);
  return error.failure() ? failed(error) : start_backward(pool, call, dx, drecord);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_dcnv3_forward, compute_forward, bind_forward(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_dcnv3_backward, compute_backward, bind_backward(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_dcnv3_fused_forward, compute_fused_forward,
                              bind_fused_forward(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_dcnv3_fused_backward, compute_fused_backward,
                              bind_fused_backward(bind()));

}  // namespace dcnv3::cpu
