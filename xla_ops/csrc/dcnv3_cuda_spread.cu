// DCNv3's backward on CUDA: the gradient of x, dx[pixel] += weight * dy over all that touch the pixel.
//
// Sums are of integers, in fixed point, so that the order in which terms arrive does not matter and the
// result is the same bits each time. A channel of an image has a scale of its own, from a bound that none
// of its sums exceeds: the sum over positions of |dy| times the sum of |weight|. Where that is not finite
// the channel is summed by the definition, by one thread. Three forms:
//
//   by channels        the nine points in half precision: dcnv3_cuda_channels.h
//   in shared memory   a block owns a few channels of one image, from the bounds to dx, on a plane of
//                      words of 32 bits
//   in global memory   for float64 and for what does not fit: words of 64 bits in the scratch; launches
//                      for bounds, sums, the definition, and from fixed point to dx
#include <algorithm>

#include "dcnv3_cuda.h"
#include "dcnv3_cuda_channels.h"
#include "dcnv3_cuda_definition.h"
#include "dcnv3_cuda_device.h"
#include "dcnv3_cuda_nine.h"

namespace dcnv3::cuda {
namespace {

// The sum of |weight| over the points of a place.
template <class T>
__device__ __noinline__ RealOf<T> magnitude_of_weights(const Call& call, const Place& at) {
  Points<T> points(call, at);
  const RealOf<T> share = points.share() * points.keep;
  RealOf<T> sum = points.blend;
  for (int p = 0; p < points.count(); ++p) {
    const RealOf<T> weight = points.weight(p) * share;
    sum += weight < 0 ? -weight : weight;
  }
  return sum;
}

// What the sum of each of C channels, from `first` of an image on, cannot exceed; for all threads of the
// block, and always to the same bit. With `softmax` a place's weights are known to add up to one, but for
// rounding, if they are finite: whoever uses these bounds finds out.
template <class T, int C>
__device__ void find_bounds(const Call& call, int64_t image, int first, bool softmax, RealOf<T>* sum) {
  const Problem& s = call.problem;
  const int group = first / int(s.depth);
#pragma unroll
  for (int c = 0; c < C; ++c) sum[c] = 0;
  for (int position = threadIdx.x; position < int(s.positions()); position += blockDim.x) {
    const int i = position / int(s.out_width), j = position - i * int(s.out_width);
    const Place at = {image, i, j, group, first - group * int(s.depth)};
    const RealOf<T> weight = softmax ? RealOf<T>(1) : magnitude_of_weights<T>(call, at);
    RealOf<T> g[C];
    load<C>(static_cast<const T*>(call.dy) + at.output(s), g);
#pragma unroll
    for (int c = 0; c < C; ++c) sum[c] += (g[c] < 0 ? -g[c] : g[c]) * weight;
  }
  sum_over_block<C>(sum);
}

// dy of C channels, to be weighted and brought to fixed point. A channel without a bound counts as zero here:
// it is left to the definition. Where no channel has one, a weight may be NaN, and nothing is to be added.
// With `softmax` no weight exceeds one, so dy alone fits; else only what the bound is of, the product, does.
template <class T, int C, bool softmax>
struct Scaled {
  using Real = RealOf<T>;

  __device__ __forceinline__ Scaled(const T* dy, const Real* bounds, int bits) {
    load<C>(dy, g);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const bool live = is_finite(bounds[c]);
      if constexpr (softmax) {
        g[c] = live ? fixed_point(bounds[c], bits).to_fixed(g[c]) : Real(0);
      } else {
        fixed[c] = fixed_point(live ? bounds[c] : Real(0), bits);
        if (!live) g[c] = 0;
        hold(g[c]), hold(fixed[c].part0), hold(fixed[c].part1);
      }
      any |= live;
    }
  }
  __device__ __forceinline__ Real times(Real weight, int c) const {
    if constexpr (softmax) return weight * g[c];
    return fixed[c].to_fixed(weight * g[c]);
  }
  Real g[C];
  FixedPoint<Real> fixed[softmax ? 1 : C];
  bool any = false;
};

// Walks the points of a place: add(pixel, weight) for each pixel that weighs something. Whether a softmax
// is finite.
template <class Points, class Add>
__device__ __forceinline__ bool walk(const Call& call, const Place& at, Points& points, Add add) {
  using Real = typename Points::Real;
  const Problem& s = call.problem;
  const Neighbours neighbour(s);
  const Real share = points.share() * points.keep;
#pragma unroll 1
  for (int first = 0; first < points.count(); first += Points::kAtOnce) {
#pragma unroll
    for (int u = 0; u < Points::kAtOnce; ++u) {
      points.next(first + u, u);
      const Cell<Real> c = cell(points, points.weight(first + u) * share);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (c.weight[k] != 0) add(c.pixel + neighbour[k], c.weight[k]);
      }
    }
  }
  if (call.centre) add(at.i * int(s.width) + at.j, points.blend);
  return is_finite(share + points.blend);
}

// ---- in global memory ----

constexpr int kBits = 62;  // of a sum

// The scratch, (N, H * W + 1, G, D): of each image the sums of its pixels, then a row of bounds.
struct Scratch {
  unsigned long long* words;
  int64_t row;    // G * D
  int64_t image;  // (H * W + 1) * G * D

  __device__ unsigned long long* sums(int64_t n) const { return words + n * image; }
  template <class Real>
  __device__ Real* bounds(int64_t n) const {
    return reinterpret_cast<Real*>(words + (n + 1) * image - row);
  }
};

template <class T, int C>
__global__ void __launch_bounds__(kThreads)
    bounds_kernel(const __grid_constant__ Call call, Scratch scratch) {
  const int pieces = int(call.problem.channels()) / C;
  const int64_t image = blockIdx.x / pieces;
  const int first = int(blockIdx.x - image * pieces) * C;
  RealOf<T> sum[C];
  find_bounds<T, C>(call, image, first, false, sum);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int c = 0; c < C; ++c) scratch.bounds<RealOf<T>>(image)[first + c] = sum[c];
  }
}

template <class T, int C>
__global__ void __launch_bounds__(kThreads)
    spread_kernel(const __grid_constant__ Call call, Scratch scratch, uint32_t blocks_an_image) {
  using Real = RealOf<T>;
  const Problem& s = call.problem;
  Place at;
  if (!place(s, blocks_an_image, C, &at)) return;
  const int64_t channels = s.channels(), first = at.group * s.depth + at.channel;
  const Scaled<T, C, false> dy(static_cast<const T*>(call.dy) + at.output(s),
                               scratch.bounds<Real>(at.image) + first, kBits);
  unsigned long long* dx = scratch.sums(at.image) + first;
  if (!dy.any) return;
  Points<T> points(call, at);
  walk(call, at, points, [&](int pixel, Real weight) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const long long v = to_integer(dy.times(weight, c));
      if (v != 0) atomicAdd(dx + pixel * channels + c, static_cast<unsigned long long>(v));
    }
  });
}

// A channel of one image that is not all finite: its sums hold Real from here on.
template <class T>
__global__ void __launch_bounds__(kThreads)
    exactly_kernel(const __grid_constant__ Call call, Scratch scratch) {
  using Real = RealOf<T>;
  const int64_t channels = call.problem.channels(), index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= call.problem.batch * channels) return;
  const int64_t image = index / channels;
  const int channel = int(index - image * channels);
  if (is_finite(scratch.bounds<Real>(image)[channel])) return;
  Real* sums = reinterpret_cast<Real*>(scratch.sums(image) + channel);
  const int64_t step = channels * int64_t{8 / sizeof(Real)};
  spread_by_definition<T>(call, image, channel, sums, step, call.problem.width * step);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Call call, Scratch scratch) {
  using Real = RealOf<T>;
  const Problem& s = call.problem;
  const int64_t channels = s.channels(), index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= s.batch * s.height * s.width * channels) return;
  const int64_t pixels = s.height * s.width, image = index / (pixels * channels);
  const int64_t at = index - image * pixels * channels;
  const Real bound = scratch.bounds<Real>(image)[at % channels];
  const unsigned long long* word = scratch.sums(image) + at;
  const Real sum = is_finite(bound)
                       ? fixed_point(bound, kBits).from_fixed(Real(static_cast<long long>(*word)))
                       : *reinterpret_cast<const Real*>(word);
  to_storage(sum, static_cast<T*>(call.dx) + index);
}

template <class T, int C>
cudaError_t launch_spread(cudaStream_t stream, const Call& call, void* words) {
  const Problem& s = call.problem;
  const int64_t channels = s.channels(), pixels = s.height * s.width, each = blocks_an_image(s, C);
  const Scratch scratch = {static_cast<unsigned long long*>(words), channels, (pixels + 1) * channels};
  const auto blocks = [](int64_t threads) { return (threads + kThreads - 1) / kThreads; };
  cudaError_t error = cudaMemsetAsync(words, 0, s.batch * scratch.image * 8, stream);
  if (error) return error;
  error = launch(stream, s.batch * channels / C, kThreads, kThreads * C * sizeof(RealOf<T>),
                 bounds_kernel<T, C>, call, scratch);
  if (error) return error;
  error = launch(stream, s.batch * each, kThreads, 0, spread_kernel<T, C>, call, scratch, uint32_t(each));
  if (error) return error;
  error = launch(stream, blocks(s.batch * channels), kThreads, 0, exactly_kernel<T>, call, scratch);
  if (error) return error;
  return launch(stream, blocks(s.batch * pixels * channels), kThreads, 0, finish_kernel<T>, call, scratch);
}

// ---- in shared memory ----

constexpr int kPlaneThreads = 512;
// A sum is one word for half precision, of which it then has thirty bits; for float32 two, a high one and
// a low one that are added up apart, so that no carry is needed: atomic additions of 64 bits in shared
// memory are loops.
template <class T>
constexpr int kWords = sizeof(T) == 2 ? 1 : 2;
constexpr int kLow = 16;  // bits of the low word

// `nine`: a warp copies its records into shared memory.
template <class T, int C, bool nine>
__global__ void __launch_bounds__(kPlaneThreads, C == 8 ? 1 : 2)
    plane_kernel(const __grid_constant__ Call call) {
  const Problem& s = call.problem;
  const int pixels = int(s.height) * int(s.width), pieces = int(s.channels()) / C;
  const int64_t image = blockIdx.x / pieces;
  const int first = int(blockIdx.x - image * pieces) * C, group = first / int(s.depth);
  constexpr int kBits = kWords<T> == 1 ? 30 : 30 + kLow;
  float bounds[C];
  find_bounds<T, C>(call, image, first, call.fused, bounds);
  bool any = false;  // is to be added at all
#pragma unroll
  for (int c = 0; c < C; ++c) any |= is_finite(bounds[c]);

  int* const plane = shared_memory<int>();  // (words, C, pixels)
  int* const spoilt = plane + kWords<T> * C * pixels;
  float* const numbers = reinterpret_cast<float*>(spoilt + 4) + threadIdx.x / 32 * 32 * kRecord;
  for (int i = threadIdx.x; i < kWords<T> * C * pixels + 1; i += blockDim.x) plane[i] = 0;
  __syncthreads();
  for (int start = threadIdx.x / 32 * 32; any && start < int(s.positions()); start += blockDim.x) {
    if constexpr (nine) {
      __syncwarp();  // with what it read before
      const Records<true> records(call, image, uint32_t(start) * uint32_t(s.group) + group, 32);
      read_records<T>(call, records, numbers);
    }
    const int position = start + threadIdx.x % 32;
    if (position >= int(s.positions())) continue;
    const int i = position / int(s.out_width), j = position - i * int(s.out_width);
    const Place at = {image, i, j, group, first - group * int(s.depth)};
    const Scaled<T, C, nine> dy(static_cast<const T*>(call.dy) + at.output(s), bounds, kBits);
    const auto add = [&](int pixel, float weight) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const float v = dy.times(weight, c);
        if constexpr (kWords<T> == 1) {
          atomicAdd(&plane[c * pixels + pixel], __float2int_rn(v));
        } else {
          const int high = __float2int_rn(v * (1.0f / (1 << kLow)));
          atomicAdd(&plane[c * pixels + pixel], high);
          const float rest = v - float(high) * (1 << kLow);  // exact: the parts are multiples of v's last bit
          atomicAdd(&plane[(C + c) * pixels + pixel], __float2int_rn(rest));
        }
      }
    };
    bool finite;
    if constexpr (nine) {
      NinePoints<T> points(call, at, numbers + threadIdx.x % 32 * kRecord);
      finite = walk(call, at, points, add);
    } else {
      Points<T> points(call, at);
      finite = walk(call, at, points, add);
    }
    if (call.fused && !finite) *spoilt = 1;
  }
  __syncthreads();
  if (*spoilt) {
    for (int i = threadIdx.x; i < C * pixels; i += blockDim.x) plane[i] = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) bounds[c] = INFINITY;
    __syncthreads();
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (is_finite(bounds[c]) || threadIdx.x != c) continue;
    spread_by_definition<T>(call, image, first + c, reinterpret_cast<float*>(plane + c * pixels), 1, s.width);
  }
  __syncthreads();
  T* dx = static_cast<T*>(call.dx) + image * pixels * s.channels() + first;
  for (int pixel = threadIdx.x; pixel < pixels; pixel += blockDim.x) {
    float v[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int* word = plane + c * pixels + pixel;
      if (!is_finite(bounds[c])) {
        v[c] = *reinterpret_cast<const float*>(word);
        continue;
      }
      float sum = float(*word);
      if constexpr (kWords<T> == 2)
        sum = float(static_cast<long long>(*word) * (1 << kLow) + word[C * pixels]);
      v[c] = fixed_point(bounds[c], kBits).from_fixed(sum);
    }
    store<C>(v, dx + int64_t(pixel) * s.channels());
  }
}

// Whether sums of words of 32 bits do not overflow, each term being off by up to a half.
bool plane_is_exact(const Call& call) {
  const int64_t terms = call.problem.positions() * (call.problem.points + 1);
  return call.type != Type::kFloat64 && terms < (call.type == Type::kFloat32 ? 1 << (32 - kLow) : 1 << 30);
}
int64_t plane_bytes(const Call& call, int channels) {
  return call.problem.height * call.problem.width * channels * (call.type == Type::kFloat32 ? 8 : 4);
}

template <class T, int C, bool nine>
cudaError_t launch_plane(cudaStream_t stream, const Call& call, const Device& device, int threads,
                         int64_t bytes) {
  return launch_with(stream, device, call.problem.batch * (call.problem.channels() / C), threads, bytes,
                     plane_kernel<T, C, nine>, call);
}
template <class T, int C>
cudaError_t launch_plane(cudaStream_t stream, const Call& call) {
  // Fewer threads would do for fewer positions, but the sum of bounds wants a power of two.
  int threads = kPlaneThreads;
  while (threads > 32 && threads / 2 >= call.problem.positions()) threads /= 2;
  const int64_t plain = std::max(plane_bytes(call, C) + 16, threads * C * int64_t{sizeof(float)});
  const int64_t bytes = plain + threads * kRecord * int64_t{sizeof(float)};
  Device device;
  if (cudaError_t error = find_device(&device)) return error;
  if constexpr (C > 1) {
    if (has_nine(call) && bytes <= (C == 8 ? device.shared : device.shared / 2)) {
      return launch_plane<T, C, true>(stream, call, device, threads, bytes);
    }
  }
  return launch_plane<T, C, false>(stream, call, device, threads, plain);
}

// As many channels a block as leave room for two planes in shared memory and work for all processors; 0
// where not even one channel fits. Records come on top of it, where there is room for them.
cudaError_t plane_channels(const Call& call, int* channels) {
  Device device;
  if (cudaError_t error = find_device(&device)) return error;
  *channels = 0;
  if (!plane_is_exact(call) || plane_bytes(call, 1) + 16 > device.shared) return cudaSuccess;
  if (only_global() && !is_small(call)) return cudaSuccess;
  *channels = 1;
  const Problem& s = call.problem;
  for (const int c : {4, 8}) {
    const bool fits =
        s.depth % c == 0 && plane_bytes(call, c) <= device.shared / 2 && aligned(call.dy) && aligned(call.dx);
    if (fits && s.batch * s.channels() / c >= device.processors) *channels = c;
  }
  return cudaSuccess;
}

}  // namespace

bool is_small(const Call& call) {
  return plane_is_exact(call) && plane_bytes(call, 1) <= 48 << 10;
}

cudaError_t spread(cudaStream_t stream, const Call& call, void* scratch) {
  return with_type(call.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) == 2) {
      Device device;
      if (cudaError_t error = find_device(&device)) return error;
      if (const int threads = slice_threads(call, device))
        return launch_channels<T>(stream, call, device, threads);
    }
    if constexpr (sizeof(T) <= 4) {
      int channels;
      if (cudaError_t error = plane_channels(call, &channels)) return error;
      if (channels == 8) return launch_plane<T, 8>(stream, call);
      if (channels == 4) return launch_plane<T, 4>(stream, call);
      if (channels == 1) return launch_plane<T, 1>(stream, call);
    }
    const bool four = call.problem.depth % 4 == 0 && aligned(call.dy);
    return (four ? launch_spread<T, 4> : launch_spread<T, 1>)(stream, call, scratch);
  });
}

}  // namespace dcnv3::cuda
