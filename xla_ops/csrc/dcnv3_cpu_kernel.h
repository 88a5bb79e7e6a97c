// The kernels for one instruction set; see dcnv3_cpu_simd.h for how this is included.
//
// Work goes in blocks of kBlock (position, group) pairs, and a lane of a vector owns a pair:
//   load    the pairs' learned numbers, transposed: row r holds number r of every pair
//   soften  fused form: softmax over the points, share of the centre pixel
//   weigh   for each point the first pixel of its cell, and the weights of the cell's four pixels
// Then, pair by pair, vectors run over the D channels of a group and the weights are scalars:
//   sample  y = sum of weight * pixel                                              (forward)
//   spread  dx[pixel] += weight * dy, and the dots <dy, pixel>                     (backward)
// and, again with a pair a lane,
//   chain   from the dots to the gradients of the learned numbers                  (backward)
//
// A cell at the map's edge has a pixel of weight zero. Zero times infinity is NaN, so a pair whose
// operands are not finite (it shows in the result) is done again by the definition.

constexpr int kBlock = 32;  // loops over lanes have this length, known to the compiler

// The block at hand and its scratch.
template <class Real>
struct Block {
  explicit Block(const Call& c)
      : call(c), s(c.problem), points(s.points), columns(3 * points + (c.fused ? 1 : 0)) {
    const int64_t rows = columns + 4 * points + 4 * points + 3 * points;
    storage.reset(new Real[rows * kBlock + 64 / sizeof(Real)]);
    const uintptr_t past = reinterpret_cast<uintptr_t>(storage.get()) % 64;
    number = storage.get() + (64 - past) % 64 / sizeof(Real);
    weight = number + 2 * points * kBlock;
    tap = number + columns * kBlock;
    dot = tap + 4 * points * kBlock;
    chained = dot + 4 * points * kBlock;
    pixel.reset(new int32_t[points * kBlock]);
  }

  const Call& call;
  const Problem& s;
  const int64_t points, columns;  // P, and the numbers of a pair
  int count;                      // pairs in the block; the lanes after them repeat the last
  int64_t position[kBlock];       // of the pair, over the whole batch
  int64_t group[kBlock];
  int64_t plane[kBlock];  // where the map of the pair's image and group starts in x
  int64_t own[kBlock];    // the pixel at the pair's position (fused form with centre)
  alignas(64) Real grid_h[kBlock], grid_w[kBlock];
  alignas(64) Real blend[kBlock], keep[kBlock];  // share of the own pixel, and the rest
  alignas(64) Real own_dot[kBlock];              // <dy, own pixel>
  Real* number;   // (columns, kBlock): x and y offsets of each point, then weights, then centre
  Real* weight;   // the rows of weights among them
  Real* tap;      // (P, 4, kBlock): weights of the cell's pixels 00, 01, 10, 11
  Real* dot;      // (P, kBlock, 4): <dy, pixel> for these
  Real* chained;  // (P, 3, kBlock): <dy, sample> and its derivatives along h and w
  std::unique_ptr<int32_t[]> pixel;  // (P, kBlock): first pixel of the cell
  std::unique_ptr<Real[]> storage;
};

// Fills the lanes with pairs [first, end) of `groups` groups from g0 on, positions from p0 on.
template <class Real>
DCNV3_TARGET void place(Block<Real>& b, int64_t p0, int64_t g0, int64_t groups, int64_t first, int64_t end) {
  const Problem& s = b.s;
  b.count = int(end - first < kBlock ? end - first : kBlock);
  int64_t position = p0 + first / groups, g = first % groups;
  int64_t image = position / s.positions();
  int64_t i = position % s.positions() / s.out_width, j = position % s.out_width;
  for (int l = 0; l < kBlock; ++l) {
    b.position[l] = position;
    b.group[l] = g0 + g;
    b.plane[l] = image * s.height * s.width * s.channels() + (g0 + g) * s.depth;
    b.own[l] = i * s.width + j;
    b.grid_h[l] = Real(grid(i, s.stride_h, s.pad_h, s.kernel_h, s.dilation_h));
    b.grid_w[l] = Real(grid(j, s.stride_w, s.pad_w, s.kernel_w, s.dilation_w));
    if (l + 1 >= b.count || ++g < groups) continue;
    g = 0;
    ++position;
    if (++j < s.out_width) continue;
    j = 0;
    if (++i < s.out_height) continue;
    i = 0;
    ++image;
  }
}

// Rows [0, n) of `rows` from n values a pair; the last four columns may be read twice.
template <class R, class Real>
DCNV3_TARGET void load_columns(const Block<Real>& b, const Columns& from, int64_t n, Real* rows) {
  using M = Memory<R, Real, 4>;
  const R* data = static_cast<const R*>(from.data);
  for (int l = 0; l < kBlock; l += 4) {
    const R* pair[4];
    for (int k = 0; k < 4; ++k) {
      pair[k] = data + b.position[l + k] * from.row + b.group[l + k] * from.group;
    }
    for (int64_t c = 0; c < n; c += 4) {
      if (n < 4) {
        for (int64_t m = 0; m < n; ++m) {
          for (int k = 0; k < 4; ++k) rows[m * kBlock + l + k] = Memory<R, Real, 1>::load(pair[k] + m);
        }
        break;
      }
      const int64_t at = c + 4 <= n ? c : n - 4;
      auto r0 = M::load(pair[0] + at), r1 = M::load(pair[1] + at);
      auto r2 = M::load(pair[2] + at), r3 = M::load(pair[3] + at);
      transpose<Real>(r0, r1, r2, r3);
      Real* to = rows + at * kBlock + l;
      store_raw(to, r0), store_raw(to + kBlock, r1);
      store_raw(to + 2 * kBlock, r2), store_raw(to + 3 * kBlock, r3);
    }
  }
}

template <class R, class Real>
DCNV3_TARGET void store_columns(const Block<Real>& b, const Real* rows, int64_t n, void* data, const Columns& like) {
  using M = Memory<R, Real, 4>;
  for (int l = 0; l < b.count; l += 4) {
    const int pairs = b.count - l < 4 ? b.count - l : 4;
    R* pair[4];
    for (int k = 0; k < pairs; ++k) {
      pair[k] = static_cast<R*>(data) + b.position[l + k] * like.row + b.group[l + k] * like.group;
    }
    for (int64_t c = 0; c < n; c += 4) {
      if (n < 4) {
        for (int64_t m = 0; m < n; ++m) {
          for (int k = 0; k < pairs; ++k) Memory<R, Real, 1>::store(pair[k] + m, rows[m * kBlock + l + k]);
        }
        break;
      }
      const int64_t at = c + 4 <= n ? c : n - 4;
      const Real* from = rows + at * kBlock + l;
      using V4 = Vec<Real, 4>;
      V4 r[4] = {load_raw<V4>(from), load_raw<V4>(from + kBlock), load_raw<V4>(from + 2 * kBlock),
                 load_raw<V4>(from + 3 * kBlock)};
      transpose<Real>(r[0], r[1], r[2], r[3]);
      for (int k = 0; k < pairs; ++k) M::store(pair[k] + at, r[k]);
    }
  }
}

// Calls f with a value of the type in which the points are stored.
template <class Real, class F>
DCNV3_FN void with_points_type(Type type, F f) {
  if constexpr (std::is_same_v<Real, double>) {
    f(double());
  } else {
    if (type == Type::kBFloat16) return f(BFloat16());
    if (type == Type::kFloat16) return f(Float16());
    f(float());
  }
}

template <class Real>
DCNV3_TARGET void soften(Block<Real>& b) {
  alignas(64) Real top[kBlock], total[kBlock];
  Real* __restrict weight = b.weight;
  for (int l = 0; l < kBlock; ++l) top[l] = weight[l], total[l] = 0;
  for (int64_t p = 1; p < b.points; ++p) {
    for (int l = 0; l < kBlock; ++l) {
      const Real w = weight[p * kBlock + l];
      top[l] = w > top[l] ? w : top[l];
    }
  }
  for (int64_t p = 0; p < b.points; ++p) {
    for (int l = 0; l < kBlock; ++l) {
      const Real e = exp_nonpositive(weight[p * kBlock + l] - top[l]);
      weight[p * kBlock + l] = e;
      total[l] += e;
    }
  }
  for (int l = 0; l < kBlock; ++l) total[l] = Real(1) / total[l];
  for (int64_t p = 0; p < b.points; ++p) {
    for (int l = 0; l < kBlock; ++l) weight[p * kBlock + l] *= total[l];
  }
  const Real* centre = b.number + 3 * b.points * kBlock;
  for (int l = 0; l < kBlock; ++l) b.blend[l] = b.call.centre ? sigmoid(centre[l]) : Real(0);
  for (int l = 0; l < kBlock; ++l) b.keep[l] = Real(1) - b.blend[l];
}

template <class Real>
DCNV3_FN void load(Block<Real>& b) {
  with_points_type<Real>(b.call.points_type, [&b](auto r) DCNV3_TARGET {
    using R = decltype(r);
    if (b.call.fused) {
      load_columns<R>(b, b.call.offset, b.columns, b.number);
    } else {
      load_columns<R>(b, b.call.offset, 2 * b.points, b.number);
      load_columns<R>(b, b.call.weight, b.points, b.weight);
    }
  });
  if (b.call.fused) {
    soften(b);
  } else {
    for (int l = 0; l < kBlock; ++l) b.blend[l] = 0, b.keep[l] = 1;
  }
}

// Where point p of each lane falls.
template <class Real>
struct Locations {
  DCNV3_TARGET Locations(const Block<Real>& b, int64_t p)
      : grid_h(b.grid_h), grid_w(b.grid_w), offset(b.number + 2 * p * kBlock), scale(Real(b.s.offset_scale)) {
    int64_t column, row;
    point_in_kernel(b.s, p, &column, &row);
    step_h = Real(step(row, b.s.kernel_h, b.s.dilation_h));
    step_w = Real(step(column, b.s.kernel_w, b.s.dilation_w));
  }
  DCNV3_ALWAYS Real h(int l) const { return grid_h[l] + (step_h + offset[kBlock + l]) * scale; }
  DCNV3_ALWAYS Real w(int l) const { return grid_w[l] + (step_w + offset[l]) * scale; }

  const Real *grid_h, *grid_w, *offset;
  Real scale, step_h, step_w;
};

template <class Real>
DCNV3_TARGET void weigh(Block<Real>& b) {
  const Extent<Real> height = extent<Real>(b.s.height), width = extent<Real>(b.s.width);
  const int32_t columns = int32_t(b.s.width);
  for (int64_t p = 0; p < b.points; ++p) {
    Real* __restrict tap = b.tap + 4 * p * kBlock;
    int32_t* __restrict pixel = b.pixel.get() + p * kBlock;
    const Real *weight = b.weight + p * kBlock, *keep = b.keep;
    const Locations<Real> at(b, p);
    for (int l = 0; l < kBlock; ++l) {
      const Axis<Real> h = locate(at.h(l), height), w = locate(at.w(l), width);
      const Real mask = weight[l] * keep[l];
      pixel[l] = int32_t(h.first) * columns + int32_t(w.first);
      tap[l] = mask * h.weight0 * w.weight0;
      tap[kBlock + l] = mask * h.weight0 * w.weight1;
      tap[2 * kBlock + l] = mask * h.weight1 * w.weight0;
      tap[3 * kBlock + l] = mask * h.weight1 * w.weight1;
    }
  }
}

// Adds the lanes of v times zero to *poison: NaN from then on if one of them is not finite.
template <class V, class Real>
DCNV3_FN void watch(V v, Real* poison) {
  store_raw(poison, load_raw<V>(poison) + v * Real(0));
}
template <class Real>
DCNV3_FN bool poisoned(const Real* poison, int n) {
  Real sum = 0;
  for (int i = 0; i < n; ++i) sum += poison[i];
  return sum != 0;
}

// Samples NV vectors of W channels from channel c on, for the pair in lane l; P points, or b.points.
template <class T, int W, int NV, int P, class Real>
DCNV3_FN void sample(const Block<Real>& b, int l, int64_t c, Real* poison) {
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
DCNV3_TARGET void sample_by_definition(const Block<Real>& b, int l) {
  using M = Memory<T, Real, 1>;
  const Problem& s = b.s;
  const T* x = static_cast<const T*>(b.call.x) + b.plane[l];
  T* y = static_cast<T*>(b.call.y) + b.position[l] * s.channels() + b.group[l] * s.depth;
  for (int64_t c = 0; c < s.depth; ++c) {
    const auto at = [&](int64_t i, int64_t j) DCNV3_TARGET { return M::load(x + (i * s.width + j) * s.channels() + c); };
    Real sum = 0;
    for (int64_t p = 0; p < b.points; ++p) {
      const Locations<Real> where(b, p);
      sum += b.weight[p * kBlock + l] * sample_exactly(where.h(l), where.w(l), s.height, s.width, at).value;
    }
    if (b.call.centre) sum = b.keep[l] * sum + b.blend[l] * M::load(x + b.own[l] * s.channels() + c);
    M::store(y + c, sum);
  }
}

template <class T, int D, int P>
DCNV3_TARGET void forward_of(const Call& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  constexpr int kLanes = kBytes / int(sizeof(Real));
  Block<Real> b(call);
  for (int64_t first = begin; first < end; first += kBlock) {
    place(b, 0, 0, call.problem.group, first, end);
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
      for (int l = 0; l < b.count; ++l) sample_by_definition<T>(b, l);
    }
  }
}

// Where the gradient of x is summed, in Real: dx itself, or scratch where dx is of half precision.
template <class Real>
struct Plane {
  Real* data;      // of the groups at hand, from the image's first pixel on
  int64_t pixel;   // elements from one pixel to the next
  int64_t group0;  // the first of these groups
};

// Spreads dy over dx for the pair in lane l, and takes the dots of dy with the pixels.
template <class T, int W, int NV, int P, class Real>
DCNV3_FN void spread(Block<Real>& b, const Plane<Real>& dx, int l, int64_t c) {
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
DCNV3_TARGET void spread_by_definition(const Block<Real>& b, const Plane<Real>& dx, int l) {
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
DCNV3_TARGET void chain_by_definition(const Block<Real>& b, int l) {
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
      const auto at = [&](int64_t i, int64_t j) DCNV3_TARGET {
        return M::load(x + (i * s.width + j) * s.channels() + c);
      };
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
DCNV3_TARGET void chain(const Block<Real>& b, Real* __restrict bad) {
  const Extent<Real> height = extent<Real>(b.s.height), width = extent<Real>(b.s.width);
  for (int64_t p = 0; p < b.points; ++p) {
    const Real* dot = b.dot + p * kBlock * 4;
    Real* __restrict chained = b.chained + 3 * p * kBlock;
    const Locations<Real> at(b, p);
    for (int l = 0; l < kBlock; ++l) {
      const Real at_h = at.h(l), at_w = at.w(l);
      const Axis<Real> h = locate(at_h, height), w = locate(at_w, width);
      const Slopes<Real> slope_h = slopes(at_h, h, height), slope_w = slopes(at_w, w, width);
      const Real upper = w.weight0 * dot[4 * l] + w.weight1 * dot[4 * l + 1];
      const Real lower = w.weight0 * dot[4 * l + 2] + w.weight1 * dot[4 * l + 3];
      const Real value = h.weight0 * upper + h.weight1 * lower;
      const Real by_h = slope_h.weight0 * upper + slope_h.weight1 * lower;
      const Real by_w = h.weight0 * (slope_w.weight0 * dot[4 * l] + slope_w.weight1 * dot[4 * l + 1]) +
                        h.weight1 * (slope_w.weight0 * dot[4 * l + 2] + slope_w.weight1 * dot[4 * l + 3]);
      chained[l] = value;
      chained[kBlock + l] = by_h;
      chained[2 * kBlock + l] = by_w;
      bad[l] += (value + by_h + by_w) * Real(0);
    }
  }
}

// Turns the numbers of the block into their gradients, in place.
template <class Real>
DCNV3_TARGET void differentiate(Block<Real>& b) {
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
DCNV3_TARGET void store(const Block<Real>& b) {
  with_points_type<Real>(b.call.points_type, [&b](auto r) DCNV3_TARGET {
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
      const int64_t group = b.group[l], next = group + 1 < b.s.group ? (group + 1) * offset.group : offset.row;
      std::memset(row + group * offset.group + b.columns, 0, (next - group * offset.group - b.columns) * sizeof(R));
    }
  });
}

// NaN in bad[l] where the pair in lane l has a weight or an element of dy that is not finite.
template <class T, class Real>
DCNV3_TARGET void watch_operands(const Block<Real>& b, Real* __restrict bad) {
  constexpr int kLanes = kBytes / int(sizeof(Real));
  for (int l = 0; l < kBlock; ++l) bad[l] = b.blend[l] * Real(0);
  for (int64_t p = 0; p < b.points; ++p) {
    for (int l = 0; l < kBlock; ++l) bad[l] += b.weight[p * kBlock + l] * Real(0);
  }
  const auto dy = [&b](int l) DCNV3_TARGET {
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

template <class T, int D, int P>
DCNV3_TARGET void backward_of(const Call& call, int64_t image, int64_t g0, int64_t g1) {
  using Real = RealOf<T>;
  constexpr int kLanes = kBytes / int(sizeof(Real));
  const Problem& s = call.problem;
  const int64_t pixels = s.height * s.width, run = (g1 - g0) * s.depth;
  T* out = static_cast<T*>(call.dx) + image * pixels * s.channels() + g0 * s.depth;
  std::unique_ptr<Real[]> scratch;
  Plane<Real> dx;
  if constexpr (std::is_same_v<T, Real>) {
    dx = {out, s.channels(), g0};
  } else {
    scratch.reset(new Real[pixels * run]);
    dx = {scratch.get(), run, g0};
  }
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    std::memset(dx.data + pixel * dx.pixel, 0, run * sizeof(Real));
  }

  Block<Real> b(call);
  const int64_t pairs = s.positions() * (g1 - g0);
  for (int64_t first = 0; first < pairs; first += kBlock) {
    place(b, image * s.positions(), g0, g1 - g0, first, pairs);
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

// Picks the form compiled for this depth and number of points, or the one that takes any.
template <class T>
DCNV3_TARGET void forward_any(const Call& call, int64_t begin, int64_t end) {
  const bool nine = call.problem.points == 9 && !std::is_same_v<T, double>;
  if (nine && call.problem.depth == 16) return forward_of<T, 16, 9>(call, begin, end);
  if (nine && call.problem.depth == 32) return forward_of<T, 32, 9>(call, begin, end);
  forward_of<T, 0, 0>(call, begin, end);
}
template <class T>
DCNV3_TARGET void backward_any(const Call& call, int64_t image, int64_t g0, int64_t g1) {
  const bool nine = call.problem.points == 9 && !std::is_same_v<T, double>;
  if (nine && call.problem.depth == 16) return backward_of<T, 16, 9>(call, image, g0, g1);
  if (nine && call.problem.depth == 32) return backward_of<T, 32, 9>(call, image, g0, g1);
  backward_of<T, 0, 0>(call, image, g0, g1);
}

DCNV3_TARGET void forward(const Call& call, int64_t begin, int64_t end) {
  switch (call.type) {
    case Type::kFloat32: return forward_any<float>(call, begin, end);
    case Type::kFloat64: return forward_any<double>(call, begin, end);
    case Type::kBFloat16: return forward_any<BFloat16>(call, begin, end);
    case Type::kFloat16: return forward_any<Float16>(call, begin, end);
  }
}
DCNV3_TARGET void backward(const Call& call, int64_t image, int64_t g0, int64_t g1) {
  switch (call.type) {
    case Type::kFloat32: return backward_any<float>(call, image, g0, g1);
    case Type::kFloat64: return backward_any<double>(call, image, g0, g1);
    case Type::kBFloat16: return backward_any<BFloat16>(call, image, g0, g1);
    case Type::kFloat16: return backward_any<Float16>(call, image, g0, g1);
  }
}

#undef DCNV3_FN
#undef DCNV3_ALWAYS
#undef DCNV3_SHUFFLE
