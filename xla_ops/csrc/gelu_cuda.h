// y = gelu(x + bias) on CUDA: the launcher over raw buffers in device memory.
#pragma once

#include <cuda_runtime.h>

#include "gelu_call.h"

namespace gelu::cuda {

// Computes the result. Nothing is allocated and nothing waits.
cudaError_t compute(cudaStream_t stream, const Call& call);

// What a call has that the kernel does not take, or null.
const char* refusal(const Call& call);

}  // namespace gelu::cuda
