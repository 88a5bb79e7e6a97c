// One call of LayerNorm over raw buffers: y = (x - mean) / sqrt(variance + epsilon) * scale + bias, over the
// channels of a row; or of add_norm, where x is the sum of two.
#pragma once

#include <cstdint>

#include "types.h"

namespace layer_norm {

using xla_ops::Type;

struct Call {
  int64_t rows, channels;
  int64_t shared;  // consecutive rows that use the same parameters
  double epsilon;
  Type type;  // of x and y
  Type parameters_type;
  const void* x;         // (rows, channels)
  const void* residual;  // added to x, likewise; null where there is none
  const void* scale;     // (rows / shared, channels)
  const void* bias;      // likewise
  void* total;           // (rows, channels), the sum, rounded to `type` before it is normalised
  void* y;               // (rows, channels)
};

}  // namespace layer_norm
