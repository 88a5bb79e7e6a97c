// The kernels for one instruction set; included by cpu_targets.h.

#include "cpu_simd.h"
#include "cpu_gelu.h"

// W channels.
template <class T, int W, bool backward, class Real>
CPU_FN void step(const T* x, const Real* bias, const T* dy, T* to) {
  using M = Memory<T, Real, W>;
  const Vec<Real, W> z = M::load(x) + Memory<Real, Real, W>::load(bias);
  if constexpr (backward) {
    M::store(to, M::load(dy) * gelu_slope_for<T, W>(z));
  } else {
    M::store(to, gelu_for<T, W>(z));
  }
}

template <class T, class P, bool backward>
CPU_TARGET void compute_of(const Call& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  constexpr int kLanes = kBytes / int(sizeof(Real));
  const int64_t n = call.channels;
  const int64_t whole = n / kLanes * kLanes;
  const std::unique_ptr<Real[]> bias(new Real[n + kLanes]());
  for (int64_t row = begin, set = -1; row < end; ++row) {
    if (row / call.shared != set) {
      set = row / call.shared;
      widen(static_cast<const P*>(call.bias) + set * n, n, bias.get());
    }
    const T* x = static_cast<const T*>(call.x) + row * n;
    const T* dy = backward ? static_cast<const T*>(call.dy) + row * n : nullptr;
    T* to = static_cast<T*>(call.result) + row * n;
    for (int64_t c = 0; c < whole; c += kLanes) {
      step<T, kLanes, backward>(x + c, bias.get() + c, backward ? dy + c : nullptr, to + c);
    }
    if (whole == n) continue;
    // What is left is a vector too, so that all numbers are rounded alike.
    T last_x[kLanes] = {}, last_dy[kLanes] = {}, last[kLanes];
    std::copy(x + whole, x + n, last_x);
    if constexpr (backward) std::copy(dy + whole, dy + n, last_dy);
    step<T, kLanes, backward>(last_x, bias.get() + whole, last_dy, last);
    std::copy(last, last + n - whole, to + whole);
  }
}

template <class T, class P>
CPU_TARGET void compute_with(const Call& call, int64_t begin, int64_t end) {
  if (call.dy) return compute_of<T, P, true>(call, begin, end);
  compute_of<T, P, false>(call, begin, end);
}

CPU_TARGET void compute(const Call& call, int64_t begin, int64_t end) {
  with_types(call.type, call.bias_type,
             [&](auto t, auto p) CPU_TARGET { compute_with<decltype(t), decltype(p)>(call, begin, end); });
}
