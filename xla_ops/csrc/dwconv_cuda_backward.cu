// Depthwise convolution, LayerNorm and GELU on CUDA: the gradients.
#include "dwconv_cuda_device.h"

namespace dwconv::cuda {
namespace {

// The gradients of kernel and bias from a row's dv, of this thread's channels.
template <class T, int C, int K, class Real>
__device__ __forceinline__ void correlate(const Call& s, const Row& row, int channel, const Real* dv,
                                          Real* to) {
  constexpr int kTaps = K ? K : 1;  // of a kernel's row at once, in registers
  const int size = K ? K : int(s.size), reach = size / 2, width = int(s.width);
  Real total[C] = {};
  for (int j = 0; j < width; ++j) {
    Real grad[C];
    load<C>(dv + int64_t(j) * s.channels, grad);
#pragma unroll
    for (int c = 0; c < C; ++c) total[c] += grad[c];
  }
  store<C>(total, to);
  for (int y = 0; y < size; ++y) {
    const int i = row.i + y - reach;
    const bool inside = i >= 0 && i < int(s.height);
    const T* line = static_cast<const T*>(s.x) + (row.all + y - reach) * s.width * s.channels + channel;
    for (int first = 0; first < size; first += kTaps) {
      Real sum[kTaps][C] = {};
      for (int j = 0; inside && j < width; ++j) {
        Real grad[C];
        load<C>(dv + int64_t(j) * s.channels, grad);
#pragma unroll
        for (int x = 0; x < kTaps; ++x) {
          const int column = j + first + x - reach;
          if (column < 0 || column >= width) continue;
          Real v[C];
          load<C>(line + int64_t(column) * s.channels, v);
#pragma unroll
          for (int c = 0; c < C; ++c) sum[x][c] += grad[c] * v[c];
        }
      }
#pragma unroll
      for (int x = 0; x < kTaps; ++x) store<C>(sum[x], to + (1 + y * size + first + x) * s.channels);
    }
  }
}

// A team owns a row: dv of its pixels, and the row's part of the parameters' gradients.
template <class T, int C, int P, int K>
__global__ void __launch_bounds__(kMostThreads)
    parameters_kernel(const __grid_constant__ Call call, const __grid_constant__ Plan plan,
                      RealOf<T>* const dv) {
  using Real = RealOf<T>;
  const int lane = threadIdx.x % plan.lanes;
  const int64_t index = int64_t(blockIdx.x) * (blockDim.x / plan.lanes) + threadIdx.x / plan.lanes;
  const Row row(call, index, call.batch * call.height);
  const Real count = Real(int(call.channels));
  Real* const line = dv + row.all * call.width * call.channels;
  Real* const part = static_cast<Real*>(call.partial) + row.all * (3 + call.size * call.size) * call.channels;
  // What waits: v, then the gradients by u, of P pixels; then the sums of offset and scale.
  const Waiting<C, Real> values = {0}, slopes = {plan.rounds * P}, sums = {plan.rounds * P * 2};
  const Real zero[C] = {};
  for (int k = 0; k < 2 * plan.rounds; ++k) store<C>(zero, sums[k]);

  for (int j = 0; j < int(call.width); j += P) {
    Real mean[P], factor[P], slope[P] = {}, dot[P] = {};
    convolve_all<T, C, P, K>(call, plan, row, j, lane, values, mean);
    statistics<C, P>(call, plan, lane, values, mean, factor);
    for (int round = 0; round < plan.rounds; ++round) {
      const int channel = (round * plan.lanes + lane) * C;
      if (channel >= int(call.channels)) break;
      Real scale[C], offset[C], of_offset[C], of_scale[C];
      load_parameters<C, T>(call.scale, call.parameters_type, row.set * call.channels + channel, scale);
      load_parameters<C, T>(call.offset, call.parameters_type, row.set * call.channels + channel, offset);
      load<C>(sums[2 * round], of_offset);
      load<C>(sums[2 * round + 1], of_scale);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (j + p >= int(call.width)) break;
        Real v[C], du[C];
        load<C>(values[round * P + p], v);
        load<C>(static_cast<const T*>(call.dy) + (row.all * call.width + j + p) * call.channels + channel,
                du);
#pragma unroll
        for (int c = 0; c < C; ++c) {
          v[c] = (v[c] - mean[p]) * factor[p];
          du[c] *= gelu_slope_for<T, 1>(v[c] * scale[c] + offset[c]);
          of_offset[c] += du[c];
          of_scale[c] += du[c] * v[c];
          du[c] *= scale[c];
          slope[p] += du[c];
          dot[p] += du[c] * v[c];
        }
        store<C>(v, values[round * P + p]);
        store<C>(du, slopes[round * P + p]);
      }
      store<C>(of_offset, sums[2 * round]);
      store<C>(of_scale, sums[2 * round + 1]);
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      slope[p] = team_sum(slope[p], plan.lanes) / count;
      dot[p] = team_sum(dot[p], plan.lanes) / count;
    }
    for (int round = 0; row.there && round < plan.rounds; ++round) {
      const int channel = (round * plan.lanes + lane) * C;
      if (channel >= int(call.channels)) break;
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (j + p >= int(call.width)) break;
        Real u[C], du[C];
        load<C>(values[round * P + p], u);
        load<C>(slopes[round * P + p], du);
#pragma unroll
        for (int c = 0; c < C; ++c) du[c] = factor[p] * (du[c] - slope[p] - u[c] * dot[p]);
        store<C>(du, line + int64_t(j + p) * call.channels + channel);
      }
    }
  }
  if (!row.there) return;
  for (int round = 0; round < plan.rounds; ++round) {
    const int channel = (round * plan.lanes + lane) * C;
    if (channel >= int(call.channels)) break;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Real v[C];
      load<C>(sums[2 * round + k], v);
      store<C>(v, part + k * call.channels + channel);
    }
    // The thread reads back what it has written itself.
    correlate<T, C, K>(call, row, channel, line + channel, part + 2 * call.channels + channel);
  }
}

// A thread owns P pixels of C channels of dx.
template <class T, int C, int P, int K>
__global__ void __launch_bounds__(kMostThreads)
    dx_kernel(const __grid_constant__ Call call, const RealOf<T>* const dv) {
  const int64_t pieces = call.channels / C, strips = (call.width + P - 1) / P;
  const int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t strip = quotient(unit, pieces), index = quotient(strip, strips);
  const Row row(call, index, call.batch * call.height);
  if (!row.there) return;
  const int channel = int(unit - strip * pieces) * C, j = int(strip - index * strips) * P;
  RealOf<T> sum[P][C];
  convolve<T, C, P, K, true>(call, dv, row, j, channel, sum);
#pragma unroll
  for (int p = 0; p < P; ++p) {
    if (j + p >= int(call.width)) break;
    store<C>(sum[p], static_cast<T*>(call.dx) + (row.all * call.width + j + p) * call.channels + channel);
  }
}

template <class T, int C, int K, int P>
cudaError_t launch_parameters(cudaStream_t stream, const Call& call, RealOf<T>* dv) {
  const Plan plan = make_plan(call, C, kBackwardWaiting<P>, sizeof(RealOf<T>));
  if constexpr (P > 1) {
    if (plan.bytes > 2 * kFewBytes) return launch_parameters<T, C, K, 1>(stream, call, dv);
  }
  return launch_teams(stream, call.batch * call.height, plan, parameters_kernel<T, C, P, K>, call, plan, dv);
}

template <class T, int C, int K>
cudaError_t launch_backward(cudaStream_t stream, const Call& call, RealOf<T>* dv) {
  if (cudaError_t error = launch_parameters<T, C, K, C == 1 ? 1 : 2>(stream, call, dv)) return error;
  constexpr int P = kPixels<C>;
  const int64_t units = call.batch * call.height * ((call.width + P - 1) / P) * (call.channels / C);
  return launch(stream, (units + kMostThreads - 1) / kMostThreads, kMostThreads, 0, dx_kernel<T, C, P, K>,
                call, dv);
}

struct Backward {
  template <class T, int C, int K>
  cudaError_t run() const {
    return launch_backward<T, C, K>(stream, call, static_cast<RealOf<T>*>(dv));
  }
  cudaStream_t stream;
  const Call& call;
  void* dv;
};

}  // namespace

cudaError_t backward(cudaStream_t stream, const Call& call, void* dv) {
  if (call.batch == 0) return cudaSuccess;
  return with_form(call, dv, Backward{stream, call, dv});
}

}  // namespace dwconv::cuda
