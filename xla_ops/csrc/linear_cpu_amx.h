// Products in bfloat16 by AMX, whose tile registers hold 16 x 16 sums, 16 rows of 32 numbers of x, or as many
// of the kernel with two rows of it interleaved. Included by linear_cpu.cc, after the kernels whose parts it
// shares.
//
// The structure is that of linear_cpu_kernel.h: a strip is 32 rows, a panel 32 columns, in four tiles of
// sums. A panel has all rows of the kernel. Denormal numbers count as zero here.

namespace amx {

#define AMX_TARGET \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,amx-tile,amx-bf16")))

constexpr int kPanel = 32, kStrip = 32, kStep = 32;  // columns, rows, and numbers of a row at once

// Has all that p points to written: GCC's intrinsics for tiles do not say how much they read, and it leaves
// out what nothing seems to.
AMX_TARGET inline void written(const void* p) {
  __asm__ volatile("" : : "r"(p) : "memory");
}

// Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 of the kernel.
AMX_TARGET void configure(int64_t top, int64_t bottom) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } config;
  const uint8_t a = uint8_t(top), b = uint8_t(std::max<int64_t>(bottom, 1));  // a tile has a row at least
  const uint8_t rows[] = {a, a, b, b, a, b, 16, 16};
  std::copy(rows, rows + 8, config.rows);
  written(&config);
  _tile_loadconfig(&config);
}

// What the vector units do while the tile unit multiplies, which runs beside them: results of the sums of the
// strip before, and what the products to come are of. Each is cut into units of a few dozen instructions,
// some of which follow each step's products, or each piece's.

AMX_TARGET inline __mmask16 first_of(int64_t n) {  // of 16
  return __mmask16(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}

template <class T>
AMX_TARGET inline __m512 load_first(const T* from, __mmask16 mask) {
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_maskz_loadu_ps(mask, from);
  } else {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
  }
}
template <class T>
AMX_TARGET inline void store_first(avx512bf16::Vec<float, 16> v, __mmask16 mask, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(to, mask, avx512bf16::bits<__m512>(v));
  } else {
    T rounded[16];
    avx512bf16::Memory<T, float, 16>::store(rounded, v);
    _mm256_mask_storeu_epi16(to, mask, avx512bf16::load_raw<__m256i>(rounded));
  }
}

AMX_TARGET inline __mmask16 not_finite(__m512 v) {
  constexpr int kNotANumberOrInfinite = 0x99;
  return _mm512_fpclass_ps_mask(v, kNotANumberOrInfinite);
}

// y, of type T, of a strip's sums; a unit is a vector of a row.
template <class T, class P>
struct Results {
  Results() = default;
  Results(const Tile& tile, const float* sums, const P* bias, T* y, int64_t stride)
      : tile(tile),
        masks{first_of(tile.columns), first_of(tile.columns - 16)},
        sums(sums),
        bias(bias),
        y(y),
        stride(stride),
        units(2 * tile.rows) {}

  Tile tile = {};           // of y
  __mmask16 masks[2] = {};  // of its vectors
  const float* sums = nullptr;
  const P* bias = nullptr;
  T* y = nullptr;  // of the first row, `stride` numbers apart
  int64_t stride = 0, unit = 0, units = 0;
  bool finite = true;  // all sums so far

  template <bool with_gelu>
  AMX_TARGET inline __attribute__((always_inline)) void next() {
    const int64_t row = unit / 2, column = unit % 2 * 16;
    ++unit;
    const __mmask16 mask = masks[column / 16];
    const __m512 sum = _mm512_load_ps(sums + row * kPanel + column);
    if constexpr (std::is_same_v<T, float>) finite &= !not_finite(sum);
    const auto z =
        avx512bf16::bits<avx512bf16::Vec<float, 16>>(_mm512_add_ps(sum, load_first(bias + column, mask)));
    store_first(with_gelu ? avx512bf16::gelu_for<T, 16>(z) : z, mask, y + row * stride + column);
  }
  template <bool with_gelu>
  AMX_TARGET void all() {
    while (unit < units) next<with_gelu>();
  }
};

template <class Results, class Rows, class Panel>
struct Aside {
  Results results;
  Rows rows;
  Panel panel;
  int64_t each_results = 0, each_rows = 0, each_panel = 0;  // units at once

  template <bool with_gelu>
  AMX_TARGET inline __attribute__((always_inline)) void some() {
    for (int64_t n = std::min(each_results, results.units - results.unit); n > 0; --n) {
      results.template next<with_gelu>();
    }
    for (int64_t n = std::min(each_rows, rows.units - rows.unit); n > 0; --n) rows.next();
    for (int64_t n = std::min(each_panel, panel.units - panel.unit); n > 0; --n) panel.next();
  }
};

// In bfloat16 rows are multiplied as they are, or copied before.
struct NoRows {
  static constexpr int64_t unit = 0, units = 0;
  void next() {}
  void all() {}
};

// A panel in pairs of rows interleaved, zero where the kernel has no more rows or columns; a unit is a pair.
struct Pairs {
  const BFloat16* kernel = nullptr;  // of the panel's first row and column
  int64_t stride = 0, inputs = 0, columns = 0;
  BFloat16* to = nullptr;
  int64_t unit = 0, units = 0;

  AMX_TARGET inline __attribute__((always_inline)) void next() {
    alignas(64) static constexpr struct Order {
      uint16_t of[2][32] = {};
      constexpr Order() {
        for (int i = 0; i < 32; ++i) {
          of[0][i] = uint16_t(i / 2 + i % 2 * 32), of[1][i] = uint16_t(16 + i / 2 + i % 2 * 32);
        }
      }
    } kOrder;
    const int64_t k = 2 * unit;
    BFloat16* const pair = to + unit * 2 * kPanel;
    ++unit;
    const __mmask32 mask = columns >= 32 ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
    const BFloat16* const from = kernel + k * stride;
    __builtin_prefetch(from + 64 * stride);
    __builtin_prefetch(from + 65 * stride);
    const __m512i a = _mm512_maskz_loadu_epi16(k < inputs ? mask : 0, from);
    const __m512i b = _mm512_maskz_loadu_epi16(k + 1 < inputs ? mask : 0, from + stride);
    _mm512_store_si512(pair, _mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder.of[0]), b));
    _mm512_store_si512(pair + kPanel, _mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder.of[1]), b));
  }
  AMX_TARGET void all() {
    while (unit < units) next();
  }
};

// Sums of a strip's rows, up to 16 or, with `two`, more, over `steps` of kStep numbers. Beside them what is
// in `given` goes on.
template <bool two, bool with_gelu, class Aside>
AMX_TARGET void strip(const BFloat16* x, int64_t stride, const BFloat16* panel, int64_t steps, float* sums,
                      Aside* given) {
  const int64_t bytes = stride * 2;
  Aside aside = *given;
  written(sums);  // and all else, the panel too
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < steps; ++i, x += kStep, panel += kStep * kPanel) {
    _tile_loadd(6, panel, 4 * kPanel);
    _tile_loadd(7, panel + kPanel, 4 * kPanel);
    _tile_loadd(4, x, bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (two) {
      _tile_loadd(5, x + 16 * stride, bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    aside.template some<with_gelu>();
  }
  _tile_stored(0, sums, 4 * kPanel);
  _tile_stored(1, sums + 16, 4 * kPanel);
  if constexpr (two) {
    _tile_stored(2, sums + 16 * kPanel, 4 * kPanel);
    _tile_stored(3, sums + 16 * kPanel + 16, 4 * kPanel);
  }
  *given = aside;
}

template <bool with_gelu, class P>
AMX_TARGET void forward_of(const Call& s, const Tile& tile) {
  const BFloat16* x = static_cast<const BFloat16*>(s.x);
  const BFloat16* kernel = static_cast<const BFloat16*>(s.kernel);
  const P* bias = static_cast<const P*>(s.bias) + tile.column;
  BFloat16* y = static_cast<BFloat16*>(s.y) + tile.row * s.outputs + tile.column;
  const int64_t steps = quotient_up(s.inputs, kStep), padded = steps * kStep;
  const bool copied = s.map.channels || padded != s.inputs;
  // Two panels, one to come, the sums of two strips, and maybe rows.
  const Scratch<Use::kProduct> scratch(padded * kPanel + 2 * kStrip * kPanel +
                                       (copied ? tile.rows * padded / 2 : 0));
  BFloat16* const panels = reinterpret_cast<BFloat16*>(scratch.data);
  float* const sums = scratch.data + padded * kPanel;
  const BFloat16* rows = x + tile.row * s.inputs;
  if (copied) {
    BFloat16* const copy = reinterpret_cast<BFloat16*>(sums + 2 * kStrip * kPanel);
    for (int64_t r = 0; r < tile.rows; ++r) {
      std::fill(copy + r * padded + s.inputs, copy + (r + 1) * padded, BFloat16{0});
    }
    if (s.map.channels) {
      avx512bf16::copy_pixels(x, s.map, tile.row, tile.rows, 0, s.inputs, copy, padded);
    } else {
      avx512bf16::copy_rows(rows, s.inputs, tile.rows, 0, s.inputs, copy, padded);
    }
    rows = copy;
  }
  const int64_t strips = quotient_up(tile.rows, kStrip), all_panels = quotient_up(tile.columns, kPanel);
  const auto columns_of = [&](int64_t p) { return std::min<int64_t>(tile.columns - p * kPanel, kPanel); };
  const auto panel_of = [&](int64_t p) {
    Pairs panel;
    panel.kernel = kernel + s.kernel_at(0, tile.column + p * kPanel), panel.stride = s.kernel_stride();
    panel.inputs = s.inputs;
    panel.columns = columns_of(p), panel.to = panels + p % 2 * padded * kPanel, panel.units = padded / 2;
    return panel;
  };
  Aside<Results<BFloat16, P>, NoRows, Pairs> aside;
  using All = decltype(aside);
  aside.panel = panel_of(0);
  aside.panel.all();
  int64_t configured = 0;
  for (int64_t p = 0; p < all_panels; ++p) {
    aside.panel = p + 1 < all_panels ? panel_of(p + 1) : Pairs();
    for (int64_t i = 0; i < strips; ++i) {
      const int64_t begin = i * tile.rows / strips, count = (i + 1) * tile.rows / strips - begin;
      if (count != configured) {
        configure(std::min<int64_t>(count, 16), std::max<int64_t>(count - 16, 0));
        configured = count;
      }
      aside.each_results = quotient_up(aside.results.units, steps);
      aside.each_panel = quotient_up(aside.panel.units - aside.panel.unit, (strips - i) * steps);
      float* const its_sums = sums + (p * strips + i) % 2 * kStrip * kPanel;
      const auto compute = count > 16 ? strip<true, with_gelu, All> : strip<false, with_gelu, All>;
      compute(rows + begin * padded, padded, panels + p % 2 * padded * kPanel, steps, its_sums, &aside);
      aside.results.template all<with_gelu>();
      BFloat16* const result = y + begin * s.outputs + p * kPanel;
      if constexpr (with_gelu) {
        aside.results = {{tile.row + begin, count, tile.column + p * kPanel, columns_of(p)},
                         its_sums,
                         bias + p * kPanel,
                         result,
                         s.outputs};
      } else {  // little to do: done at once it takes less than cut into units
        avx512bf16::finish<false>(its_sums, count, columns_of(p), bias + p * kPanel, result, s.outputs);
      }
    }
    aside.panel.all();
  }
  aside.results.template all<with_gelu>();
  _tile_release();
}

void forward(const Call& call, const Tile& tile) {
  const bool wide = call.bias_type == Type::kFloat32;
  if (call.gelu) return wide ? forward_of<true, float>(call, tile) : forward_of<true, BFloat16>(call, tile);
  wide ? forward_of<false, float>(call, tile) : forward_of<false, BFloat16>(call, tile);
}

}  // namespace amx
