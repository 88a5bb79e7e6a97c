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
// two numbers in half precision, good to 2^-17 (bfloat16) or 2^-22 (float16; 2^-25 of one, where small); sums
// are float32.
//
// A warp alternates: its threads make the cells of ten pairs, three threads a pair and a column of the
// kernel each, and put them into shared memory; then it multiplies.
#pragma once

#include "dcnv3_cuda_definition.h"
#include "dcnv3_cuda_maps.h"

namespace dcnv3::cuda {

// The cells of a pair in shared memory, in words. A stream is a row of the cells, leading or remaining bits
// of the weights of its two pixels, of ten points in the order in which they are multiplied (see Places).
// Four streams, then the places. So two pairs' streams lie in different banks. After all pairs are zeros, in
// the place of weights that do not count: from pair to pair they are read two words earlier, and so never in
// the pairs' banks.
constexpr int kStream = 10, kCells = 4 * kStream + kPlaces;
constexpr int kZeros = kTeam * kCells, kFirstZeros = kZeros + 16, kZeroStep = -2;
constexpr int kCellWords = kFirstZeros + kStream;
static_assert(kZeros % 32 == 12, "the first zeros are in bank 28, after the pairs' banks");
static_assert(kFirstZeros + (kTeam - 2) * kZeroStep >= kZeros, "the last pairs' zeros are zeros");

#if KERNEL_HAS_TENSOR_CORES

// Makes the cells of a column of a pair's points.
template <class T, int S, bool centre>
struct CellMaker {
  __device__ __forceinline__ CellMaker(const Call& call, const Maps& maps, uint32_t* team)
      : points_of(call, centre), place_of(maps), cells(shared_address(team + points_of.slot * kCells)) {
    hold(cells);
  }

  // All threads of the warp take part; those of no pair write nothing.
  template <class N>
  __device__ __forceinline__ void put(const ColumnOfRecord<N>& record, const Walk& at) const {
    const ColumnOfPoints points = points_of.make(record, at);
    if (!points_of.counts()) return;
    const int column = points_of.column;
    const float share = 1 - points.blend, of_group = place_of.of_group(at.group);
    uint32_t stream[4][3], place[3], tenth = 0;
#pragma unroll
    for (int row = 0; row < 3; ++row) {
      uint32_t words[4];
      place[row] = make(points.weight[row] * share, points.h[row], points.w[row], of_group, words);
#pragma unroll
      for (int i = 0; i < 4; ++i) stream[i][row] = words[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      write_two(cells + (i * kStream + 2 * column) * 4, stream[i][0], stream[i][1]);
      write_one(cells + (i * kStream + 6 + column) * 4, stream[i][2]);
    }
    if (centre && column == 0) {
      uint32_t words[4];
      tenth = make(points.blend, float(at.i), float(at.j), of_group, words);
#pragma unroll
      for (int i = 0; i < 4; ++i) write_one(cells + (i * kStream + 9) * 4, words[i]);
    }
    place_of.put(cells + 4 * kStream * 4, column, place, tenth);
  }

  // Sets a point's words of the four streams, and returns its place.
  __device__ __forceinline__ uint32_t make(float weight, float at_h, float at_w, float of_group,
                                           uint32_t (&words)[4]) const {
    const Axis<float> h = locate(at_h, points_of.height), w = locate(at_w, points_of.width);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float of_row = weight * (row ? h.weight1 : h.weight0);
      const float left = of_row * w.weight0, right = of_row * w.weight1;
      words[row] = pack(left, right, T());
      float part[2];
      unpack(words[row], T(), part);
      words[2 + row] = pack(left - part[0], right - part[1], T());
    }
    return place_of(of_group, h.first, w.first);
  }

  PointColumns<kTeam> points_of;
  Places<S> place_of;
  uint32_t cells;
};

// Multiplies for two pairs that follow each other in shared memory.
template <class T, int S, bool centre>
struct Samples {
  __device__ __forceinline__ Samples(const Call& call, const Maps& maps, const char* planes,
                                     const uint32_t* team)
      // Its row of a matrix: the pair and which of two points, the pixel, the channels.
      : cells(call, maps, planes, team + 4 * kStream, threadIdx.x / 8 % 2, threadIdx.x / 16 % 2,
              threadIdx.x % 4, threadIdx.x / 4 % 2) {
    // Its column of the weights: the channels, the pair, which bits; and its depth.
    const int column = threadIdx.x % 32 / 4, depth = threadIdx.x % 4;
    const bool counts = depth / 2 == column / 4;
    weights = shared_address(
        team + (counts ? column / 2 % 2 * kCells + (column % 2 * 2 + depth % 2) * kStream : kFirstZeros));
    step = uint32_t(counts ? kCells : kZeroStep) * 4;
    hold(weights), hold(step);
  }

  // Sets v to a channel of each slice, lane % 4 / 2 * 8 + lane / 4, of pair lane % 2.
  __device__ __forceinline__ void compute(int pair, float* v) const {
    uint32_t w[10], place[5];
    cells.find(pair, place);
#pragma unroll
    for (int i = 0; i < 10; i += 2) read_two(weights + pair * step + i * 4, &w[i]);
    float sum[S][4] = {};
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const uint32_t row = cells.from + place[i] * kUnit;
      const bool both = centre || i < 4;
#pragma unroll
      for (int slice = 0; slice < S; ++slice) {
        uint32_t m[4] = {};
        if (both) {
          load_matrices<true>(row ^ (slice * kUnit), m);
        } else {
          load_two_matrices(row ^ (slice * kUnit), m);
        }
        multiply_add<T>(m, w[2 * i], both ? w[2 * i + 1] : 0, sum[slice]);
      }
    }
#pragma unroll
    for (int slice = 0; slice < S; ++slice) {
      const float* const r = sum[slice];
      v[slice] = threadIdx.x % 2 ? r[2] + r[3] : r[0] + r[1];
    }
  }

  CellRows<S, kCells> cells;
  uint32_t weights, step;  // of the first pair, and how far a pair's are from the last one's
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
template <class T, class N, int S, bool centre>
__global__ void __launch_bounds__(kTensorThreads)
    tensor_forward_kernel(const __grid_constant__ Call call, const __grid_constant__ Maps maps) {
#if KERNEL_HAS_TENSOR_CORES
  const Problem& s = call.problem;
  const int lane = threadIdx.x % 32;
  const BlockOfMaps block(s, maps);
  uint32_t* const team = block.team(maps, kCellWords);
  const CellMaker<T, S, centre> maker(call, maps, team);
  Walk at(s, block.groups, block.first_pair() + maker.points_of.slot, block.step());
  const uint32_t channels = uint32_t(s.channels()), row = uint32_t(call.offset.row);
  ColumnOfRecord<N> record(block.records<N>(call, call.offset.data), maker.points_of.column);
  const auto read = [&] {
    if (at.pair < block.pairs && maker.points_of.counts())
      record.read(at.position() * row + at.group * kNumbers, centre);
  };
  const auto put = [&] {  // and starts to read for the next time
    maker.put(record, at);
    at.next();
    read();
  };
  read();
  copy_maps<T, S>(call, maps, block);
  if (kZeros + lane < kCellWords) team[kZeros + lane] = 0;
  put();
  wait_for_maps();

  const Samples<T, S, centre> samples(call, maps, block.planes, team);
  T* y = block.results<T>(call, call.y) + lane % 4 / 2 * 8 + lane / 4;
  hold(y);
  const Divisor position_of(block.groups);
  const uint32_t others = channels - block.groups * (16 * S);  // channels that are not this block's
  float poison = 0;
  for (int first = block.first_pair(); first < block.pairs; first += block.step()) {
#pragma unroll
    for (int pair = 0; pair < kTeam; pair += 2) {
      float v[S];
      samples.compute(pair, v);
      const uint32_t own = first + pair + lane % 2;
      T* const to = y + (position_of(own) * others + own * (16 * S));
      const bool there = own < uint32_t(block.pairs);
#pragma unroll
      for (int slice = 0; slice < S; ++slice) {
        poison += v[slice] * 0;
        T stored;
        to_storage(v[slice], &stored);
        if (there) to[slice * 16] = stored;
      }
    }
    __syncwarp();
    if (first + block.step() < block.pairs) put();
    __syncwarp();
  }
  if (__any_sync(~0u, poison != 0)) repair_results<T>(call, maps);
#endif
}

}  // namespace dcnv3::cuda
