// One call of DCNv3 over raw buffers, as the CPU's and CUDA's compute functions take it.
#pragma once

#include <cstdint>

#include "dcnv3.h"
#include "types.h"

namespace dcnv3 {

using xla_ops::Type;

// The learned numbers of each (position, group), n values in a row: those of position q (counted over
// the whole batch) and group g start at element q * row + g * group.
struct Columns {
  const void* data;
  int64_t row, group;
};

// One call, forward or backward. Separate form: `offset` holds 2P values and `weight` P masks for each
// (position, group). Fused form: `offset` holds all 3P + 1 values of the record and `weight` is unused.
struct Call {
  Problem problem;
  Type type;         // of x, y and their gradients
  Type points_type;  // of offset and weight (or the record) and their gradients
  bool fused;        // weights are logits: a softmax over P comes first
  bool centre;       // fused only: blends with x at the position by the record's last value
  const void* x;     // (N, H, W, G, D)
  Columns offset, weight;
  void* y;         // forward's result (N, Ho, Wo, G, D)
  const void* dy;  // backward's operand, and its results: dx like x, and the gradients of the
  void* dx;        // points with the rows of `offset` and `weight`
  void* doffset;
  void* dweight;
};

}  // namespace dcnv3
