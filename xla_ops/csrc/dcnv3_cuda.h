// DCNv3 on CUDA: launchers over raw buffers in device memory; XLA and Python are elsewhere.
//
// Nothing is allocated and nothing waits: a launcher puts its kernels on the stream and returns. Calls
// may run as they are inside a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dcnv3_call.h"

namespace dcnv3::cuda {

// Computes y; `early` as in cuda_device.h's Manner, where there is a choice.
cudaError_t forward(cudaStream_t stream, const Call& call, bool early = false);

// Computes all gradients: the same bits each time, in whatever order blocks run. `scratch` is device
// memory of N * (H * W + 1) * G * D words of 64 bits, or anything where `is_small`.
cudaError_t backward(cudaStream_t stream, const Call& call, void* scratch);

// Its second half: the gradient of x.
cudaError_t spread(cudaStream_t stream, const Call& call, void* scratch);

// Whether a channel's gradient fits the shared memory of every GPU there is: then no scratch is needed.
// xla_ops/dcnv3_kernel.py has the same rule.
bool is_small(const Call& call);

// What a call has that these kernels do not take, or null. Each image's work has to count up to 2^31.
const char* refusal(const Call& call);

}  // namespace dcnv3::cuda
