// y = gelu(x + bias), gelu(z) = z * Phi(z), on CPU: compute functions over raw buffers.
#pragma once

#include "cpu_types.h"

namespace gelu::cpu {

using ::cpu::Type;

struct Call {
  int64_t rows, channels;
  int64_t shared;  // consecutive rows that use the same bias
  Type type;       // of x, y and their gradients
  Type bias_type;
  const void* x;     // (rows, channels)
  const void* bias;  // (rows / shared, channels)
  const void* dy;    // null for the forward
  void* result;      // y, or dx if there is a dy
};

// Computes the rows [begin, end) of the result.
void compute(const Call& call, int64_t begin, int64_t end);

}  // namespace gelu::cpu
