// What the CUDA handlers of all operators share.
//
// A handler checks the call and puts kernels on XLA's stream: it allocates nothing and waits for nothing,
// so XLA may record it into a command buffer. Scratch comes as a result that nobody reads.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace xla_ops::cuda {

namespace ffi = xla::ffi;

// What CUDA says of this machine, with what helps where that is not plain.
inline std::string explain(cudaError_t error) {
  std::string text = std::string("CUDA: ") + cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    const auto release = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    text += " (the driver is for CUDA " + release(driver) + ", the kernels were built with " +
            release(CUDART_VERSION) + ": build them with an older nvcc, or install a newer driver)";
  }
  if (error == cudaErrorNoKernelImageForDevice) {
    text += " (built for " INTERNIMAGE_CUDA_ARCHS "; INTERNIMAGE_CUDA_ARCHS at the build names others)";
  }
  return text;
}

inline ffi::Error check(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, std::string(name) + ": " + explain(error));
}

inline auto bind() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>();
}

// In the handler itself: registered beside it, on CUDA, they do not count.
#define TRAITS {ffi::Traits::kCmdBufferCompatible}

}  // namespace xla_ops::cuda
