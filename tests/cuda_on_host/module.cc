// The extension `_cuda` on the host (cuda_runtime.h): XLA's handlers for CUDA, as handlers for a CPU, so that
// the tests for a GPU run without one. tests/kernels_on_host.py builds and registers it.
#include "xla/ffi/api/ffi.h"

#include <pybind11/pybind11.h>

#include <cuda_runtime.h>  // after others: it defines words that these use

// A CPU has no stream.
template <>
struct xla::ffi::CtxDecoding<xla::ffi::PlatformStream<cudaStream_t>> {
  using Type = cudaStream_t;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*, DiagnosticEngine&) {
    return nullptr;
  }
};

#define INTERNIMAGE_CUDA_ARCHS "the host"

// clang-format off: in this order the names of one do not hide what another means
#include "dcnv3_cuda_backward.cu"
#include "dcnv3_cuda_forward.cu"
#include "dcnv3_cuda_spread.cu"
#include "dwconv_cuda_backward.cu"
#include "dwconv_cuda_forward.cu"
#include "gelu_cuda.cu"
#include "layer_cuda.cu"
#include "linear_cuda.cu"
#include "mlp_cuda.cu"
#include "norm_cuda.cu"
#include "dcnv3_cuda_handlers.cc"
#include "dwconv_cuda_handlers.cc"
#include "gelu_cuda_handlers.cc"
#include "layer_cuda_handlers.cc"
#include "linear_cuda_handlers.cc"
#include "norm_cuda_handlers.cc"
#include "cuda_module.cc"
// clang-format on

namespace xla_ops::cuda {
alignas(1024) unsigned char dynamic_shared_memory[cuda_on_host::kShared];
}

// How many launches there were since the last time that this was asked; of each whether it was early.
extern "C" __attribute__((visibility("default"))) int take_launches(char* early, int most) {
  const std::vector<char> all = std::move(cuda_on_host::launched);
  cuda_on_host::launched.clear();
  std::copy_n(all.begin(), std::min<size_t>(most, all.size()), early);
  return int(all.size());
}

namespace {
const bool ready = [] {
  cuda_on_host::shared = xla_ops::cuda::dynamic_shared_memory;
  return true;
}();
}  // namespace
