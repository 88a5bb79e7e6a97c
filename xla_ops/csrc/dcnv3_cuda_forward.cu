// DCNv3's forward on CUDA. Two forms, which differ in where a thread finds its learned numbers:
//
//   where they are     any geometry, any dtype
//   in shared memory   the nine points of the fused form; a warp copies its records there, which lie
//                      together, where each thread on its own would read a piece of many lines of memory
//
// Pixels are read where they are: caches serve what neighbours share. A third form, on tensor cores, has
// whole maps in shared memory: dcnv3_cuda_tensor.h.
#include "cuda_chain.h"
#include "dcnv3_cuda.h"
#include "dcnv3_cuda_definition.h"
#include "dcnv3_cuda_device.h"
#include "dcnv3_cuda_nine.h"
#include "dcnv3_cuda_tensor.h"

namespace dcnv3::cuda {
namespace {

// Computes C channels of y at a place, U points under way at once.
template <class T, int C, int U, class Points>
__device__ __forceinline__ void sample(const Call& call, const Place& at, Points& points) {
  using Real = RealOf<T>;
  using Raw = typename InGlobal<T, C>::Raw;
  const Problem& s = call.problem;
  const InGlobal<T, C> read = {{call.x, s, at.input(s)}};
  const Neighbours neighbour(s);
  Real sum[C] = {}, total = 0;
#pragma unroll 1
  for (int first = 0; first < points.count(); first += U) {
    Raw raw[U][4];
    Cell<Real> c[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      points.next(first + u, u);
      const Real weight = points.weight(first + u);
      total += weight;
      c[u] = cell(points, weight);
#pragma unroll
      for (int k = 0; k < 4; ++k) raw[u][k] = read.fetch(c[u].pixel + neighbour[k]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Real v[C];
        read.values(raw[u][k], v);
#pragma unroll
        for (int i = 0; i < C; ++i) sum[i] += c[u].weight[k] * v[i];
      }
    }
  }
  if (call.fused) {
    const Real share = points.keep / total;
#pragma unroll
    for (int i = 0; i < C; ++i) sum[i] *= share;
  }
  if (call.centre) {
    Real own[C];
    read.values(read.fetch(at.i * int(s.width) + at.j), own);
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
  Points<T> points(call, at);
  sample<T, C, 1>(call, at, points);
}

template <class T, int C>
cudaError_t launch_forward(cudaStream_t stream, const Call& call) {
  const int64_t each = blocks_an_image(call.problem, C);
  return launch(stream, call.problem.batch * each, kThreads, 0, forward_kernel<T, C>, call, uint32_t(each));
}

template <class T, int C, int U>
__global__ void __launch_bounds__(kThreads, U == 9 ? 4 : 6)
    nine_forward_kernel(const __grid_constant__ Call call, uint32_t blocks_an_image, int shift) {
  const uint32_t lane = threadIdx.x % 32;  // 2^shift of them to a pair
  const uint32_t image = blockIdx.x / blocks_an_image;
  const uint32_t first = (blockIdx.x - image * blocks_an_image) * kThreads + threadIdx.x - lane;
  float* const records = shared_memory<float>() + ((threadIdx.x - lane) >> shift) * kRecord;
  const Records<false> own(call, image, first >> shift, 32 >> shift);
  wait_for_kernel_before();
  let_next_kernel_begin();
  read_records<T>(call, own, records);
  Place at;
  if (!place(call.problem, blocks_an_image, C, &at)) return;
  NinePoints<T> points(call, at, records + (lane >> shift) * kRecord);
  sample<T, C, U>(call, at, points);
}

template <class T, int C, int U>
cudaError_t launch_nine(Manner manner, cudaStream_t stream, const Call& call) {
  const int64_t each = blocks_an_image(call.problem, C);
  const int shift = shift_of(call, C);
  return launch(manner, stream, call.problem.batch * each, kThreads,
                (kThreads >> shift) * kRecord * sizeof(float), nine_forward_kernel<T, C, U>, call,
                uint32_t(each), shift);
}

template <class T, int S, bool centre>
auto* tensor_kernel(const Call& call) {
  const bool wide = call.points_type == Type::kFloat32;
  return wide ? tensor_forward_kernel<T, float, S, centre> : tensor_forward_kernel<T, T, S, centre>;
}
template <class T>
cudaError_t launch_tensor(cudaStream_t stream, const Call& call, const Device& device, const Maps& maps) {
  const bool one = call.problem.depth == 16;
  auto* const kernel = call.centre ? (one ? tensor_kernel<T, 1, true> : tensor_kernel<T, 2, true>)(call)
                                   : (one ? tensor_kernel<T, 1, false> : tensor_kernel<T, 2, false>)(call);
  return launch_with_maps(stream, call, device, kernel, kCellWords, maps);
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
  if (s.points > kPlainShared / 8) return "a kernel of more than 6144 points";
  if (s.channels() > INT32_MAX / 8) return "more than 2^28 channels";
  if (!aligned(call.offset.data)) return "offset or record not aligned to 16 bytes";
  if (s.batch * s.height * s.width * s.channels() / kThreads > INT32_MAX ||
      s.batch * blocks_an_image(s, 1) > INT32_MAX || s.batch * s.channels() > INT32_MAX) {
    return "a batch of more than 2^31 blocks";
  }
  return nullptr;
}

cudaError_t forward(cudaStream_t stream, const Call& call, bool early) {
  if (call.problem.batch == 0) return cudaSuccess;
  return with_type(call.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t depth = aligned(call.x) && aligned(call.y) ? call.problem.depth : 1;
    if constexpr (sizeof(T) <= 4) {
      if (has_nine(call) && depth > 1) {
        Device device;
        if (cudaError_t error = find_device(&device)) return error;
        if constexpr (sizeof(T) == 2) {
          Maps maps;
          const auto kernel = tensor_forward_kernel<T, T, 1, false>;
          if (cudaError_t error = share_out(call, device, kernel, kCellWords, &maps)) return error;
          if (maps.groups > 0) return launch_tensor<T>(stream, call, device, maps);
        }
        Manner manner;
        manner.early = early;
        // Few threads have to wait for as little as can be, one after the other.
        const int64_t threads = call.problem.batch * call.problem.positions() * call.problem.channels() / 8;
        if (threads < 1024 * int64_t(device.processors)) return launch_nine<T, 4, 9>(manner, stream, call);
        return launch_nine<T, 8, 3>(manner, stream, call);
      }
      if (depth % 16 == 0) return launch_forward<T, 16>(stream, call);
    }
    if (depth % kPiece<T> == 0) return launch_forward<T, kPiece<T>>(stream, call);
    return launch_forward<T, 1>(stream, call);
  });
}

}  // namespace dcnv3::cuda
