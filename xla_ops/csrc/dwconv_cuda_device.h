// Depthwise convolution, LayerNorm and GELU on CUDA: how a launch divides its work, and what forward and
// backward share.
//
// A thread owns pieces of C channels, as many as 16 bytes hold, or one. A team of up to 32 neighbouring
// threads, a power of two, owns P pixels that lie together in a row, all their channels: the norm's sums
// go through the team by shuffles, always in the same order. Where a pixel has more pieces than the team
// has threads, the threads go round several times; what they convolved waits in shared memory, each
// thread's in a place of its own, so there is no barrier. The forward has a second form, of its own.
#pragma once

#include "dwconv_cuda.h"
#include "gelu_cuda_device.h"

namespace dwconv::cuda {

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

// Plans for pieces of C channels, for each of which a thread keeps `waiting` values of `bytes`.
inline Plan make_plan(const Call& call, int C, int waiting, int bytes) {
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

}  // namespace dwconv::cuda
