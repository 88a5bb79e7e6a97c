// Depthwise convolution, LayerNorm and GELU on CUDA.
//
// A thread owns pieces of C channels, as many as 16 bytes hold, or one. A team of up to 32 neighbouring
// threads, a power of two, owns P pixels that lie together in a row, all their channels: the norm's sums
// go through the team by shuffles, always in the same order. Where a pixel has more pieces than the team
// has threads, the threads go round several times; what they convolved waits in shared memory, each
// thread's in a place of its own, so there is no barrier.
#include "dwconv_cuda.h"
#include "gelu_cuda_device.h"

namespace dwconv::cuda {
namespace {

using namespace xla_ops::cuda;

constexpr int kMostThreads = 128;          // of a block
constexpr int64_t kMostShared = 64 << 10;  // bytes that a block may ask for on every architecture

// How a launch divides the channels.
struct Plan {
  int lanes, rounds, threads;  // threads of a team; pieces of each; threads of a block
  int bytes;                   // of shared memory that a thread needs

  int64_t shared() const { return int64_t(bytes) * threads; }
};

// A team's place: an image, a row, and whether there is such a row: a team that has none computes the
// last one again, because all threads take part in shuffles, and writes nothing.
struct Row {
  __device__ __forceinline__ Row(const Call& s, int64_t index, int64_t count)
      : there(index < count),
        all(there ? index : count - 1),
        image(quotient(all, s.height)),
        i(int(all - image * s.height)),
        set(quotient(image, s.shared)) {}
  bool there;
  int64_t all, image;  // the row over the whole batch
  int i;
  int64_t set;  // which parameters
};

template <class Real>
__device__ __forceinline__ Real team_sum(Real v, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

// Convolves P pixels of C channels from (row, j, channel) on into `sum`. With `flipped` the kernel is
// turned round, which is the convolution's transpose, and there is no bias. K is the kernel's side, or 0
// for any. `from` is x or dv.
template <class T, int C, int P, int K, bool flipped, class From, class Real>
__device__ __forceinline__ void convolve(const Call& s, const From* from, const Row& row, int j, int channel,
                                         Real (&sum)[P][C]) {
  const int size = K ? K : int(s.size), reach = size / 2, channels = int(s.channels);
  Real start[C] = {};
  if constexpr (!flipped) {
    load_parameters<C, T>(s.bias, s.parameters_type, row.set * channels + channel, start);
  }
#pragma unroll
  for (int p = 0; p < P; ++p) {
#pragma unroll
    for (int c = 0; c < C; ++c) sum[p][c] = start[c];
  }
  for (int y = 0; y < size; ++y) {
    const int i = row.i + y - reach;
    if (i < 0 || i >= int(s.height)) continue;
    const From* line = from + (row.all + y - reach) * s.width * channels + channel;
    const auto read = [&](int column, Real* v) {
#pragma unroll
      for (int c = 0; c < C; ++c) v[c] = 0;
      if (column >= 0 && column < int(s.width)) load<C>(line + int64_t(column) * channels, v);
    };
    Real window[P][C];
#pragma unroll
    for (int p = 0; p + 1 < P; ++p) read(j + p - reach, window[p + 1]);
#pragma unroll
    for (int x = 0; x < size; ++x) {
#pragma unroll
      for (int p = 0; p + 1 < P; ++p) {
#pragma unroll
        for (int c = 0; c < C; ++c) window[p][c] = window[p + 1][c];
      }
      read(j + P - 1 + x - reach, window[P - 1]);
      Real weight[C];
      const int tap = flipped ? size * size - 1 - (y * size + x) : y * size + x;
      load_parameters<C, T>(s.kernel, s.parameters_type, (row.set * size * size + tap) * channels + channel,
                            weight);
#pragma unroll
      for (int p = 0; p < P; ++p) {
#pragma unroll
        for (int c = 0; c < C; ++c) sum[p][c] += weight[c] * window[p][c];
      }
    }
  }
}

// Values that wait for their thread: C of them for each `index`.
template <int C, class Real>
struct Waiting {
  __device__ __forceinline__ Real* operator[](int index) const {
    return shared_memory<Real>() + (int64_t(first + index) * blockDim.x + threadIdx.x) * C;
  }
  int first;
};

// Means over the channels, and 1 / sqrt(variance + epsilon), of P pixels whose values wait.
template <int C, int P, class Real>
__device__ __forceinline__ void statistics(const Call& s, const Plan& plan, int lane,
                                           const Waiting<C, Real>& values, Real (&mean)[P],
                                           Real (&factor)[P]) {
  const Real count = Real(int(s.channels));
  Real squares[P] = {};
#pragma unroll
  for (int p = 0; p < P; ++p) mean[p] = team_sum(mean[p], plan.lanes) / count;
  for (int round = 0; round < plan.rounds; ++round) {
    if ((round * plan.lanes + lane) * C >= int(s.channels)) break;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      Real v[C];
      load<C>(values[round * P + p], v);
#pragma unroll
      for (int c = 0; c < C; ++c) squares[p] += (v[c] - mean[p]) * (v[c] - mean[p]);
    }
  }
#pragma unroll
  for (int p = 0; p < P; ++p) {
    factor[p] = Real(1) / sqrt(team_sum(squares[p], plan.lanes) / count + Real(s.epsilon));
  }
}

// Convolves P pixels from column j on, all channels; the values wait, and `sum` is their sum over this
// thread's channels.
template <class T, int C, int P, int K, class Real>
__device__ __forceinline__ void convolve_all(const Call& s, const Plan& plan, const Row& row, int j, int lane,
                                             const Waiting<C, Real>& values, Real (&sum)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) sum[p] = 0;
  for (int round = 0; round < plan.rounds; ++round) {
    const int channel = (round * plan.lanes + lane) * C;
    if (channel >= int(s.channels)) break;
    Real v[P][C];
    convolve<T, C, P, K, false>(s, static_cast<const T*>(s.x), row, j, channel, v);
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int c = 0; c < C; ++c) sum[p] += v[p][c];
      store<C>(v[p], values[round * P + p]);
    }
  }
}

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
        v[c] = gelu<Real, 1>((v[c] - mean[p]) * factor[p] * scale[c] + offset[c]);
      }
      store<C>(v, static_cast<T*>(call.y) + (row.all * call.width + j + p) * call.channels + channel);
    }
  }
}

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
          du[c] *= gelu_slope<Real, 1>(v[c] * scale[c] + offset[c]);
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

// Plans for pieces of C channels, for each of which a thread keeps `waiting` values of `bytes`.
Plan make_plan(const Call& call, int C, int waiting, int bytes) {
  const int64_t pieces = call.channels / C;
  Plan plan = {1, 1, kMostThreads};
  while (plan.lanes < 32 && plan.lanes < pieces) plan.lanes *= 2;
  plan.rounds = int((pieces + plan.lanes - 1) / plan.lanes);
  plan.bytes = int(plan.rounds * waiting * C * bytes);
  while (plan.threads > 32 && plan.shared() > kMostShared) plan.threads /= 2;
  return plan;
}

// Launches a kernel of which a team owns one unit.
template <class... Parameters, class... Arguments>
cudaError_t launch_teams(cudaStream_t stream, int64_t teams, const Plan& plan, void (*kernel)(Parameters...),
                         Arguments... arguments) {
  const int64_t each = plan.threads / plan.lanes;
  if (plan.shared() > kPlainShared) {  // the same for all calls: others may be launching this kernel
    const int most = int(kMostShared);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error) return error;
  }
  return launch(stream, (teams + each - 1) / each, plan.threads, plan.shared(), kernel, arguments...);
}

template <int C>
constexpr int kPixels = C == 1 ? 1 : 4;  // of a thread, where no more than these wait
template <int P>
constexpr int kBackwardWaiting = 2 * P + 2;
constexpr int kFewBytes = 256;  // a thread, so that a multiprocessor has room for several blocks

template <class T, int C, int K, int P>
cudaError_t launch_forward(cudaStream_t stream, const Call& call) {
  const Plan plan = make_plan(call, C, P, sizeof(RealOf<T>));
  if constexpr (P > 1) {
    if (plan.bytes > kFewBytes) return launch_forward<T, C, K, 1>(stream, call);
  }
  const int64_t strips = call.batch * call.height * ((call.width + P - 1) / P);
  return launch_teams(stream, strips, plan, forward_kernel<T, C, P, K>, call, plan);
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

// Calls f.run<T, C, K>() for the call's dtype, channels and kernel.
template <class T, int C, class F>
cudaError_t with_size(const Call& call, F f) {
  // Each form takes its time to compile, so there are those that matter.
  if constexpr (C > 1) {
    if (call.size == 3) return f.template run<T, C, 3>();
  }
  if constexpr (C > 1 && sizeof(T) == 2) {
    if (call.size == 5) return f.template run<T, C, 5>();
  }
  return f.template run<T, C, 0>();
}
template <class F>
cudaError_t with_form(const Call& call, const void* dv, F f) {
  return with_type(call.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kMost = std::is_same_v<T, double> ? 1 : kPiece<T>;
    bool whole = call.channels % kMost == 0 && aligned(dv);
    for (const void* p :
         {call.x, call.kernel, call.bias, call.scale, call.offset, call.dy, static_cast<const void*>(call.y),
          static_cast<const void*>(call.dx), static_cast<const void*>(call.partial)}) {
      whole = whole && aligned(p);
    }
    return whole ? with_size<T, kMost>(call, f) : with_size<T, 1>(call, f);
  });
}

struct Forward {
  template <class T, int C, int K>
  cudaError_t run() const {
    return launch_forward<T, C, K, kPixels<C>>(stream, call);
  }
  cudaStream_t stream;
  const Call& call;
};
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

cudaError_t backward(cudaStream_t stream, const Call& call, void* dv) {
  if (call.batch == 0) return cudaSuccess;
  return with_form(call, dv, Backward{stream, call, dv});
}

}  // namespace dwconv::cuda
