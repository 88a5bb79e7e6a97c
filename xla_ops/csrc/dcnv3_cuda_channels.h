// The gradient of x of the nine points in half precision, a warp's threads side by side in the channels.
//
// A block owns one image and a slice of 16 channels of a group, on a plane of words of 32 bits. Threads lie
// so that one atomic addition of a warp adds to each bank of shared memory once: thread 8 * k + pair has
// pixel k of a cell's four, and of it channels 2 * pair and 2 * pair + 1, one after the other. The words of a
// pixel are its even channels, then its odd ones, and rows are padded by 8 words: so the eight words that a
// pixel takes of an addition are at 0 and 16 in one row of the cell, at 8 and 24 in the other, modulo 32,
// plus the same for all. Cells are made by the warp for some positions at a time (dcnv3_cuda_columns.h) and
// handed on through shared memory.
#pragma once

#include "dcnv3_cuda_definition.h"
#include "dcnv3_cuda_slices.h"

namespace dcnv3::cuda {

template <class T, class N>
__global__ void __launch_bounds__(kSliceThreads, 1) channels_kernel(const __grid_constant__ Call call) {
  const Problem& s = call.problem;
  const int positions = int(s.positions()), row = row_words(s), words = int(s.height) * row;
  const uint32_t channels = uint32_t(s.channels()), slices = channels / kSlice;
  const int64_t image = blockIdx.x / slices;
  const int first = int(blockIdx.x % slices) * kSlice;
  int lane = threadIdx.x % 32, k = lane / 8, warp = threadIdx.x / 32;
  const int pair = lane % 8;
  const T* const dy = static_cast<const T*>(call.dy) + image * positions * channels + first;

  const SliceMemory memory(words);
  for (int i = threadIdx.x; i < words / 4; i += blockDim.x)
    reinterpret_cast<uint4*>(memory.plane)[i] = uint4{0, 0, 0, 0};
  if (threadIdx.x == 0) *memory.spoilt = 0;
  float bounds[2];
  find_bounds_of_slice(call, dy, memory, bounds);
  // A channel without a bound counts as zero here, whatever its dy: it is left to the definition.
  FixedPoint<float> fixed[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    fixed[c] = {0, 0};
    if (is_finite(bounds[c])) fixed[c] = fixed_point(bounds[c], kSliceBits + 1);
  }
  if (threadIdx.x < kSlice / 2) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const FixedPoint<float> sum = fixed_point(is_finite(bounds[c]) ? bounds[c] : 0.0f, kSliceBits);
      memory.bounds[2 * pair + c] = bounds[c];
      // Powers of two, so that multiplying by these is dividing.
      memory.units[2 * (2 * pair + c)] = 1 / sum.part0;
      memory.units[2 * (2 * pair + c) + 1] = 1 / sum.part1;
    }
  }
  __syncthreads();

  {
    const PointColumns<kSlicePositions> columns(call, call.centre);
    ColumnOfRecord<N> record(static_cast<const N*>(call.offset.data) + image * positions * call.offset.row +
                                 first / int(s.depth) * kNumbers,
                             columns.column);
    hold(k);
    hold(lane);
    hold(warp);
    WarpCells& cells = memory.cells[warp];
    char* const plane = reinterpret_cast<char*>(memory.plane);
    int own =
        int(WarpCells::bytes(k / 2 && s.height > 1, k % 2 && s.width > 1, row)) + pair * int(sizeof(int));
    hold(own);
    const auto add = [](char* to, uint32_t weight, int g) {
      atomicAdd(reinterpret_cast<int*>(to), product(weight, g));
    };

    // A warp owns positions in a row.
    const int each = (positions + int(blockDim.x) / 32 - 1) / (int(blockDim.x) / 32);
    int start = warp * each;
    const int end = positions < start + each ? positions : start + each;
    // dy of the next positions is on its way; beyond the last of the image it is read again.
    const char* base = reinterpret_cast<const char*>(dy + 2 * pair);
    hold(base);
    const uint32_t position_bytes = channels * uint32_t(sizeof(T));
    const int last = positions - 1;
    int next = start;
    const auto fetch = [&] {
      const uint32_t position = next < last ? next : last;
      ++next;
      hold(next);
      return *reinterpret_cast<const uint32_t*>(base + uint64_t(position) * position_bytes);
    };
    uint32_t ahead[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) ahead[u] = fetch();
    Walk at(s, 1, start + columns.slot, kSlicePositions);
    const auto read = [&] {
      if (at.pair < positions && columns.counts())
        record.read(at.position() * uint32_t(call.offset.row), call.centre);
    };
    read();
#pragma unroll 1
    for (; start < end; start += kSlicePositions) {
      const ColumnOfPoints points = columns.make(record, at);
      if (!is_finite(points.share + points.blend)) *memory.spoilt = 1;
      __syncwarp();  // with what it read before
      if (columns.counts()) {
        const uint32_t own_pixel = WarpCells::bytes(at.i, at.j, row);
        cells.set(lane, points, columns.height, columns.width, row,
                  columns.column == 0 ? own_pixel : fixed_weight(points.blend));
      }
      at.next();
      read();
      __syncwarp();
      const int count = end - start < kSlicePositions ? end - start : kSlicePositions;
#pragma unroll 1
      for (int q = 0; q < kSlicePositions; q += kAhead) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          if (q + u >= count) break;
          float v[2];
          unpack(ahead[u], T(), v);
          ahead[u] = fetch();
          const int g0 = __float2int_rn(fixed[0].to_fixed(v[0])),
                    g1 = __float2int_rn(fixed[1].to_fixed(v[1]));
          uint4 pixels[3];
          uint2 two[3];
          uint32_t third[3];
#pragma unroll
          for (int column = 0; column < 3; ++column) {
            const int i = column * kSlicePositions + q + u;
            pixels[column] = cells.pixels[i];
            two[column] = cells.two[k][i];
            third[column] = cells.third[k][i];
          }
          const auto point = [&](uint32_t pixel, uint32_t weight) {
            add(plane + own + pixel, weight, g0);
            add(plane + own + pixel + kSlice / 2 * sizeof(int), weight, g1);
          };
#pragma unroll
          for (int column = 0; column < 3; ++column) {
            point(pixels[column].x, two[column].x);
            point(pixels[column].y, two[column].y);
            point(pixels[column].z, third[column]);
          }
          // The first eight threads have its even channels, the next its odd ones.
          if (call.centre && k < 2) add(plane + pixels[0].w + lane * sizeof(int), pixels[1].w, k ? g1 : g0);
        }
      }
    }
  }
  __syncthreads();
  if (*memory.spoilt) {
    for (int i = threadIdx.x; i < words; i += blockDim.x) memory.plane[i] = 0;
    if (threadIdx.x < kSlice) memory.bounds[threadIdx.x] = INFINITY;
    __syncthreads();
  }
  if (threadIdx.x < kSlice && !is_finite(memory.bounds[threadIdx.x])) {
    spread_by_definition<T>(call, image, first + int(threadIdx.x),
                            reinterpret_cast<float*>(memory.plane) + word_of(threadIdx.x), kSlice, row);
  }
  __syncthreads();

  constexpr int kEach = kSlice / 2;  // two threads a pixel, 16 bytes each
  const int half = threadIdx.x % 2;
  float unit[kEach][2];
  bool exact[kEach];  // whether the channel's sums are integers
#pragma unroll
  for (int c = 0; c < kEach; ++c) {
    load<2>(memory.units + 2 * (half * kEach + c), unit[c]);
    exact[c] = is_finite(memory.bounds[half * kEach + c]);
  }
  const int pixels = int(s.height) * int(s.width), width = int(s.width), step = int(blockDim.x) / 2;
  const int step_i = step / width, step_j = step - step_i * width;
  int i = int(threadIdx.x) / 2 / width, j = int(threadIdx.x) / 2 - i * width;
  T* const dx = static_cast<T*>(call.dx) + image * pixels * channels + first + half * kEach;
  for (int pixel = threadIdx.x / 2; pixel < pixels; pixel += step) {
    const float* from = reinterpret_cast<const float*>(memory.plane + i * row + j * kSlice);
    float read[2][kEach / 2], v[kEach];
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) load<kEach / 2>(from + word_of(half * kEach + odd), read[odd]);
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      v[c] = read[c % 2][c / 2];
      const int sum = int(__float_as_uint(v[c]));
      if (exact[c]) v[c] = float(sum) * unit[c][0] * unit[c][1];
    }
    store<kEach>(v, dx + int64_t(pixel) * channels);
    i += step_i, j += step_j;
    if (j >= width) j -= width, ++i;
  }
}

// How many threads a block of this form takes; 0 where it does not serve the call: where the plane does not
// fit, or there are so few images and slices that most processors would have none.
inline int slice_threads(const Call& call, const Device& device) {
  const Problem& s = call.problem;
  if (!has_nine(call) || call.type == Type::kFloat32 || s.depth % kSlice != 0) return 0;
  if (!aligned(call.dy) || !aligned(call.dx)) return 0;
  // A term is off by less than one, so that sums stay below 2^31.
  if (s.positions() * (s.points + 1) >= 1 << 29 || s.height * row_words(s) > device.shared) return 0;
  const int64_t blocks = s.batch * (s.channels() / kSlice);
  if (blocks * 2 < device.processors) return 0;
  // Where blocks share a multiprocessor a warp has several turns, so that their parts interleave.
  const int turns = blocks > device.processors ? 8 : 1;
  int threads = kSliceThreads;
  while (threads > 64 && s.positions() < turns * kSlicePositions * (threads / 32)) threads /= 2;
  if (threads == kSliceThreads && SliceMemory::bytes(s, threads) > device.shared) threads /= 2;
  return SliceMemory::bytes(s, threads) <= device.shared ? threads : 0;
}

template <class T, class N>
cudaError_t launch_channels(cudaStream_t stream, const Call& call, const Device& device, int threads) {
  return launch_with(stream, device, call.problem.batch * (call.problem.channels() / kSlice), threads,
                     SliceMemory::bytes(call.problem, threads), channels_kernel<T, N>, call);
}
template <class T>
cudaError_t launch_channels(cudaStream_t stream, const Call& call, const Device& device, int threads) {
  const bool wide = call.points_type == Type::kFloat32;
  return (wide ? launch_channels<T, float> : launch_channels<T, T>)(stream, call, device, threads);
}

}  // namespace dcnv3::cuda
