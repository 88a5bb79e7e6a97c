// DCNv3 on CPU: compute functions over raw buffers; XLA and Python are elsewhere.
#pragma once

#include <cstdint>

#include "cpu_types.h"
#include "dcnv3.h"

namespace dcnv3::cpu {

using ::cpu::Type;

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

// Computes y of the (position, group) pairs [begin, end) of N * Ho * Wo * G.
void forward(const Call& call, int64_t begin, int64_t end);

// Computes all gradients of groups [begin, end) of one image. Every element of a gradient is the
// work of one such call, in an order that does not depend on how the groups are divided.
void backward(const Call& call, int64_t image, int64_t begin, int64_t end);

}  // namespace dcnv3::cpu
