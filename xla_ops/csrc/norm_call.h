// One call of LayerNorm over raw buffers: y = (x - mean) / sqrt(variance + epsilon) * scale + bias, over the
// channels of a row; of add_norm, where x is the sum of two; or of norm_add, where y is added to.
#pragma once

#include <cstdint>

#include "types.h"

namespace layer_norm {

using xla_ops::Type;

// Where the residual is added, if at all.
enum class Add { kNot, kBefore, kAfter };

struct Call {
  int64_t rows, channels;
  int64_t shared;  // consecutive rows that use the same parameters
  double epsilon;
  Type type;  // of x and y
  Type parameters_type;
  const void* x;         // (rows, channels)
  const void* residual;  // added to x, or to y before it is rounded, likewise; null where there is none
  const void* scale;     // (rows / shared, channels)
  const void* bias;      // likewise
  void* total;           // (rows, channels), the sum that is normalised, rounded to `type`; or null
  void* y;               // (rows, channels)

  Add add() const { return !residual ? Add::kNot : total ? Add::kBefore : Add::kAfter; }
};

// One call of the gradients: those of x, and of scale and bias parts that each some rows of an image make.
struct BackwardCall {
  int64_t parts, parts_of_image;
  int64_t image_rows, channels;
  int64_t shared;  // consecutive parts that use the same scale
  double epsilon;
  Type type;  // of x, dy, dtotal and dx
  Type parameters_type;
  const void* x;       // (rows, channels)
  const void* scale;   // (parts / shared, channels)
  const void* dy;      // (rows, channels)
  const void* dtotal;  // added to x's gradient, likewise; null where there is none
  void* dx;            // (rows, channels)
  void* dparameters;   // (parts, 2, channels), of the type that sums have: scale's, then bias's
};

}  // namespace layer_norm
