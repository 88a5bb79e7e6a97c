// The gradient of x of the nine points in half precision, a warp's threads side by side in the channels.
//
// A block owns one image and a slice of 16 channels of a group, on a plane of words of 32 bits, (pixels, 16).
// Two neighbouring pixels of a row are 32 words in a row, one for each bank of shared memory, so one atomic
// addition of a warp adds to both all channels without a conflict, and a point is two of them: thread
// 16 * right + channel has that channel of the left or the right pixel, in the upper row, then in the lower.
// Cells are made by the warp for ten positions at a time (dcnv3_cuda_columns.h) and handed on through shared
// memory, laid out so that a thread reads four numbers at once.
#pragma once

#include "dcnv3_cuda_columns.h"
#include "dcnv3_cuda_device.h"
#include "dcnv3_cuda_nine.h"
#include "dcnv3_cuda_spread.h"

namespace dcnv3::cuda {

constexpr int kSlice = 16;          // channels of a block
constexpr int kSliceThreads = 512;  // of a block at most
constexpr int kAhead = 2;           // positions whose dy a thread reads ahead
constexpr int kSliceBits = 30;      // of a sum
constexpr int kPixelBytes = kSlice * int(sizeof(int));

// A weight, in [0, 1], as a multiple of 2^-31; one itself is a unit less, and NaN is zero.
__device__ __forceinline__ uint32_t fixed_weight(float weight) {
  return uint32_t(__float2int_rn(weight * 2147483648.0f));
}
// The product with dy's multiple of half a unit, in units. On a GPU one instruction: the conversion of a
// product of floats to an integer takes two, one of them on the few units that do exponentials.
__device__ __forceinline__ int product(uint32_t fixed_weight, int dy) {
  return int((int64_t(int(fixed_weight)) * dy + (int64_t{1} << 31)) >> 32);
}

// The cells of ten positions of a warp, as the threads that make them lie: element 3 * position + column has
// the three points of a column. A pixel is in bytes from the plane's start; the fourth is, in the first
// column, the pixel at the position, in the second its blend. Weights, in fixed point, are of the left pixels
// or the right, of the upper row and the lower of one point, then of the next.
struct TenCells {
  uint4 pixels[3 * kTen];
  uint4 two[2][3 * kTen];    // points 0 and 1 of a column
  uint2 third[2][3 * kTen];  // point 2

  __device__ __forceinline__ void set(int i, const Cell<float> (&cells)[3], uint32_t fourth) {
    pixels[i] = {uint32_t(cells[0].pixel) * kPixelBytes, uint32_t(cells[1].pixel) * kPixelBytes,
                 uint32_t(cells[2].pixel) * kPixelBytes, fourth};
#pragma unroll
    for (int right = 0; right < 2; ++right) {
      const auto fixed = [&](int point, int lower) {
        return fixed_weight(cells[point].weight[2 * lower + right]);
      };
      two[right][i] = {fixed(0, 0), fixed(0, 1), fixed(1, 0), fixed(1, 1)};
      third[right][i] = {fixed(2, 0), fixed(2, 1)};
    }
  }
};

// Shared memory of a block: the plane, the bounds of its channels and what times a sum is its value, in two
// factors, whether a softmax is not finite, and of each warp the cells of ten positions.
struct SliceMemory {
  static int64_t bytes(const Problem& s, int threads) {
    return s.height * s.width * kPixelBytes + (3 * kSlice + 4) * int64_t{sizeof(float)} +
           threads / 32 * int64_t{sizeof(TenCells)};
  }
  __device__ __forceinline__ explicit SliceMemory(int pixels)
      : plane(shared_memory<int>()),
        bounds(reinterpret_cast<float*>(plane + pixels * kSlice)),
        units(bounds + kSlice),
        spoilt(reinterpret_cast<int*>(units + 2 * kSlice)),
        cells(reinterpret_cast<TenCells*>(spoilt + 4)) {}
  int* plane;
  float *bounds, *units;
  int* spoilt;
  TenCells* cells;
};

// What the sum of each channel of the slice cannot exceed, as find_bounds has it with a softmax; in one
// order, so always to the same bit. A thread has that of channel threadIdx.x % 16. Takes the cells' memory.
template <class T>
__device__ __forceinline__ float find_bound(const Call& call, const T* dy, const SliceMemory& memory) {
  const int positions = int(call.problem.positions());
  const uint32_t channels = uint32_t(call.problem.channels());
  constexpr int kEach = kSlice / 2;  // two threads a position, 16 bytes each
  float sum[kEach] = {};
#pragma unroll 4
  for (int position = threadIdx.x / 2; position < positions; position += blockDim.x / 2) {
    float g[kEach];
    load<kEach>(dy + int64_t(position) * channels + threadIdx.x % 2 * kEach, g);
#pragma unroll
    for (int c = 0; c < kEach; ++c) sum[c] += fabsf(g[c]);
  }
#pragma unroll
  for (int mask = 2; mask < 32; mask *= 2) {
#pragma unroll
    for (int c = 0; c < kEach; ++c) sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], mask);
  }
  float* const sums = reinterpret_cast<float*>(memory.cells);  // (warps, 16)
  const int lane = threadIdx.x % 32;
  if (lane < 2) {
#pragma unroll
    for (int c = 0; c < kEach; ++c) sums[threadIdx.x / 32 * kSlice + lane * kEach + c] = sum[c];
  }
  __syncthreads();
  float bound = 0;
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) bound += sums[warp * kSlice + threadIdx.x % kSlice];
  return bound;
}

template <class T, class N>
__global__ void __launch_bounds__(kSliceThreads, 1) channels_kernel(const __grid_constant__ Call call) {
  const Problem& s = call.problem;
  const int pixels = int(s.height) * int(s.width), positions = int(s.positions());
  const uint32_t channels = uint32_t(s.channels()), slices = channels / kSlice;
  const int64_t image = blockIdx.x / slices;
  const int first = int(blockIdx.x % slices) * kSlice;
  const int lane = threadIdx.x % 32, channel = lane % kSlice, right = lane / kSlice;
  const T* const dy = static_cast<const T*>(call.dy) + image * positions * channels + first;

  const SliceMemory memory(pixels);
  for (int i = threadIdx.x; i < pixels * (kPixelBytes / 16); i += blockDim.x)
    reinterpret_cast<uint4*>(memory.plane)[i] = uint4{0, 0, 0, 0};
  if (threadIdx.x == 0) *memory.spoilt = 0;
  const float bound = find_bound(call, dy, memory);
  // A channel without a bound counts as zero here: it is left to the definition.
  const bool live = is_finite(bound);
  const FixedPoint<float> fixed = fixed_point(live ? bound : 0.0f, kSliceBits + 1);
  if (threadIdx.x < kSlice) {
    const FixedPoint<float> sum = fixed_point(live ? bound : 0.0f, kSliceBits);
    memory.bounds[channel] = bound;
    memory.units[2 * channel] = 1 / sum.part0;  // powers of two: multiplying by these is dividing
    memory.units[2 * channel + 1] = 1 / sum.part1;
  }
  __syncthreads();

  {
    Columns3<N> columns(call, image, first / int(s.depth));
    TenCells& cells = memory.cells[threadIdx.x / 32];
    const Neighbours neighbour(s);
    char* const upper = reinterpret_cast<char*>(memory.plane + right * neighbour.right * kSlice + channel);
    char* const lower = upper + neighbour.down * kPixelBytes;
    const auto add = [](char* to, int v) { atomicAdd(reinterpret_cast<int*>(to), v); };

    // A warp owns positions in a row.
    const int each = (positions + int(blockDim.x) / 32 - 1) / (int(blockDim.x) / 32);
    int start = int(threadIdx.x) / 32 * each;
    const int end = positions < start + each ? positions : start + each;
    // dy of the next positions is on its way; beyond the last it is read again.
    int next = start;
    const auto fetch = [&] {
      const int position = next < positions ? next : positions - 1;
      ++next;
      return dy[uint64_t(uint32_t(position)) * channels + channel];
    };
    T ahead[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) ahead[u] = fetch();
    columns.fetch(start);
#pragma unroll 1
    for (; start < end; start += kTen) {
      __syncwarp();  // with what it read before
      Cell<float> three[3];
      if (!columns.make(three)) *memory.spoilt = 1;
      if (columns.writes()) {
        const uint32_t own = uint32_t(columns.i * int(s.width) + columns.j) * kPixelBytes;
        cells.set(lane, three, columns.column == 0 ? own : fixed_weight(columns.blend));
      }
      columns.fetch(start + kTen);
      __syncwarp();
      const int count = end - start < kTen ? end - start : kTen;
#pragma unroll 1
      for (int q = 0; q < count; q += kAhead) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          if (q + u >= count) break;
          const int g = live ? __float2int_rn(fixed.to_fixed(to_real(ahead[u]))) : 0;
          ahead[u] = fetch();
          uint32_t pixel[3][4];
          uint32_t weight[3][6];
#pragma unroll
          for (int column = 0; column < 3; ++column) {
            const int i = 3 * (q + u) + column;
            const uint4 pixels = cells.pixels[i], two = cells.two[right][i];
            const uint2 third = cells.third[right][i];
            memcpy(pixel[column], &pixels, sizeof pixels);
            memcpy(weight[column], &two, sizeof two);
            memcpy(weight[column] + 4, &third, sizeof third);
          }
#pragma unroll
          for (int column = 0; column < 3; ++column) {
#pragma unroll
            for (int k = 0; k < 3; ++k) {
              add(upper + pixel[column][k], product(weight[column][2 * k], g));
              add(lower + pixel[column][k], product(weight[column][2 * k + 1], g));
            }
          }
          if (call.centre && right == 0) add(upper + pixel[0][3], product(pixel[1][3], g));
        }
      }
    }
  }
  __syncthreads();
  if (*memory.spoilt) {
    for (int i = threadIdx.x; i < pixels * kSlice; i += blockDim.x) memory.plane[i] = 0;
    if (threadIdx.x < kSlice) memory.bounds[threadIdx.x] = INFINITY;
    __syncthreads();
  }
  if (threadIdx.x < kSlice && !is_finite(memory.bounds[threadIdx.x])) {
    spread_by_definition<T>(call, image, first + int(threadIdx.x),
                            reinterpret_cast<float*>(memory.plane) + threadIdx.x, kSlice);
  }
  __syncthreads();

  constexpr int kEach = kSlice / 2;  // two threads a pixel, 16 bytes each
  const int half = threadIdx.x % 2 * kEach;
  float unit[kEach][2];
  bool exact[kEach];  // whether the channel's sums are integers
#pragma unroll
  for (int c = 0; c < kEach; ++c) {
    load<2>(memory.units + 2 * (half + c), unit[c]);
    exact[c] = is_finite(memory.bounds[half + c]);
  }
  T* const dx = static_cast<T*>(call.dx) + image * pixels * channels + first + half;
  for (int pixel = threadIdx.x / 2; pixel < pixels; pixel += blockDim.x / 2) {
    float v[kEach];
    load<kEach>(reinterpret_cast<const float*>(memory.plane + pixel * kSlice + half), v);
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      int sum;
      memcpy(&sum, &v[c], sizeof sum);
      if (exact[c]) v[c] = float(sum) * unit[c][0] * unit[c][1];
    }
    store<kEach>(v, dx + int64_t(pixel) * channels);
  }
}

// How many threads a block of this form takes; 0 where it does not serve the call: where the plane does not
// fit, or there are so few images and slices that most processors would have none.
inline int slice_threads(const Call& call, const Device& device) {
  const Problem& s = call.problem;
  if (!has_nine(call) || call.type == Type::kFloat32 || s.depth % kSlice != 0) return 0;
  if (!aligned(call.dy) || !aligned(call.dx)) return 0;
  if (s.batch * (s.channels() / kSlice) * 2 < device.processors) return 0;
  // Few positions leave none for many warps, or an uneven number of turns.
  constexpr int kTurns = 3;
  int threads = kSliceThreads;
  while (threads > 64 && s.positions() < kTurns * kTen * (threads / 32)) threads /= 2;
  return SliceMemory::bytes(s, threads) <= device.shared ? threads : 0;
}

template <class T, class N>
cudaError_t launch_channels(cudaStream_t stream, const Call& call, const Device& device, int threads) {
  const auto kernel = channels_kernel<T, N>;
  // The same for all calls: others may be launching this kernel.
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared);
  if (error) return error;
  return launch(stream, call.problem.batch * (call.problem.channels() / kSlice), threads,
                SliceMemory::bytes(call.problem, threads), kernel, call);
}
template <class T>
cudaError_t launch_channels(cudaStream_t stream, const Call& call, const Device& device, int threads) {
  const bool wide = call.points_type == Type::kFloat32;
  return (wide ? launch_channels<T, float> : launch_channels<T, T>)(stream, call, device, threads);
}

}  // namespace dcnv3::cuda
