// One call of y = gelu(x + bias), gelu(z) = z * Phi(z), over raw buffers, as all platforms take it.
#pragma once

#include <cstdint>

#include "types.h"

namespace gelu {

using xla_ops::Type;

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

}  // namespace gelu
