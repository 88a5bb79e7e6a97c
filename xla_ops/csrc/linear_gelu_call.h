// One call of y = gelu(x kernel + bias), gelu(z) = z * Phi(z), over raw buffers.
#pragma once

#include <cstdint>

#include "types.h"

namespace linear_gelu {

using xla_ops::Type;

struct Call {
  int64_t rows, inputs, outputs;
  Type type;  // of x, kernel and y: kBFloat16 or kFloat16
  Type bias_type;
  const void* x;       // (rows, inputs)
  const void* kernel;  // (inputs, outputs)
  const void* bias;    // (outputs)
  void* y;             // (rows, outputs)
};

}  // namespace linear_gelu
