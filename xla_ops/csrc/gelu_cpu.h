// y = gelu(x + bias), gelu(z) = z * Phi(z), on CPU: compute functions over raw buffers.
#pragma once

#include "cpu_types.h"
#include "gelu_call.h"

namespace gelu::cpu {

// Computes the rows [begin, end) of the result.
void compute(const Call& call, int64_t begin, int64_t end);

}  // namespace gelu::cpu
