// The backward. Part of dcnv3_cpu_kernel.h, included with it.

// Where the gradient of x is summed, in Real: dx itself, or scratch where dx is of half precision.
template <class Real>
struct Plane {
  Real* data;      // of the groups at hand, from the image's first pixel on
  int64_t pixel;   // elements from one pixel to the next
  int64_t group0;  // the first of these groups
};

// Spreads dy over dx for the pair in lane l, and takes the dots of dy with the pixels.
template <class T, int W, int NV, int P, class Real>
CPU_FN void spread(Block<Real>& b, const Plane<Real>& dx, int l, int64_t c) {
  using M = Memory<T, Real, W>;
  using R = Memory<Real, Real, W>;
  using V = Vec<Real, W>;
  const int64_t channels = b.s.channels();
  const bool wide = b.s.width > 1, high = b.s.height > 1;
  const int64_t offset[4] = {0, wide, high ? b.s.width : 0, (high ? b.s.width : 0) + wide};
  const T* x = static_cast<const T*>(b.call.x) + b.plane[l] + c;
  const T* dy = static_cast<const T*>(b.call.dy) + b.position[l] * channels + b.group[l] * b.s.depth + c;
  Real* to = dx.data + (b.group[l] - dx.group0) * b.s.depth + c;
  const int64_t points = P ? P : b.points;
  V g[NV];
  for (int v = 0; v < NV; ++v) g[v] = M::load(dy + v * W);
  for (int64_t p = 0; p < points; ++p) {
    const int64_t pixel = b.pixel[p * kBlock + l];
    const Real* tap = b.tap + 4 * p * kBlock + l;
    V product[4];
    for (int k = 0; k < 4; ++k) {
      const T* q = x + (pixel + offset[k]) * channels;
      product[k] = g[0] * M::load(q);
      for (int v = 1; v < NV; ++v) product[k] += g[v] * M::load(q + v * W);
    }
    for (int k = 0; k < 4; ++k) {  // in order: on a map of one row or column pixels coincide
      Real* d = to + (pixel + offset[k]) * dx.pixel;
      for (int v = 0; v < NV; ++v) R::store(d + v * W, R::load(d + v * W) + tap[k * kBlock] * g[v]);
    }
    Real* dot = b.dot + (p * kBlock + l) * 4;
    Vec<Real, 4> total = sums<Real, W>(product[0], product[1], product[2], product[3]);
    if (c > 0) total += load_raw<Vec<Real, 4>>(dot);
    store_raw(dot, total);
  }
  if (b.call.centre) {
    Real* d = to + b.own[l] * dx.pixel;
    V product = {};
    for (int v = 0; v < NV; ++v) {
      product += g[v] * M::load(x + b.own[l] * channels + v * W);
      R::store(d + v * W, R::load(d + v * W) + b.blend[l] * g[v]);
    }
    const Real total = sums<Real, W>(product, V{}, V{}, V{})[0];
    b.own_dot[l] = c > 0 ? b.own_dot[l] + total : total;
  }
}

// The two halves of that by the definition: what goes to dx, and what the chain rule needs.
template <class T, class Real>
CPU_TARGET void spread_by_definition(const Block<Real>& b, const Plane<Real>& dx, int l) {
  using M = Memory<T, Real, 1>;
  const Problem& s = b.s;
  const T* dy = static_cast<const T*>(b.call.dy) + b.position[l] * s.channels() + b.group[l] * s.depth;
  Real* to = dx.data + (b.group[l] - dx.group0) * s.depth;
  for (int64_t p = 0; p < b.points; ++p) {
    const Locations<Real> where(b, p);
    const Axis<Real> h = locate(where.h(l), extent<Real>(s.height));
    const Axis<Real> w = locate(where.w(l), extent<Real>(s.width));
    const Real mask = b.weight[p * kBlock + l] * b.keep[l];
    for (int k = 0; k < 4; ++k) {
      const Real weight = (k / 2 ? h.weight1 : h.weight0) * (k % 2 ? w.weight1 : w.weight0);
      if (!(weight > 0)) continue;
      const int64_t pixel = (int64_t(h.first) + k / 2) * s.width + int64_t(w.first) + k % 2;
      for (int64_t c = 0; c < s.depth; ++c) to[pixel * dx.pixel + c] += weight * mask * M::load(dy + c);
    }
  }
  for (int64_t c = 0; b.call.centre && c < s.depth; ++c) {
    to[b.own[l] * dx.pixel + c] += b.blend[l] * M::load(dy + c);
  }
}

template <class T, class Real>
CPU_TARGET void chain_by_definition(const Block<Real>& b, int l) {
  using M = Memory<T, Real, 1>;
  const Problem& s = b.s;
  const T* x = static_cast<const T*>(b.call.x) + b.plane[l];
  const T* dy = static_cast<const T*>(b.call.dy) + b.position[l] * s.channels() + b.group[l] * s.depth;
  for (int64_t p = 0; p < b.points; ++p) {
    const Locations<Real> where(b, p);
    const Real h = where.h(l), w = where.w(l);
    const bool inside = is_inside(h, w, s.height, s.width);
    Sample<Real> total = {0, 0, 0};
    for (int64_t c = 0; c < s.depth; ++c) {
      const auto at = [&](int64_t i, int64_t j)
                          CPU_TARGET { return M::load(x + (i * s.width + j) * s.channels() + c); };
      const Sample<Real> sample = sample_exactly(h, w, s.height, s.width, at);
      const Real g = M::load(dy + c);
      total.value += g * sample.value;
      if (!inside) continue;  // then the location has no gradient, whatever dy is
      total.slope_h += g * sample.slope_h;
      total.slope_w += g * sample.slope_w;
    }
    b.chained[3 * p * kBlock + l] = total.value;
    b.chained[(3 * p + 1) * kBlock + l] = total.slope_h;
    b.chained[(3 * p + 2) * kBlock + l] = total.slope_w;
  }
}

// From the dots to what the chain rule needs of each point; bad[l] becomes NaN where one is not finite.
template <class Real>
CPU_TARGET void chain(const Block<Real>& b, Real* __restrict bad) {
  const Extent<Real> height = extent<Real>(b.s.height), width = extent<Real>(b.s.width);
  for (int64_t p = 0; p < b.points; ++p) {
    const Real* dot = b.dot + p * kBlock * 4;
    Real* __restrict chained = b.chained + 3 * p * kBlock;
    const Locations<Real> at(b, p);
    for (int l = 0; l < kBlock; ++l) {
      const Sample<Real> sample = dcnv3::chain(at.h(l), at.w(l), height, width, dot + 4 * l);
      chained[l] = sample.value;
      chained[kBlock + l] = sample.slope_h;
      chained[2 * kBlock + l] = sample.slope_w;
      bad[l] += (sample.value + sample.slope_h + sample.slope_w) * Real(0);
    }
  }
}

// Turns the numbers of the block into their gradients, in place.
template <class Real>
CPU_TARGET void differentiate(Block<Real>& b) {
  const Real scale = Real(b.s.offset_scale);
  alignas(64) Real mean[kBlock] = {};  // of <dy, sample> over the softmax
  for (int64_t p = 0; p < b.points; ++p) {
    for (int l = 0; l < kBlock; ++l) mean[l] += b.weight[p * kBlock + l] * b.chained[3 * p * kBlock + l];
  }
  for (int64_t p = 0; p < b.points; ++p) {
    Real* __restrict offset = b.number + 2 * p * kBlock;
    Real* __restrict weight = b.weight + p * kBlock;
    const Real* chained = b.chained + 3 * p * kBlock;
    for (int l = 0; l < kBlock; ++l) {
      const Real mask = weight[l] * b.keep[l], factor = mask * scale;
      const Real by_h = chained[kBlock + l], by_w = chained[2 * kBlock + l];
      offset[l] = by_w != 0 ? factor * by_w : Real(0);  // zero outside, even where the mask is NaN
      offset[kBlock + l] = by_h != 0 ? factor * by_h : Real(0);
      weight[l] = b.call.fused ? mask * (chained[l] - mean[l]) : chained[l];
    }
  }
  if (!b.call.fused) return;
  Real* centre = b.number + 3 * b.points * kBlock;
  for (int l = 0; l < kBlock; ++l) {
    centre[l] = b.call.centre ? b.blend[l] * b.keep[l] * (b.own_dot[l] - mean[l]) : Real(0);
  }
}

template <class Real>
CPU_TARGET void store(const Block<Real>& b) {
  with_type_in<Real>(b.call.points_type, [&b](auto r) CPU_TARGET {
    using R = decltype(r);
    const Columns& offset = b.call.offset;
    if (!b.call.fused) {
      store_columns<R>(b, b.number, 2 * b.points, b.call.doffset, offset);
      store_columns<R>(b, b.weight, b.points, b.call.dweight, b.call.weight);
      return;
    }
    store_columns<R>(b, b.number, b.columns, b.call.doffset, offset);
    for (int l = 0; l < b.count; ++l) {  // padding: after each group's numbers, and after the last group
      R* row = static_cast<R*>(b.call.doffset) + b.position[l] * offset.row;
      const int64_t group = b.group[l],
                    next = group + 1 < b.s.group ? (group + 1) * offset.group : offset.row;
      std::memset(row + group * offset.group + b.columns, 0,
                  (next - group * offset.group - b.columns) * sizeof(R));
    }
  });
}

// NaN in bad[l] where the pair in lane l has a weight or an element of dy that is not finite.
template <class T, class Real>
CPU_TARGET void watch_operands(const Block<Real>& b, Real* __restrict bad) {
  constexpr int kLanes = kBytes / int(sizeof(Real));
  for (int l = 0; l < kBlock; ++l) bad[l] = b.blend[l] * Real(0);
  for (int64_t p = 0; p < b.points; ++p) {
    for (int l = 0; l < kBlock; ++l) bad[l] += b.weight[p * kBlock + l] * Real(0);
  }
  const auto dy = [&b](int l) CPU_TARGET {
    return static_cast<const T*>(b.call.dy) + b.position[l] * b.s.channels() + b.group[l] * b.s.depth;
  };
  Real poison[kLanes] = {};
  for (int l = 0; l < b.count; ++l) {
    int64_t c = 0;
    for (; c + kLanes <= b.s.depth; c += kLanes) watch(Memory<T, Real, kLanes>::load(dy(l) + c), poison);
    for (; c < b.s.depth; ++c) watch(Memory<T, Real, 1>::load(dy(l) + c), poison);
  }
  if (!poisoned(poison, kLanes)) return;
  for (int l = 0; l < b.count; ++l) {
    for (int64_t c = 0; c < b.s.depth; ++c) watch(Memory<T, Real, 1>::load(dy(l) + c), bad + l);
  }
}

// Asks for the rows of dx ahead, as `prefetch` does for those of x.
template <class Real>
CPU_FN void prefetch_gradient(const Block<Real>& b, const Plane<Real>& dx) {
  for (int l = 0; l < b.count; ++l) {
    const Real* to = dx.data + (b.group[l] - dx.group0) * b.s.depth + b.soon[l] * dx.pixel;
    for (int64_t c = 0; c < b.s.depth; c += 64 / int64_t(sizeof(Real))) __builtin_prefetch(to + c, 1, 2);
  }
}

// The gradients of `groups` groups from g0 on, of one image. Scratch holds dx of half precision.
template <class T, int D, int P, class Real>
CPU_TARGET void backward_groups(Block<Real>& b, Real* scratch, int64_t image, int64_t g0, int64_t groups) {
  constexpr int kLanes = kBytes / int(sizeof(Real));
  const Problem& s = b.s;
  const int64_t pixels = s.height * s.width, run = groups * s.depth;
  T* out = static_cast<T*>(b.call.dx) + image * pixels * s.channels() + g0 * s.depth;
  Plane<Real> dx;
  if constexpr (std::is_same_v<T, Real>) {
    dx = {out, s.channels(), g0};
  } else {
    dx = {scratch, run, g0};
  }
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    std::memset(dx.data + pixel * dx.pixel, 0, run * sizeof(Real));
  }

  const int64_t pairs = s.positions() * groups;
  for (int64_t first = 0; first < pairs; first += kBlock) {
    place(b, image * s.positions(), g0, groups, first, pairs);
    prefetch<T>(b);
    prefetch_gradient(b, dx);
    load(b);
    weigh(b);
    alignas(64) Real bad[kBlock];
    watch_operands<T>(b, bad);
    for (int l = 0; l < b.count; ++l) {
      if (bad[l] != 0) {
        spread_by_definition<T>(b, dx, l);
      } else if constexpr (D > 0) {
        constexpr int W = D < kLanes ? D : kLanes;
        spread<T, W, D / W, P>(b, dx, l, 0);
      } else {
        int64_t c = 0;
        for (; c + kLanes <= s.depth; c += kLanes) spread<T, kLanes, 1, P>(b, dx, l, c);
        if constexpr (kLanes > 4) {
          for (; c + 4 <= s.depth; c += 4) spread<T, 4, 1, P>(b, dx, l, c);
        }
        for (; c < s.depth; ++c) spread<T, 1, 1, P>(b, dx, l, c);
      }
    }
    chain(b, bad);
    for (int l = 0; l < b.count; ++l) {
      if (bad[l] != 0) chain_by_definition<T>(b, l);
    }
    differentiate(b);
    store(b);
  }

  if constexpr (!std::is_same_v<T, Real>) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const Real* from = dx.data + pixel * run;
      T* to = out + pixel * s.channels();
      int64_t c = 0;
      for (; c + kLanes <= run; c += kLanes) {
        Memory<T, Real, kLanes>::store(to + c, Memory<Real, Real, kLanes>::load(from + c));
      }
      for (; c < run; ++c) Memory<T, Real, 1>::store(to + c, from[c]);
    }
  }
}

template <class T, int D, int P>
CPU_TARGET void backward_of(const Call& call, int64_t image, int64_t g0, int64_t g1) {
  using Real = RealOf<T>;
  const Problem& s = call.problem;
  // All groups of a position in turn, or one group after the other where the rows of x and dx around a
  // position are more than a core's cache holds.
  constexpr int64_t kCache = 1 << 18;
  const int64_t pixel = (g1 - g0) * s.depth * int64_t(sizeof(T) + sizeof(Real));
  const int64_t groups = (2 * reach(s) + 1) * s.width * pixel <= kCache ? g1 - g0 : 1;
  std::unique_ptr<Real[]> scratch;
  if constexpr (!std::is_same_v<T, Real>) scratch.reset(new Real[s.height * s.width * groups * s.depth]);
  Block<Real> b(call);
  for (int64_t g = g0; g < g1; g += groups) backward_groups<T, D, P>(b, scratch.get(), image, g, groups);
}
