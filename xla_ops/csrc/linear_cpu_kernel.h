// The kernels for one instruction set; included by cpu_targets.h.
//
// A panel of the kernel, kPanel columns of up to kDepth rows, is copied to lie side by side, so that it
// stays in the nearest caches while all rows of the tile go by it; float32's panels of a call that has them
// are used in place. A strip of rows has its sums over the panel's depth in registers: as many as there are.

#include "cpu_simd.h"
#include "cpu_gelu.h"

constexpr int kLanes = kBytes / 4;
constexpr int kPanel = kPanelColumns;
constexpr int kVectors = kPanel / kLanes;
constexpr int kDepth = 256;  // words
constexpr int kStep = 16;    // words
// Vectors of sums in registers, and with so many in a row the rows of a strip.
constexpr int kSums = kBytes == 64 ? 28 : 12;
constexpr int kMostRows = kBytes == 64 ? 14 : 12;
constexpr int strip_rows(int vectors) {
  return std::clamp(kSums / vectors, 1, kMostRows);
}

// What a strip is computed from, in words, and where it goes.
struct Strip {
  const float* x;  // of the first row, `stride` words apart
  int64_t stride;
  const float* panel;
  int64_t depth;
  const float* before;  // sums over the panels before, kPanel apart, or null
  const float* bias;    // or null
  float* to;            // of the first row, `to_stride` apart
  int64_t to_stride;
  const char* ahead;  // rows of the next panel to fetch, `ahead_stride` bytes apart
  int64_t ahead_stride;
  int64_t ahead_rows;  // of them for each step of kStep words of depth
};

// Adds the products of a word of x and those of a panel.
template <bool pairs>
CPU_FN void add_products(Vec<float, kLanes>& sum, const float* x, Vec<float, kLanes> panel) {
#if CPU_BFLOAT16
  if constexpr (pairs) {
    const __m512i word = _mm512_set1_epi32(load_raw<int32_t>(x));
    sum = _mm512_dpbf16_ps(sum, bits<__m512bh>(word), bits<__m512bh>(panel));
    return;
  }
#endif
  sum += *x * panel;
}

// Sums of x[r * stride + k] * panel[k][] over k for a strip's rows and the panel's first vectors, of which
// I = 0, 1, ... counts all.
template <bool pairs, int rows, int vectors, int... I>
CPU_TARGET void strip_of(std::integer_sequence<int, I...>, const Strip& s) {
  using V = Vec<float, kLanes>;
  // The fewer of a panel's vectors and a column's numbers stay in registers.
  constexpr bool by_rows = vectors <= rows;
  constexpr int row[] = {by_rows ? I / vectors : I % rows...};
  constexpr int column[] = {(by_rows ? I % vectors : I / rows) * kLanes...};
  V sum[sizeof...(I)] = {};
  const float *x = s.x, *panel = s.panel;
  const char* ahead = s.ahead;
  const int64_t stride = s.stride;
  for (int64_t left = s.depth; left > 0; left -= kStep) {
    // Bit by bit: there are few that a processor can wait for at once.
    for (int64_t n = s.ahead_rows; n > 0; --n, ahead += s.ahead_stride) {
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + 64);
    }
    for (int64_t k = std::min<int64_t>(left, kStep); k > 0; --k, ++x, panel += kPanel) {
      (add_products<pairs>(sum[I], x + row[I] * stride, load_raw<V>(panel + column[I])), ...);
    }
  }
  if (const float* const before = s.before) {
    ((sum[I] += load_raw<V>(before + row[I] * kPanel + column[I])), ...);
  }
  if (const float* const bias = s.bias) ((sum[I] += load_raw<V>(bias + column[I])), ...);
  float* const to = s.to;
  const int64_t to_stride = s.to_stride;
  (store_raw(to + row[I] * to_stride + column[I], sum[I]), ...);
}

using StripOf = void (*)(const Strip&);

template <bool pairs, int rows, int vectors>
CPU_TARGET void strip_of(const Strip& s) {
  strip_of<pairs, rows, vectors>(std::make_integer_sequence<int, rows * vectors>{}, s);
}

template <bool pairs, int vectors, int... N>
CPU_FN StripOf strip_of_rows(std::integer_sequence<int, N...>, int64_t rows) {
  static constexpr StripOf kAll[] = {strip_of<pairs, N + 1, vectors>...};
  return kAll[rows - 1];
}

// strip_of<pairs, rows, vectors>
template <bool pairs, int vectors = kVectors>
CPU_FN StripOf strip_for(int64_t rows, int64_t vectors_wanted) {
  if constexpr (vectors > 1) {
    if (vectors_wanted < vectors) return strip_for<pairs, vectors - 1>(rows, vectors_wanted);
  }
  return strip_of_rows<pairs, vectors>(std::make_integer_sequence<int, strip_rows(vectors)>{}, rows);
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
    const int64_t left = 2 * j - 1, top = 2 * i - 1;
    const bool inside_map = left >= 0 && left + 3 <= map.width && top >= 0 && top + 3 <= map.height;
    const int64_t lowest = left < 0 ? c : 0, highest = std::min(across, (map.width - left) * c);
    for (int line = 0; line < 3; ++line) {
      const int64_t from = ((image * map.height + top + line) * map.width + left) * c;
      if (inside_map && depth == 3 * across) {  // most pixels of few channels
        copy(x + from, across, to + line * across);
        continue;
      }
      // Of the line's numbers those that are asked for, and of these the ones inside the map.
      const int64_t begin = std::max<int64_t>(at - line * across, 0);
      const int64_t end = std::min(at + depth - line * across, across);
      if (begin >= end) continue;
      const bool inside = top + line >= 0 && top + line < map.height;
      const int64_t first = inside ? std::clamp(lowest, begin, end) : end;
      const int64_t last = inside ? std::clamp(highest, first, end) : end;
      To* const p = to + line * across - at;
      std::fill(p + begin, p + first, To{});
      if (first < last) copy(x + from + first, last - first, p + first);
      std::fill(p + last, p + end, To{});
    }
    if (++j < map.columns()) continue;
    j = 0;
    if (++i < map.rows()) continue;
    i = 0, ++image;
  }
}

// Four numbers as they are copied, in the lower halves of words where they have 16 bits.
template <class T, class To>
CPU_FN Vec<float, 4> load_four(const T* from) {
  if constexpr (std::is_same_v<T, To> && sizeof(T) == 2) {
    using Words = Vec<uint32_t, 4>;
    return bits<Vec<float, 4>>(__builtin_convertvector(load_raw<Vec<uint16_t, 4>>(from), Words));
  } else {
    return Memory<T, float, 4>::load(from);
  }
}
template <class To>
CPU_FN void store_four(Vec<float, 4> v, To* to) {
  if constexpr (sizeof(To) == 2) {
    store_raw(to, __builtin_convertvector(bits<Vec<uint32_t, 4>>(v), Vec<uint16_t, 4>));
  } else {
    store_raw(to, v);
  }
}

// Copies columns of x to rows `stride` apart: `rows` of them, `columns` numbers apart in x, of each `depth`
// numbers.
template <class T, class To>
CPU_TARGET void copy_columns(const T* x, int64_t columns, int64_t rows, int64_t depth, To* to,
                             int64_t stride) {
  const int64_t whole_rows = rows / 4 * 4, whole_depth = depth / 4 * 4;
  for (int64_t r = 0; r < whole_rows; r += 4) {
    for (int64_t k = 0; k < whole_depth; k += 4) {
      const T* const from = x + k * columns + r;
      To* const p = to + r * stride + k;
      Vec<float, 4> four[4];
      for (int i = 0; i < 4; ++i) four[i] = load_four<T, To>(from + i * columns);
      transpose<float>(four[0], four[1], four[2], four[3]);
      for (int i = 0; i < 4; ++i) store_four(four[i], p + i * stride);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = r < whole_rows ? whole_depth : 0; k < depth; ++k) {
      copy(x + k * columns + r, 1, to + r * stride + k);
    }
  }
}

// Copies the numbers from `at` on of a tile's rows, and zero after them up to `whole` numbers. `pixels` holds
// those of a convolution before they are transposed.
template <class T, class To>
CPU_TARGET void copy_inputs(const Call& s, const Tile& tile, int64_t at, int64_t numbers, int64_t whole,
                            To* to, int64_t stride, T* pixels) {
  const T* const x = static_cast<const T*>(s.x);
  if (s.transposed && s.map.channels) {
    copy_pixels(x, s.map, at, numbers, tile.row, tile.rows, pixels, tile.rows);
    copy_columns(pixels, tile.rows, tile.rows, numbers, to, stride);
  } else if (s.transposed) {
    copy_columns(x + at * s.rows + tile.row, s.rows, tile.rows, numbers, to, stride);
  } else if (s.map.channels) {
    copy_pixels(x, s.map, tile.row, tile.rows, at, numbers, to, stride);
  } else {
    copy_rows(x + tile.row * s.inputs, s.inputs, tile.rows, at, numbers, to, stride);
  }
  if (numbers == whole) return;
  for (int64_t r = 0; r < tile.rows; ++r) std::fill_n(to + r * stride + numbers, whole - numbers, To{});
}

// Copies a panel's rows of the kernel, each to words of its own or with the next one to pairs; what the
// kernel lacks is zero.
template <bool pairs, class T>
CPU_TARGET void pack(const T* kernel, int64_t stride, int64_t rows, int64_t columns, float* panel) {
  using M = Memory<T, float, kLanes>;
  for (int64_t k = 0; k < rows; k += pairs ? 2 : 1, panel += kPanel) {
    const T *first = kernel + k * stride, *second = k + 1 < rows ? first + stride : nullptr;
    if (columns < kPanel || (pairs && !second)) {
      for (int c = 0; c < kPanel; ++c) {
        if constexpr (pairs) {
          const auto number = [&](const T* row) { return row && c < columns ? row[c].bits : 0u; };
          store_raw(panel + c, number(second) << 16 | number(first));
        } else {
          panel[c] = c < columns ? Memory<T, float, 1>::load(first + c) : 0.f;
        }
      }
      continue;
    }
    for (int c = 0; c < kPanel; c += kLanes) {
      if constexpr (pairs) {
        const auto numbers = [c](const T* row) CPU_TARGET {
          return __builtin_convertvector(load_raw<Vec<uint16_t, kLanes>>(row + c), Vec<uint32_t, kLanes>);
        };
        store_raw(panel + c, numbers(second) << 16 | numbers(first));
      } else {
        store_raw(panel + c, M::load(first + c));
      }
    }
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

// The rows of a panel to come, which the strips that go by another one fetch.
class Ahead {
 public:
  // Of the panel at `column` from input `number` on, as many as `most` inputs, in so many steps of strips;
  // none where there is no such column.
  template <class T>
  CPU_ALWAYS Ahead(const Call& s, const T* kernel, int64_t number, int64_t column, int64_t most,
                   int64_t steps) {
    if (column >= s.outputs) return;
    // Rows of 64 bytes that lie together count as one.
    const int64_t together = s.panels && sizeof(T) == 2 ? 2 : 1;
    next_ = reinterpret_cast<const char*>(kernel + s.kernel_at(number, column));
    stride_ = s.kernel_stride() * together * int64_t(sizeof(T));
    left_ = std::min(s.inputs - number, most) / together;
    each_ = quotient_up(left_, steps);
  }

  // Hands a strip its part.
  CPU_ALWAYS void give(Strip* strip) {
    const int64_t steps = quotient_up(strip->depth, kStep);
    each_ = std::min(each_, quotient_up(left_, steps));
    strip->ahead = next_, strip->ahead_stride = stride_, strip->ahead_rows = each_;
    next_ += each_ * steps * stride_;
    left_ = std::max<int64_t>(left_ - each_ * steps, 0);
  }

 private:
  const char* next_ = nullptr;
  int64_t stride_ = 0, left_ = 0, each_ = 0;  // each_: in a step
};

template <class T, class P>
CPU_TARGET void forward_of(const Call& s, const Tile& tile) {
  if (tile.rows < 1) return;
  const T* const kernel = static_cast<const T*>(s.kernel);
  const P* const bias = static_cast<const P*>(s.bias) + tile.column;
  T* const y = static_cast<T*>(s.y) + tile.row * s.outputs + tile.column;
  constexpr bool pairs = CPU_BFLOAT16 && std::is_same_v<T, BFloat16>;
  using Number = std::conditional_t<pairs, BFloat16, float>;
  constexpr int kNumbers = pairs ? 2 : 1;  // of a word
  const int64_t words = quotient_up(s.inputs, kNumbers);
  // Strips read x as it is, unless it is no whole words, or the many rows of a whole panel's strips begin
  // 4096 bytes apart, all of them in the same few places of the first cache.
  constexpr bool kWiden = !std::is_same_v<T, Number>;
  const bool copied = kWiden || s.map.channels || s.transposed || words * kNumbers > s.inputs ||
                      (strip_rows(kVectors) > 4 && words % 1024 == 0);
  const bool in_place = std::is_same_v<T, float> && s.panels;
  const int64_t panels = quotient_up(tile.columns, kPanel), depths = quotient_up(words, kDepth);
  constexpr int64_t kCopyStride = kDepth + 16;
  const int64_t stride = copied ? kCopyStride : words;
  const int64_t sums_size = kPanel * (depths > 1 ? tile.rows * panels : kMostRows);
  const int64_t pixels_size = s.transposed && s.map.channels ? tile.rows * kDepth : 0;
  const Scratch<Use::kProduct> scratch(kDepth * kPanel + sums_size + pixels_size +
                                       (copied ? tile.rows * kCopyStride : 0));
  float* const panel_copy = scratch.data;
  float* const all_sums = panel_copy + kDepth * kPanel;
  float* const pixels = all_sums + sums_size;
  float* const copied_rows = pixels + pixels_size;
  for (int64_t at = 0; at < words; at += kDepth) {
    const int64_t depth = std::min<int64_t>(words - at, kDepth);
    const bool last = at + depth == words;
    const int64_t number = at * kNumbers, numbers = std::min(s.inputs - number, depth * kNumbers);
    const float* rows = copied_rows;
    if (copied) {
      copy_inputs<T>(s, tile, number, numbers, depth * kNumbers, reinterpret_cast<Number*>(copied_rows),
                     kCopyStride * kNumbers, reinterpret_cast<T*>(pixels));
    } else {
      rows = reinterpret_cast<const float*>(static_cast<const T*>(s.x) + tile.row * s.inputs + number);
    }
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t column = tile.column + p * kPanel, columns = tile.columns - p * kPanel;
      const int64_t vectors = std::min<int64_t>(quotient_up(columns, kLanes), kVectors);
      const int64_t strips = quotient_up(tile.rows, strip_rows(vectors));
      const T* const from = kernel + s.kernel_at(number, column);
      T* const result = y + p * kPanel;
      if (!in_place) pack<pairs>(from, s.kernel_stride(), numbers, columns, panel_copy);
      Strip strip = {};
      strip.stride = stride, strip.depth = depth;
      strip.panel = in_place ? reinterpret_cast<const float*>(from) : panel_copy;
      // What is neither rounded nor goes into GELU goes to its place at once.
      bool direct = false;
      if constexpr (std::is_same_v<T, float>) {
        direct = last && !s.gelu && columns >= vectors * kLanes;
        if (direct) strip.bias = bias + p * kPanel;
      }
      // The next panel is of this depth, of the next one, or of the next tile.
      int64_t next = number, next_column = column + kPanel;
      if (p + 1 == panels && !last) next = number + numbers, next_column = tile.column;
      if (p + 1 == panels && last) next = 0;
      Ahead ahead(s, kernel, next, next_column, kDepth * kNumbers, strips * quotient_up(depth, kStep));
      const auto write = s.gelu ? finish<true, T, P> : finish<false, T, P>;
      const int64_t count = tile.rows / strips, longer = tile.rows % strips;
      for (int64_t i = 0, row = 0, end; i < strips; ++i, row = end) {
        end = row + count + (i < longer);
        float* const sums = all_sums + (depths > 1 ? (p * tile.rows + row) * kPanel : 0);
        strip.x = rows + row * stride;
        strip.before = at > 0 ? sums : nullptr;
        strip.to = sums, strip.to_stride = kPanel;
        if constexpr (std::is_same_v<T, float>) {
          if (direct) strip.to = result + row * s.outputs, strip.to_stride = s.outputs;
        }
        ahead.give(&strip);
        strip_for<pairs>(end - row, vectors)(strip);
        if (!last || direct) continue;
        write(sums, end - row, std::min<int64_t>(columns, kPanel), bias + p * kPanel,
              result + row * s.outputs, s.outputs);
      }
    }
  }
}

CPU_TARGET void forward(const Call& call, const Tile& tile) {
  with_types(call.type, call.bias_type, [&](auto t, auto p) CPU_TARGET {
    if constexpr (!std::is_same_v<decltype(t), double>) {  // which the handlers refuse
      forward_of<decltype(t), decltype(p)>(call, tile);
    }
  });
}
