// The forward, from pixels and weights to y. Part of dcnv3_cpu_kernel.h, included with it.

// Adds the lanes of v times zero to *poison: NaN from then on if one of them is not finite.
template <class V, class Real>
CPU_FN void watch(V v, Real* poison) {
  store_raw(poison, load_raw<V>(poison) + v * Real(0));
}
template <class Real>
CPU_FN bool poisoned(const Real* poison, int n) {
  Real sum = 0;
  for (int i = 0; i < n; ++i) sum += poison[i];
  return sum != 0;
}

// Samples NV vectors of W channels from channel c on, for the pair in lane l; P points, or b.points.
template <class T, int W, int NV, int P, class Real>
CPU_FN void sample(const Block<Real>& b, int l, int64_t c, Real* poison) {
  using M = Memory<T, Real, W>;
  using V = Vec<Real, W>;
  constexpr int kSums = NV <= 2 ? 4 : NV <= 4 ? 2 : 1;  // apart, to hide the latency of an addition
  const int64_t channels = b.s.channels();
  const int64_t right = b.s.width > 1 ? channels : 0;
  const int64_t down = b.s.height > 1 ? b.s.width * channels : 0;
  const T* x = static_cast<const T*>(b.call.x) + b.plane[l] + c;
  const int64_t points = P ? P : b.points;
  V sum[kSums][NV] = {};
  for (int64_t p = 0; p < points; ++p) {
    const T* q = x + b.pixel[p * kBlock + l] * channels;
    const Real* tap = b.tap + 4 * p * kBlock + l;
    for (int v = 0; v < NV; ++v) sum[0][v] += tap[0] * M::load(q + v * W);
    for (int v = 0; v < NV; ++v) sum[1 % kSums][v] += tap[kBlock] * M::load(q + right + v * W);
    for (int v = 0; v < NV; ++v) sum[2 % kSums][v] += tap[2 * kBlock] * M::load(q + down + v * W);
    for (int v = 0; v < NV; ++v) sum[3 % kSums][v] += tap[3 * kBlock] * M::load(q + down + right + v * W);
  }
  T* y = static_cast<T*>(b.call.y) + b.position[l] * channels + b.group[l] * b.s.depth + c;
  for (int v = 0; v < NV; ++v) {
    V total = sum[0][v];
    if constexpr (kSums == 2) total += sum[1][v];
    if constexpr (kSums == 4) total = (total + sum[1][v]) + (sum[2][v] + sum[3][v]);
    if (b.call.centre) total += b.blend[l] * M::load(x + b.own[l] * channels + v * W);
    watch(total, poison);
    M::store(y + v * W, total);
  }
}

// The same by the definition.
template <class T, class Real>
CPU_TARGET void sample_by_definition(const Block<Real>& b, int l) {
  using M = Memory<T, Real, 1>;
  const Problem& s = b.s;
  const T* x = static_cast<const T*>(b.call.x) + b.plane[l];
  T* y = static_cast<T*>(b.call.y) + b.position[l] * s.channels() + b.group[l] * s.depth;
  for (int64_t c = 0; c < s.depth; ++c) {
    const auto at = [&](int64_t i, int64_t j)
                        CPU_TARGET { return M::load(x + (i * s.width + j) * s.channels() + c); };
    Real sum = 0;
    for (int64_t p = 0; p < b.points; ++p) {
      const Locations<Real> where(b, p);
      sum += b.weight[p * kBlock + l] * sample_exactly(where.h(l), where.w(l), s.height, s.width, at).value;
    }
    if (b.call.centre) sum = b.keep[l] * sum + b.blend[l] * M::load(x + b.own[l] * s.channels() + c);
    M::store(y + c, sum);
  }
}

// Whether all of the pair's result is finite.
template <class T, class Real>
CPU_TARGET bool is_finite(const Block<Real>& b, int l) {
  const T* y = static_cast<const T*>(b.call.y) + b.position[l] * b.s.channels() + b.group[l] * b.s.depth;
  Real poison = 0;
  for (int64_t c = 0; c < b.s.depth; ++c) watch(Memory<T, Real, 1>::load(y + c), &poison);
  return !poisoned(&poison, 1);
}

template <class T, int D, int P>
CPU_TARGET void forward_of(const Call& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  constexpr int kLanes = kBytes / int(sizeof(Real));
  Block<Real> b(call);
  for (int64_t first = begin; first < end; first += kBlock) {
    place(b, 0, 0, call.problem.group, first, end);
    prefetch<T>(b);
    load(b);
    weigh(b);
    Real poison[kLanes] = {};
    for (int l = 0; l < b.count; ++l) {
      if constexpr (D > 0) {
        constexpr int W = D < kLanes ? D : kLanes;
        sample<T, W, D / W, P>(b, l, 0, poison);
      } else {
        int64_t c = 0;
        for (; c + kLanes <= b.s.depth; c += kLanes) sample<T, kLanes, 1, P>(b, l, c, poison);
        if constexpr (kLanes > 4) {
          for (; c + 4 <= b.s.depth; c += 4) sample<T, 4, 1, P>(b, l, c, poison);
        }
        for (; c < b.s.depth; ++c) sample<T, 1, 1, P>(b, l, c, poison);
      }
    }
    if (poisoned(poison, kLanes)) {
      for (int l = 0; l < b.count; ++l) {
        if (!is_finite<T>(b, l)) sample_by_definition<T>(b, l);
      }
    }
  }
}
