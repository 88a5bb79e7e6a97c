// LayerNorm on CPU: compute functions over raw buffers.
#pragma once

#include "cpu_types.h"
#include "norm_call.h"

namespace layer_norm::cpu {

// Computes the rows [begin, end) of the result.
void forward(const Call& call, int64_t begin, int64_t end);

// Computes the gradients that a part is of, and its rows' of x.
void backward(const BackwardCall& call, int64_t part);

}  // namespace layer_norm::cpu
