// The CPU handlers of XLA's foreign function interface, and the Python module that hands them over.
//
// A handler never waits: it cuts the work into pieces, asks XLA's pool for help, works on pieces
// itself until none is left, and returns a future that the last piece fulfils, wherever that is done.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>

#include "dcnv3_cpu.h"
#include "dcnv3_ffi.h"

namespace dcnv3::cpu {
namespace {

constexpr int64_t kSmall = int64_t{1} << 17;  // multiply-adds that one thread does at once: 20 us

ffi::Future failed(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

// Runs work(i) for i in [0, pieces) on this thread and the pool's.
template <class Work>
ffi::Future run(ffi::ThreadPool& pool, int64_t pieces, Work work) {
  if (pieces <= 1) {
    if (pieces == 1) work(0);
    ffi::Promise promise;
    ffi::Future future(promise);
    promise.SetAvailable();
    return future;
  }
  struct State {
    State(int64_t n, Work w) : done(n), work(std::move(w)), pieces(n) {}
    void help() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
        work(i);
        done.CountDown();
      }
    }
    ffi::CountDownPromise done;
    Work work;
    const int64_t pieces;
    std::atomic<int64_t> next{0};
  };
  auto state = std::make_shared<State>(pieces, std::move(work));
  ffi::Future future(state->done);
  const int64_t helpers = std::min(pool.num_threads(), pieces) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->help(); });
  state->help();
  return future;
}

// How many pieces to cut `units` of work into, all of them together `cost` multiply-adds.
int64_t pieces_of(const ffi::ThreadPool& pool, int64_t units, double cost) {
  const double most = static_cast<double>(4 * std::max<int64_t>(pool.num_threads(), 1));
  const double pieces = std::min({cost / kSmall, most, static_cast<double>(units)});
  return std::max<int64_t>(static_cast<int64_t>(pieces), units > 0 ? 1 : 0);
}

ffi::Future start_forward(ffi::ThreadPool& pool, const Call& call) {
  const Problem& s = call.problem;
  const int64_t pairs = s.batch * s.positions() * s.group;
  const int64_t pieces = pieces_of(pool, pairs, 4.0 * pairs * s.points * (s.depth + 8));
  return run(pool, pieces, [call, pairs, pieces](int64_t i) {
    // A multiple of 16 pairs, so that no vector of lanes is split without need.
    const int64_t each = ((pairs + pieces - 1) / pieces + 31) / 32 * 32;
    forward(call, std::min(i * each, pairs), std::min((i + 1) * each, pairs));
  });
}

ffi::Future start_backward(ffi::ThreadPool& pool, const Call& call) {
  const Problem& s = call.problem;
  // One piece is one group of one image, or all of it where all is small.
  const double cost = 12.0 * s.batch * s.positions() * s.group * s.points * (s.depth + 8);
  const bool small = cost < kSmall;
  return run(pool, small ? 1 : s.batch * s.group, [call, small](int64_t i) {
    const Problem& s = call.problem;
    if (!small) return backward(call, i / s.group, i % s.group, i % s.group + 1);
    for (int64_t image = 0; image < s.batch; ++image) backward(call, image, 0, s.group);
  });
}

ffi::Future forward_handler(ffi::ThreadPool pool, Buffer x, Buffer offset, Buffer mask, Result y,
                            Geometry geometry, double offset_scale) {
  Call call = {};
  auto error = forward_call(x, offset, mask, y, geometry, offset_scale, &call);
  return error.failure() ? failed(error) : start_forward(pool, call);
}

ffi::Future backward_handler(ffi::ThreadPool pool, Buffer x, Buffer offset, Buffer mask, Buffer dy, Result dx,
                             Result doffset, Result dmask, Geometry geometry, double offset_scale) {
  Call call = {};
  auto error = backward_call(x, offset, mask, dy, dx, doffset, dmask, geometry, offset_scale, &call);
  return error.failure() ? failed(error) : start_backward(pool, call);
}

ffi::Future fused_forward_handler(ffi::ThreadPool pool, Buffer x, Buffer record, Result y, Geometry geometry,
                                  double offset_scale, bool centre) {
  Call call = {};
  auto error = fused_forward_call(x, record, y, geometry, offset_scale, centre, &call);
  return error.failure() ? failed(error) : start_forward(pool, call);
}

ffi::Future fused_backward_handler(ffi::ThreadPool pool, Buffer x, Buffer record, Buffer dy, Result dx,
                                   Result drecord, Geometry geometry, double offset_scale, bool centre) {
  Call call = {};
  auto error = fused_backward_call(x, record, dy, dx, drecord, geometry, offset_scale, centre, &call);
  return error.failure() ? failed(error) : start_backward(pool, call);
}

auto bind() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>();
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // offset
                           .Arg<Buffer>()  // mask
                           .Ret<Buffer>()  // y
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale"));
XLA_FFI_DEFINE_HANDLER(kBackward, backward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // offset
                           .Arg<Buffer>()  // mask
                           .Arg<Buffer>()  // dy
                           .Ret<Buffer>()  // dx
                           .Ret<Buffer>()  // doffset
                           .Ret<Buffer>()  // dmask
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale"));
XLA_FFI_DEFINE_HANDLER(kFusedForward, fused_forward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // record
                           .Ret<Buffer>()  // y
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale")
                           .Attr<bool>("center_feature_scale"));
XLA_FFI_DEFINE_HANDLER(kFusedBackward, fused_backward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // record
                           .Arg<Buffer>()  // dy
                           .Ret<Buffer>()  // dx
                           .Ret<Buffer>()  // drecord
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale")
                           .Attr<bool>("center_feature_scale"));

pybind11::capsule capsule(XLA_FFI_Handler* handler) {
  return pybind11::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace
}  // namespace dcnv3::cpu

PYBIND11_MODULE(_cpu, m) {
  using namespace dcnv3::cpu;
  m.doc() = "Handlers of the CPU custom calls, by target name.";
  m.def("targets", [] {
    pybind11::dict targets;
    targets["internimage_dcnv3_forward"] = capsule(kForward);
    targets["internimage_dcnv3_backward"] = capsule(kBackward);
    targets["internimage_dcnv3_fused_forward"] = capsule(kFusedForward);
    targets["internimage_dcnv3_fused_backward"] = capsule(kFusedBackward);
    return targets;
  });
  m.def("instruction_set", &instruction_set);
  m.attr("version") = dcnv3::kVersion;
}
