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

// `count` rows, at most kTogether, by the parameters `scale` and `bias`; `work` holds kTogether rows. A
// residual is added to the rows before the norm, and the sum goes to `total`, or to the result.
template <Add kAdd, class T, class Real>
CPU_FN void normalize(const T* x, const T* residual, T* total, int64_t count, int64_t n, Real epsilon,
                      const Real* scale, const Real* bias, Real* work, T* y) {
  constexpr int kLanes = kBytes / int(sizeof(Real));
  using V = Vec<Real, kLanes>;
  // Of each row the sum of f(its number), in lanes and, for the channels left over, alone.
  const auto sums_of = [&](auto f) CPU_TARGET {
    V lanes[kTogether] = {};
    Real alone[kTogether] = {};
    for (int64_t r = 0; r < count; ++r) {
      V even = {}, odd = {};
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
  };
  const Vec<Real, 4> mean = sums_of([&](int64_t r, int64_t c, auto lanes) CPU_TARGET {
                              using M = Memory<T, Real, lanes()>;
                              const int64_t at = r * n + c;
                              auto v = M::load(x + at);
                              if constexpr (kAdd == Add::kBefore) {
                                M::store(total + at, v + M::load(residual + at));
                                v = M::load(total + at);
                              }
                              store_raw(work + at, v);
                              return v;
                            }) /
                            Real(n);
  const Vec<Real, 4> variance = sums_of([&](int64_t r, int64_t c, auto lanes) CPU_TARGET {
                                  const auto v =
                                      Memory<Real, Real, lanes()>::load(work + r * n + c) - mean[r];
                                  store_raw(work + r * n + c, v);
                                  return v * v;
                                }) /
                                Real(n);
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
      const P* from[] = {static_cast<const P*>(call.scale) + set * n,
                         static_cast<const P*>(call.bias) + set * n};
      for (int64_t c = 0; c < n; ++c) {
        scale[c] = Memory<P, Real, 1>::load(from[0] + c), bias[c] = Memory<P, Real, 1>::load(from[1] + c);
      }
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
  const bool same = call.type == call.parameters_type;
  switch (call.type) {
    case Type::kFloat32:
      return forward_of<float, float>(call, begin, end);
    case Type::kFloat64:
      return forward_of<double, double>(call, begin, end);
    case Type::kBFloat16:
      if (same) return forward_of<BFloat16, BFloat16>(call, begin, end);
      return forward_of<BFloat16, float>(call, begin, end);
    case Type::kFloat16:
      if (same) return forward_of<Float16, Float16>(call, begin, end);
      return forward_of<Float16, float>(call, begin, end);
  }
}
