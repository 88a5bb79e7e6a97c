// The forward of the fused form's nine points in half precision on tensor cores, where a block's shared
// memory holds whole maps of groups.
//
// A sample is a product: weights of the cell's four pixels times their channels. For two (position, group)
// at once, two of their points and 16 channels, `mma.m16n8k16` has
//
//   rows      8 channels of the one pair, then 8 of the other
//   depth     of each of the two points the cell's four pixels, once for the first 8 of the 16 channels
//             and once for the last 8
//   columns   of either pair four: the first 8 channels, and the last, each for the weights' leading bits and
//             for the rest of them; a weight counts in its own pair's columns and its own 8 channels' depth
//
// so half of the results mean nothing, and of the others two add up to a channel of y. Weights are sums of
// two numbers in half precision, good to 2^-17 (bfloat16) or 2^-22; sums are float32.
//
// A warp alternates: its threads make the cells of ten pairs, three threads a pair and a column of the
// kernel each, and put them into shared memory; then it multiplies.
#pragma once

#include "dcnv3_cuda_definition.h"
#include "dcnv3_cuda_maps.h"

namespace dcnv3::cuda {

// The cells of a team in shared memory, in words. A stream is a row of a pair's cells, leading or remaining
// bits of the weights of its two pixels: of each column three points and a fourth word, in the first column
// that of the tenth point, the pixel at the position. Four streams a pair; two pairs and 16 bytes, so that
// neither what a thread writes meets what its neighbours do in a bank, nor what it reads. Then the places.
constexpr int kStream = 12, kTwoPairs = 2 * 4 * kStream + 4, kCells = kTeam / 2 * kTwoPairs - 4;
constexpr int kCellWords = kCells + kPlaces;
__device__ __forceinline__ int cells_of(int pair) {
  return pair / 2 * kTwoPairs + pair % 2 * 4 * kStream;
}

#if KERNEL_HAS_TENSOR_CORES

// Makes the cells of a column of a pair's points.
template <class T, int S>
struct CellMaker {
  __device__ __forceinline__ CellMaker(const Call& call, const Maps& maps, uint32_t* team)
      : points_of(call),
        place_of(maps),
        cells(shared_address(team + cells_of(points_of.slot) + 4 * points_of.column)),
        places(shared_address(team + kCells + places_of(points_of.slot, points_of.column))) {
    hold(cells), hold(places);
  }

  // All threads of the warp take part; those of no pair write nothing.
  template <class N>
  __device__ __forceinline__ void put(const ColumnOfRecord<N>& record, const Walk& at) const {
    const ColumnOfPoints points = points_of.make(record, at);
    if (!points_of.counts()) return;
    uint32_t stream[4][4];
    uint32_t place[4];
    stream[0][3] = stream[1][3] = stream[2][3] = stream[3][3] = 0, place[3] = 0;
    const float share = 1 - points.blend, of_group = place_of.of_group(at.group);
#pragma unroll
    for (int row = 0; row < 3; ++row)
      place[row] = make(points.weight[row] * share, points.h[row], points.w[row], of_group, row, stream);
    if (points_of.with_centre && points_of.column == 0)
      place[3] = make(points.blend, float(at.i), float(at.j), of_group, 3, stream);
#pragma unroll
    for (int i = 0; i < 4; ++i) write_four(cells + i * kStream * 4, stream[i]);
    write_two(places, place_of.two(place[0], place[1]), place_of.two(place[2], place[3]));
  }

  // Sets a point's words, the weights in two parts, and returns its place.
  __device__ __forceinline__ uint32_t make(float weight, float at_h, float at_w, float of_group, int point,
                                           uint32_t (&stream)[4][4]) const {
    const Axis<float> h = locate(at_h, points_of.height), w = locate(at_w, points_of.width);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float of_row = weight * (row ? h.weight1 : h.weight0);
      const float left = of_row * w.weight0, right = of_row * w.weight1;
      const uint32_t leading = pack(left, right, T());
      float part[2];
      unpack(leading, T(), part);
      stream[row][point] = leading;
      stream[2 + row][point] = pack(left - part[0], right - part[1], T());
    }
    return place_of(of_group, h.first, w.first);
  }

  PointColumns<kTeam> points_of;
  Places<S> place_of;
  uint32_t cells, places;
};

// Multiplies for two pairs that follow each other in shared memory.
template <class T, int S>
struct Samples {
  __device__ __forceinline__ Samples(const Call& call, const Maps& maps, const char* planes,
                                     const uint32_t* team)
      // Its row of a matrix: the pair and which of two points, the channels, the pixel.
      : cells(call, maps, planes, team + kCells, threadIdx.x / 8 % 2, threadIdx.x / 16 % 2, threadIdx.x % 4,
              threadIdx.x / 4 % 2),
        with_centre(call.centre) {
    // Its column of the weights: the pair, the channels, which bits; and its depth.
    const int lane = threadIdx.x % 32, column = lane / 4, depth = lane % 4;
    weights = shared_address(team + cells_of(column / 4) + (column % 2 * 2 + depth % 2) * kStream);
    mask = depth / 2 == column / 2 % 2 ? ~0u : 0u;
    hold(weights), hold(mask);
  }

  // Sets v to a channel of each slice, lane % 2 * 8 + lane / 4, of pair lane % 4 / 2.
  __device__ __forceinline__ void compute(int pair, float* v) const {
    uint32_t w[12], place[5];
    cells.find(pair, place);
#pragma unroll
    for (int i = 0; i < 12; i += 4) read_four(weights + pair / 2 * kTwoPairs * 4 + i * 4, &w[i]);
    const uint32_t weight[5][2] = {{w[0], w[1]}, {w[2], w[3]}, {w[4], w[5]}, {w[6], w[8]}, {w[9], w[10]}};
    float sum[S][4] = {};
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const uint32_t row = cells.from + place[i] * kUnit;
#pragma unroll
      for (int slice = 0; slice < S; ++slice) {
        uint32_t m[4] = {};
        if (i != 1 || with_centre) {
          load_matrices<true>(row ^ (slice * kUnit), m);
        } else {
          load_two_matrices(row ^ (slice * kUnit), m);
        }
        multiply_add<T>(m, weight[i][0] & mask, weight[i][1] & mask, sum[slice]);
      }
    }
#pragma unroll
    for (int slice = 0; slice < S; ++slice) {
      const float* const r = sum[slice];
      v[slice] = threadIdx.x % 4 < 2 ? r[0] + r[1] : r[2] + r[3];
    }
  }

  CellRows<S> cells;
  bool with_centre;
  uint32_t weights, mask;
};

// Does what is not finite among the warp's results once more, by the definition.
template <class T>
__device__ __noinline__ void repair_results(const Call& call, const Maps& maps) {
  const Problem& s = call.problem;
  const BlockOfMaps block(s, maps);
  const int lane = threadIdx.x % 32, depth = int(s.depth);
  Walk at(s, block.groups, block.first_pair() + lane % kTeam, block.step());
  for (; at.pair < block.pairs; at.next()) {
    const Place place = {block.image, at.i, at.j, block.first_group + at.group, 0};
    for (int c = lane / kTeam; c < depth && lane < 3 * kTeam; c += 3) {
      T* const y = static_cast<T*>(call.y) + place.output(s) + c;
      if (!is_finite(to_real(*y))) to_storage(sample_by_definition<T>(call, place, place.input(s) + c), y);
    }
  }
}

#endif

// T of x and y, N of records, S slices of 16 channels.
template <class T, class N, int S>
__global__ void __launch_bounds__(kTensorThreads)
    tensor_forward_kernel(const __grid_constant__ Call call, Maps maps) {
#if KERNEL_HAS_TENSOR_CORES
  const Problem& s = call.problem;
  const int lane = threadIdx.x % 32;
  const BlockOfMaps block(s, maps);
  uint32_t* const team = block.team(maps, kCellWords);
  const CellMaker<T, S> maker(call, maps, team);
  Walk at(s, block.groups, block.first_pair() + maker.points_of.slot, block.step());
  const uint32_t channels = uint32_t(s.channels()), row = uint32_t(call.offset.row);
  ColumnOfRecord<N> record(block.records<N>(call, call.offset.data), maker.points_of.column);
  const auto read = [&] {
    if (at.pair < block.pairs && maker.points_of.counts())
      record.read(at.position() * row + at.group * kNumbers, call.centre);
  };
  read();
  copy_maps<T, S>(call, maps, block);
  __syncthreads();

  const Samples<T, S> samples(call, maps, block.planes, team);
  T* y = block.results<T>(call, call.y) + lane % 2 * 8 + lane / 4;
  hold(y);
  float poison = 0;
  for (int first = block.first_pair(); first < block.pairs; first += block.step()) {
    const uint32_t result = at.pair < block.pairs ? at.position() * channels + at.group * 16 * S : kNone;
    maker.put(record, at);
    at.next();
    read();
    __syncwarp();
#pragma unroll
    for (int pair = 0; pair < kTeam; pair += 2) {
      float v[S];
      samples.compute(pair, v);
      const uint32_t begin = __shfl_sync(~0u, result, pair + lane % 4 / 2);
#pragma unroll
      for (int slice = 0; slice < S; ++slice) {
        poison += v[slice] * 0;
        if (begin != kNone) to_storage(v[slice], y + (begin + slice * 16));
      }
    }
    __syncwarp();
  }
  if (__any_sync(~0u, poison != 0)) repair_results<T>(call, maps);
#endif
}

}  // namespace dcnv3::cuda
