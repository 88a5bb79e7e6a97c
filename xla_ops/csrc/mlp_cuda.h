// y = gelu(x kernel1 + bias1) kernel2 + bias2 on CUDA: the launcher over raw buffers in device memory.
#pragma once

#include <cuda_runtime.h>

#include "linear_call.h"

namespace linear::cuda {

// Computes y, which is the second's; the first's is not written. Nothing is allocated and nothing waits.
cudaError_t mlp(cudaStream_t stream, const Call& first, const Call& second);

// What the calls have that the kernel does not take, or null.
const char* mlp_refusal(const Call& first, const Call& second);

// Whether the GPU in use has products of warpgroups, and code for them is here. Without them `mlp` would
// write nothing.
cudaError_t mlp_serves(bool* answer);

}  // namespace linear::cuda
