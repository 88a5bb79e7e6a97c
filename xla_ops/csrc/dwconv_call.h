// One call of depthwise convolution, LayerNorm and GELU over raw buffers, as all platforms take it.
//
// Axes: N images, H rows, W columns, C channels, K the side of the kernel (odd). With r = K / 2,
//   v[n,i,j] = bias + sum over a, b of kernel[a,b] * x[n, i+a-r, j+b-r]     (zero outside the map)
//   u = (v - mean(v)) / sqrt(var(v) + epsilon)                               (over the channels)
//   y = gelu(scale * u + offset),  gelu(z) = z * Phi(z)
#pragma once

#include <cstdint>

#include "types.h"

namespace dwconv {

using xla_ops::Type;

struct Call {
  int64_t batch, height, width, channels, size;  // N, H, W, C, K
  int64_t shared;                                // consecutive images that use the same parameters
  int64_t chunks;                                // backward: an image's rows go in so many pieces
  double epsilon;
  Type type;                          // of x, y and their gradients
  Type parameters_type;               // of the four parameters
  const void* x;                      // (N, H, W, C)
  const void* kernel;                 // (N / shared, K, K, C)
  const void *bias, *scale, *offset;  // (N / shared, C)
  void* y;
  const void* dy;
  void* dx;
  void* partial;  // (N, chunks, 3 + K * K, C), float64 for float64 and float32 otherwise: a chunk's part
                  // of the gradients of offset, scale, bias and kernel
};

}  // namespace dwconv
