// Products in float32 by AMX, which multiplies bfloat16. Included by linear_cpu.cc, after linear_cpu_amx.h.
//
// A float32 is the sum of three numbers of eight bits each, a = a0 + a1 + a2, exactly, where a1 is at most
// 2^-8 of a0 and a2 of a1. Of the nine products of two such sums those of a1 b2, a2 b1 and a2 b2 are left
// out: at most 2^-23 of |a b|, of four million random products 2^-24.3 at most and 2^-27.5 in the mean
// square, where rounding a product to float32 loses 2^-24 and 2^-25.2. The sums are in float32, as anywhere.
// XLA knows the scheme as BF16_BF16_F32_X6 (Henry, Tang and Heinecke, Leveraging the bfloat16 artificial
// intelligence datatype for higher-precision computations, arXiv 1904.06376). Six products at 16 times the
// rate of AVX-512's are 2.7 times that; making the pieces takes back half of it.
//
// Denormal pieces and products count as zero: numbers below 2^-103 lose their last bits, and products below
// 2^-102. A number that is infinite, not a number, or so large that a0 is infinite, makes sums that are not
// finite: their rows are computed by AVX-512 instead.

namespace amx {

constexpr int kPieces = 3;
constexpr int64_t kPiece = kStep * kPanel;  // numbers of a strip or a panel, over a step
constexpr int64_t kStepSize = kPieces * kPiece;
constexpr int64_t kDepth = 512;  // numbers of a row whose pieces are made at once
constexpr int kGroup = 4;        // panels that are made at once

struct Pieces {
  __m512i of[kPieces];  // floats whose lower halves are zero
};

AMX_TARGET inline Pieces pieces(__m512 a) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000));
  const __m512i first = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(a), half), upper);
  const __m512 rest = _mm512_sub_ps(a, _mm512_castsi512_ps(first));
  const __m512i second = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), half), upper);
  const __m512 last = _mm512_sub_ps(rest, _mm512_castsi512_ps(second));
  return {{first, second, _mm512_castps_si512(last)}};
}

// Writes a's and b's pieces in pairs, kPiece apart. AMX multiplies pairs of a row with pairs of a column, and
// which numbers a pair has does not matter: here those 16 apart.
AMX_TARGET inline void store_pairs(const Pieces& a, const Pieces& b, BFloat16* to) {
  for (int i = 0; i < kPieces; ++i) {
    const __m512i low = _mm512_srli_epi32(a.of[i], 16);
    _mm512_store_si512(to + i * kPiece, _mm512_mask_blend_epi16(0xaaaaaaaau, low, b.of[i]));
  }
}

AMX_TARGET inline __mmask16 first_of(int64_t n) {  // of 16
  return __mmask16(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}

// Of a row of x, to each step's row in the strip.
AMX_TARGET void split_row(const float* x, int64_t inputs, BFloat16* to) {
  for (int64_t k = 0; k < inputs; k += kStep, to += kStepSize) {
    const __m512 a = _mm512_maskz_loadu_ps(first_of(inputs - k), x + k);
    const __m512 b = _mm512_maskz_loadu_ps(first_of(inputs - k - 16), x + k + 16);
    store_pairs(pieces(a), pieces(b), to);
  }
}

// Up to kGroup panels of the kernel; zero where it has no more rows or columns. They are made together
// because longer stretches of the kernel's rows come faster.
AMX_TARGET void split_panels(const float* kernel, int64_t stride, int64_t inputs, int64_t columns,
                             int64_t size, BFloat16* to) {
  for (int64_t k = 0; k < inputs; k += kStep, to += kStepSize) {
    for (int64_t i = 0; i < 16; ++i) {
      const float* const from = kernel + (k + i) * stride;
      for (int64_t c = 0; c < rounded_up(columns, kPanel) * kPanel; c += 16) {
        const __mmask16 mask = first_of(columns - c);
        const __mmask16 a = k + i < inputs ? mask : 0, b = k + i + 16 < inputs ? mask : 0;
        __builtin_prefetch(from + 32 * stride + c);
        __builtin_prefetch(from + 48 * stride + c);
        store_pairs(pieces(_mm512_maskz_loadu_ps(a, from + c)),
                    pieces(_mm512_maskz_loadu_ps(b, from + 16 * stride + c)),
                    to + c / kPanel * size + c / 16 % 2 * (kPiece / 2) + i * kStep);
      }
    }
  }
}

// Adds products of the loaded pieces: tiles 4 and 5 are of x, 6 and 7 of the kernel.
template <bool two>
AMX_TARGET inline __attribute__((always_inline)) void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (two) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Sums of a strip's rows, up to 16 or, with `two`, more; with `further` they are added to those there.
template <bool two>
AMX_TARGET void strip_of_pieces(const BFloat16* x, const BFloat16* panel, int64_t steps, bool further,
                                float* sums) {
  constexpr int64_t kRow = 2 * kStep, kSumsRow = 4 * kPanel, kLower = 16 * kPanel;  // bytes, bytes, numbers
  written(x);
  written(panel);
  written(sums);
  if (further) {
    _tile_loadd(0, sums, kSumsRow);
    _tile_loadd(1, sums + 16, kSumsRow);
    if constexpr (two) {
      _tile_loadd(2, sums + kLower, kSumsRow);
      _tile_loadd(3, sums + kLower + 16, kSumsRow);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
#define LOAD_X(i)                         \
  _tile_loadd(4, x + (i) * kPiece, kRow); \
  if constexpr (two) _tile_loadd(5, x + (i) * kPiece + kPiece / 2, kRow)
#define LOAD_PANEL(i)                         \
  _tile_loadd(6, panel + (i) * kPiece, kRow); \
  _tile_loadd(7, panel + (i) * kPiece + kPiece / 2, kRow)
  for (int64_t i = 0; i < steps; ++i, x += kStepSize, panel += kStepSize) {
    LOAD_X(0);
    LOAD_PANEL(2);
    multiply<two>();
    LOAD_PANEL(1);
    multiply<two>();
    LOAD_X(1);
    multiply<two>();
    LOAD_PANEL(0);
    multiply<two>();
    LOAD_X(2);
    multiply<two>();
    LOAD_X(0);
    multiply<two>();
  }
#undef LOAD_X
#undef LOAD_PANEL
  _tile_stored(0, sums, kSumsRow);
  _tile_stored(1, sums + 16, kSumsRow);
  if constexpr (two) {
    _tile_stored(2, sums + kLower, kSumsRow);
    _tile_stored(3, sums + kLower + 16, kSumsRow);
  }
}

// Whether a row's sums over a panel are finite.
AMX_TARGET inline bool finite(const float* sums) {
  constexpr int kNotANumberOrInfinite = 0x99;
  const __mmask16 left = _mm512_fpclass_ps_mask(_mm512_load_ps(sums), kNotANumberOrInfinite);
  const __mmask16 right = _mm512_fpclass_ps_mask(_mm512_load_ps(sums + 16), kNotANumberOrInfinite);
  return !(left | right);
}

// Computes by AVX-512 those of a strip's rows, over a panel's columns, whose sums are not finite.
AMX_TARGET void redo(const Call& s, Tile tile, const float* sums) {
  const int64_t row = tile.row, end = tile.rows;
  for (int64_t r = 0; r < end; ++r) {
    if (finite(sums + r * kPanel)) continue;
    const int64_t begin = r;
    while (r + 1 < end && !finite(sums + (r + 1) * kPanel)) ++r;
    tile.row = row + begin, tile.rows = r + 1 - begin;
    avx512::forward_of<float, float>(s, tile);
  }
}

// With fewer inputs, or fewer rows, making the pieces takes as long as is won.
bool takes_float32(const Call& call) {
  return call.type == Type::kFloat32 && call.inputs >= 128 && call.image_rows >= 48 && has_amx();
}

// At least half of the tiles wanted, such that the least is split: rows of x once for each column of tiles,
// the kernel once for each row of them. What of x and of the kernel is split at once fits the second cache,
// of 2 MB.
Tiles tiles_of_float32(const Call& call, int64_t wanted) {
  if (call.rows == 0) return {};
  const int64_t units = rounded_up(call.outputs, kUnit);
  const int64_t most = 250000 / std::min(call.inputs, kDepth) - kGroup * kPanel;  // rows: 1.5 MB of pieces
  wanted = std::clamp<int64_t>(wanted / 2, 1, units * rounded_up(call.rows, kStrip));
  const auto split = [&](const Tiles& t) { return t.across * call.rows + t.down * call.outputs; };
  Tiles best = {};
  for (int64_t across = 1; across <= units; ++across) {
    const Tiles tiles = {std::max(rounded_up(wanted, across), rounded_up(call.rows, most)), across};
    if (!best.down || split(tiles) < split(best)) best = tiles;
  }
  return best;
}

AMX_TARGET void forward_float32(const Call& s, const Tile& tile) {
  const float* x = static_cast<const float*>(s.x);
  const float* kernel = static_cast<const float*>(s.kernel) + tile.column;
  const float* bias = static_cast<const float*>(s.bias) + tile.column;
  float* y = static_cast<float*>(s.y) + tile.row * s.outputs + tile.column;
  const int64_t strips = rounded_up(tile.rows, kStrip), depths = rounded_up(s.inputs, kDepth);
  // Numbers of a strip's pieces or a panel's, and of sums: one strip's are enough where no more are added to
  // them.
  const int64_t size = rounded_up(std::min(s.inputs, kDepth), kStep) * kStepSize;
  const int64_t strip_sums = kStrip * kPanel;
  const int64_t all_sums = depths > 1 ? rounded_up(tile.columns, kPanel) * strips * strip_sums : strip_sums;
  const Scratch scratch((kGroup + strips) * size / 2 + all_sums + kDepth);
  BFloat16* const panels = reinterpret_cast<BFloat16*>(scratch.data);
  BFloat16* const rows = panels + kGroup * size;
  float* const first_sums = scratch.data + (kGroup + strips) * size / 2;
  float* const pixels = first_sums + all_sums;
  const auto first_row = [&](int64_t strip) { return strip * tile.rows / strips; };
  const auto write = s.gelu ? avx512::finish<true, float, float> : avx512::finish<false, float, float>;
  int64_t configured = 0;
  for (int64_t at = 0; at < s.inputs; at += kDepth) {
    const int64_t depth = std::min(s.inputs - at, kDepth);
    for (int64_t i = 0; i < strips; ++i) {
      for (int64_t r = first_row(i); r < first_row(i + 1); ++r) {
        const float* row = x + (tile.row + r) * s.inputs + at;
        if (s.map.channels) {
          avx512::copy_pixels(x, s.map, tile.row + r, 1, at, depth, pixels, 0);
          row = pixels;
        }
        split_row(row, depth, rows + i * size + (r - first_row(i)) * kStep);
      }
    }
    for (int64_t column = 0; column < tile.columns; column += kPanel) {
      const int64_t p = column / kPanel, columns = std::min<int64_t>(tile.columns - column, kPanel);
      if (p % kGroup == 0) {
        const int64_t group = std::min<int64_t>(tile.columns - column, kGroup * kPanel);
        split_panels(kernel + at * s.outputs + column, s.outputs, depth, group, size, panels);
      }
      for (int64_t i = 0; i < strips; ++i) {
        const int64_t begin = first_row(i), count = first_row(i + 1) - begin;
        if (count != configured) {
          configure(std::min<int64_t>(count, 16), std::max<int64_t>(count - 16, 0));
          configured = count;
        }
        float* const sums = first_sums + (depths > 1 ? (p * strips + i) * strip_sums : 0);
        const auto compute = count > 16 ? strip_of_pieces<true> : strip_of_pieces<false>;
        compute(rows + i * size, panels + p % kGroup * size, rounded_up(depth, kStep), at > 0, sums);
        if (at + depth < s.inputs) continue;
        write(sums, count, columns, bias + column, y + begin * s.outputs + column, s.outputs);
        redo(s, {tile.row + begin, count, tile.column + column, columns}, sums);
      }
    }
  }
  _tile_release();
}

}  // namespace amx
