// LayerNorm on CPU: compute functions over raw buffers.
#pragma once

#include "cpu_types.h"
#include "norm_call.h"

namespace layer_norm::cpu {

// Computes the rows [begin, end) of the result.
void forward(const Call& call, int64_t begin, int64_t end);

}  // namespace layer_norm::cpu
