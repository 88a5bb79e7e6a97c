// Two products in float32 by AMX with GELU between them, a tile of rows at a time, which goes from the one to
// the other as pieces and is written nowhere else. Included by linear_cpu.cc, after linear_cpu_amx_float32.h.
//
// The sums run in the same order as those of two calls of `linear`, so the results are theirs to the bit. But
// where `linear` does a panel's columns of a row again by AVX-512, since sums are not finite, here the whole
// row is done again.

namespace amx {

constexpr int64_t kPart = 256;  // of a row's numbers between the products, at most so many are there at once

// Pieces of GELU of a strip's sums; a unit is a row of a panel, which is a step of what comes next. What
// `Aside` asks about GELU does not matter.
struct Hidden {
  __mmask16 masks[2] = {};
  const float* sums = nullptr;
  const float* bias = nullptr;
  BFloat16* to = nullptr;
  int64_t unit = 0, units = 0;

  template <bool>
  AMX_TARGET inline __attribute__((always_inline)) void next() {
    const int64_t row = unit++;
    store_pairs(pieces_of(row, 0), pieces_of(row, 1), to + row * kStep);
  }
  AMX_TARGET inline __attribute__((always_inline)) Pieces pieces_of(int64_t row, int half) const {
    const __m512 sum = _mm512_load_ps(sums + row * kPanel + half * 16);
    const __m512 z = _mm512_add_ps(sum, load_first(bias + half * 16, masks[half]));
    const auto y = avx512bf16::gelu_for<float, 16>(avx512bf16::bits<avx512bf16::Vec<float, 16>>(z));
    // GELU would make zero of minus infinity, and that the sum may not be: some of its pieces were too large.
    const __m512 spoilt = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
    return pieces(_mm512_mask_mov_ps(avx512bf16::bits<__m512>(y), not_finite(sum), spoilt));
  }
  template <bool>
  AMX_TARGET void all() {
    while (unit < units) next<true>();
  }
};

bool takes_mlp(const Call& first, const Call& second) {
  return takes_float32(first) && takes_float32(second);
}

// Rows of a tile whose pieces and sums the second cache holds; but not so few that the kernels' pieces, which
// are made for each tile, take longer.
int64_t most_mlp_rows(const Call& first, int64_t outputs) {
  constexpr int64_t kBytes = 1750000;
  const int64_t each = 2 * kPieces * (first.inputs + std::min(first.outputs, kPart)) + 4 * outputs;
  return std::clamp<int64_t>(kBytes / each, 208, kMlpRows);
}

// Computes rows by AVX-512.
AMX_TARGET void redo(Call first, Call second, int64_t row, int64_t rows) {
  const Scratch<Use::kHidden> hidden(rows * first.outputs);
  first.x = static_cast<const float*>(first.x) + row * first.inputs, first.y = hidden.data;
  second.x = hidden.data, second.y = static_cast<float*>(second.y) + row * second.outputs;
  avx512bf16::forward_of<float, float>(first, {0, rows, 0, first.outputs});
  avx512bf16::forward_of<float, float>(second, {0, rows, 0, second.outputs});
}

// A tile's way through both products. What is between them is made and multiplied in parts, as many numbers
// of all rows as the second cache has place for.
class Mlp {
 public:
  Mlp(const Call& first, const Call& second, int64_t row, int64_t rows)
      : first(first),
        second(second),
        row(row),
        strips{rows},
        x(static_cast<const float*>(first.x) + row * first.inputs),
        y(static_cast<float*>(second.y) + row * second.outputs),
        between(first.outputs),
        part(quotient_up(quotient_up(between, quotient_up(between, kPart)), kPanel) * kPanel),
        x_size(quotient_up(first.inputs, kStep) * kStepSize),
        hidden_size(part / kStep * kStepSize),
        panel_size(std::max(x_size, hidden_size)),
        scratch(panel_size + strips.count * (x_size + hidden_size) / 2 +
                (2 + strips.count * quotient_up(second.outputs, kPanel)) * kSums),
        panels(reinterpret_cast<BFloat16*>(scratch.data)),
        x_pieces(panels + 2 * panel_size),
        hidden(x_pieces + strips.count * x_size),
        sums_in(reinterpret_cast<float*>(hidden + strips.count * hidden_size)),
        sums_out(sums_in + 2 * kSums) {}

  AMX_TARGET void compute() {
    Panel panel = first_panel(0);
    panel.all();
    for (int64_t at = 0; at < between; at += part) {
      make_hidden(at);
      multiply_hidden(at);
    }
    complete();
    _tile_release();
    for (size_t begin = 0, end; begin < spoilt.size(); begin = end + 1) {
      for (end = begin; end < spoilt.size() && spoilt[end];) ++end;
      if (end > begin) redo(first, second, row + int64_t(begin), int64_t(end - begin));
    }
  }

 private:
  static constexpr int64_t kSums = kStrip * kPanel;  // numbers

  // Pieces of x, once for all parts.
  Rows rows_of(int64_t strip) const {
    Rows rows;
    rows.x = x + strips.first_row(strip) * first.inputs, rows.stride = first.inputs,
    rows.depth = first.inputs;
    rows.to = x_pieces + strip * x_size, rows.units = strips.size(strip) * (x_size / kStepSize);
    return rows;
  }

  // The next panel to multiply by: of all rows of the first kernel, or of a part's of the second.
  Panel first_panel(int64_t column) { return panel_of(first, 0, first.inputs, column); }
  Panel second_panel(int64_t at, int64_t column) {
    return panel_of(second, at, std::min(between - at, part), column);
  }
  Panel panel_of(const Call& s, int64_t at, int64_t depth, int64_t column) {
    Panel panel;
    panel.kernel = static_cast<const float*>(s.kernel) + s.kernel_at(at, column);
    panel.stride = s.kernel_stride();
    panel.depth = depth, panel.columns = std::min<int64_t>(s.outputs - column, kPanel);
    panel.to = panels + made++ % 2 * panel_size, panel.units = quotient_up(depth, kStep) * 32;
    return panel;
  }
  const BFloat16* last_panel() const { return panels + (made - 1) % 2 * panel_size; }

  // GELU of a part's columns of the first product.
  AMX_TARGET void make_hidden(int64_t at) {
    Aside<Hidden, Rows, Panel> aside;
    const auto complete = [&]() AMX_TARGET {
      aside.results.all<true>();
      aside.results = {};
    };
    const int64_t end = std::min(at + part, between);
    for (int64_t column = at; column < end; column += kPanel) {
      const Factors factors = {x_pieces, x_size, last_panel(), first.inputs, false};
      aside.panel = column + kPanel < end ? first_panel(column + kPanel) : second_panel(at, 0);
      if (column == 0) {
        aside.rows = rows_of(0);
        aside.rows.all();
      }
      const auto sums_of = [&](int64_t i) { return sums_in + (made * strips.count + i) % 2 * kSums; };
      const auto prepare = [&](int64_t i) AMX_TARGET {
        if (column == 0 && i + 1 < strips.count) aside.rows = rows_of(i + 1);
      };
      const auto follow = [&](int64_t i) AMX_TARGET {
        aside.results = {{first_of(between - column), first_of(between - column - 16)},
                         sums_of(i),
                         static_cast<const float*>(first.bias) + column,
                         hidden + i * hidden_size + (column - at) / kStep * kStepSize,
                         0,
                         strips.size(i)};
      };
      multiply_strips<true>(strips, factors, sums_of, &aside, prepare, complete, follow);
    }
    complete();
  }

  // Adds the part's products with the second kernel to the sums; after the last part they are complete.
  AMX_TARGET void multiply_hidden(int64_t at) {
    const bool last = at + part >= between;
    for (int64_t column = 0; column < second.outputs; column += kPanel) {
      const Factors factors = {hidden, hidden_size, last_panel(), std::min(between - at, part), at > 0};
      out.panel = column + kPanel < second.outputs ? second_panel(at, column + kPanel)
                  : last                           ? Panel()
                                                   : first_panel(at + part);
      const auto sums_of = [&](int64_t i) { return sums_out + (column / kPanel * strips.count + i) * kSums; };
      const auto follow = [&](int64_t i) AMX_TARGET {
        if (!last) return;
        const int64_t columns = std::min<int64_t>(second.outputs - column, kPanel);
        out.results = {{strips.first_row(i), strips.size(i), column, columns},
                       sums_of(i),
                       static_cast<const float*>(second.bias) + column,
                       y + strips.first_row(i) * second.outputs + column,
                       second.outputs};
      };
      const auto prepare = [](int64_t) {};
      multiply_strips<false>(strips, factors, sums_of, &out, prepare, [this] { complete(); }, follow);
    }
  }

  // Takes y's last results, and notes the rows whose sums are not finite.
  AMX_TARGET void complete() {
    FloatResults& results = out.results;
    results.all<false>();
    if (!results.finite) {
      spoilt.resize(strips.rows);
      for (int64_t r = 0; r < results.tile.rows; ++r) {
        if (!finite(results.sums + r * kPanel)) spoilt[results.tile.row + r] = true;
      }
    }
    results = {};
  }

  const Call first, second;
  const int64_t row;
  const Strips strips;
  const float* const x;  // of the tile, as y
  float* const y;
  const int64_t between, part;  // numbers of a row
  // Numbers of a strip's pieces, or a panel's.
  const int64_t x_size, hidden_size, panel_size;
  const Scratch<Use::kProduct> scratch;
  BFloat16* const panels;  // the one in use and the next
  BFloat16* const x_pieces;
  BFloat16* const hidden;
  float* const sums_in;   // of two strips
  float* const sums_out;  // of all strips and panels
  int64_t made = 0;       // panels
  Aside<FloatResults, NoRows, Panel> out;
  std::vector<bool> spoilt;  // rows, once there are any
};

}  // namespace amx
