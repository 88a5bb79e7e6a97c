// Matrix products with bias and GELU on CPU: the kernels of linear_cpu_kernel.h.
#include "linear_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

namespace linear::cpu {
namespace {

using namespace ::cpu;

constexpr int64_t kUnit = kPanelColumns;  // that stay together: whole panels for any instruction set

// Whether AMX multiplies a call's numbers as they are.
bool by_amx(const Call& call) {
  return call.type == Type::kBFloat16 && !call.transposed && call.inputs > 0 && has_amx();
}

// Rows of a tile: what is copied of the kernel is used so often. Where AMX computes, it should be oftener, as
// long as the rows of x stay in the second cache.
int64_t most_rows([[maybe_unused]] const Call& call) {
#if CPU_AMX
  constexpr int64_t kNumbers = int64_t{1} << 19;
  if (by_amx(call)) return std::clamp<int64_t>(kNumbers / call.inputs, 64, 896);
#endif
  return 16 * 14;
}
constexpr int64_t kMostUnits = 8;  // 256 columns
// Of `mlp` a tile has up to so many rows: many, since each takes both kernels whole, and few enough for what
// is between the products to stay in the caches.
constexpr int64_t kMlpRows = 416;
int64_t mlp_unit() {  // rows that stay together: a strip, of AVX-512 or AMX
  return has_amx() ? 32 : 14;
}
// With AVX2, where kernels are read in place: rows of about so many numbers between the products, most of the
// half megabyte that the second caches of its processors hold, but not so few that reading the kernels
// counts.
constexpr int64_t kMlpNumbers = 98304, kLeastMlpRows = 64;

int64_t quotient_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

enum class Use { kProduct, kHidden };

// Memory for a tile's parts, aligned to cache lines. A thread keeps that of each use for its next tile, up to
// kMost each: asked for a megabyte each time, malloc may go to the system each time, which takes as long as
// the tile does.
template <Use>
class Scratch {
 public:
  explicit Scratch(int64_t floats) : size(std::exchange(kept_size, 0)), memory(std::move(kept)) {
    if (size < floats) {
      memory.reset();
      memory.reset(static_cast<float*>(::operator new[](floats * sizeof(float), kAlignment)));
      size = floats;
    }
    data = memory.get();
  }
  ~Scratch() {
    if (size <= kept_size || size > kMost) return;
    kept = std::move(memory);
    kept_size = size;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data;

 private:
  static constexpr std::align_val_t kAlignment{64};
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kMost = 0;  // so that each is as large as its tile asks
#else
  static constexpr int64_t kMost = int64_t{10} << 18;  // 10 MB
#endif
  struct Delete {
    void operator()(float* p) const { ::operator delete[](p, kAlignment); }
  };
  using Memory = std::unique_ptr<float[], Delete>;
  static inline thread_local Memory kept;
  static inline thread_local int64_t kept_size = 0;
  int64_t size;
  Memory memory;
};

// The part of a call that a tile is.
struct Tile {
  int64_t row, rows, column, columns;
};

#define CPU_KERNELS "linear_cpu_kernel.h"
#include "cpu_targets.h"
#if CPU_AMX
#include "linear_cpu_amx.h"
#include "linear_cpu_amx_float32.h"
#include "linear_cpu_amx_mlp.h"
#endif

}  // namespace

Tiles tiles_of(const Call& call, int64_t wanted, int64_t threads) {
  if (call.rows == 0) return {};
#if CPU_AMX
  if (amx::takes_float32(call)) return amx::tiles_of_float32(call, wanted, threads);
#endif
  const int64_t units = quotient_up(call.outputs, kUnit);
  const Tiles least = {quotient_up(call.rows, most_rows(call)), quotient_up(units, kMostUnits)};
  // To read a row of x, or to copy it, takes as long as to multiply it by so many columns; a column of the
  // kernel, as it is or copied, as long as so many rows.
  const bool pairs = call.type == Type::kBFloat16 && instruction_set() >= InstructionSet::kAvx512BFloat16;
  const bool as_it_is = call.type == Type::kFloat32 && call.panels;
  const bool other = call.map.channels || call.transposed || (call.type != Type::kFloat32 && !pairs);
  const int64_t row = other ? 10 : 2;
  const int64_t column = by_amx(call) ? 30 : as_it_is ? 1 : 9;
  const int64_t strip = by_amx(call) ? 32 : 1;
  // The time of the thread with most tiles, and a part of what it may have to wait for the last of another.
  const auto time = [&](const Tiles& t) {
    const int64_t rows = quotient_up(quotient_up(call.rows, t.down), strip) * strip;
    const int64_t columns = quotient_up(units, t.across) * kUnit;
    const int64_t tile = rows * columns + row * rows + column * columns;
    return quotient_up(t.down * t.across, threads) * tile + tile / 8;
  };
  Tiles best = least;
  const auto consider = [&](const Tiles& t) {
    if (time(t) < time(best)) best = t;
  };
  const int64_t most_down = std::max(quotient_up(call.rows, 28), least.down);
  for (int64_t across = least.across; across <= std::min(std::max(wanted, least.across), units); ++across) {
    const int64_t most = std::clamp(quotient_up(wanted, across), least.down, most_down);
    for (int64_t down = least.down; down <= most; ++down) consider({down, across});
    if (wanted < threads) continue;
    const int64_t even = threads / std::gcd(across, threads);  // as many tiles for each thread
    consider({std::min(quotient_up(most, even) * even, most_down), across});
  }
  return best;
}

void forward(const Call& call, const Tiles& tiles, int64_t i, int64_t j) {
  const int64_t units = quotient_up(call.outputs, kUnit);
  const int64_t units_down = quotient_up(call.rows, tiles.unit);
  const int64_t row = i * units_down / tiles.down * tiles.unit, column = j * units / tiles.across * kUnit;
  const int64_t end = std::min((j + 1) * units / tiles.across * kUnit, call.outputs);
  const int64_t end_row = std::min((i + 1) * units_down / tiles.down * tiles.unit, call.rows);
  const Tile tile = {row, end_row - row, column, end - column};
#if CPU_AMX
  if (by_amx(call)) return amx::forward(call, tile);
  if (amx::takes_float32(call)) return amx::forward_float32(call, tile);
#endif
  CPU_CALL(forward, call, tile);
}

int64_t mlp_tiles(const Call& first, const Call& second, int64_t threads) {
  int64_t most = kMlpRows;
  const bool in_place = first.type == Type::kFloat32 && first.panels && second.panels;
  if (in_place && instruction_set() == InstructionSet::kAvx2) {
    most = std::clamp(kMlpNumbers / std::max<int64_t>(first.outputs, 1), kLeastMlpRows, kMlpRows);
  }
#if CPU_AMX
  if (amx::takes_mlp(first, second)) most = amx::most_mlp_rows(first, second.outputs);
#endif
  const int64_t tiles = quotient_up(quotient_up(first.rows, most), threads) * threads;
  return std::min(tiles, quotient_up(first.rows, mlp_unit()));
}

void mlp(Call first, Call second, int64_t tiles, int64_t tile) {
  const int64_t unit = mlp_unit(), strips = quotient_up(first.rows, unit);
  const int64_t row = tile * strips / tiles * unit;
  const int64_t rows = std::min((tile + 1) * strips / tiles * unit, first.rows) - row;
#if CPU_AMX
  if (amx::takes_mlp(first, second)) return amx::Mlp(first, second, row, rows).compute();
#endif
  const int64_t bytes = first.type == Type::kFloat32 ? 4 : 2;
  const Scratch<Use::kHidden> hidden(quotient_up(rows * first.outputs * bytes, 4));
  first.x = static_cast<const char*>(first.x) + row * first.inputs * bytes, first.y = hidden.data;
  second.x = hidden.data, second.y = static_cast<char*>(second.y) + row * second.outputs * bytes;
  for (Call* call : {&first, &second}) {
    call->rows = rows;
    const Tiles parts = tiles_of(*call, 1, 1);
    for (int64_t j = 0; j < parts.down * parts.across; ++j) {
      forward(*call, parts, j / parts.across, j % parts.across);
    }
  }
}

}  // namespace linear::cpu
