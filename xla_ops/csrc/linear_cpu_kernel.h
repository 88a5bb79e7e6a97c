// The kernels for one instruction set; included by cpu_targets.h.
//
// A panel of the kernel, kPanel columns of up to kDepth rows, is copied to lie side by side, so that it
// stays in the first caches while all rows of the tile go by it; float32's panels of a call that has them are
// used in place by AVX-512, whose width they have. A strip of kStrip rows has its sums over the panel's depth
// in registers: as many as there are.

#include "cpu_simd.h"
#include "cpu_gelu.h"

constexpr int kLanes = kBytes / 4;
constexpr int kPanel = 2 * kLanes;
constexpr int kStrip = kBytes == 64 ? 14 : 6;
constexpr int kDepth = 256;

// What a strip is computed from, and where it goes.
struct Strip {
  const float* x;  // of the first row, `stride` numbers apart
  int64_t stride;
  const float* panel;
  int64_t depth;
  const float* before;  // sums over the panels before, kPanel apart, or null
  const float* bias;    // or null
  float* to;            // of the first row, `to_stride` apart
  int64_t to_stride;
  const char* ahead;  // the next panel's rows, `ahead_stride` bytes apart, or null
  int64_t ahead_stride;
};

// Sums of x[R * stride + k] * panel[k][] over k for the rows R = 0, 1, ..., in the panel's first vectors.
template <int vectors, int... R>
CPU_TARGET void strip_of(std::integer_sequence<int, R...>, const Strip& s) {
  using V = Vec<float, kLanes>;
  V low[sizeof...(R)] = {}, high[sizeof...(R)] = {};
  const float *x = s.x, *panel = s.panel;
  const char* ahead = s.ahead;
  const int64_t stride = s.stride;
  for (int64_t left = s.depth; left > 0; left -= 16) {
    if (ahead) {  // bit by bit: there are few that a processor can wait for at once
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + 64);
      ahead += s.ahead_stride;
    }
    for (int64_t k = std::min<int64_t>(left, 16); k > 0; --k, ++x, panel += kPanel) {
      const V a = load_raw<V>(panel);
      if constexpr (vectors == 1) {
        ((low[R] += x[R * stride] * a), ...);
      } else {
        const V b = load_raw<V>(panel + kLanes);
        ((low[R] += x[R * stride] * a, high[R] += x[R * stride] * b), ...);
      }
    }
  }
  const auto finish = [&s](int64_t row, int64_t column, V sum) CPU_TARGET {
    if (s.before) sum += load_raw<V>(s.before + row * kPanel + column);
    if (s.bias) sum += load_raw<V>(s.bias + column);
    store_raw(s.to + row * s.to_stride + column, sum);
  };
  (finish(R, 0, low[R]), ...);
  if constexpr (vectors == 2) (finish(R, kLanes, high[R]), ...);
}

template <int rows, int vectors>
CPU_TARGET void strip_of(const Strip& s) {
  strip_of<vectors>(std::make_integer_sequence<int, rows>{}, s);
}

// strip_of<rows, vectors>
template <int... N>
CPU_FN auto strip_for(std::integer_sequence<int, N...>, int64_t rows, int64_t vectors) {
  using Compute = void (*)(const Strip&);
  static constexpr Compute kOne[] = {strip_of<N + 1, 1>...}, kTwo[] = {strip_of<N + 1, 2>...};
  return (vectors == 1 ? kOne : kTwo)[rows - 1];
}

// Copies n numbers of T as floats, or as they are.
template <class T, class To>
CPU_FN void copy(const T* from, int64_t n, To* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, To> && sizeof(T) == 2) {
    using Raw = Vec<uint16_t, kBytes / 2>;
    for (; i + kBytes / 2 <= n; i += kBytes / 2) store_raw(to + i, load_raw<Raw>(from + i));
    for (; i + 4 <= n; i += 4) store_raw(to + i, load_raw<Vec<uint16_t, 4>>(from + i));
    for (; i < n; ++i) to[i] = from[i];
  } else {
    for (; i + kLanes <= n; i += kLanes) store_raw(to + i, Memory<T, float, kLanes>::load(from + i));
    for (; i + 4 <= n; i += 4) store_raw(to + i, Memory<T, float, 4>::load(from + i));
    for (; i < n; ++i) to[i] = Memory<T, float, 1>::load(from + i);
  }
}

// Copies `rows` rows of x, of each the numbers from `at` on, to rows `stride` apart.
template <class T, class To>
CPU_TARGET void copy_rows(const T* x, int64_t inputs, int64_t rows, int64_t at, int64_t depth, To* to,
                          int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) copy(x + r * inputs + at, depth, to + r * stride);
}

// Likewise of the rows that a convolution's are, from `row` on: the three rows of three pixels around pixel
// (2 i, 2 j) for the result's pixel (i, j), zero outside the map.
template <class T, class To>
CPU_TARGET void copy_pixels(const T* x, const Map& map, int64_t row, int64_t rows, int64_t at, int64_t depth,
                            To* to, int64_t stride) {
  const int64_t c = map.channels, across = 3 * c;
  int64_t image = row / (map.rows() * map.columns());
  int64_t i = row / map.columns() % map.rows(), j = row % map.columns();
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    const int64_t left = 2 * j - 1;
    const int64_t lowest = left < 0 ? c : 0, highest = std::min(across, (map.width - left) * c);
    for (int line = 0; line < 3; ++line) {
      // Of the line's numbers those that are asked for, and of these the ones inside the map.
      const int64_t begin = std::max<int64_t>(at - line * across, 0);
      const int64_t end = std::min(at + depth - line * across, across);
      if (begin >= end) continue;
      const int64_t y = 2 * i - 1 + line;
      const bool inside = y >= 0 && y < map.height;
      const int64_t first = inside ? std::clamp(lowest, begin, end) : end;
      const int64_t last = inside ? std::clamp(highest, first, end) : end;
      To* const p = to + line * across - at;
      std::fill(p + begin, p + first, To{});
      if (first < last) {
        copy(x + ((image * map.height + y) * map.width + left) * c + first, last - first, p + first);
      }
      std::fill(p + last, p + end, To{});
    }
    if (++j < map.columns()) continue;
    j = 0;
    if (++i < map.rows()) continue;
    i = 0, ++image;
  }
}

// Copies a panel; the columns that the kernel lacks are zero.
template <class T>
CPU_TARGET void pack(const T* kernel, int64_t stride, int64_t depth, int64_t columns, float* panel) {
  using M = Memory<T, float, kLanes>;
  for (int64_t k = 0; k < depth; ++k, kernel += stride, panel += kPanel) {
    if (columns >= kPanel) {
      store_raw(panel, M::load(kernel));
      store_raw(panel + kLanes, M::load(kernel + kLanes));
      continue;
    }
    for (int c = 0; c < kPanel; ++c) panel[c] = c < columns ? Memory<T, float, 1>::load(kernel + c) : 0.f;
  }
}

// y = f(sums + bias) of as many columns as a vector has.
template <bool with_gelu, class T, class P>
CPU_FN void finish_some(const float* sums, const P* bias, T* y) {
  const Vec<float, kLanes> z = load_raw<Vec<float, kLanes>>(sums) + Memory<P, float, kLanes>::load(bias);
  Memory<T, float, kLanes>::store(y, with_gelu ? gelu_for<T, kLanes>(z) : z);
}

// y of a panel's columns. Those that are left are a vector too, so that GELU rounds alike in all columns.
template <bool with_gelu, class T, class P>
CPU_TARGET void finish(const float* sums, int64_t rows, int64_t columns, const P* bias, T* y,
                       int64_t stride) {
  const int64_t whole = columns / kLanes * kLanes;
  P last_bias[kLanes] = {};
  std::copy(bias + whole, bias + columns, last_bias);
  for (int64_t r = 0; r < rows; ++r, sums += kPanel, y += stride) {
    for (int64_t c = 0; c < whole; c += kLanes) finish_some<with_gelu>(sums + c, bias + c, y + c);
    if (whole == columns) continue;
    T last[kLanes];
    finish_some<with_gelu>(sums + whole, last_bias, last);
    std::copy(last, last + columns - whole, y + whole);
  }
}

template <class T, class P>
CPU_TARGET void forward_of(const Call& s, const Tile& tile) {
  const T* x = static_cast<const T*>(s.x);
  const T* kernel = static_cast<const T*>(s.kernel);
  const P* bias = static_cast<const P*>(s.bias) + tile.column;
  T* y = static_cast<T*>(s.y) + tile.row * s.outputs + tile.column;
  // Strips read x as it is, unless it is in half precision, or its rows begin 4096 bytes apart, all of
  // them in the same few places of the first cache.
  constexpr bool kWiden = !std::is_same_v<T, float>;
  const bool copied = kWiden || s.map.channels || s.inputs % 1024 == 0;
  const bool in_place = !kWiden && s.panels && kPanel == kPanelColumns;
  const int64_t panels = rounded_up(tile.columns, kPanel), depths = rounded_up(s.inputs, kDepth);
  constexpr int64_t kCopyStride = kDepth + 16;
  const int64_t sums_size = tile.rows * kPanel * (depths > 1 ? panels : 1);
  const Scratch<Use::kProduct> scratch(kDepth * kPanel + sums_size + (copied ? tile.rows * kCopyStride : 0));
  float* const panel_copy = scratch.data;
  float* const all_sums = panel_copy + kDepth * kPanel;
  float* const copied_rows = all_sums + sums_size;
  for (int64_t at = 0; at < s.inputs; at += kDepth) {
    const int64_t depth = std::min<int64_t>(s.inputs - at, kDepth);
    const bool last = at + depth == s.inputs;
    if (copied) {
      if (s.map.channels) {
        copy_pixels(x, s.map, tile.row, tile.rows, at, depth, copied_rows, kCopyStride);
      } else {
        copy_rows(x + tile.row * s.inputs, s.inputs, tile.rows, at, depth, copied_rows, kCopyStride);
      }
    }
    const float* rows = copied_rows;
    if constexpr (!kWiden) rows = copied ? copied_rows : x + tile.row * s.inputs + at;
    const int64_t stride = copied ? kCopyStride : s.inputs;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t columns = tile.columns - p * kPanel;
      const int64_t column = tile.column + p * kPanel;
      const T* const from = kernel + s.kernel_at(at, column);
      const float* panel = panel_copy;
      if constexpr (!kWiden) panel = in_place ? from : panel_copy;
      if (!in_place) pack(from, s.kernel_stride(), depth, columns, panel_copy);
      float* const sums = all_sums + (depths > 1 ? p * tile.rows * kPanel : 0);
      T* const result = y + p * kPanel;
      Strip strip = {};
      strip.stride = stride, strip.panel = panel, strip.depth = depth;
      // What is neither rounded nor goes into GELU goes to its place at once.
      bool direct = false;
      if constexpr (std::is_same_v<T, float>) {
        direct = last && !s.gelu && (columns >= kPanel || columns == kLanes);
        if (direct) strip.bias = bias + p * kPanel;
      }
      const int64_t strips = rounded_up(tile.rows, kStrip);
      for (int64_t i = 0; i < strips; ++i) {
        const int64_t begin = i * tile.rows / strips, end = (i + 1) * tile.rows / strips;
        strip.x = rows + begin * stride;
        strip.before = at > 0 ? sums + begin * kPanel : nullptr;
        strip.to = sums + begin * kPanel, strip.to_stride = kPanel;
        if constexpr (std::is_same_v<T, float>) {
          if (direct) strip.to = result + begin * s.outputs, strip.to_stride = s.outputs;
        }
        // Each strip fetches as many rows of the next panel as it has sixteens of depth.
        const int64_t row = i * rounded_up(depth, 16);
        const bool more = p + 1 < panels && row + rounded_up(depth, 16) <= depth;
        strip.ahead = nullptr;
        if (more)
          strip.ahead = reinterpret_cast<const char*>(kernel + s.kernel_at(at + row, column + kPanel));
        strip.ahead_stride = s.kernel_stride() * int64_t(sizeof(T));
        strip_for(std::make_integer_sequence<int, kStrip>{}, end - begin, columns > kLanes ? 2 : 1)(strip);
      }
      if (!last || direct) continue;
      const auto write = s.gelu ? finish<true, T, P> : finish<false, T, P>;
      write(sums, tile.rows, std::min<int64_t>(columns, kPanel), bias + p * kPanel, result, s.outputs);
    }
  }
}

CPU_TARGET void forward(const Call& call, const Tile& tile) {
  const bool same = call.type == call.bias_type;
  switch (call.type) {
    case Type::kFloat32:
      return forward_of<float, float>(call, tile);
    case Type::kBFloat16:
      if (same) return forward_of<BFloat16, BFloat16>(call, tile);
      return forward_of<BFloat16, float>(call, tile);
    case Type::kFloat16:
      if (same) return forward_of<Float16, Float16>(call, tile);
      return forward_of<Float16, float>(call, tile);
    case Type::kFloat64:
      return;  // the handlers refuse it
  }
}
