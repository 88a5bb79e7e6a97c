// Whole layers of a small map on CUDA: the launcher over raw buffers in device memory.
#pragma once

#include <cuda_runtime.h>

#include "layer_call.h"

namespace layer::cuda {

// Computes y. Nothing is allocated and nothing waits.
cudaError_t forward(cudaStream_t stream, const Call& call);

// What a call has that the kernels do not take, or null.
const char* refusal(const Call& call);

// Whether the GPU in use is of compute capability 9.0 or later, with shared memory for the kernels, and code
// for it is here. Without them `forward` would write nothing, or fail.
cudaError_t serves(bool* answer);

}  // namespace layer::cuda
