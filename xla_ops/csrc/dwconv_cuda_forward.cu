// Depthwise convolution, LayerNorm and GELU on CUDA: the forward, and what calls are refused.
#include "dwconv_cuda_device.h"

namespace dwconv::cuda {
namespace {

template <class T, int C, int P, int K>
__global__ void __launch_bounds__(kMostThreads)
    forward_kernel(const __grid_constant__ Call call, const __grid_constant__ Plan plan) {
  using Real = RealOf<T>;
  const int strips = (int(call.width) + P - 1) / P, lane = threadIdx.x % plan.lanes;
  const int64_t strip = int64_t(blockIdx.x) * (blockDim.x / plan.lanes) + threadIdx.x / plan.lanes;
  const int64_t index = quotient(strip, strips);
  const Row row(call, index, call.batch * call.height);
  const int j = int(strip - index * strips) * P;
  const Waiting<C, Real> values = {0};
  Real mean[P], factor[P];
  convolve_all<T, C, P, K>(call, plan, row, j, lane, values, mean);
  statistics<C, P>(call, plan, lane, values, mean, factor);
  if (!row.there) return;
  for (int round = 0; round < plan.rounds; ++round) {
    const int channel = (round * plan.lanes + lane) * C;
    if (channel >= int(call.channels)) break;
    Real scale[C], offset[C];
    load_parameters<C, T>(call.scale, call.parameters_type, row.set * call.channels + channel, scale);
    load_parameters<C, T>(call.offset, call.parameters_type, row.set * call.channels + channel, offset);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (j + p >= int(call.width)) break;
      Real v[C];
      load<C>(values[round * P + p], v);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        v[c] = gelu_for<T, 1>((v[c] - mean[p]) * factor[p] * scale[c] + offset[c]);
      }
      store<C>(v, static_cast<T*>(call.y) + (row.all * call.width + j + p) * call.channels + channel);
    }
  }
}

template <class T, int C, int K, int P>
cudaError_t launch_forward(cudaStream_t stream, const Call& call) {
  const Plan plan = make_plan(call, C, P, sizeof(RealOf<T>));
  if constexpr (P > 1) {
    if (plan.bytes > kFewBytes) return launch_forward<T, C, K, 1>(stream, call);
  }
  const int64_t strips = call.batch * call.height * ((call.width + P - 1) / P);
  return launch_teams(stream, strips, plan, forward_kernel<T, C, P, K>, call, plan);
}

struct Forward {
  template <class T, int C, int K>
  cudaError_t run() const {
    return launch_forward<T, C, K, kPixels<C>>(stream, call);
  }
  cudaStream_t stream;
  const Call& call;
};

}  // namespace

const char* refusal(const Call& call) {
  const int bytes = call.type == Type::kFloat64 ? 8 : 4;
  // A team of 32 threads for one pixel; a round of pieces that is not full counts as one that is.
  const int64_t most = call.dy ? kBackwardWaiting<1> : 1, channels = (call.channels + 255) / 256 * 256;
  if (channels * most * bytes > kMostShared) {
    return "more channels than fit the shared memory of a block";
  }
  if (call.batch * call.height * call.width * call.channels / 32 >= INT32_MAX || call.width > INT32_MAX / 2 ||
      call.height > INT32_MAX / 2) {
    return "more than 2^31 blocks";
  }
  if (call.size > 32767) return "a kernel of more than 2^30 taps";
  return nullptr;
}

cudaError_t forward(cudaStream_t stream, const Call& call) {
  if (call.batch == 0) return cudaSuccess;
  return with_form(call, nullptr, Forward{stream, call});
}

}  // namespace dwconv::cuda
