// The block of pairs at hand: loads the learned numbers and turns them into pixels and weights, a pair
// a lane; and the way back for their gradients. Part of dcnv3_cpu_kernel.h, included with it.

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
  int64_t groups;                 // of a position, one after the other
  int64_t position[kBlock];       // of the pair, over the whole batch
  int64_t group[kBlock];
  int64_t plane[kBlock];  // where the map of the pair's image and group starts in x
  int64_t own[kBlock];    // the pixel at the pair's position (fused form with centre)
  int64_t soon[kBlock];   // a pixel that pairs to come will sample
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

// Rows from the middle of a position's points to the last that they sample, with offsets of about a pixel.
CPU_TARGET inline int64_t reach(const Problem& s) {
  const double far = std::fabs(s.offset_scale) * double(radius(s.kernel_h, s.dilation_h) + 1);
  return far < 64 ? int64_t(far) + 1 : 64;  // 1: the lower neighbour
}

// Asks for a row of the map ahead of the samples. Points wander about their grid, so the hardware does
// not see what they will want next.
template <class T, class Real>
CPU_FN void prefetch(const Block<Real>& b) {
  for (int l = 0; l < b.count; ++l) {
    const T* x = static_cast<const T*>(b.call.x) + b.plane[l] + b.soon[l] * b.s.channels();
    for (int64_t c = 0; c < b.s.depth; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + c, 0, 2);
  }
}

// Fills the lanes with pairs [first, end) of `groups` groups from g0 on, positions from p0 on.
template <class Real>
CPU_TARGET void place(Block<Real>& b, int64_t p0, int64_t g0, int64_t groups, int64_t first, int64_t end) {
  const Problem s = b.s;  // a copy: what is written below could be a part of the other
  b.count = int(end - first < kBlock ? end - first : kBlock);
  b.groups = groups;
  int64_t position = p0 + first / groups, g = first % groups;
  int64_t image = position / s.positions();
  int64_t i = position % s.positions() / s.out_width, j = position % s.out_width;
  const int64_t pixels = s.height * s.width;
  const int64_t ahead = grid(0, s.stride_h, s.pad_h, s.kernel_h, s.dilation_h) + reach(s) + 1;
  for (int l = 0; l < kBlock;) {
    const int64_t plane = image * pixels * s.channels(), own = i * s.width + j;
    const int64_t row_ahead = (i * s.stride_h + ahead) * s.width + j * s.stride_w;
    const int64_t soon = row_ahead < 0 ? 0 : row_ahead < pixels ? row_ahead : pixels - 1;
    const Real grid_h = Real(grid(i, s.stride_h, s.pad_h, s.kernel_h, s.dilation_h));
    const Real grid_w = Real(grid(j, s.stride_w, s.pad_w, s.kernel_w, s.dilation_w));
    // The groups of this position; in lanes after the last pair that one again.
    for (bool same = true; same && l < kBlock; ++l) {
      b.position[l] = position;
      b.group[l] = g0 + g;
      b.plane[l] = plane + (g0 + g) * s.depth;
      b.own[l] = own;
      b.soon[l] = soon;
      b.grid_h[l] = grid_h;
      b.grid_w[l] = grid_w;
      if (l + 1 < b.count) same = ++g < groups;
    }
    g = 0;
    ++position;
    if (++j < s.out_width) continue;
    j = 0;
    if (++i < s.out_height) continue;
    i = 0;
    ++image;
  }
}

// Rows [0, n) of `rows` from n values a pair; the last four columns may be read twice. Asks for those of the
// next block.
template <class R, class Real>
CPU_TARGET void load_columns(const Block<Real>& b, const Columns& from, int64_t n, Real* rows) {
  using M = Memory<R, Real, 4>;
  const R* data = static_cast<const R*>(from.data);
  const int64_t next = kBlock * from.row / b.groups;
  for (int l = 0; l < kBlock; l += 4) {
    const R* pair[4];
    for (int k = 0; k < 4; ++k) {
      pair[k] = data + b.position[l + k] * from.row + b.group[l + k] * from.group;
      for (int64_t c = 0; c < n; c += 64 / int64_t(sizeof(R))) __builtin_prefetch(pair[k] + next + c);
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
CPU_TARGET void store_columns(const Block<Real>& b, const Real* rows, int64_t n, void* data,
                              const Columns& like) {
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

template <class Real>
CPU_TARGET void soften(Block<Real>& b) {
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
CPU_FN void load(Block<Real>& b) {
  with_type_in<Real>(b.call.points_type, [&b](auto r) CPU_TARGET {
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
  CPU_TARGET Locations(const Block<Real>& b, int64_t p)
      : grid_h(b.grid_h), grid_w(b.grid_w), offset(b.number + 2 * p * kBlock), scale(Real(b.s.offset_scale)) {
    int64_t column, row;
    point_in_kernel(b.s, p, &column, &row);
    step_h = Real(step(row, b.s.kernel_h, b.s.dilation_h));
    step_w = Real(step(column, b.s.kernel_w, b.s.dilation_w));
  }
  CPU_ALWAYS Real h(int l) const { return grid_h[l] + (step_h + offset[kBlock + l]) * scale; }
  CPU_ALWAYS Real w(int l) const { return grid_w[l] + (step_w + offset[l]) * scale; }

  const Real *grid_h, *grid_w, *offset;
  Real scale, step_h, step_w;
};

template <class Real>
CPU_TARGET void weigh(Block<Real>& b) {
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
