// DCNv3's forward on CUDA, from any geometry, on any architecture.
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

template <class T, int C>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 6)
    forward_kernel(const __grid_constant__ Call call, uint32_t blocks_an_image) {
  using Real = RealOf<T>;
  const Problem& s = call.problem;
  Place at;
  if (!place(s, blocks_an_image, C, &at)) return;
  const Map<T> x(call.x, s, at.input(s));
  const Neighbours neighbour(s);
  Points<T> points(call, at);
  Real sum[C] = {}, total = 0;
  for (int p = 0; p < points.count(); ++p) {
    points.next(p);
    const Real weight = points.weight(p);
    total += weight;
    const Cell<Real> c = cell(points, weight);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      Real v[C];
      load<C>(x[c.pixel + neighbour[k]], v);
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
    load<C>(x[at.i * int(s.width) + at.j], own);
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
cudaError_t launch_forward(cudaStream_t stream, const Call& call) {
  const int64_t each = blocks_an_image(call.problem, C);
  return launch(stream, call.problem.batch * each, kThreads, 0, forward_kernel<T, C>, call, uint32_t(each));
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
      if (depth % 16 == 0) return launch_forward<T, 16>(stream, call);
    }
    if (depth % kPiece<T> == 0) return launch_forward<T, kPiece<T>>(stream, call);
    return launch_forward<T, 1>(stream, call);
  });
}

}  // namespace dcnv3::cuda
