// LayerNorm on CUDA: the launcher over raw buffers in device memory.
#pragma once

#include <cuda_runtime.h>

#include "norm_call.h"

namespace layer_norm::cuda {

// Computes the results; `early` as in cuda_device.h's Manner. Nothing is allocated and nothing waits.
cudaError_t forward(cudaStream_t stream, const Call& call, bool early = false);

// What a call has that the kernels do not take, or null.
const char* refusal(const Call& call);

}  // namespace layer_norm::cuda
