// What the CUDA kernels of DCNv3 share: the thread's share of the work, its learned numbers.
//
// A thread owns one (position, group) and C channels of it, a number that divides the group's. What
// counts within one image is 32-bit.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "cuda_device.h"
#include "dcnv3_call.h"

namespace dcnv3::cuda {

using namespace xla_ops::cuda;

constexpr int kThreads = 128;  // of a block

// Keeps a value that a loop uses in a register, where the compiler would make it anew each time around.
// Pointers are to global memory.
__device__ __forceinline__ void hold(float& v) {
#ifdef __CUDA_ARCH__
  asm("" : "+f"(v));
#endif
}
__device__ __forceinline__ void hold(double& v) {
#ifdef __CUDA_ARCH__
  asm("" : "+d"(v));
#endif
}
__device__ __forceinline__ void hold(uint32_t& v) {
#ifdef __CUDA_ARCH__
  asm("" : "+r"(v));
#endif
}
__device__ __forceinline__ void hold(int& v) {
#ifdef __CUDA_ARCH__
  asm("" : "+r"(v));
#endif
}
template <class T>
__device__ __forceinline__ void hold(T*& p) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
#endif
}

// Learned numbers in a row, which have x's dtype T or, where that is of half precision, may be float32.
template <class T, class Byte = const char>
struct Numbers {
  using Real = RealOf<T>;
  static constexpr bool kEither = sizeof(T) == 2;

  __device__ __forceinline__ Numbers(Byte* data, Type type, int64_t first)
      : wide(kEither && type == Type::kFloat32),
        bytes(wide ? int(sizeof(float)) : int(sizeof(T))),
        base(data + first * bytes) {
    hold(base);
  }
  template <class R>
  __device__ __forceinline__ auto* at(int i) const {
    using Element = std::conditional_t<std::is_const_v<Byte>, const R, R>;
    return reinterpret_cast<Element*>(base + uint32_t(i * bytes));
  }
  __device__ __forceinline__ Real operator[](int i) const {
    if constexpr (kEither) {
      if (wide) return *at<float>(i);
    }
    return to_real(*at<T>(i));
  }
  __device__ __forceinline__ void get_pair(int i, Real* v) const {  // i is even
    if constexpr (kEither) {
      if (wide) return load<2>(at<float>(i), v);
    }
    load<2>(at<T>(i), v);
  }
  __device__ __forceinline__ void set(int i, Real v) const {
    if constexpr (kEither) {
      if (wide) return to_storage(v, at<float>(i));
    }
    to_storage(v, at<T>(i));
  }

  bool wide;
  int bytes;
  Byte* base;
};

// Whether a sum is neither infinite nor NaN.
template <class Real>
__device__ __forceinline__ bool is_finite(Real v) {
  return v * Real(0) == Real(0);
}

__device__ __forceinline__ long long to_integer(float v) {
  return __float2ll_rn(v);
}
__device__ __forceinline__ long long to_integer(double v) {
  return __double2ll_rn(v);
}

// Adds up each of a thread's C numbers over the block, always in the same order; all threads have the
// sums. Takes C numbers a thread of shared memory, free again afterwards. The number of threads is a
// power of two.
template <int C, class Real>
__device__ void sum_over_block(Real* v) {
  Real* all = shared_memory<Real>();
#pragma unroll
  for (int c = 0; c < C; ++c) all[c * blockDim.x + threadIdx.x] = v[c];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x >= half) continue;
#pragma unroll
    for (int c = 0; c < C; ++c) all[c * blockDim.x + threadIdx.x] += all[c * blockDim.x + threadIdx.x + half];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < C; ++c) v[c] = all[c * blockDim.x];
  __syncthreads();
}

// A thread's place in an image: a position, a group, and the first of its channels in the group.
struct Place {
  int64_t image;
  int i, j, group, channel;

  __device__ int64_t position(const Problem& s) const {  // over the whole batch
    return (image * s.out_height + i) * s.out_width + j;
  }
  __device__ int64_t input(const Problem& s) const {  // element of x at the image's first pixel
    return image * s.height * s.width * s.channels() + group * s.depth + channel;
  }
  __device__ int64_t output(const Problem& s) const {  // element of y
    return position(s) * s.channels() + group * s.depth + channel;
  }
};

// The work of an image counts positions, of each the groups, of each the pieces of `channels`; blocks
// of threads share it, the last of an image not wholly. Returns whether there is a place for the thread.
__device__ __forceinline__ bool place(const Problem& s, uint32_t blocks_an_image, int channels, Place* to) {
  const uint32_t pieces = uint32_t(s.depth) / channels, groups = uint32_t(s.group);
  const uint32_t image = blockIdx.x / blocks_an_image;
  uint32_t unit = (blockIdx.x - image * blocks_an_image) * blockDim.x + threadIdx.x;
  if (unit >= uint32_t(s.positions()) * groups * pieces) return false;
  uint32_t piece = 0;
  if (pieces > 1) {
    piece = unit % pieces;
    unit /= pieces;
  }
  const uint32_t position = unit / groups;
  to->image = image;
  to->group = int(unit - position * groups);
  to->channel = int(piece) * channels;
  to->i = int(position / uint32_t(s.out_width));
  to->j = int(position - uint32_t(to->i) * uint32_t(s.out_width));
  return true;
}

// The points of one (position, group), walked in their order: where each falls, what it weighs.
template <class T>
struct Points {
  using Real = RealOf<T>;
  static constexpr int kAtOnce = 1;  // points that are walked at once

  __device__ __forceinline__ Points(const Call& c, const Place& at)
      : call(c),
        height(extent<Real>(c.problem.height)),
        width(extent<Real>(c.problem.width)),
        numbers(static_cast<const char*>(c.offset.data), c.points_type, first_number(c, at)),
        weights(static_cast<const char*>(c.fused ? c.offset.data : c.weight.data), c.points_type,
                first_weight(c, at)) {
    const Problem& s = c.problem;
    grid_h = Real(int(grid(at.i, s.stride_h, s.pad_h, s.kernel_h, s.dilation_h)));
    grid_w = Real(int(grid(at.j, s.stride_w, s.pad_w, s.kernel_w, s.dilation_w)));
    scale = Real(s.offset_scale);
    hold(scale);
    hold(height.end);
    hold(width.end);
    centre = s.remove_center ? int(s.kernel_h) * int(s.kernel_w) / 2 : -1;
    if (c.fused) {
#pragma unroll 3
      for (int p = 0; p < count(); ++p) {
        const Real logit = weights[p];
        top = p == 0 || logit > top ? logit : top;
      }
    }
    if (c.centre) {
      blend = sigmoid(numbers[3 * count()]);
      keep = Real(1) - blend;
    }
    restart();
  }

  // Elements: of the first offset and of the first weight of a place, in their tensors.
  static __device__ __forceinline__ int64_t first_number(const Call& c, const Place& at) {
    return at.position(c.problem) * c.offset.row + at.group * c.offset.group;
  }
  static __device__ __forceinline__ int64_t first_weight(const Call& c, const Place& at) {
    if (c.fused) return first_number(c, at) + 2 * c.problem.points;
    return at.position(c.problem) * c.weight.row + at.group * c.weight.group;
  }

  __device__ __forceinline__ int count() const { return int(call.problem.points); }

  // The weight of point p, in the fused form that of a softmax before its division by the sum.
  __device__ __forceinline__ Real weight(int p) const {
    const Real w = weights[p];
    return call.fused ? exp_nonpositive(w - top) : w;
  }
  // What times these weights is the softmax.
  __device__ __forceinline__ Real share() const {
    if (!call.fused) return Real(1);
    Real total = 0;
#pragma unroll 3
    for (int p = 0; p < count(); ++p) total += weight(p);
    return Real(1) / total;
  }

  // The walk: restart, then next for each point, which sets h and w.
  __device__ __forceinline__ void restart() {
    const Problem& s = call.problem;
    row = -1;
    start_h = Real(int(-radius(s.kernel_h, s.dilation_h)));
    step_h = start_h - Real(int(s.dilation_h));
    step_w = Real(int(-radius(s.kernel_w, s.dilation_w)));
  }
  __device__ __forceinline__ void advance() {
    const Problem& s = call.problem;
    step_h += Real(int(s.dilation_h));
    if (++row < int(s.kernel_h)) return;
    row = 0;
    step_h = start_h;
    step_w += Real(int(s.dilation_w));
  }
  __device__ __forceinline__ void next(int p, int) {
    advance();
    if (p == centre) advance();
    Real offset[2];
    numbers.get_pair(2 * p, offset);
    h = grid_h + (step_h + offset[1]) * scale;
    w = grid_w + (step_w + offset[0]) * scale;
  }

  const Call& call;
  Extent<Real> height, width;
  const Numbers<T> numbers, weights;  // from the first offset on, from the first weight on
  Real grid_h, grid_w, scale;
  Real top = 0;              // of the logits
  Real blend = 0, keep = 1;  // share of the pixel at the position, and the rest
  Real start_h, step_h, step_w;
  int row, centre;  // the row at hand, and the point that is left out
  Real h, w;        // location of the point at hand
};

// Whether the environment variable INTERNIMAGE_CUDA_FORM keeps to the plain forms, which need no shared
// memory for records or sums, where it can: to compare.
inline bool only_global() {
  const char* form = std::getenv("INTERNIMAGE_CUDA_FORM");
  return form && !std::strcmp(form, "global");
}

// The cell of a point: its first pixel, the weights of its four pixels.
template <class Real>
struct Cell {
  int pixel;
  Real weight[4];
};
template <class Points, class Real>
__device__ __forceinline__ Cell<Real> cell(const Points& points, Real weight) {
  const Axis<Real> h = locate(points.h, points.height), w = locate(points.w, points.width);
  const Real upper = weight * h.weight0, lower = weight * h.weight1;
  return {int(h.first) * int(points.call.problem.width) + int(w.first),
          {upper * w.weight0, upper * w.weight1, lower * w.weight0, lower * w.weight1}};
}

// From a cell's first pixel to its four, in pixels: a map of one row or column has no others.
struct Neighbours {
  __device__ __forceinline__ explicit Neighbours(const Problem& s)
      : right(s.width > 1 ? 1 : 0), down(s.height > 1 ? int(s.width) : 0) {}
  __device__ __forceinline__ int operator[](int k) const { return (k & 1 ? right : 0) + (k & 2 ? down : 0); }
  int right, down;
};

// The map of one image and group, from a channel on.
template <class T>
struct Map {
  __device__ __forceinline__ Map(const void* x, const Problem& s, int64_t first)
      : base(static_cast<const char*>(x) + first * sizeof(T)),
        pixel_bytes(uint32_t(s.group) * uint32_t(s.depth) * uint32_t(sizeof(T))) {
    hold(base);
  }
  __device__ __forceinline__ const T* operator[](int pixel) const {  // one multiplication, to 64 bits
    return reinterpret_cast<const T*>(base + uint64_t(uint32_t(pixel)) * pixel_bytes);
  }
  const char* base;
  uint32_t pixel_bytes;
};

// Reads C channels of pixels where they are: `fetch` starts it, `values` are there when they are used.
template <class T, int C>
struct InGlobal {
  using W = Word<T, C>;
  static constexpr int kEach = sizeof(W) / sizeof(T);
  struct Raw {
    W word[C / kEach];
  };
  __device__ __forceinline__ Raw fetch(int pixel) const {
    Raw raw;
#pragma unroll
    for (int i = 0; i < C / kEach; ++i) raw.word[i] = reinterpret_cast<const W*>(map[pixel])[i];
    return raw;
  }
  static __device__ __forceinline__ void values(const Raw& raw, RealOf<T>* v) {
#pragma unroll
    for (int i = 0; i < C / kEach; ++i) unpack_word<T>(raw.word[i], v + i * kEach);
  }
  Map<T> map;
};

// Blocks that one image takes, with `channels` a thread.
inline int64_t blocks_an_image(const Problem& s, int channels, int threads = kThreads) {
  return (s.positions() * s.group * (s.depth / channels) + threads - 1) / threads;
}

}  // namespace dcnv3::cuda
