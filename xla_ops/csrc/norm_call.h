// One call of LayerNorm over raw buffers: y = (x - mean) / sqrt(variance + epsilon) * scale + bias, over the
// channels of a row.
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
  const void* x;      // (rows, channels)
  const void* scale;  // (rows / shared, channels)
  const void* bias;   // likewise
  void* y;            // (rows, channels)
};

}  // namespace layer_norm
