// y = f(x kernel + bias), f GELU or nothing, on CPU: compute functions over raw buffers.
#pragma once

#include "cpu_types.h"
#include "linear_call.h"

namespace linear::cpu {

// How a call is cut into tiles of y, each of them computed alone. Their sums run in the same order whatever
// the tiles are.
struct Tiles {
  int64_t down, across;
  int64_t unit = 1;  // rows that stay together
};

// Tiles that fit the caches, about `wanted` of them or more: of such divisions the one that `threads` should
// be done with first.
Tiles tiles_of(const Call& call, int64_t wanted, int64_t threads);

// Computes a tile.
void forward(const Call& call, const Tiles& tiles, int64_t row, int64_t column);

// Of two calls, of which the second takes the rows that the first, with GELU, gives: into how many tiles of
// rows to cut them, a multiple of `threads` if there are rows enough.
int64_t mlp_tiles(const Call& first, const Call& second, int64_t threads);

// Computes both calls of a tile; where the first call's y is does not matter. The results are those of
// `forward`, but for rounding in rows that are not finite.
void mlp(Call first, Call second, int64_t tiles, int64_t tile);

}  // namespace linear::cpu
