// Products in float32 by AMX, which multiplies bfloat16. Included by linear_cpu.cc, after linear_cpu_amx.h.
//
// A float32 is the sum of three numbers of eight bits each, a = a0 + a1 + a2, exactly, where a1 is at most
// 2^-8 of a0 and a2 of a1. Of the nine products of two such sums those of a1 b2, a2 b1 and a2 b2 are left
// out: at most 2^-23 of |a b|, of four million random products 2^-24.3 at most and 2^-27.5 in the mean
// square, where rounding a product to float32 loses 2^-24 and 2^-25.2. The sums are in float32, as anywhere.
// XLA knows the scheme as BF16_BF16_F32_X6 (Henry, Tang and Heinecke, Leveraging the bfloat16 artificial
// intelligence datatype for higher-precision computations, arXiv 1904.06376). Six products at 16 times the
// rate of AVX-512's are 2.7 times that, less what is lost to making the pieces beside them.
//
// Denormal pieces and products count as zero: numbers below 2^-103 lose their last bits, and products below
// 2^-102. A number that is infinite, not a number, or so large that a0 is infinite, makes sums that are not
// finite: their rows are computed by AVX-512 instead.

namespace amx {

constexpr int kPieces = 3;
constexpr int64_t kPiece = kStep * kPanel;  // numbers of a strip or a panel, over a step
constexpr int64_t kStepSize = kPieces * kPiece;
constexpr int64_t kDepth = 512;  // numbers of a row whose pieces are made at once

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

// Pieces of a strip's rows; a unit is a step of a row.
struct Rows {
  const float* x = nullptr;  // of the first row and number, `stride` numbers apart
  int64_t stride = 0, depth = 0;
  BFloat16* to = nullptr;
  int64_t row = 0, k = 0, unit = 0, units = 0;
  const Call* convolution = nullptr;
  float* pixels = nullptr;  // a convolution's row, put together
  int64_t first_row = 0, at = 0;

  AMX_TARGET inline __attribute__((always_inline)) void next() {
    ++unit;
    if (convolution && k == 0) put_together();
    const float* const from = convolution ? pixels : x + row * stride;
    const __m512 a = _mm512_maskz_loadu_ps(first_of(depth - k), from + k);
    const __m512 b = _mm512_maskz_loadu_ps(first_of(depth - k - 16), from + k + 16);
    store_pairs(pieces(a), pieces(b), to + k / kStep * kStepSize + row * kStep);
    k += kStep;
    if (k >= depth) k = 0, ++row;
  }
  AMX_TARGET __attribute__((noinline)) void put_together() const {
    const float* map = static_cast<const float*>(convolution->x);
    avx512bf16::copy_pixels(map, convolution->map, first_row + row, 1, at, depth, pixels, 0);
  }
  AMX_TARGET void all() {
    while (unit < units) next();
  }
};

// Pieces of a panel; a unit is 16 columns of two rows of the kernel. Zero where it has no more.
struct Panel {
  const float* kernel = nullptr;  // of the panel's first row and column
  int64_t stride = 0, depth = 0, columns = 0;
  BFloat16* to = nullptr;
  int64_t unit = 0, units = 0;

  AMX_TARGET inline __attribute__((always_inline)) void next() {
    const int64_t k = unit / 32 * kStep, row = unit / 2 % 16, column = unit % 2 * 16;
    ++unit;
    const float* const from = kernel + (k + row) * stride + column;
    const __mmask16 mask = first_of(columns - column);
    const __mmask16 a = k + row < depth ? mask : 0, b = k + row + 16 < depth ? mask : 0;
    __builtin_prefetch(from + 32 * stride);
    __builtin_prefetch(from + 48 * stride);
    store_pairs(pieces(_mm512_maskz_loadu_ps(a, from)), pieces(_mm512_maskz_loadu_ps(b, from + 16 * stride)),
                to + k / kStep * kStepSize + column / 16 * (kPiece / 2) + row * kStep);
  }
  AMX_TARGET void all() {
    while (unit < units) next();
  }
};

using FloatResults = Results<float, float>;

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

// Sums of a strip's rows, up to 16 or, with `two`, more, over `steps`; with `further` they are added to those
// there. Beside them what is in `given` goes on.
template <bool two, bool with_gelu, class Aside>
AMX_TARGET void strip_of_pieces(const BFloat16* x, const BFloat16* panel, int64_t steps, bool further,
                                float* sums, Aside* given) {
  constexpr int64_t kRow = 2 * kStep, kSumsRow = 4 * kPanel, kLower = 16 * kPanel;  // bytes, bytes, numbers
  Aside aside = *given;
  written(sums);  // and all else, x's and the panel's pieces too
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
#define MULTIPLY   \
  multiply<two>(); \
  aside.template some<with_gelu>()
  for (int64_t i = 0; i < steps; ++i, x += kStepSize, panel += kStepSize) {
    LOAD_X(0);
    LOAD_PANEL(2);
    MULTIPLY;
    LOAD_PANEL(1);
    MULTIPLY;
    LOAD_X(1);
    MULTIPLY;
    LOAD_PANEL(0);
    MULTIPLY;
    LOAD_X(2);
    MULTIPLY;
    LOAD_X(0);
    MULTIPLY;
  }
#undef LOAD_X
#undef LOAD_PANEL
#undef MULTIPLY
  _tile_stored(0, sums, kSumsRow);
  _tile_stored(1, sums + 16, kSumsRow);
  if constexpr (two) {
    _tile_stored(2, sums + kLower, kSumsRow);
    _tile_stored(3, sums + kLower + 16, kSumsRow);
  }
  *given = aside;
}

// The strips that a tile's rows are.
struct Strips {
  int64_t rows, count = quotient_up(rows, kStrip);

  int64_t first_row(int64_t i) const { return std::min(i * kStrip, rows); }
  int64_t size(int64_t i) const { return first_row(i + 1) - first_row(i); }
};

// Pieces of all strips, each `size` numbers after the one before, and of a panel.
struct Factors {
  const BFloat16* x;
  int64_t size;
  const BFloat16* panel;
  int64_t depth;
  bool further;  // the products are added to the sums there
};

// Multiplies strips by a panel; the sums of strip i go to sums_of(i). Beside that goes on what is in `aside`,
// to which prepare(i) may add. Then complete() takes its results, and follow(i) says which are next.
template <bool with_gelu, class Aside, class SumsOf, class Prepare, class Complete, class Follow>
AMX_TARGET void multiply_strips(const Strips& strips, const Factors& s, SumsOf sums_of, Aside* aside,
                                Prepare prepare, Complete complete, Follow follow) {
  const int64_t steps = quotient_up(s.depth, kStep), slots = 6 * steps;
  int64_t configured = 0;
  for (int64_t i = 0; i < strips.count; ++i) {
    const int64_t size = strips.size(i);
    if (size != configured) {
      configure(std::min<int64_t>(size, 16), std::max<int64_t>(size - 16, 0));
      configured = size;
    }
    prepare(i);
    aside->each_results = quotient_up(aside->results.units, slots);
    aside->each_rows = quotient_up(aside->rows.units, slots);
    aside->each_panel = quotient_up(aside->panel.units - aside->panel.unit, (strips.count - i) * slots);
    const auto compute =
        size > 16 ? strip_of_pieces<true, with_gelu, Aside> : strip_of_pieces<false, with_gelu, Aside>;
    compute(s.x + i * s.size, s.panel, steps, s.further, sums_of(i), aside);
    aside->rows.all();
    complete();
    follow(i);
  }
  aside->panel.all();
}

// Whether a row's sums over a panel are finite.
AMX_TARGET inline bool finite(const float* sums) {
  return !(not_finite(_mm512_load_ps(sums)) | not_finite(_mm512_load_ps(sums + 16)));
}

// Computes by AVX-512 those of a strip's rows, over a panel's columns, whose sums are not finite.
AMX_TARGET void redo(const Call& s, Tile tile, const float* sums) {
  const int64_t row = tile.row, end = tile.rows;
  for (int64_t r = 0; r < end; ++r) {
    if (finite(sums + r * kPanel)) continue;
    const int64_t begin = r;
    while (r + 1 < end && !finite(sums + (r + 1) * kPanel)) ++r;
    tile.row = row + begin, tile.rows = r + 1 - begin;
    avx512bf16::forward_of<float, float>(s, tile);
  }
}

// With fewer inputs, or fewer rows, making the pieces takes as long as is won.
bool takes_float32(const Call& call) {
  return call.type == Type::kFloat32 && !call.transposed && call.inputs >= 64 && call.image_rows >= 48 &&
         has_amx();
}

// About half of the tiles wanted; where that is one for each thread or more, a multiple of the threads. Of
// such divisions the one that splits least: rows of x once for each column of tiles, the kernel once for each
// row of them. The pieces that are there at once take half of the second cache, of 2 MB.
Tiles tiles_of_float32(const Call& call, int64_t wanted, int64_t threads) {
  if (call.rows == 0) return {};
  const int64_t units = quotient_up(call.outputs, kUnit), strips = quotient_up(call.rows, kStrip);
  const int64_t most = 170000 / std::min(call.inputs, kDepth) - 2 * kPanel;  // rows: 1 MB of pieces
  wanted = std::clamp<int64_t>(wanted / 2, 1, units * strips);
  if (wanted > threads) wanted -= wanted % threads;
  // Rows weigh more: those of a tile are mostly in the caches of the core that computes it.
  const auto split = [&](const Tiles& t) { return 3 * t.across * call.rows + t.down * call.outputs; };
  Tiles best = {};
  for (int64_t across = 1; across <= units; ++across) {
    Tiles tiles = {std::max(quotient_up(wanted, across), quotient_up(call.rows, most)), across, kStrip};
    while (wanted >= threads && tiles.down < strips && tiles.down * across % threads) ++tiles.down;
    if (tiles.down > strips) continue;
    if (!best.down || split(tiles) < split(best)) best = tiles;
  }
  return best;
}

template <bool with_gelu>
AMX_TARGET void forward_float32(const Call& s, const Tile& tile) {
  const float* const kernel = static_cast<const float*>(s.kernel);
  const float* const bias = static_cast<const float*>(s.bias) + tile.column;
  float* const y = static_cast<float*>(s.y) + tile.row * s.outputs + tile.column;
  const int64_t panels = quotient_up(tile.columns, kPanel), depths = quotient_up(s.inputs, kDepth);
  const Strips strips{tile.rows};
  // Numbers of a strip's pieces or a panel's, and of a strip's sums. There are two panels, the one in use and
  // the next; and sums of two strips, in use and before, or of all strips and panels where further depths are
  // added.
  const int64_t size = quotient_up(std::min(s.inputs, kDepth), kStep) * kStepSize;
  const int64_t strip_sums = kStrip * kPanel, sums_kept = depths > 1 ? panels * strips.count : 2;
  const Scratch<Use::kProduct> scratch((2 + strips.count) * size / 2 + sums_kept * strip_sums + kDepth);
  BFloat16* const panel_pieces = reinterpret_cast<BFloat16*>(scratch.data);
  BFloat16* const row_pieces = panel_pieces + 2 * size;
  float* const first_sums = scratch.data + (2 + strips.count) * size / 2;
  const auto depth_from = [&](int64_t at) { return std::min(s.inputs - at, kDepth); };
  const auto rows_of = [&](int64_t strip, int64_t at) {
    Rows rows;
    rows.stride = s.inputs, rows.depth = depth_from(at), rows.to = row_pieces + strip * size;
    rows.units = strips.size(strip) * quotient_up(rows.depth, kStep);
    rows.first_row = tile.row + strips.first_row(strip), rows.at = at;
    if (s.map.channels) {
      rows.convolution = &s, rows.pixels = first_sums + sums_kept * strip_sums;
    } else {
      rows.x = static_cast<const float*>(s.x) + rows.first_row * s.inputs + at;
    }
    return rows;
  };
  // Panels follow one another over all columns, and then over further numbers of the rows.
  const auto panel_of = [&](int64_t i) {
    Panel panel;
    const int64_t at = i / panels * kDepth, column = i % panels * kPanel;
    panel.kernel = kernel + s.kernel_at(at, tile.column + column), panel.stride = s.kernel_stride();
    panel.depth = depth_from(at), panel.columns = std::min<int64_t>(tile.columns - column, kPanel);
    panel.to = panel_pieces + i % 2 * size;
    panel.units = quotient_up(panel.depth, kStep) * 32;
    return panel;
  };
  Aside<FloatResults, Rows, Panel> aside;
  const auto complete = [&]() AMX_TARGET {
    FloatResults& results = aside.results;
    results.all<with_gelu>();
    if (!results.finite) redo(s, results.tile, results.sums);
    results = {};
  };
  aside.panel = panel_of(0);
  aside.panel.all();
  for (int64_t p = 0; p < panels * depths; ++p) {
    const int64_t at = p / panels * kDepth, column = p % panels * kPanel;
    const int64_t columns = std::min<int64_t>(tile.columns - column, kPanel);
    aside.panel = p + 1 < panels * depths ? panel_of(p + 1) : Panel();
    if (column == 0) {
      aside.rows = rows_of(0, at);
      aside.rows.all();
    }
    const auto sums_of = [&](int64_t i) {
      const int64_t n = depths > 1 ? p % panels * strips.count + i : (p * strips.count + i) % 2;
      return first_sums + n * strip_sums;
    };
    const auto prepare = [&](int64_t i) AMX_TARGET {
      if (column == 0 && i + 1 < strips.count) aside.rows = rows_of(i + 1, at);
    };
    const auto follow = [&](int64_t i) AMX_TARGET {
      if (at + kDepth < s.inputs) return;
      const int64_t begin = strips.first_row(i);
      aside.results = {{tile.row + begin, strips.size(i), tile.column + column, columns},
                       sums_of(i),
                       bias + column,
                       y + begin * s.outputs + column,
                       s.outputs};
    };
    const Factors factors = {row_pieces, size, panel_pieces + p % 2 * size, depth_from(at), at > 0};
    multiply_strips<with_gelu>(strips, factors, sums_of, &aside, prepare, complete, follow);
  }
  complete();
  _tile_release();
}

void forward_float32(const Call& call, const Tile& tile) {
  (call.gelu ? forward_float32<true> : forward_float32<false>)(call, tile);
}

}  // namespace amx
