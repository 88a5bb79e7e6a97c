// What a block of dcnv3_cuda_channels.h has in shared memory: its plane, its warps' cells, the bounds of its
// sums.
#pragma once

#include "dcnv3_cuda_columns.h"
#include "dcnv3_cuda_nine.h"

namespace dcnv3::cuda {

constexpr int kSlice = 16;          // channels of a block
constexpr int kSliceThreads = 512;  // of a block at most
constexpr int kSliceBits = 30;      // of a sum
// Positions of a warp at once: of ten, the cells would not fit beside a map of 56 x 56.
constexpr int kSlicePositions = 9;
constexpr int kAhead = 3;  // positions whose dy a thread reads ahead
static_assert(kSlicePositions % kAhead == 0, "");

// Where a channel of the slice is among a pixel's words; and words of a row of pixels.
__device__ __forceinline__ int word_of(int channel) {
  return channel % 2 * (kSlice / 2) + channel / 2;
}
__host__ __device__ __forceinline__ int row_words(const Problem& s) {
  return int(s.width) * kSlice + kSlice / 2;
}

// A weight, in [0, 1], as a multiple of 2^-31; one itself is a unit less, and NaN is zero.
__device__ __forceinline__ uint32_t fixed_weight(float weight) {
  return uint32_t(__float2int_rn(weight * 2147483648.0f));
}
// The product with dy's multiple of half a unit, in units. On a GPU one instruction, where a product of
// floats and its conversion to an integer are two, one of them on the few units that do exponentials.
__device__ __forceinline__ int product(uint32_t fixed_weight, int dy) {
  return int((int64_t(int(fixed_weight)) * dy + (int64_t{1} << 31)) >> 32);
}

// The cells of a warp's positions, as the threads that make them lie: element column * kSlicePositions +
// position has the three points of a column. Its pixels are bytes from the plane's start; the fourth is, in
// the first column, the pixel at the position, in the second its blend. The weights, in fixed point, are
// those of pixel k.
struct WarpCells {
  static constexpr int kCount = 3 * kSlicePositions;
  uint4 pixels[kCount];
  uint2 two[4][kCount];  // of points 0 and 1
  uint32_t third[4][kCount];

  static __device__ __forceinline__ uint32_t bytes(int i, int j, int row) {
    return uint32_t(i * row + j * kSlice) * uint32_t(sizeof(int));
  }
  // The places of the column's three, and the fourth word.
  __device__ __forceinline__ void set(int i, const ColumnOfPoints& points, const Extent<float>& height,
                                      const Extent<float>& width, int row, uint32_t fourth) {
    uint32_t pixel[3], weight[3][4];
    const float share = 1 - points.blend;
#pragma unroll
    for (int p = 0; p < 3; ++p) {
      const Axis<float> h = locate(points.h[p], height), w = locate(points.w[p], width);
      const float of_point = points.weight[p] * share;
      const float upper = of_point * h.weight0, lower = of_point * h.weight1;
      pixel[p] = bytes(int(h.first), int(w.first), row);
      weight[p][0] = fixed_weight(upper * w.weight0), weight[p][1] = fixed_weight(upper * w.weight1);
      weight[p][2] = fixed_weight(lower * w.weight0), weight[p][3] = fixed_weight(lower * w.weight1);
    }
    pixels[i] = {pixel[0], pixel[1], pixel[2], fourth};
#pragma unroll
    for (int k = 0; k < 4; ++k) two[k][i] = {weight[0][k], weight[1][k]}, third[k][i] = weight[2][k];
  }
};

// Shared memory of a block: the plane, the bounds of its channels and what times a sum is its value, in two
// factors, whether a softmax is not finite, and each warp's cells.
struct SliceMemory {
  static int64_t bytes(const Problem& s, int threads) {
    return (s.height * row_words(s) + 3 * kSlice + 4) * int64_t{sizeof(float)} +
           threads / 32 * int64_t{sizeof(WarpCells)};
  }
  __device__ __forceinline__ explicit SliceMemory(int words)
      : plane(shared_memory<int>()),
        bounds(reinterpret_cast<float*>(plane + words)),
        units(bounds + kSlice),
        spoilt(reinterpret_cast<int*>(units + 2 * kSlice)),
        cells(reinterpret_cast<WarpCells*>(spoilt + 4)) {}
  int* plane;
  float *bounds, *units;
  int* spoilt;
  WarpCells* cells;
};

// What the sum of each channel of the slice cannot exceed, as find_bounds has it with a softmax; in one
// order, so always to the same bit. A thread has those of its two channels. Takes the cells' memory.
template <class T>
__device__ __forceinline__ void find_bounds_of_slice(const Call& call, const T* dy, const SliceMemory& memory,
                                                     float (&bounds)[2]) {
  const int positions = int(call.problem.positions());
  const uint32_t channels = uint32_t(call.problem.channels());
  constexpr int kEach = kSlice / 2;  // two threads a position, 16 bytes each
  float sum[kEach] = {};
  constexpr int kReads = 8;  // on their way at once
  const int step = int(blockDim.x) / 2;
  const T* const from = dy + threadIdx.x % 2 * kEach;
#pragma unroll 1
  for (int start = threadIdx.x / 2; start < positions; start += kReads * step) {
    uint4 read[kReads];
#pragma unroll
    for (int a = 0; a < kReads; ++a) {
      const int position = start + a * step < positions ? start + a * step : start;
      read[a] = *reinterpret_cast<const uint4*>(from + int64_t(position) * channels);
    }
#pragma unroll
    for (int a = 0; a < kReads; ++a) {
      float g[kEach];
      unpack_word<T>(read[a], g);
      // No branch, behind which the compiler would put off the reads.
      const bool there = start + a * step < positions;
#pragma unroll
      for (int c = 0; c < kEach; ++c) sum[c] += there ? fabsf(g[c]) : 0.0f;
    }
  }
#pragma unroll
  for (int mask = 2; mask < 32; mask *= 2) {
#pragma unroll
    for (int c = 0; c < kEach; ++c) sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], mask);
  }
  float* const sums = reinterpret_cast<float*>(memory.cells);  // (warps, 16)
  const int lane = threadIdx.x % 32;
  if (lane < 2) store<kEach>(sum, sums + threadIdx.x / 32 * kSlice + lane * kEach);
  __syncthreads();
  bounds[0] = bounds[1] = 0;
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) {
    float of_warp[2];
    load<2>(sums + warp * kSlice + lane % 8 * 2, of_warp);
    bounds[0] += of_warp[0], bounds[1] += of_warp[1];
  }
}

}  // namespace dcnv3::cuda
