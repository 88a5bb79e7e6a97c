// The gradients of the learned numbers of the fused form's nine points in half precision on tensor cores,
// where a block's shared memory holds whole maps of groups.
//
// All that is needed of x are the dots <dy, pixel> with the four pixels of each point's cell. For two
// (position, group) at once, two of their points and 16 channels, `mma.m16n8k16` has
//
//   rows      of the one pair the pixels of the first point, then of the second; then those of the other pair
//   depth     8 channels and the other 8: of the first point the first and the last of the 16, of the second
//             the last and the first
//   columns   dy with its channels in the one order and the other, of the one pair, then of the other; each
//             twice, since there is room
//
// so a dot is where a row meets the column of its pair and order. Products are exact, sums float32. That the
// points differ in their order is for `ldmatrix`: of eight rows it reads four are the first 8 channels of a
// cell, four the last 8, and these never meet in a bank, wherever the two cells are.
//
// A warp does ten pairs at a time, in three steps: its threads, three a pair and a column of the kernel each,
// make places of cells; it multiplies; and each thread makes its points' gradients from their dots. Places,
// dots and gradients change hands through shared memory, so that whole records are written.
#pragma once

#include "dcnv3_cuda_definition.h"
#include "dcnv3_cuda_maps.h"

namespace dcnv3::cuda {

// The dots of a team in shared memory, in words: of each point four, the points in the order in which they
// are multiplied (see Places). Two pairs written at once are 16 banks apart; of the eight that are read at
// once, 16 bytes each, no three meet. Later the gradients are there. Then the places.
constexpr int kDotPairs = 92, kDots = kTeam / 2 * kDotPairs, kDotWords = kDots + kTeam * kPlaces;
constexpr uint32_t kNone = ~0u;  // where no pair has its numbers
__device__ __forceinline__ int dots_of(int pair) {
  return pair / 2 * kDotPairs + pair % 2 * 48;
}

#if KERNEL_HAS_TENSOR_CORES

// A column of a pair's points until their dots are there.
struct PendingColumn {
  float t_h[3], t_w[3], weight[3];  // where they are in their cells
  float blend;
  int own;  // which of its cell's pixels the one at the position is
};

// Makes the places of the cells of a column of a pair's points.
template <int S>
struct PlaceMaker {
  __device__ __forceinline__ PlaceMaker(const Call& call, const Maps& maps, uint32_t* team)
      : points_of(call, call.centre),
        place_of(maps),
        places(shared_address(team + kDots + points_of.slot * kPlaces)) {
    hold(places);
  }

  // All threads of the warp take part; those of no pair write nothing.
  template <class N>
  __device__ __forceinline__ PendingColumn put(const ColumnOfRecord<N>& record, const Walk& at) const {
    const ColumnOfPoints points = points_of.make(record, at);
    PendingColumn pending;
    const float of_group = place_of.of_group(at.group);
    uint32_t place[3], tenth = 0;
#pragma unroll
    for (int row = 0; row < 3; ++row) {
      const float y = first_pixel(points.h[row], points_of.height);
      const float x = first_pixel(points.w[row], points_of.width);
      pending.t_h[row] = points.h[row] - y, pending.t_w[row] = points.w[row] - x;
      pending.weight[row] = points.weight[row];
      place[row] = place_of(of_group, y, x);
    }
    pending.blend = points.blend;
    pending.own = 0;
    if (points_of.with_centre) {
      const float y = smaller(float(at.i), points_of.height.last),
                  x = smaller(float(at.j), points_of.width.last);
      tenth = place_of(of_group, y, x);
      pending.own = (at.i - int(y)) * 2 + at.j - int(x);
    }
    if (points_of.counts()) place_of.put(places, points_of.column, place, tenth);
    return pending;
  }

  PointColumns<kTeam> points_of;
  Places<S> place_of;
  uint32_t places;
};

// dy of a team as the columns of its products, two pairs at a time.
template <class T, int S>
struct TeamDy {
  __device__ __forceinline__ explicit TeamDy(const T* dy)
      : one(dy + threadIdx.x % 4 * 2 + threadIdx.x / 8 % 2 * 8),
        other(dy + threadIdx.x % 4 * 2 + (1 - threadIdx.x / 8 % 2) * 8) {
    hold(one), hold(other);
  }
  // Starts to read that of two pairs; `begin` is where the thread's own pair has its.
  __device__ __forceinline__ void read(int pair, uint32_t begin) {
    begin = __shfl_sync(~0u, begin, pair + threadIdx.x % 32 / 16);
#pragma unroll
    for (int slice = 0; slice < S; ++slice) {
      word[pair / 2][slice][0] = *reinterpret_cast<const uint32_t*>(one + begin + slice * 16);
      word[pair / 2][slice][1] = *reinterpret_cast<const uint32_t*>(other + begin + slice * 16);
    }
  }
  const T *one, *other;
  uint32_t word[kTeam / 2][S][2];
};

// Takes the dots of two pairs that follow each other.
template <class T, int S>
struct Dots {
  __device__ __forceinline__ Dots(const Call& call, const Maps& maps, const char* planes, uint32_t* team)
      // Its row of a matrix: the pair, which of two points, the pixel, and the channels.
      : cells(call, maps, planes, team + kDots, threadIdx.x / 8 % 2, threadIdx.x / 4 % 2, threadIdx.x % 4,
              threadIdx.x / 4 % 2 ^ threadIdx.x / 16 % 2) {
    const int lane = threadIdx.x % 32, second = lane / 16, pixel = lane / 4 % 4;
    other_pair = lane % 4 / 2;
    later = (lane % 2) ^ second;
    to = shared_address(team + dots_of(other_pair) + later * 8 + second * 4 + pixel);
    from[0] = cells.from, from[1] = cells.from ^ 16;
    hold(to), hold(from[0]), hold(from[1]);
  }

  __device__ __forceinline__ void compute(int pair, const uint32_t (&dy)[S][2]) const {
    uint32_t place[5];
    cells.find(pair, place);
    float dot[6] = {};
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      // Channels change places each time: so of two times either half of the threads have the dots.
      const uint32_t row = from[i % 2] + place[i] * kUnit;
      float sum[4] = {};
#pragma unroll
      for (int slice = 0; slice < S; ++slice) {
        uint32_t m[4];
        load_matrices<false>(row ^ (slice * kUnit), m);
        multiply_add<T>(m, dy[slice][0], dy[slice][1], sum);
      }
      dot[i] = other_pair ? sum[2] : sum[0];
    }
    const uint32_t of_pair = to + pair / 2 * kDotPairs * 4;
    write_one(of_pair, __float_as_uint(later ? dot[1] : dot[0]));
    write_one(of_pair + 64, __float_as_uint(later ? dot[3] : dot[2]));
    if (!later) write_one(of_pair + 128, __float_as_uint(dot[4]));
  }

  CellRows<S, kPlaces> cells;
  uint32_t from[2];
  // Of the results that mean something a thread has those of one pair, in the earlier or the later of two
  // times; and where they go.
  bool other_pair, later;
  uint32_t to;
};

// Makes the gradients of a column of a pair's points, and writes a team's.
template <class N>
struct GradientMaker {
  __device__ __forceinline__ GradientMaker(const PointColumns<kTeam>& points_of, uint32_t* team, N* records)
      : points_of(points_of), records(records) {
    const int slot = points_of.slot, column = points_of.column;
    // Who is left over reads with the last who is not.
    const int reads = points_of.counts() ? slot : kTeam - 1, of = column > 2 ? 2 : column;
    dots = shared_address(team + dots_of(reads) + 2 * of * 4);
    third_dots = shared_address(team + dots_of(reads) + (6 + of) * 4);
    own_dots = shared_address(team + dots_of(slot) + 9 * 4);
    staged = shared_address(team);
    offsets = staged + (slot * kNumbers + 6 * column) * uint32_t(sizeof(N));
    logits = staged + (slot * kNumbers + 18 + (column == 0 ? 0 : 2 + 2 * column)) * uint32_t(sizeof(N));
    hold(dots), hold(third_dots), hold(own_dots), hold(staged), hold(offsets), hold(logits);
    hold(this->records);
  }

  // Puts them where the dots were; returns a sum that is not finite where a softmax, a sample or a
  // derivative is not. All threads of the warp take part.
  __device__ __forceinline__ float make(const PendingColumn& pending) const {
    Sample<float> sample[3];
    const float keep = 1 - pending.blend;
    float test = pending.weight[0] + keep, mean = 0, by[3];
#pragma unroll
    for (int row = 0; row < 3; ++row) {
      uint32_t word[4];
      read_four(row < 2 ? dots + row * 16 : third_dots, word);
      const float dot[4] = {__uint_as_float(word[0]), __uint_as_float(word[1]), __uint_as_float(word[2]),
                            __uint_as_float(word[3])};
      sample[row] = chain_in_cell(pending.t_h[row], pending.t_w[row], points_of.height, points_of.width, dot);
      test += sample[row].value + sample[row].slope_h + sample[row].slope_w;
      mean += pending.weight[row] * sample[row].value;
    }
    float centre = 0;
    mean = points_of.of(mean, 0) + points_of.of(mean, 1) + points_of.of(mean, 2);
    if (points_of.with_centre)
      centre = pending.blend * keep * (__uint_as_float(read_one(own_dots + pending.own * 4)) - mean);
#pragma unroll
    for (int row = 0; row < 3; ++row) by[row] = pending.weight[row] * keep * (sample[row].value - mean);
    const float next = points_of.of(by[0], 1);
    __syncwarp();
    if (points_of.counts()) {
#pragma unroll
      for (int row = 0; row < 3; ++row) {
        const float factor = pending.weight[row] * keep * points_of.scale;
        put(offsets, row, factor * sample[row].slope_w, factor * sample[row].slope_h);
      }
      // Of the first column its three numbers and the next's first, of that the rest, of the last its three
      // and the centre's.
      const int column = points_of.column;
      put(logits, 0, column == 1 ? by[1] : by[0], column == 1 ? by[2] : by[1]);
      if (column != 1) put(logits, 1, by[2], column == 0 ? next : centre);
    }
    return test;
  }

  // Puts two numbers there, as the i-th two.
  static __device__ __forceinline__ void put(uint32_t address, int i, float a, float b) {
    if constexpr (sizeof(N) == 4) {
      write_two(address + i * 8, __float_as_uint(a), __float_as_uint(b));
    } else {
      write_one(address + i * 4, pack(a, b, N()));
    }
  }

  // Copies the team's to their rows; `begin` is where the thread's own pair has its.
  __device__ __forceinline__ void copy_out(uint32_t begin) const {
    constexpr uint32_t kPieces = kNumbers / 4;
#pragma unroll
    for (int start = 0; start < kTeam * int(kPieces); start += 32) {
      const uint32_t i = start + threadIdx.x % 32, pair = i / kPieces;
      const uint32_t to = __shfl_sync(~0u, begin, pair);
      if (i >= kTeam * kPieces || to == kNone) continue;
      uint32_t word[sizeof(N)];
      const uint32_t from = staged + i * uint32_t(4 * sizeof(N));
      if constexpr (sizeof(N) == 4) {
        read_four(from, word);
      } else {
        read_two(from, word);
      }
      Word<N, 4> piece;
      memcpy(&piece, word, sizeof piece);
      *reinterpret_cast<Word<N, 4>*>(records + (to + i % kPieces * 4)) = piece;
    }
  }

  const PointColumns<kTeam>& points_of;
  N* records;
  uint32_t dots, third_dots, own_dots, staged, offsets, logits;
};

// Makes those of the warp's gradients by the definition that are not finite: of a pair with a sample or a
// derivative that is not finite some are not, whatever its weights.
template <class T, class N>
__device__ __noinline__ void repair_gradients(const Call& call, const Maps& maps) {
  const BlockOfMaps block(call.problem, maps);
  const int lane = threadIdx.x % 32;
  if (lane >= kTeam) return;
  Walk at(call.problem, block.groups, block.first_pair() + lane, block.step());
  for (; at.pair < block.pairs; at.next()) {
    const N* const record = block.records<N>(call, call.doffset) + at.position() * uint32_t(call.offset.row) +
                            at.group * kNumbers;
    float sum = 0;
    for (int i = 0; i < kNumbers; ++i) sum += to_real(record[i]) * 0;
    if (sum != 0)
      gradients_by_definition<T>(call, {block.image, at.i, at.j, block.first_group + at.group, 0});
  }
}

// Clears what follows the last group's numbers in a row.
template <class N>
__device__ __forceinline__ void clear_padding(const Call& call, const BlockOfMaps& block) {
  const Problem& s = call.problem;
  const int row = int(call.offset.row), padding = row - int(s.group) * kNumbers;
  if (padding == 0 || block.first_group + block.groups < int(s.group)) return;
  N* const after = block.records<N>(call, call.doffset) + block.groups * kNumbers;
  for (int position = block.first_position + threadIdx.x; position < block.last_position;
       position += blockDim.x) {
    for (int i = 0; i < padding; ++i) to_storage(0.0f, after + uint32_t(position) * uint32_t(row) + i);
  }
}

#endif

// T of x and dy, N of records, S slices of 16 channels.
template <class T, class N, int S>
__global__ void __launch_bounds__(kTensorThreads)
    dots_kernel(const __grid_constant__ Call call, const __grid_constant__ Maps maps) {
#if KERNEL_HAS_TENSOR_CORES
  const Problem& s = call.problem;
  const BlockOfMaps block(s, maps);
  clear_padding<N>(call, block);
  uint32_t* const team = block.team(maps, kDotWords);
  const PlaceMaker<S> maker(call, maps, team);
  Walk at(s, block.groups, block.first_pair() + maker.points_of.slot, block.step());
  const uint32_t channels = uint32_t(s.channels()), row = uint32_t(call.offset.row);
  ColumnOfRecord<N> record(block.records<N>(call, call.offset.data), maker.points_of.column);
  TeamDy<T, S> dy(block.results<T>(call, call.dy));
  const auto number = [&] { return at.position() * row + at.group * kNumbers; };
  const auto read = [&] {
    if (at.pair < block.pairs && maker.points_of.counts()) record.read(number(), call.centre);
  };
  const auto result = [&] {
    return at.pair < block.pairs ? at.position() * channels + at.group * 16 * S : 0;
  };
  read();
#pragma unroll
  for (int pair = 0; pair < kTeam; pair += 2) dy.read(pair, result());
  copy_maps<T, S>(call, maps, block);
  wait_for_maps();

  const Dots<T, S> dots(call, maps, block.planes, team);
  const GradientMaker<N> gradients(maker.points_of, team, block.records<N>(call, call.doffset));
  float poison = 0;
  for (int first = block.first_pair(); first < block.pairs; first += block.step()) {
    const uint32_t begin = at.pair < block.pairs ? number() : kNone;
    const PendingColumn pending = maker.put(record, at);
    at.next();
    read();
    __syncwarp();
    const uint32_t next = result();
#pragma unroll
    for (int pair = 0; pair < kTeam; pair += 2) {
      dots.compute(pair, dy.word[pair / 2]);
      dy.read(pair, next);
    }
    __syncwarp();
    poison += gradients.make(pending) * 0;
    __syncwarp();
    gradients.copy_out(begin);
  }
  __syncwarp();
  if (__any_sync(~0u, poison != 0)) repair_gradients<T, N>(call, maps);
#endif
}

}  // namespace dcnv3::cuda
