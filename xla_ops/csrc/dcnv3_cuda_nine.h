// The fused form's nine points of 3 x 3, as the released models have them: the numbers of a (position,
// group), its record, go through shared memory, and the walk knows how many points there are.
#pragma once

#include "dcnv3_cuda_device.h"

namespace dcnv3::cuda {

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
    return reciprocal(total);
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

}  // namespace dcnv3::cuda
