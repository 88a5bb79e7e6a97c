// y = gelu(x kernel + bias), or x kernel + bias, on CUDA: the launcher over raw buffers in device memory.
#pragma once

#include <cuda_runtime.h>

#include "linear_call.h"

namespace linear::cuda {

// Computes y. Nothing is allocated and nothing waits.
cudaError_t forward(cudaStream_t stream, const Call& call);

// What a call has that the kernel does not take, or null.
const char* refusal(const Call& call);

// Whether the GPU in use has tensor cores of the kind that the kernel wants, and code for them is here.
// Without them `forward` would write nothing.
cudaError_t serves(bool* answer);

// Likewise of a call without GELU, for which it has to be compute capability 9.0.
cudaError_t serves_plain(bool* answer);

}  // namespace linear::cuda
