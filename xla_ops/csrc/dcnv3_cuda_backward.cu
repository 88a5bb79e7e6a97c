// DCNv3's backward on CUDA, for any geometry, on any architecture.
//
// Two halves, each a launch or more:
//   points   a thread owns a (position, group) and all its channels: the dots <dy, pixel> of each point
//            and from them, within the thread, the gradients of its learned numbers
//   spread   dx[pixel] += weight * dy, by atomic additions of 64-bit integers in fixed point, so that the
//            order in which they arrive does not matter:
//              bounds   for each image and channel, sum over positions of |dy| times the sum of |weight|:
//                       no element of dx exceeds it, so none overflows
//              spread   adds
//              exactly  a channel whose bound is not finite is summed by the definition, one thread each
//              finish   from fixed point to dx
#include "dcnv3_cuda.h"
#include "dcnv3_cuda_device.h"

namespace dcnv3::cuda {
namespace {

constexpr int kBits = 62;  // of the sums

// ---- points ----

// <dy, sample> and its derivatives by the definition, where something is not finite.
template <class T, class Real>
__device__ __noinline__ Sample<Real> chain_by_definition(const Call& call, int64_t input, int64_t output,
                                                         Real h, Real w) {
  const Problem& s = call.problem;
  Sample<Real> total = {0, 0, 0};
  if (!is_inside(h, w, s.height, s.width)) {
    for (int64_t c = 0; c < s.depth; ++c)
      total.value += to_real(static_cast<const T*>(call.dy)[output + c]) * 0;
    return total;  // the location has no gradient, whatever dy is
  }
  for (int64_t c = 0; c < s.depth; ++c) {
    const T* x = static_cast<const T*>(call.x) + input + c;
    const auto pixel = [&](int64_t i, int64_t j) { return to_real(x[(i * s.width + j) * s.channels()]); };
    const Sample<Real> sample = sample_exactly(h, w, s.height, s.width, pixel);
    const Real g = to_real(static_cast<const T*>(call.dy)[output + c]);
    total.value += g * sample.value;
    total.slope_h += g * sample.slope_h;
    total.slope_w += g * sample.slope_w;
  }
  return total;
}

template <class T, int C>
__global__ void __launch_bounds__(kThreads)
    points_kernel(const __grid_constant__ Call call, uint32_t blocks_an_image) {
  using Real = RealOf<T>;
  const Problem& s = call.problem;
  Place at;
  if (!place(s, blocks_an_image, int(s.depth), &at)) return;
  const int depth = int(s.depth);
  const Map<T> x(call.x, s, at.input(s));
  const Neighbours neighbour(s);
  const T* dy = static_cast<const T*>(call.dy) + at.output(s);
  // <dy, sample> of each point until their mean over the softmax is known: (P, threads)
  Real* values = shared_memory<Real>() + threadIdx.x;

  Points<T> points(call, at);
  const Real share = points.share();
  Real g[C], mean = 0;
  load<C>(dy, g);
  for (int p = 0; p < points.count(); ++p) {
    points.next(p);
    const Axis<Real> h = locate(points.h, points.height), w = locate(points.w, points.width);
    const int pixel = int(h.first) * int(s.width) + int(w.first);
    Real dot[4] = {};
    for (int c = 0; c < depth; c += C) {
      if (depth > C) load<C>(dy + c, g);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Real v[C];
        load<C>(x[pixel + neighbour[k]] + c, v);
#pragma unroll
        for (int i = 0; i < C; ++i) dot[k] += g[i] * v[i];
      }
    }
    Sample<Real> sample = chain(points.h, points.w, points.height, points.width, dot);
    if (!is_finite(sample.value + sample.slope_h + sample.slope_w)) {
      sample = chain_by_definition<T>(call, at.input(s), at.output(s), points.h, points.w);
    }
    const Real weight = points.weight(p) * share, factor = weight * points.keep * points.scale;
    mean += weight * sample.value;
    values[p * blockDim.x] = sample.value;
    // Zero outside, even where the weight is NaN.
    const Real by_w = sample.slope_w != 0 ? factor * sample.slope_w : Real(0);
    const Real by_h = sample.slope_h != 0 ? factor * sample.slope_h : Real(0);
    write<T>(by_w, call.doffset, call.points_type, points.numbers + 2 * p);
    write<T>(by_h, call.doffset, call.points_type, points.numbers + 2 * p + 1);
  }
  if (!call.fused) {
    for (int p = 0; p < points.count(); ++p) {
      write<T>(values[p * blockDim.x], call.dweight, call.points_type, points.weights + p);
    }
    return;
  }
  for (int p = 0; p < points.count(); ++p) {
    const Real gradient = points.weight(p) * share * points.keep * (values[p * blockDim.x] - mean);
    write<T>(gradient, call.doffset, call.points_type, points.weights + p);
  }
  Real centre = 0;
  if (call.centre) {
    const T* own = x[at.i * int(s.width) + at.j];
    for (int c = 0; c < depth; ++c) centre += to_real(dy[c]) * to_real(own[c]);
    centre = points.blend * points.keep * (centre - mean);
  }
  write<T>(centre, call.doffset, call.points_type, points.numbers + 3 * s.points);
  // Padding: after each group's numbers, and after the last group.
  const int64_t end =
      at.group + 1 < s.group ? call.offset.group : call.offset.row - at.group * call.offset.group;
  for (int64_t i = 3 * s.points + 1; i < end; ++i) {
    write<T>(Real(0), call.doffset, call.points_type, points.numbers + i);
  }
}

template <class T, int C>
cudaError_t launch_points(cudaStream_t stream, const Call& call) {
  // Fewer threads where points are so many that their values would not fit.
  const int64_t each = call.problem.points * sizeof(RealOf<T>);
  int threads = kThreads;
  while (threads > 1 && threads * each > kPlainShared) threads /= 2;
  const int64_t blocks = blocks_an_image(call.problem, int(call.problem.depth), threads);
  return launch(stream, call.problem.batch * blocks, threads, threads * each, points_kernel<T, C>, call,
                uint32_t(blocks));
}

// ---- spread ----

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

template <class T>
__device__ RealOf<T> magnitude_of_weights(const Call& call, const Place& at) {
  Points<T> points(call, at);
  const RealOf<T> share = points.share() * points.keep;
  RealOf<T> sum = points.blend;
  for (int p = 0; p < points.count(); ++p) {
    const RealOf<T> weight = points.weight(p) * share;
    sum += weight < 0 ? -weight : weight;
  }
  return sum;
}

// A block sums up one channel piece of an image, in an order that is always the same.
template <class T, int C>
__global__ void __launch_bounds__(kThreads)
    bounds_kernel(const __grid_constant__ Call call, Scratch scratch) {
  using Real = RealOf<T>;
  const Problem& s = call.problem;
  const uint32_t pieces = uint32_t(s.channels() / C), positions = uint32_t(s.positions());
  const int64_t image = blockIdx.x / pieces;
  const int first = int(blockIdx.x % pieces) * C, group = first / int(s.depth);
  Real sum[C] = {};
  for (uint32_t position = threadIdx.x; position < positions; position += blockDim.x) {
    const int i = int(position / uint32_t(s.out_width)), j = int(position % uint32_t(s.out_width));
    const Place at = {image, i, j, group, first - group * int(s.depth)};
    const Real weight = magnitude_of_weights<T>(call, at);
    Real g[C];
    load<C>(static_cast<const T*>(call.dy) + at.output(s), g);
#pragma unroll
    for (int c = 0; c < C; ++c) sum[c] += (g[c] < 0 ? -g[c] : g[c]) * weight;
  }
  sum_over_block<C>(sum);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int c = 0; c < C; ++c) scratch.bounds<Real>(image)[first + c] = sum[c];
  }
}

template <class T, int C>
__global__ void __launch_bounds__(kThreads)
    spread_kernel(const __grid_constant__ Call call, Scratch scratch, uint32_t blocks_an_image) {
  using Real = RealOf<T>;
  const Problem& s = call.problem;
  Place at;
  if (!place(s, blocks_an_image, C, &at)) return;
  const int64_t channels = s.channels();
  Points<T> points(call, at);
  const Real share = points.share() * points.keep;
  const int64_t first = at.group * s.depth + at.channel;
  const Real* bounds = scratch.bounds<Real>(at.image) + first;
  Real g[C];
  bool live[C];
  load<C>(static_cast<const T*>(call.dy) + at.output(s), g);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const Real bound = bounds[c];
    live[c] = is_finite(bound) && g[c] != 0;
    if (live[c]) g[c] = fixed_point(bound, kBits).to_fixed(g[c]);
  }
  unsigned long long* dx = scratch.sums(at.image) + first;
  const auto add = [&](int64_t pixel, Real weight) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (live[c])
        atomicAdd(dx + pixel * channels + c, static_cast<unsigned long long>(to_integer(weight * g[c])));
    }
  };
  const Neighbours neighbour(s);
  for (int p = 0; p < points.count(); ++p) {
    points.next(p);
    const Cell<Real> c = cell(points, points.weight(p) * share);
    for (int k = 0; k < 4; ++k) {
      if (c.weight[k] != 0) add(c.pixel + neighbour[k], c.weight[k]);
    }
  }
  if (call.centre) add(at.i * s.width + at.j, points.blend);
}

// A channel of one image that is not all finite: its sums hold Real from here on.
template <class T>
__global__ void __launch_bounds__(kThreads)
    exactly_kernel(const __grid_constant__ Call call, Scratch scratch) {
  using Real = RealOf<T>;
  const Problem& s = call.problem;
  const int64_t channels = s.channels(), index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= s.batch * channels) return;
  const int64_t image = index / channels;
  const int first = int(index - image * channels), group = first / int(s.depth);
  if (is_finite(scratch.bounds<Real>(image)[first])) return;
  Place at = {image, 0, 0, group, first - group * int(s.depth)};
  const auto add = [&](int64_t pixel, Real v) {
    *reinterpret_cast<Real*>(scratch.sums(image) + pixel * channels + first) += v;
  };
  const Neighbours neighbour(s);
  for (at.i = 0; at.i < int(s.out_height); ++at.i) {
    for (at.j = 0; at.j < int(s.out_width); ++at.j) {
      Points<T> points(call, at);
      const Real share = points.share() * points.keep;
      const Real g = to_real(static_cast<const T*>(call.dy)[at.output(s)]);
      for (int p = 0; p < points.count(); ++p) {
        points.next(p);
        const Cell<Real> c = cell(points, Real(1));
        const Real weight = points.weight(p) * share;
        for (int k = 0; k < 4; ++k) {
          if (c.weight[k] > 0) add(c.pixel + neighbour[k], c.weight[k] * weight * g);
        }
      }
      if (call.centre) add(at.i * s.width + at.j, points.blend * g);
    }
  }
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

}  // namespace

cudaError_t backward(cudaStream_t stream, const Call& call, void* scratch) {
  if (call.problem.batch == 0) return cudaSuccess;
  return with_type(call.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t depth = aligned(call.x) && aligned(call.dy) ? call.problem.depth : 1;
    auto points = depth % kPiece<T> == 0 ? launch_points<T, kPiece<T>> : launch_points<T, 1>;
    if constexpr (sizeof(T) <= 4) {
      if (depth % 16 == 0) points = launch_points<T, 16>;
    }
    if (cudaError_t error = points(stream, call)) return error;
    return (depth % 4 == 0 ? launch_spread<T, 4> : launch_spread<T, 1>)(stream, call, scratch);
  });
}

}  // namespace dcnv3::cuda
