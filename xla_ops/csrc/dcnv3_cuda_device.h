// What the CUDA kernels of DCNv3 share: the thread's share of the work, its learned numbers.
//
// A thread owns one (position, group) and C channels of it: 16, or as many as 16 bytes hold, or 1,
// whichever first divides the group's. What counts within one image is 32-bit.
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

// The exponential of a number that is not positive, for a softmax: to 1e-7 of its largest term.
__device__ __forceinline__ float exp_of(float x) {
  return power_of_two(1.44269504f * x);
}

// The fused form's nine points of 3 x 3 have 28 numbers, in shared memory as float32. They take an odd
// number of words, so that what the threads of a warp read at once is in as many banks.
constexpr int kNumbers = 28, kRecord = kNumbers + 1;

// Whether they are this call's, with channels for a power of two of threads, eight each.
inline bool has_nine(const Call& call) {
  const Problem& s = call.problem;
  if (s.depth != 8 && s.depth != 16 && s.depth != 32 && s.depth != 64) return false;
  // What counts within an image's records is 32-bit here.
  if (s.positions() * call.offset.row > UINT32_MAX || !aligned(call.doffset)) return false;
  return call.fused && call.type != Type::kFloat64 && s.kernel_h == 3 && s.kernel_w == 3 && s.points == 9 &&
         !only_global();
}

// Of a pair's threads, C channels each, the logarithm.
inline int shift_of(const Call& call, int C) {
  int shift = 0;
  while (C << shift < call.problem.depth) ++shift;
  return shift;
}

// The records of some pairs (position, group) of an image, from the pair `first` on, which count positions
// and of each the groups; or of one group alone. Their pieces of four numbers count on from record to record.
template <bool one_group>
struct Records {
  static constexpr uint32_t kPieces = kNumbers / 4;

  __device__ __forceinline__ Records(const Call& call, int64_t image, uint32_t first, uint32_t count)
      : start(image * call.problem.positions() * call.offset.row),
        first(first),
        groups(uint32_t(call.problem.group)),
        row(uint32_t(call.offset.row)) {
    const uint32_t pairs = uint32_t(call.problem.positions()) * groups, step = one_group ? groups : 1;
    const uint32_t left = first < pairs ? (pairs - first + step - 1) / step : 0;
    pieces = (count < left ? count : left) * kPieces;
  }

  // Calls go(place) with a function from a piece to its first number in the image's rows.
  template <class Go>
  __device__ __forceinline__ void with_place(Go go) const {
    if (one_group) {
      const uint32_t position = first / groups, column = first % groups * kNumbers;
      go([=](uint32_t i) { return (position + i / kPieces) * row + column + i % kPieces * 4; });
    } else if (row == groups * kNumbers) {  // no padding: all records lie together
      go([=](uint32_t i) { return first * kNumbers + i * 4; });
    } else {
      go([=](uint32_t i) {
        const uint32_t pair = first + i / kPieces;
        return pair / groups * row + pair % groups * kNumbers + i % kPieces * 4;
      });
    }
  }

  int64_t start;  // of the image
  uint32_t first, groups, row, pieces;
};

// Copies them from rows of N into a warp's part of shared memory, and back.
template <class N, bool one_group>
__device__ __forceinline__ void copy_in(const Records<one_group>& records, const void* rows, float* to) {
  const N* const from = static_cast<const N*>(rows) + records.start;
  records.with_place([&](auto place) {
    constexpr int kAhead = 4;  // on their way at once
#pragma unroll 1
    for (uint32_t start = threadIdx.x % 32; start < records.pieces; start += kAhead * 32) {
      Word<N, 4> word[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const uint32_t i = start + a * 32 < records.pieces ? start + a * 32 : start;
        word[a] = *reinterpret_cast<const Word<N, 4>*>(from + place(i));
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const uint32_t i = start + a * 32;
        float v[4];
        unpack_word<N>(word[a], v);
        if (i >= records.pieces) break;
#pragma unroll
        for (int e = 0; e < 4; ++e)
          to[i * 4 + i / Records<one_group>::kPieces + e] = v[e];  // a word after each record
      }
    }
  });
}
template <class N, bool one_group>
__device__ __forceinline__ void copy_out(const Records<one_group>& records, const float* from, void* rows) {
  N* const to = static_cast<N*>(rows) + records.start;
  records.with_place([&](auto place) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x % 32; i < records.pieces; i += 32) {
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = from[i * 4 + i / Records<one_group>::kPieces + e];
      store<4>(v, to + place(i));
    }
  });
}
template <class T, bool one_group>
__device__ __forceinline__ void read_records(const Call& call, const Records<one_group>& records, float* to) {
  if (sizeof(T) == 2 && call.points_type == Type::kFloat32) {
    copy_in<float>(records, call.offset.data, to);
  } else {
    copy_in<T>(records, call.offset.data, to);
  }
  __syncwarp();
}
template <class T, bool one_group>
__device__ __forceinline__ void write_gradients(const Call& call, const Records<one_group>& records,
                                                const float* from) {
  __syncwarp();
  if (sizeof(T) == 2 && call.points_type == Type::kFloat32) {
    copy_out<float>(records, from, call.doffset);
  } else {
    copy_out<T>(records, from, call.doffset);
  }
}

// These nine points, walked as Points walks any.
template <class T>
struct NinePoints {
  using Real = float;
  static constexpr int kAtOnce = 3;

  __device__ __forceinline__ NinePoints(const Call& c, const Place& at, const float* record)
      : call(c),
        height(extent<float>(c.problem.height)),
        width(extent<float>(c.problem.width)),
        numbers(record),
        logits(record + 18),
        scale(float(c.problem.offset_scale)),
        dilation_h(float(int(c.problem.dilation_h))),
        dilation_w(float(int(c.problem.dilation_w))) {
    const Problem& s = c.problem;
    grid_h = float(int(grid(at.i, s.stride_h, s.pad_h, 3, s.dilation_h)));
    grid_w = float(int(grid(at.j, s.stride_w, s.pad_w, 3, s.dilation_w)));
    hold(scale);
    hold(height.end);
    hold(width.end);
    top = logits[0];
#pragma unroll
    for (int p = 1; p < 9; ++p) top = larger(top, logits[p]);
    if (c.centre) {
      blend = sigmoid(numbers[27]);
      keep = 1 - blend;
    }
  }
  static __device__ __forceinline__ constexpr int count() { return 9; }

  // That of a softmax before its division by the sum, and what times these weights is the softmax.
  __device__ __forceinline__ float weight(int p) const { return exp_of(logits[p] - top); }
  __device__ __forceinline__ float share() const {
    float total = 0;
#pragma unroll
    for (int p = 0; p < 9; ++p) total += weight(p);
    return 1 / total;
  }

  // Sets h and w to where point p is, the one at `u` of those that are walked at once: whole columns.
  __device__ __forceinline__ void next(int p, int u) {
    if (u % 3 == 0) step_w = dilation_w * float(p / 3 - 1);
    h = grid_h + (dilation_h * float(u % 3 - 1) + numbers[2 * p + 1]) * scale;
    w = grid_w + (step_w + numbers[2 * p]) * scale;
  }

  const Call& call;
  Extent<float> height, width;
  const float *numbers, *logits;
  float scale, dilation_h, dilation_w, grid_h, grid_w, top;
  float blend = 0, keep = 1;  // share of the pixel at the position, and the rest
  float step_w, h, w;
};

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
