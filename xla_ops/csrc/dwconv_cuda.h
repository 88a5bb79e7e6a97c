// Depthwise convolution, LayerNorm and GELU on CUDA: launchers over raw buffers in device memory.
//
// Nothing is allocated and nothing waits, as in dcnv3_cuda.h.
#pragma once

#include <cuda_runtime.h>

#include "dwconv_call.h"

namespace dwconv::cuda {

// Computes y; `early` as in cuda_device.h's Manner, where there is a choice.
cudaError_t forward(cudaStream_t stream, const Call& call, bool early = false);

// Computes dx and the parts of the parameters' gradients, where each row of an image is a chunk: `chunks`
// is the height. Deterministic: every sum has its order. `dv` is device memory of as many float32, float64
// for float64, as x has elements; it holds the gradients by v.
cudaError_t backward(cudaStream_t stream, const Call& call, void* dv);

// What a call has that these kernels do not take, or null.
const char* refusal(const Call& call);

}  // namespace dwconv::cuda
