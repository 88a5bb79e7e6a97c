// Bias and GELU on CUDA: a thread owns as many neighbouring channels of a row as 16 bytes hold, or one.
#include "gelu_cuda.h"
#include "gelu_cuda_device.h"

namespace gelu::cuda {
namespace {

using namespace xla_ops::cuda;

constexpr int kThreads = 256;

template <class T, int C, bool backward>
__global__ void __launch_bounds__(kThreads) gelu_kernel(const __grid_constant__ Call call) {
  using Real = RealOf<T>;
  const int64_t pieces = call.channels / C, unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= call.rows * pieces) return;
  const int64_t row = quotient(unit, pieces), first = (unit - row * pieces) * C,
                at = row * call.channels + first;
  Real z[C], bias[C], slope[C];
  load<C>(static_cast<const T*>(call.x) + at, z);
  load_parameters<C, T>(call.bias, call.bias_type, quotient(row, call.shared) * call.channels + first, bias);
  if constexpr (backward) load<C>(static_cast<const T*>(call.dy) + at, slope);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    z[c] += bias[c];
    z[c] = backward ? slope[c] * gelu_slope_for<T, 1>(z[c]) : gelu_for<T, 1>(z[c]);
  }
  store<C>(z, static_cast<T*>(call.result) + at);
}

template <class T, int C>
cudaError_t launch_gelu(cudaStream_t stream, const Call& call) {
  const int64_t blocks = (call.rows * (call.channels / C) + kThreads - 1) / kThreads;
  const auto kernel = call.dy ? gelu_kernel<T, C, true> : gelu_kernel<T, C, false>;
  return launch(stream, blocks, kThreads, 0, kernel, call);
}

}  // namespace

const char* refusal(const Call& call) {
  return call.rows * call.channels / kThreads >= INT32_MAX ? "more than 2^31 blocks" : nullptr;
}

cudaError_t compute(cudaStream_t stream, const Call& call) {
  if (call.rows == 0) return cudaSuccess;
  return with_type(call.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool whole = call.channels % kPiece<T> == 0 && aligned(call.x) && aligned(call.bias) &&
                       aligned(call.dy) && aligned(call.result);
    return whole ? launch_gelu<T, kPiece<T>>(stream, call) : launch_gelu<T, 1>(stream, call);
  });
}

}  // namespace gelu::cuda
