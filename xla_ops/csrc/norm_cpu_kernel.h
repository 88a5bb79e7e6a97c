// The kernels for one instruction set; included by cpu_targets.h.

#include "cpu_simd.h"

constexpr int kTogether = 4;  // rows; their sums are added up across lanes at once

// Calls f(first channel, lanes as a constant) for all channels, whole vectors first.
template <int kLanes, class F>
CPU_FN void over(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, std::integral_constant<int, kLanes>{});
  for (; c < channels; ++c) f(c, std::integral_constant<int, 1>{});
}

// Of each of `count` rows, at most kTogether, the sum over n channels of f(row, channel, lanes).
template <class Real, class F>
CPU_FN Vec<Real, 4> sums_of(int64_t count, int64_t n, F f) {
  constexpr int kLanes = kBytes / int(sizeof(Real));
  Vec<Real, kLanes> lanes[kTogether] = {};
  Real alone[kTogether] = {};  // of the channels left over
  for (int64_t r = 0; r < count; ++r) {
    Vec<Real, kLanes> even = {}, odd = {};
    int64_t c = 0;
    for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
      even += f(r, c, std::integral_constant<int, kLanes>{});
      odd += f(r, c + kLanes, std::integral_constant<int, kLanes>{});
    }
    if (c + kLanes <= n) even += f(r, c, std::integral_constant<int, kLanes>{}), c += kLanes;
    for (; c < n; ++c) alone[r] += f(r, c, std::integral_constant<int, 1>{});
    lanes[r] = even + odd;
  }
  return sums<Real, kLanes>(lanes[0], lanes[1], lanes[2], lanes[3]) + load_raw<Vec<Real, 4>>(alone);
}

// Writes rows less their means to `work`, and returns their variances; load(row, channel, lanes) loads.
template <class Real, class F>
CPU_FN Vec<Real, 4> centre(int64_t count, int64_t n, Real* work, F load) {
  const Vec<Real, 4> mean = sums_of<Real>(count, n,
                                          [&](int64_t r, int64_t c, auto lanes) CPU_TARGET {
                                            const auto v = load(r, c, lanes);
                                            store_raw(work + r * n + c, v);
                                            return v;
                                          }) /
                            Real(n);
  return sums_of<Real>(count, n,
                       [&](int64_t r, int64_t c, auto lanes) CPU_TARGET {
                         const auto v = Memory<Real, Real, lanes()>::load(work + r * n + c) - mean[r];
                         store_raw(work + r * n + c, v);
                         return v * v;
                       }) /
         Real(n);
}

// `count` rows, at most kTogether, by the parameters `scale` and `bias`; `work` holds kTogether rows. A
// residual is added to the rows before the norm, and the sum goes to `total`, or to the result.
template <Add kAdd, class T, class Real>
CPU_FN void normalize(const T* x, const T* residual, T* total, int64_t count, int64_t n, Real epsilon,
                      const Real* scale, const Real* bias, Real* work, T* y) {
  constexpr int kLanes = kBytes / int(sizeof(Real));
  const Vec<Real, 4> variance = centre(count, n, work, [&](int64_t r, int64_t c, auto lanes) CPU_TARGET {
    using M = Memory<T, Real, lanes()>;
    const int64_t at = r * n + c;
    if constexpr (kAdd == Add::kBefore) {
      M::store(total + at, M::load(x + at) + M::load(residual + at));
      return M::load(total + at);
    } else {
      return M::load(x + at);
    }
  });
  for (int64_t r = 0; r < count; ++r) {
    const Real factor = 1 / std::sqrt(variance[r] + epsilon);
    over<kLanes>(n, [&](int64_t c, auto lanes) CPU_TARGET {
      using M = Memory<Real, Real, lanes()>;
      auto v = M::load(work + r * n + c) * (M::load(scale + c) * factor) + M::load(bias + c);
      if constexpr (kAdd == Add::kAfter) v += Memory<T, Real, lanes()>::load(residual + r * n + c);
      Memory<T, Real, lanes()>::store(y + r * n + c, v);
    });
  }
}

template <Add kAdd, class T, class P>
CPU_TARGET void forward_rows(const Call& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const int64_t n = call.channels;
  const std::unique_ptr<Real[]> memory(new Real[(2 + kTogether) * n]);
  Real *const scale = memory.get(), *const bias = scale + n, *const work = bias + n;
  for (int64_t row = begin, set = -1; row < end;) {
    if (row / call.shared != set) {
      set = row / call.shared;
      widen(static_cast<const P*>(call.scale) + set * n, n, scale);
      widen(static_cast<const P*>(call.bias) + set * n, n, bias);
    }
    const int64_t count = std::min<int64_t>({kTogether, end - row, (set + 1) * call.shared - row});
    const T* residual = kAdd != Add::kNot ? static_cast<const T*>(call.residual) + row * n : nullptr;
    T* total = kAdd == Add::kBefore ? static_cast<T*>(call.total) + row * n : nullptr;
    normalize<kAdd, T, Real>(static_cast<const T*>(call.x) + row * n, residual, total, count, n,
                             Real(call.epsilon), scale, bias, work, static_cast<T*>(call.y) + row * n);
    row += count;
  }
}

template <class T, class P>
CPU_TARGET void forward_of(const Call& call, int64_t begin, int64_t end) {
  switch (call.add()) {
    case Add::kNot:
      return forward_rows<Add::kNot, T, P>(call, begin, end);
    case Add::kBefore:
      return forward_rows<Add::kBefore, T, P>(call, begin, end);
    case Add::kAfter:
      return forward_rows<Add::kAfter, T, P>(call, begin, end);
  }
}

CPU_TARGET void forward(const Call& call, int64_t begin, int64_t end) {
  with_types(call.type, call.parameters_type,
             [&](auto t, auto p) CPU_TARGET { forward_of<decltype(t), decltype(p)>(call, begin, end); });
}

// The gradients of `count` rows, at most kTogether: that of x, to which dtotal is added if there is one, and
// what they add to those of scale and bias. `work` holds kTogether rows.
template <class T, class Real>
CPU_FN void differentiate(const T* x, const T* dy, const T* dtotal, int64_t count, int64_t n, Real epsilon,
                          const Real* scale, Real* work, T* dx, Real* dscale, Real* dbias) {
  constexpr int kLanes = kBytes / int(sizeof(Real));
  const Vec<Real, 4> variance = centre(count, n, work, [&](int64_t r, int64_t c, auto lanes) CPU_TARGET {
    return Memory<T, Real, lanes()>::load(x + r * n + c);
  });
  Real factor[kTogether];
  for (int r = 0; r < kTogether; ++r) factor[r] = 1 / std::sqrt(variance[r] + epsilon);
  // What comes of the mean and of the variance: the means of g and of g z, g = dy scale, z the row as it is
  // normalised.
  const auto g_of = [&](int64_t r, int64_t c, auto lanes) CPU_TARGET {
    return Memory<T, Real, lanes()>::load(dy + r * n + c) * Memory<Real, Real, lanes()>::load(scale + c);
  };
  const Vec<Real, 4> mean = sums_of<Real>(count, n, g_of) / Real(n);
  const Vec<Real, 4> slope = sums_of<Real>(count, n,
                                           [&](int64_t r, int64_t c, auto lanes) CPU_TARGET {
                                             using M = Memory<Real, Real, lanes()>;
                                             const auto z = M::load(work + r * n + c) * factor[r];
                                             store_raw(work + r * n + c, z);
                                             return g_of(r, c, lanes) * z;
                                           }) /
                             Real(n);
  over<kLanes>(n, [&](int64_t c, auto lanes) CPU_TARGET {
    using M = Memory<Real, Real, lanes()>;
    using N = Memory<T, Real, lanes()>;
    auto scale_sum = M::load(dscale + c), bias_sum = M::load(dbias + c);
    for (int64_t r = 0; r < count; ++r) {
      const auto z = M::load(work + r * n + c), d = N::load(dy + r * n + c);
      scale_sum += d * z, bias_sum += d;
      auto v = (d * M::load(scale + c) - mean[r] - z * slope[r]) * factor[r];
      if (dtotal) v += N::load(dtotal + r * n + c);
      N::store(dx + r * n + c, v);
    }
    M::store(dscale + c, scale_sum), M::store(dbias + c, bias_sum);
  });
}

template <class T, class P>
CPU_TARGET void backward_of(const BackwardCall& call, int64_t part) {
  using Real = RealOf<T>;
  const int64_t n = call.channels, image = part / call.parts_of_image, i = part % call.parts_of_image;
  const int64_t first = image * call.image_rows;
  const int64_t begin = first + i * call.image_rows / call.parts_of_image;
  const int64_t end = first + (i + 1) * call.image_rows / call.parts_of_image;
  const std::unique_ptr<Real[]> memory(new Real[(1 + kTogether) * n]);
  Real *const scale = memory.get(), *const work = scale + n;
  widen(static_cast<const P*>(call.scale) + part / call.shared * n, n, scale);
  Real* const dscale = static_cast<Real*>(call.dparameters) + part * 2 * n;
  std::fill_n(dscale, 2 * n, Real(0));
  for (int64_t row = begin; row < end; row += kTogether) {
    const auto at = [&](const void* rows) { return static_cast<const T*>(rows) + row * n; };
    differentiate<T, Real>(at(call.x), at(call.dy), call.dtotal ? at(call.dtotal) : nullptr,
                           std::min<int64_t>(kTogether, end - row), n, Real(call.epsilon), scale, work,
                           static_cast<T*>(call.dx) + row * n, dscale, dscale + n);
  }
}

CPU_TARGET void backward(const BackwardCall& call, int64_t part) {
  with_types(call.type, call.parameters_type,
             [&](auto t, auto p) CPU_TARGET { backward_of<decltype(t), decltype(p)>(call, part); });
}
