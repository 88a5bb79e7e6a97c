// Products in bfloat16 by AMX, whose tile registers hold 16 x 16 sums, 16 rows of 32 numbers of x, or as many
// of the kernel with two rows of it interleaved. Included by linear_cpu.cc, after the kernels whose parts it
// shares.
//
// The structure is that of linear_cpu_kernel.h: a strip is 32 rows, a panel 32 columns, in four tiles of
// sums. A panel has all rows of the kernel. Denormal numbers count as zero here.

namespace amx {

#define AMX_TARGET \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,amx-tile,amx-bf16")))

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

// Sums of a strip's rows, up to 16 or, with `two`, more, over `steps` of kStep numbers.
template <bool two>
AMX_TARGET void strip(const BFloat16* x, int64_t stride, const BFloat16* panel, int64_t steps, float* sums) {
  const int64_t bytes = stride * 2;
  written(x);
  written(panel);
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
  }
  _tile_stored(0, sums, 4 * kPanel);
  _tile_stored(1, sums + 16, 4 * kPanel);
  if constexpr (two) {
    _tile_stored(2, sums + 16 * kPanel, 4 * kPanel);
    _tile_stored(3, sums + 16 * kPanel + 16, 4 * kPanel);
  }
}

// Copies a panel: pairs of rows interleaved, zero where the kernel has no more rows or columns.
AMX_TARGET void pack(const BFloat16* kernel, int64_t stride, int64_t inputs, int64_t columns,
                     BFloat16* panel) {
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; ++i) {
    order[0][i] = uint16_t(i / 2 + i % 2 * 32), order[1][i] = uint16_t(16 + i / 2 + i % 2 * 32);
  }
  const __m512i left = _mm512_load_si512(order[0]), right = _mm512_load_si512(order[1]);
  const __mmask32 mask = columns >= 32 ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
  for (int64_t k = 0; k < rounded_up(inputs, kStep) * kStep; k += 2, panel += 2 * kPanel) {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i a = k < inputs ? _mm512_maskz_loadu_epi16(mask, kernel + k * stride) : zero;
    const __m512i b = k + 1 < inputs ? _mm512_maskz_loadu_epi16(mask, kernel + (k + 1) * stride) : zero;
    _mm512_store_si512(panel, _mm512_permutex2var_epi16(a, left, b));
    _mm512_store_si512(panel + kPanel, _mm512_permutex2var_epi16(a, right, b));
  }
}

template <class P>
AMX_TARGET void forward_of(const Call& s, const Tile& tile) {
  const BFloat16* x = static_cast<const BFloat16*>(s.x);
  const BFloat16* kernel = static_cast<const BFloat16*>(s.kernel) + tile.column;
  const P* bias = static_cast<const P*>(s.bias) + tile.column;
  BFloat16* y = static_cast<BFloat16*>(s.y) + tile.row * s.outputs + tile.column;
  const int64_t steps = rounded_up(s.inputs, kStep), padded = steps * kStep;
  const bool copied = s.map.channels || padded != s.inputs;
  const Scratch scratch(padded * kPanel / 2 + kStrip * kPanel + (copied ? tile.rows * padded / 2 : 0));
  BFloat16* const panel = reinterpret_cast<BFloat16*>(scratch.data);
  float* const sums = scratch.data + padded * kPanel / 2;
  const BFloat16* rows = x + tile.row * s.inputs;
  if (copied) {
    BFloat16* const copy = reinterpret_cast<BFloat16*>(sums + kStrip * kPanel);
    for (int64_t r = 0; r < tile.rows; ++r) {
      std::fill(copy + r * padded + s.inputs, copy + (r + 1) * padded, BFloat16{0});
    }
    if (s.map.channels) {
      avx512::copy_pixels(x, s.map, tile.row, tile.rows, 0, s.inputs, copy, padded);
    } else {
      avx512::copy_rows(rows, s.inputs, tile.rows, 0, s.inputs, copy, padded);
    }
    rows = copy;
  }
  const int64_t strips = rounded_up(tile.rows, kStrip);
  for (int64_t p = 0; p * kPanel < tile.columns; ++p) {
    const int64_t columns = std::min<int64_t>(tile.columns - p * kPanel, kPanel);
    pack(kernel + p * kPanel, s.outputs, s.inputs, columns, panel);
    int64_t configured = 0;
    for (int64_t i = 0; i < strips; ++i) {
      const int64_t begin = i * tile.rows / strips, count = (i + 1) * tile.rows / strips - begin;
      if (count != configured) {
        configure(std::min<int64_t>(count, 16), std::max<int64_t>(count - 16, 0));
        configured = count;
      }
      (count > 16 ? strip<true> : strip<false>)(rows + begin * padded, padded, panel, steps, sums);
      BFloat16* const result = y + begin * s.outputs + p * kPanel;
      const auto write = s.gelu ? avx512::finish<true, BFloat16, P> : avx512::finish<false, BFloat16, P>;
      write(sums, count, columns, bias + p * kPanel, result, s.outputs);
    }
  }
  _tile_release();
}

void forward(const Call& call, const Tile& tile) {
  if (call.bias_type == Type::kFloat32) return forward_of<float>(call, tile);
  forward_of<BFloat16>(call, tile);
}

}  // namespace amx
