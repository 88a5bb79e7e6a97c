// DCNv3's forward on CUDA. Two forms, which differ in where the pixels are read:
//
//   from global memory   any geometry, any architecture; caches serve what neighbours share
//   from shared memory   a block stages the plane of one image and 16 channels and computes all of its
//                        positions: for maps whose plane leaves room for two blocks, at batches that
//                        have a plane for every multiprocessor
#include "dcnv3_cuda.h"
#include "dcnv3_cuda_device.h"

namespace dcnv3::cuda {
namespace {

// One channel of y by the definition, for operands that are not finite. Rare, so kept out of the way.
template <class T, class Real = RealOf<T>>
__device__ __noinline__ Real sample_by_definition(const Call& call, const Place& at, int64_t input) {
  const Problem& s = call.problem;
  const T* x = static_cast<const T*>(call.x) + input;
  const auto pixel = [&](int64_t i, int64_t j) { return to_real(x[(i * s.width + j) * s.channels()]); };
  Points<T> points(call, at);
  const Real share = points.share() * points.keep;
  Real sum = 0;
  for (int p = 0; p < points.count(); ++p) {
    points.next(p);
    sum += points.weight(p) * share * sample_exactly(points.h, points.w, s.height, s.width, pixel).value;
  }
  return call.centre ? sum + points.blend * pixel(at.i, at.j) : sum;
}

// Reads C channels of pixels where they are.
template <class T, int C>
struct InGlobal {
  __device__ __forceinline__ void operator()(int pixel, RealOf<T>* v) const { load<C>(map[pixel], v); }
  Map<T> map;
};

// Reads 16 channels from a staged plane, (pieces of 16 bytes, pixels): neighbours in different banks.
template <class T>
struct InShared {
  static constexpr int kPieces = 16 / kPiece<T>;

  __device__ __forceinline__ void operator()(int pixel, RealOf<T>* v) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) unpack_word<T>(plane[i * pixels + pixel], v + i * kPiece<T>);
  }
  const uint4* plane;
  int pixels;
};

// Computes C channels of y at a place, from what `read(pixel, values)` reads.
template <class T, int C, class Read>
__device__ __forceinline__ void sample(const Call& call, const Place& at, const Read& read) {
  using Real = RealOf<T>;
  const Problem& s = call.problem;
  const Neighbours neighbour(s);
  Points<T> points(call, at);
  Real sum[C] = {}, total = 0;
#pragma unroll 1
  for (int p = 0; p < points.count(); ++p) {
    points.next(p);
    const Real weight = points.weight(p);
    total += weight;
    const Cell<Real> c = cell(points, weight);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      Real v[C];
      read(c.pixel + neighbour[k], v);
#pragma unroll
      for (int i = 0; i < C; ++i) sum[i] += c.weight[k] * v[i];
    }
  }
  if (call.fused) {
    const Real share = points.keep / total;
#pragma unroll
    for (int i = 0; i < C; ++i) sum[i] *= share;
  }
  if (call.centre) {
    Real own[C];
    read(at.i * int(s.width) + at.j, own);
#pragma unroll
    for (int i = 0; i < C; ++i) sum[i] += points.blend * own[i];
  }
  Real poison = 0;
#pragma unroll
  for (int i = 0; i < C; ++i) poison += sum[i] * Real(0);
  T* y = static_cast<T*>(call.y) + at.output(s);
  if (poison == 0) return store<C>(sum, y);
#pragma unroll 1
  for (int i = 0; i < C; ++i) {
    to_storage(sample_by_definition<T>(call, at, at.input(s) + i), y + i);
  }
}

template <class T, int C>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 6)
    forward_kernel(const __grid_constant__ Call call, uint32_t blocks_an_image) {
  Place at;
  if (!place(call.problem, blocks_an_image, C, &at)) return;
  sample<T, C>(call, at, InGlobal<T, C>{{call.x, call.problem, at.input(call.problem)}});
}

template <class T, int C>
cudaError_t launch_forward(cudaStream_t stream, const Call& call) {
  const int64_t each = blocks_an_image(call.problem, C);
  return launch(stream, call.problem.batch * each, kThreads, 0, forward_kernel<T, C>, call, uint32_t(each));
}

constexpr int kStagedThreads = 384;

template <class T>
__global__ void __launch_bounds__(kStagedThreads, 2)
    staged_forward_kernel(const __grid_constant__ Call call) {
  const Problem& s = call.problem;
  const int pixels = int(s.height) * int(s.width), pieces = int(s.channels()) / 16;
  const int64_t image = blockIdx.x / pieces;
  const int first = int(blockIdx.x - image * pieces) * 16, group = first / int(s.depth);
  uint4* plane = shared_memory<uint4>();
  const Map<T> x(call.x, s, image * pixels * s.channels() + first);
  constexpr int kPieces = InShared<T>::kPieces;
  // Threads next to each other read what lies together: the pieces of a pixel.
  for (int i = threadIdx.x; i < pixels * kPieces; i += blockDim.x) {
    const int pixel = i / kPieces, piece = i % kPieces;
    plane[piece * pixels + pixel] = reinterpret_cast<const uint4*>(x[pixel])[piece];
  }
  __syncthreads();
  for (int position = threadIdx.x; position < int(s.positions()); position += blockDim.x) {
    const int i = position / int(s.out_width), j = position - i * int(s.out_width);
    const Place at = {image, i, j, group, first - group * int(s.depth)};
    sample<T, 16>(call, at, InShared<T>{plane, pixels});
  }
}

template <class T>
cudaError_t launch_staged(cudaStream_t stream, const Call& call, int bytes) {
  cudaError_t error =
      cudaFuncSetAttribute(staged_forward_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error) return error;
  return launch(stream, call.problem.batch * (call.problem.channels() / 16), kStagedThreads, bytes,
                staged_forward_kernel<T>, call);
}

// Whether a plane of `bytes` is worth staging.
bool stages(const Call& call, int64_t bytes, const Device& device) {
  const Problem& s = call.problem;
  return bytes <= device.shared / 2 && s.positions() >= 2 * kStagedThreads &&
         s.batch * s.channels() / 16 >= device.processors && !only_global();
}

}  // namespace

const char* refusal(const Call& call) {
  const Problem& s = call.problem;
  if (call.type != call.points_type && (!call.fused || call.points_type != Type::kFloat32)) {
    return "learned numbers have to be of x's dtype, a record may be of float32";
  }
  if (s.positions() * s.group * s.depth > INT32_MAX || s.height * s.width * s.group * s.depth > INT32_MAX) {
    return "an image of more than 2^31 elements";
  }
  if (s.channels() > INT32_MAX / 8) return "more than 2^28 channels";
  if (!aligned(call.offset.data)) return "offset or record not aligned to 16 bytes";
  if (s.batch * s.height * s.width * s.channels() / kThreads > INT32_MAX ||
      s.batch * blocks_an_image(s, 1) > INT32_MAX) {
    return "a batch of more than 2^31 blocks";
  }
  return nullptr;
}

cudaError_t forward(cudaStream_t stream, const Call& call) {
  if (call.problem.batch == 0) return cudaSuccess;
  return with_type(call.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t depth = aligned(call.x) && aligned(call.y) ? call.problem.depth : 1;
    if constexpr (sizeof(T) <= 4) {
      if (depth % 16 == 0) {
        Device device;
        if (cudaError_t error = find_device(&device)) return error;
        const int64_t bytes = call.problem.height * call.problem.width * 16 * sizeof(T);
        if (stages(call, bytes, device)) return launch_staged<T>(stream, call, int(bytes));
        return launch_forward<T, 16>(stream, call);
      }
    }
    if (depth % kPiece<T> == 0) return launch_forward<T, kPiece<T>>(stream, call);
    return launch_forward<T, 1>(stream, call);
  });
}

}  // namespace dcnv3::cuda
