// One call of whole layers over raw buffers, one after the other: DCNv3 and an MLP, each a branch that is
// added to the map.
//
//   attend(n) = DCNv3(n input + b, dwconv_norm_gelu(n) record + b) output + b
//   mlp(n)    = gelu(n fc1 + b) fc2 + b
//   y = v + mlp(norm2(v)),  v = x + attend(norm1(x))      the norms before the branches, or
//   y = v + norm2(mlp(v)),  v = x + norm1(attend(x))      after them (post_norm)
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "types.h"

namespace layer {

using xla_ops::Type;

// Of a layer, in the order of the operands.
enum Parameter {
  kNorm1Scale,
  kNorm1Bias,
  kDwKernel,
  kDwBias,
  kDwScale,
  kDwOffset,
  kInputKernel,
  kInputBias,
  kRecordKernel,
  kRecordBias,
  kOutputKernel,
  kOutputBias,
  kNorm2Scale,
  kNorm2Bias,
  kFc1Kernel,
  kFc1Bias,
  kFc2Kernel,
  kFc2Bias,
  kParameters
};

struct Array {
  const void* data;
  Type type;
};
using Parameters = std::array<Array, kParameters>;

struct Call {
  int64_t batch, height, width, channels;
  int64_t size, group, record, hidden;  // side of the depthwise kernel; widths of the record and in the MLP
  double offset_scale, epsilon;
  bool post_norm;
  bool early;  // whether kernels begin before those before them have ended
  Type type;   // of x, y and the products' kernels
  const void* x;
  void* y;
  void* scratch;  // (pixels, scratch_width()) of `type`
  std::vector<Parameters> layers;

  int64_t pixels() const { return batch * height * width; }
  // Of each pixel: what lies between the kernels.
  int64_t scratch_width() const { return 6 * channels + record + hidden; }
};

}  // namespace layer
