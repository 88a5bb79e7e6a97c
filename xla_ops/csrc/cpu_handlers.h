// What the handlers of all CPU operators share.
//
// A handler never waits: it cuts the work into pieces, asks XLA's pool for help, works on pieces
// itself until none is left, and returns a future that the last piece fulfils, wherever that is done.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "cpu_types.h"
#include "ffi_types.h"
#include "xla/ffi/api/ffi.h"

namespace cpu {

namespace ffi = xla::ffi;

constexpr int64_t kSmall = int64_t{1} << 17;  // multiply-adds that one thread does at once: 20 us

inline auto bind() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>();
}

inline ffi::Future failed(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

// Asks Linux for pages of 2 MB under large results, as NumPy does for its arrays. XLA's memory is often new
// from the system for each call of a program, and else is given page by page of 4 KB as it is written.
template <class... Results>
void prefer_large_pages([[maybe_unused]] Results&... results) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto advise = [](const void* data, size_t bytes) {
    if (bytes < size_t{1} << 20) return;
    // All pages of the result, the first and last of which others may share, and be marked too: XLA puts one
    // result right after the other, and a page is large only where all of it is asked for before it is
    // written.
    constexpr uintptr_t kPage = uintptr_t{2} << 20;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + kPage - 1) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  };
  (advise(results->untyped_data(), results->size_bytes()), ...);
#endif
}

// Runs work(i) for i in [0, pieces) on this thread and the pool's. Nobody above them catches an exception,
// of which there is one: no memory for what a piece works in.
template <class Work>
ffi::Future run(ffi::ThreadPool& pool, int64_t pieces, Work work) {
  if (pieces <= 0) {
    ffi::Promise promise;
    ffi::Future future(promise);
    promise.SetAvailable();
    return future;
  }
  struct State {
    State(int64_t n, Work w) : done(n), work(std::move(w)), pieces(n) {}
    void help() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
        try {
          work(i);
          done.CountDown();
        } catch (const std::bad_alloc&) {
          done.CountDown(ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a kernel's scratch"));
        }
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
inline int64_t pieces_of(const ffi::ThreadPool& pool, int64_t units, double cost) {
  const double most = static_cast<double>(4 * std::max<int64_t>(pool.num_threads(), 1));
  const double pieces = std::min({cost / kSmall, most, static_cast<double>(units)});
  return std::max<int64_t>(static_cast<int64_t>(pieces), units > 0 ? 1 : 0);
}

}  // namespace cpu
