// DCNv3's backward on CUDA: the gradients of the learned numbers, and the launcher of all of it. Three forms:
//
//   plain              any geometry, any dtype: a thread owns a (position, group) and all its channels; it
//                      takes the dots <dy, pixel> of each point, and from them come, within the thread, the
//                      gradients of the point's offset and weight
//   nine points        of the fused form: some threads own a pair, and records go through shared memory
//   on tensor cores    these in half precision, where shared memory holds whole maps: dcnv3_cuda_dots.h
//
// The gradient of x is in dcnv3_cuda_spread.cu.
#include "dcnv3_cuda.h"
#include "dcnv3_cuda_definition.h"
#include "dcnv3_cuda_device.h"
#include "dcnv3_cuda_dots.h"
#include "dcnv3_cuda_nine.h"

namespace dcnv3::cuda {
namespace {

template <class T, int C>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 4)
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
  const Numbers<T, char> dnumbers(static_cast<char*>(call.doffset), call.points_type,
                                  points.first_number(call, at));
  const Numbers<T, char> dweights(static_cast<char*>(call.fused ? call.doffset : call.dweight),
                                  call.points_type, points.first_weight(call, at));
  Real g[C], mean = 0;
  load<C>(dy, g);
  for (int p = 0; p < points.count(); ++p) {
    points.next(p, 0);
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
    dnumbers.set(2 * p, by_w);
    dnumbers.set(2 * p + 1, by_h);
  }
  if (!call.fused) {
    for (int p = 0; p < points.count(); ++p) {
      dweights.set(p, values[p * blockDim.x]);
    }
    return;
  }
  for (int p = 0; p < points.count(); ++p) {
    const Real gradient = points.weight(p) * share * points.keep * (values[p * blockDim.x] - mean);
    dweights.set(p, gradient);
  }
  Real centre = 0;
  if (call.centre) {
    const T* own = x[at.i * int(s.width) + at.j];
    for (int c = 0; c < depth; ++c) centre += to_real(dy[c]) * to_real(own[c]);
    centre = points.blend * points.keep * (centre - mean);
  }
  dnumbers.set(3 * points.count(), centre);
  // Padding: after each group's numbers, and after the last group.
  const int end =
      int(at.group + 1 < s.group ? call.offset.group : call.offset.row - at.group * call.offset.group);
  for (int i = 3 * points.count() + 1; i < end; ++i) dnumbers.set(i, Real(0));
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

// The sum over the neighbouring threads of a pair, a power of two; all have it.
template <int N>
__device__ __forceinline__ void sum_over_pair(float (&v)[N], int shift) {
  for (int mask = 1; mask < 1 << shift; mask *= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], mask);
  }
}

// The nine points of the fused form: 2^shift threads own a pair, C channels each, and a warp copies its
// records into shared memory and its gradients out of it.
template <class T, int C>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 4)
    nine_points_kernel(const __grid_constant__ Call call, uint32_t blocks_an_image, int shift) {
  const Problem& s = call.problem;
  const uint32_t lane = threadIdx.x % 32, slots = blockDim.x >> shift;
  const uint32_t image = blockIdx.x / blocks_an_image;
  const uint32_t first = (blockIdx.x - image * blocks_an_image) * kThreads + threadIdx.x - lane;
  float* const numbers = shared_memory<float>() + ((threadIdx.x - lane) >> shift) * kRecord;
  float* const gradients = numbers + slots * kRecord;
  const Records<false> records(call, image, first >> shift, 32 >> shift);
  read_records<T>(call, records, numbers);

  // All threads take part in the exchange: one without a place computes what nobody reads.
  Place at;
  const bool there = place(s, blocks_an_image, C, &at);
  if (!there) at = {int64_t(image), 0, 0, 0, 0};
  Place whole = at;
  whole.channel = 0;
  const InGlobal<T, C> read = {{call.x, s, at.input(s)}};
  const Neighbours neighbour(s);
  float g[C];
  load<C>(static_cast<const T*>(call.dy) + at.output(s), g);
  NinePoints<T> points(call, at, numbers + (lane >> shift) * kRecord);
  float* const results = gradients + (lane >> shift) * kRecord;
  const bool leads = (lane & ((1u << shift) - 1)) == 0;
  const float share = points.share();
  float mean = 0;
  constexpr int kAtOnce = 3;
#pragma unroll 1
  for (int column = 0; column < 9; column += kAtOnce) {
    typename InGlobal<T, C>::Raw raw[kAtOnce][4];
    float at_h[kAtOnce], at_w[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      points.next(column + u, u);
      at_h[u] = points.h, at_w[u] = points.w;
      const int pixel = cell(points, 1.0f).pixel;
#pragma unroll
      for (int k = 0; k < 4; ++k) raw[u][k] = read.fetch(pixel + neighbour[k]);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int p = column + u;
      float dot[4] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float v[C];
        read.values(raw[u][k], v);
#pragma unroll
        for (int i = 0; i < C; ++i) dot[k] += g[i] * v[i];
      }
      sum_over_pair(dot, shift);
      Sample<float> sample = chain(at_h[u], at_w[u], points.height, points.width, dot);
      if (!is_finite(sample.value + sample.slope_h + sample.slope_w)) {
        sample = chain_by_definition<T>(call, whole.input(s), whole.output(s), at_h[u], at_w[u]);
      }
      const float weight = points.weight(p) * share, factor = weight * points.keep * points.scale;
      mean += weight * sample.value;
      if (!leads) continue;
      // Zero outside, even where the weight is NaN.
      results[2 * p] = sample.slope_w != 0 ? factor * sample.slope_w : 0.0f;
      results[2 * p + 1] = sample.slope_h != 0 ? factor * sample.slope_h : 0.0f;
      results[18 + p] = sample.value;
    }
  }
  float centre[1] = {};
  if (call.centre) {
    float own[C];
    read.values(read.fetch(at.i * int(s.width) + at.j), own);
#pragma unroll
    for (int i = 0; i < C; ++i) centre[0] += g[i] * own[i];
    sum_over_pair(centre, shift);
    centre[0] = points.blend * points.keep * (centre[0] - mean);
  }
  if (leads) {
#pragma unroll
    for (int p = 0; p < 9; ++p) {
      results[18 + p] = points.weight(p) * share * points.keep * (results[18 + p] - mean);
    }
    results[27] = centre[0];
  }
  write_gradients<T>(call, records, gradients);
  if (!there || !leads || at.group + 1 < s.group) return;
  const Numbers<T, char> row(static_cast<char*>(call.doffset), call.points_type,
                             at.position(s) * call.offset.row);
  for (int i = int(s.group) * kNumbers; i < int(call.offset.row); ++i) row.set(i, 0.0f);
}

template <class T>
cudaError_t launch_nine_points(cudaStream_t stream, const Call& call) {
  const int64_t each = blocks_an_image(call.problem, 8);
  const int shift = shift_of(call, 8);
  return launch(stream, call.problem.batch * each, kThreads,
                2 * (kThreads >> shift) * kRecord * sizeof(float), nine_points_kernel<T, 8>, call,
                uint32_t(each), shift);
}

template <class T>
cudaError_t launch_dots(cudaStream_t stream, const Call& call, const Device& device, const Maps& maps) {
  const bool wide = call.points_type == Type::kFloat32;
  auto kernel = wide ? dots_kernel<T, float, 1> : dots_kernel<T, T, 1>;
  if (call.problem.depth == 32) kernel = wide ? dots_kernel<T, float, 2> : dots_kernel<T, T, 2>;
  return launch_with_maps(stream, call, device, kernel, kDotWords, maps);
}

// By the nine points' form that serves the call.
template <class T>
cudaError_t launch_nine(cudaStream_t stream, const Call& call) {
  if constexpr (sizeof(T) == 2) {
    Device device;
    Maps maps;
    if (cudaError_t error = find_device(&device)) return error;
    if (cudaError_t error = share_out(call, device, dots_kernel<T, T, 1>, kDotWords, &maps)) return error;
    if (maps.groups > 0) return launch_dots<T>(stream, call, device, maps);
  }
  return launch_nine_points<T>(stream, call);
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
      if (has_nine(call) && depth > 1) points = launch_nine<T>;
    }
    if (cudaError_t error = points(stream, call)) return error;
    return spread(stream, call, scratch);
  });
}

}  // namespace dcnv3::cuda
