// Depthwise convolution, LayerNorm and GELU on CPU: compute functions over raw buffers.
#pragma once

#include "cpu_types.h"
#include "dwconv_call.h"

namespace dwconv::cpu {

// Computes y of the rows [begin, end) of N * H.
void forward(const Call& call, int64_t begin, int64_t end);

// Computes piece i of N * chunks: dx of a chunk's rows, and the chunk's part of the parameters'
// gradients. How the pieces are divided among threads changes no result.
void backward(const Call& call, int64_t i);

}  // namespace dwconv::cpu
