// Depthwise convolution, LayerNorm and GELU on CUDA: the forward, in two forms, and what calls are refused.
#include <algorithm>

#include "cuda_chain.h"
#include "dwconv_cuda_device.h"

namespace dwconv::cuda {
namespace {

// The form for any kernel.
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

// A number from 1 to 2^31 by which smaller numbers than 2^31 are divided in two instructions.
struct Divisor {
  explicit Divisor(int64_t by) {
    while (int64_t(1) << (shift - 31) < by) ++shift;
    factor = uint32_t(((uint64_t(1) << shift) + by - 1) / by);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t v) const {
    return uint32_t(uint64_t(v) * factor >> shift);
  }
  int shift = 31;
  uint32_t factor;
};

// The form for kernels of side 3 and 5. A thread owns one piece of the channels and keeps its P pixels in
// registers. A team is as wide as the channels: up to 32 threads, a power of two, or the whole warps of a
// block; or, where a fifth or more of these would have no channels, just as many as have. Sums go through
// warps by shuffles, of as many threads as a power of two divides a team into, and meet in shared memory. No
// read waits for another or for a branch: those of several rows of the kernel are under way at once, since a
// small launch takes as long as one thread, and in a large one a multiprocessor has few threads to wait with,
// by the registers.
struct Team {
  int lanes, near, each;  // threads of a team, and of those whose sums go by shuffles; teams of a block
  uint32_t count;         // of teams
  float share;            // 1 / channels
  Divisor by_lanes, height, strips, shared;
  bool early;  // of the launch
};

template <class T, int P, int K>
constexpr int kMostLanes =
    P == 1 || (K == 3 && sizeof(T) == 2) ? 512 : 384;  // leaves 128 and 168 registers to a thread
constexpr int kManyWarps = 8;  // of a multiprocessor: with fewer a thread owns one pixel, to be done sooner

// C neighbouring values as memory has them.
template <class T, int C>
struct Raw {
  using W = Word<T, C>;
  static constexpr int kEach = sizeof(W) / sizeof(T);

  // Zeros if nothing is `there`.
  __device__ __forceinline__ void read(const T* p, bool there = true) {
#pragma unroll
    for (int i = 0; i < C / kEach; ++i) {
      words[i] = W();
      if (there) words[i] = reinterpret_cast<const W*>(p)[i];
    }
  }
  __device__ __forceinline__ void unpack(float (&v)[C]) const {
#pragma unroll
    for (int i = 0; i < C / kEach; ++i) unpack_word<T>(words[i], v + i * kEach);
  }
  W words[C / kEach];
};

// The team's sums of P numbers at once, for all its threads. `meeting` has room for P of each `near` threads
// of the block.
template <int P>
__device__ __forceinline__ void team_sums(float (&v)[P], const Team& team, int lane, float* meeting) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    if (mask >= team.near) continue;
#pragma unroll
    for (int p = 0; p < P; ++p) v[p] += __shfl_xor_sync(0xffffffffu, v[p], mask);
  }
  if (team.lanes == team.near) return;
  const int first = (int(threadIdx.x) - lane) / team.near, parts = team.lanes / team.near;
  if (lane % team.near == 0) store<P>(v, meeting + (first + lane / team.near) * P);
  __syncthreads();
#pragma unroll
  for (int p = 0; p < P; ++p) v[p] = 0;
#pragma unroll 4
  for (int i = first; i < first + parts; ++i) {
    float part[P];
    load<P>(meeting + i * P, part);
#pragma unroll
    for (int p = 0; p < P; ++p) v[p] += part[p];
  }
}

// Neighbouring teams own strips below each other: they share two of three rows, in the first-level cache.
// `same`: the parameters are of x's dtype, else of float32. kAhead: rows of the kernel that are read at once.
template <class T, int C, int P, int K, bool same>
__global__ void __launch_bounds__((kMostLanes<T, P, K>))
    register_forward_kernel(const __grid_constant__ Call call, const __grid_constant__ Team team) {
  using Parameter = std::conditional_t<same, T, float>;
  constexpr int kColumns = P + K - 1, kAhead = K == 5 ? 1 : same && (P == 1 || sizeof(T) == 4) ? 3 : 2;
  const int height = int(call.height), width = int(call.width), channels = int(call.channels);
  const int strips = (width + P - 1) / P, line = width * channels;
  const int in_block = int(team.by_lanes.divide(threadIdx.x)),
            lane = int(threadIdx.x) - in_block * team.lanes;
  const uint32_t index = in_block < team.each ? blockIdx.x * team.each + in_block : team.count;
  // A thread that has none computes a piece or strip anew that another has, and writes nothing.
  const bool piece_there = lane * C < channels, there = index < team.count && piece_there;
  const uint32_t strip = index < team.count ? index : team.count - 1, place = team.height.divide(strip);
  const uint32_t image = team.strips.divide(place);
  const int channel = piece_there ? lane * C : 0, i = strip - place * height,
            j = (place - image * strips) * P;
  const int64_t first = ((int64_t(image) * height + i) * width + j) * channels + channel;

  const auto parameters = [&, set = team.shared.divide(image)](const void* data, int each) {
    return static_cast<const Parameter*>(data) + int64_t(set) * (each * channels) + channel;
  };
  const T* const x = static_cast<const T*>(call.x) + (first - int64_t(K / 2) * (line + channels));
  const Parameter* const kernel = parameters(call.kernel, K * K);
  Raw<T, C> pixels[kAhead][kColumns];
  Raw<Parameter, C> weights[kAhead][K], bias, scale, offset;
  const auto read = [&](int y) {
    const bool row_there = uint32_t(i + y - K / 2) < uint32_t(height);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const bool column_there = uint32_t(j + k - K / 2) < uint32_t(width);
      pixels[y % kAhead][k].read(x + uint32_t(y * line + k * channels), row_there && column_there);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) weights[y % kAhead][k].read(kernel + uint32_t((y * K + k) * channels));
  };
  if (team.early) {  // the parameters may be far away, in DRAM
#pragma unroll 1
    for (int tap = 0; tap < K * K; ++tap) bring_near(kernel + tap * channels);
    for (const void* vector : {call.bias, call.scale, call.offset}) bring_near(parameters(vector, 1));
  }
  wait_for_kernel_before();
  let_next_kernel_begin();
#pragma unroll
  for (int y = 0; y < kAhead; ++y) read(y);
  bias.read(parameters(call.bias, 1));
  // Compilers would put reads off to save registers, but not beyond these lines. A warp without teams ends.
  __syncwarp();
  if (blockIdx.x * team.each + team.by_lanes.divide(threadIdx.x & ~31u) >= team.count) return;
  float v[P][C];
#pragma unroll
  for (int p = 0; p < P; ++p) bias.unpack(v[p]);
#pragma unroll
  for (int y = 0; y < K; ++y) {
    float weight[K][C];
#pragma unroll
    for (int k = 0; k < K; ++k) weights[y % kAhead][k].unpack(weight[k]);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      float pixel[C];
      pixels[y % kAhead][k].unpack(pixel);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (k < p || k - p >= K) continue;
#pragma unroll
        for (int c = 0; c < C; ++c) v[p][c] += weight[k - p][c] * pixel[c];
      }
    }
    if (y + kAhead < K) read(y + kAhead);
  }
  scale.read(parameters(call.scale, 1));
  offset.read(parameters(call.offset, 1));

  float* const meeting = shared_memory<float>();
  float mean[P], factor[P];
#pragma unroll
  for (int p = 0; p < P; ++p) {
    mean[p] = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) mean[p] += v[p][c];
    if (!piece_there) mean[p] = 0;
  }
  team_sums<P>(mean, team, lane, meeting);
#pragma unroll
  for (int p = 0; p < P; ++p) {
    factor[p] = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      v[p][c] -= mean[p] * team.share;
      factor[p] += v[p][c] * v[p][c];
    }
    if (!piece_there) factor[p] = 0;
  }
  team_sums<P>(factor, team, lane, meeting + blockDim.x / team.near * P);
  if (!there) return;
  float by[C], and_then[C];
  scale.unpack(by);
  offset.unpack(and_then);
#pragma unroll
  for (int p = 0; p < P; ++p) {
    if (j + p >= width) break;
    factor[p] = rsqrtf(factor[p] * team.share + float(call.epsilon));
#pragma unroll
    for (int c = 0; c < C; ++c) v[p][c] = gelu_for<T, 1>(v[p][c] * factor[p] * by[c] + and_then[c]);
    store<C>(v[p], static_cast<T*>(call.y) + (first + p * channels));
  }
}

template <class T, int C, int K, bool same, int P>
cudaError_t launch_register_forward(Manner manner, cudaStream_t stream, const Call& call, int processors) {
  const int64_t across = (call.width + P - 1) / P, strips = call.batch * across * call.height;
  const int pieces = int(call.channels / C);
  int lanes = 1;
  while (lanes < 32 && lanes < pieces) lanes *= 2;
  if (pieces > 32) lanes = (pieces + 31) / 32 * 32;
  int near = std::min(lanes, 32), each = lanes > 32 ? 1 : kMostThreads / lanes;
  if (pieces * 5 <= lanes * 4) {
    lanes = pieces, near = std::min(pieces & -pieces, 32), each = 32 / near;  // whole warps
    static_assert(2 * kMostThreads <= kMostLanes<T, P, K>);
    if (each * lanes > 2 * kMostThreads) each = std::max(kMostThreads / pieces, 1);
  }
  if constexpr (P > 1) {
    if (lanes > kMostLanes<T, P, K> || strips * lanes < int64_t(32) * kManyWarps * processors) {
      return launch_register_forward<T, C, K, same, 1>(manner, stream, call, processors);
    }
  }
  const int threads = (each * lanes + 31) / 32 * 32;
  const Team team = {lanes,
                     near,
                     each,
                     uint32_t(strips),
                     1.f / float(call.channels),
                     Divisor(lanes),
                     Divisor(call.height),
                     Divisor(across),
                     Divisor(std::min(call.shared, call.batch)),
                     manner.early};
  // Threads behind the last team read as if they were one.
  const int64_t shared = lanes == near ? 0 : (2 * threads + lanes) / near * P * sizeof(float);
  return launch(manner, stream, (strips + each - 1) / each, threads, shared,
                register_forward_kernel<T, C, P, K, same>, call, team);
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
    if constexpr (K > 0) {
      if (call.channels / C <= kMostLanes<T, 1, K> && call.batch * call.height * call.width <= INT32_MAX &&
          call.size * call.width * call.channels <= INT32_MAX) {
        Device device;
        if (cudaError_t error = find_device(&device)) return error;
        Manner manner;
        manner.early = early;
        if constexpr (sizeof(T) == 2) {
          if (call.parameters_type == Type::kFloat32) {
            return launch_register_forward<T, C, K, false, kPixels<C>>(manner, stream, call,
                                                                       device.processors);
          }
        }
        return launch_register_forward<T, C, K, true, kPixels<C>>(manner, stream, call, device.processors);
      }
    }
    return launch_forward<T, C, 0, kPixels<C>>(stream, call);
  }
  cudaStream_t stream;
  const Call& call;
  bool early;
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

cudaError_t forward(cudaStream_t stream, const Call& call, bool early) {
  if (call.batch == 0) return cudaSuccess;
  return with_form(call, nullptr, Forward{stream, call, early});
}

}  // namespace dwconv::cuda
