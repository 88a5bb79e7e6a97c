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
// two numbers in half precision, good to 2^-17 (bfloat16) or 2^-22; sums are float32. Eight rows of 16 bytes
// for `ldmatrix`, the channels of a cell, never meet in a bank: that is what the maps' layout is for.
//
// A warp alternates: its threads make the cells of ten pairs, three threads a pair and a column of the
// kernel each, and put them into shared memory; then it multiplies.
#pragma once

#include <algorithm>

#include "cuda_tensor_cores.h"
#include "dcnv3_cuda_nine.h"

namespace dcnv3::cuda {

constexpr int kTensorThreads = 512;
constexpr int kTeam = 10;  // pairs of a warp at once

// The cells of a pair in shared memory, in words. A stream is a row of the cells, leading or remaining bits
// of the weights of its two pixels: the first two points of each column, then the third of each, then the
// tenth point, the pixel at the position. Points that follow each other there are multiplied at once. After
// four streams the places of the points, 16 bits each: of those that are first of two, two of each column,
// then of those that are second.
constexpr int kStream = 10, kPlaces = 4 * kStream, kCells = kPlaces + 6;
constexpr int kTeamWords = kTeam * kCells;

constexpr int kUnit = 32;  // bytes; what places count

// The maps of a block in shared memory: of how many groups, bytes of one, units of a row of it; and the
// block's warps.
struct Maps {
  int groups, blocks_an_image, bytes, pitch, warps;
};

// With 16 channels a group the two rows of a cell, 64 bytes each, lie in different halves of the banks. With
// 32 each row takes all banks if read at once, but 16 channels are: in odd rows the first 16 and the last 16
// of a pixel are exchanged.
inline Maps maps_of(const Problem& s) {
  Maps maps = {};
  maps.pitch = int(s.width * s.depth * 2 / kUnit);
  while (s.depth == 16 && maps.pitch % 4 != 2) ++maps.pitch;
  maps.bytes = int(s.height) * maps.pitch * kUnit;
  return maps;
}

// How many groups a block should have and how many warps: 16, or half as many where two blocks fit. No groups
// where this form is not for the call.
inline Maps shared_out(const Problem& s, const Device& device) {
  constexpr int64_t kTeamBytes = kTeamWords * sizeof(uint32_t), kReserved = 1 << 10;
  Maps best = {};
  int64_t least = INT64_MAX;
  if (s.height * s.width * s.depth * 2 > device.shared) return best;
  if (s.positions() * s.group * s.group > UINT32_MAX) return best;  // see Divisor
  for (int groups = 1; groups <= s.group; ++groups) {
    Maps maps = maps_of(s);
    maps.groups = groups;
    if (const char* g = std::getenv("TENSOR_GROUPS"); g && atoi(g) != groups) continue;
    maps.blocks_an_image = int((s.group + groups - 1) / groups);
    const int64_t blocks = s.batch * maps.blocks_an_image, bytes = int64_t{groups} * maps.bytes;
    const bool two =
        blocks > device.processors && 2 * (bytes + 8 * kTeamBytes + kReserved) <= device.shared + kReserved;
    maps.warps = two ? 8 : int(std::min<int64_t>(16, (device.shared - bytes) / kTeamBytes));
    if (const char* g = std::getenv("TENSOR_WARPS")) maps.warps = std::min(maps.warps, atoi(g));
    if (bytes + 8 * kTeamBytes > device.shared || blocks * 4 < device.processors * 3) break;
    // What the busiest multiprocessor has to do, in positions: to begin a block takes one as long as 160 of
    // them, and half of that where another goes on meanwhile (an H200).
    const int64_t rounds = (blocks + device.processors - 1) / device.processors;
    const int64_t work = rounds * (groups * s.positions() + (two ? 80 : 160));
    if (work < least || (work == least && two)) best = maps, least = work;
  }
  return best;
}

#if KERNEL_HAS_TENSOR_CORES

// Divides n by a number, exactly as long as n times that number is below 2^32.
struct Divisor {
  __device__ __forceinline__ explicit Divisor(uint32_t by) : one(by == 1), inverse(0xffffffffu / by + 1) {}
  __device__ __forceinline__ uint32_t operator()(uint32_t n) const {
    return one ? n : uint32_t(uint64_t{n} * inverse >> 32);
  }
  bool one;
  uint32_t inverse;
};

// Copies the maps of `groups` groups, a warp a row, a thread 16 bytes.
template <class T, int S>
__device__ __forceinline__ void copy_maps(const Call& call, const Maps& maps, int64_t image, int group,
                                          int groups, char* to) {
  const Problem& s = call.problem;
  const uint32_t pieces = groups * 2 * S, in_row = uint32_t(s.width) * pieces;
  const Divisor pixel(pieces);
  const uint32_t channels = uint32_t(s.channels());
  const T* from = static_cast<const T*>(call.x) + image * s.height * s.width * channels + group * s.depth;
  for (int y = threadIdx.x / 32; y < int(s.height); y += blockDim.x / 32) {
    const T* const row = from + int64_t(y) * s.width * channels;
    char* const to_row = to + y * maps.pitch * kUnit;
    const uint32_t exchange = S == 2 && y % 2 ? kUnit : 0;
    for (uint32_t i = threadIdx.x % 32; i < in_row; i += 32) {
      const uint32_t x = pixel(i), piece = i - x * pieces;
      const uint32_t in_pixel = piece % (2 * S) * 16 ^ exchange;
      copy_ahead(to_row + piece / (2 * S) * maps.bytes + x * S * kUnit + in_pixel,
                 row + x * channels + piece * 8, true);
    }
  }
  end_group();
  wait_for_groups<0>();
}

// What a thread reads of records of N: its column's three offsets and logits, and the last number.
template <class N>
struct ColumnOfRecord {
  __device__ __forceinline__ ColumnOfRecord(const N* records, int column)
      : column(column), offsets(records + 6 * column), logits(records + 18 + 3 * column / 2 * 2) {
    hold(offsets);
    hold(logits);
  }
  // Half precision: three words of offsets, two that the logits are in.
  __device__ __forceinline__ void read(uint32_t element, bool) {
#pragma unroll
    for (int i = 0; i < 3; ++i) word[i] = reinterpret_cast<const uint32_t*>(offsets + element)[i];
#pragma unroll
    for (int i = 0; i < 2; ++i) word[3 + i] = reinterpret_cast<const uint32_t*>(logits + element)[i];
  }
  __device__ __forceinline__ void values(float* offset, float* logit, float* centre) const {
#pragma unroll
    for (int i = 0; i < 3; ++i) unpack(word[i], N(), offset + 2 * i);
    float v[4];
    unpack(word[3], N(), v);
    unpack(word[4], N(), v + 2);
#pragma unroll
    for (int i = 0; i < 3; ++i) logit[i] = column == 1 ? v[i + 1] : v[i];
    *centre = v[3];  // the last column's
  }
  int column;
  const N *offsets, *logits;
  uint32_t word[5] = {};
};
template <>
struct ColumnOfRecord<float> {
  __device__ __forceinline__ ColumnOfRecord(const float* records, int column)
      : column(column), records(records) {
    hold(this->records);
  }
  __device__ __forceinline__ void read(uint32_t element, bool with_centre) {
    const float* record = records + element;
#pragma unroll
    for (int i = 0; i < 3; ++i) load<2>(record + 6 * column + 2 * i, number + 2 * i);
#pragma unroll
    for (int i = 0; i < 3; ++i) number[6 + i] = record[18 + 3 * column + i];
    if (with_centre) number[9] = record[27];
  }
  __device__ __forceinline__ void values(float* offset, float* logit, float* centre) const {
#pragma unroll
    for (int i = 0; i < 6; ++i) offset[i] = number[i];
#pragma unroll
    for (int i = 0; i < 3; ++i) logit[i] = number[6 + i];
    *centre = number[9];
  }
  int column;
  const float* records;
  float number[10] = {};
};

// The pairs of a block count positions, of each the groups; a thread's next is always as far.
struct Walk {
  __device__ __forceinline__ Walk(const Problem& s, int groups, int first, int step)
      : groups(groups), width(int(s.out_width)), pair(first), step(step) {
    const auto split = [&](int n, int* group, int* i, int* j) {
      const int position = n / groups;
      *group = n - position * groups;
      *i = position / width;
      *j = position - *i * width;
    };
    split(first, &group, &i, &j);
    split(step, &step_group, &step_i, &step_j);
  }
  __device__ __forceinline__ void next() {
    pair += step, group += step_group, i += step_i, j += step_j;
    if (group >= groups) group -= groups, ++j;
    if (j >= width) j -= width, ++i;
  }
  __device__ __forceinline__ uint32_t position() const { return uint32_t(i * width + j); }
  int groups, width;
  int pair, group, i, j;  // the group in the block
  int step, step_group, step_i, step_j;
};

// Makes the cells of a column of a pair's points.
template <class T, int S>
struct CellMaker {
  __device__ __forceinline__ CellMaker(const Call& call, const Maps& maps, int member, int column,
                                       uint32_t* team)
      : member(member),
        column(column),
        cells(shared_address(team + member * kCells)),
        pitch(maps.pitch),
        bytes(maps.bytes / kUnit),
        scale(float(call.problem.offset_scale)),
        with_centre(call.centre) {
    const Problem& s = call.problem;
    height = extent<float>(s.height), width = extent<float>(s.width);
    dilation_h = float(int(s.dilation_h)), step_w = float(int(s.dilation_w)) * float(column - 1);
    stride_h = int(s.stride_h), stride_w = int(s.stride_w);
    start_h = int(grid(0, s.stride_h, s.pad_h, 3, s.dilation_h));
    start_w = int(grid(0, s.stride_w, s.pad_w, 3, s.dilation_w));
    hold(scale), hold(dilation_h), hold(step_w);
    hold(height.last), hold(height.end), hold(width.last), hold(width.end);
    hold(start_h), hold(start_w), hold(cells);
  }

  // All threads of the warp take part in the softmax; those of no pair write nothing.
  template <class N>
  __device__ __forceinline__ void put(const ColumnOfRecord<N>& record, const Walk& at, bool in_team) const {
    float offset[6], logit[3], centre;
    record.values(offset, logit, &centre);
    const auto of = [&](float v, int column) { return __shfl_sync(~0u, v, member + column * kTeam); };
    float top = larger(larger(logit[0], logit[1]), logit[2]);
    top = larger(larger(of(top, 0), of(top, 1)), of(top, 2));
    float weight[3];
#pragma unroll
    for (int row = 0; row < 3; ++row) weight[row] = exp_of(logit[row] - top);
    const float sum = weight[0] + weight[1] + weight[2];
    const float total = of(sum, 0) + of(sum, 1) + of(sum, 2);
    float blend = 0;
    if (with_centre) blend = sigmoid(of(centre, 2));
    const float share = (1 - blend) / total;
    if (!in_team) return;

    const float grid_h = float(at.i * stride_h + start_h), grid_w = float(at.j * stride_w + start_w);
    const int map = at.group * bytes;
    uint32_t stream[4][3];
    uint32_t place[3];
#pragma unroll
    for (int row = 0; row < 3; ++row) {
      const float h = grid_h + (dilation_h * float(row - 1) + offset[2 * row + 1]) * scale;
      const float w = grid_w + (step_w + offset[2 * row]) * scale;
      uint32_t words[4];
      place[row] = map + make(weight[row] * share, h, w, words);
#pragma unroll
      for (int i = 0; i < 4; ++i) stream[i][row] = words[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      write_two(cells + (i * kStream + 2 * column) * 4, stream[i][0], stream[i][1]);
      write_one(cells + (i * kStream + 6 + column) * 4, stream[i][2]);
    }
    // Of the third points those of the first column and the last are first of two, that of the middle second.
    uint32_t first = place[0], second = place[1];
    (column == 1 ? second : first) |= place[2] << 16;
    if (with_centre && column == 0) {
      uint32_t words[4];
      second |= (map + make(blend, float(at.i), float(at.j), words)) << 16;
#pragma unroll
      for (int i = 0; i < 4; ++i) write_one(cells + (i * kStream + 9) * 4, words[i]);
    }
    write_one(cells + (kPlaces + column) * 4, first);
    write_one(cells + (kPlaces + (column < 2 ? 4 + column : 3)) * 4, second);
  }

  // Sets a point's words of the four streams, and returns its place.
  __device__ __forceinline__ uint32_t make(float weight, float at_h, float at_w, uint32_t (&words)[4]) const {
    const Axis<float> h = locate(at_h, height), w = locate(at_w, width);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float of_row = weight * (row ? h.weight1 : h.weight0);
      const float left = of_row * w.weight0, right = of_row * w.weight1;
      words[row] = pack(left, right, T());
      float part[2];
      unpack(words[row], T(), part);
      words[2 + row] = pack(left - part[0], right - part[1], T());
    }
    const int y = int(h.first), x = int(w.first);
    return y * pitch + x * S + (S == 2 ? y & 1 : 0);
  }

  int member, column;
  uint32_t cells;
  int pitch, bytes;
  float scale, dilation_h, step_w;
  bool with_centre;
  Extent<float> height, width;
  int stride_h, stride_w, start_h, start_w;
};

// Multiplies for two pairs that follow each other in shared memory.
template <class T, int S>
struct Samples {
  __device__ __forceinline__ Samples(const Call& call, const Maps& maps, const char* planes,
                                     const uint32_t* team)
      : with_centre(call.centre) {
    const Problem& s = call.problem;
    const int lane = threadIdx.x % 32;
    // Its column of the weights: the channels, the pair, which bits; and its depth.
    const int column = lane / 4, pair = column / 2 % 2, depth = lane % 4;
    weights = shared_address(team + pair * kCells + (column % 2 * 2 + depth % 2) * kStream);
    mask = depth / 2 == column / 4 ? ~0u : 0u;
    // Its row of a matrix: of two points the first or the second, the pair, the channels, the pixel.
    const int second = lane / 16, row = lane % 8, channels = row / 4, down = row / 2 % 2, right = row % 2;
    places = shared_address(team + pair * kCells + kPlaces + 4 * second);
    last = shared_address(team + pair * kCells + kPlaces + 2 + second);
    half = second ? 0xff76 : 0xbb32;
    odd = S == 2 && down && s.height > 1 ? 1 : 0;
    from = shared_address(planes) + channels * 16;
    if (right && s.width > 1) from += S * kUnit;
    if (down && s.height > 1) from += maps.pitch * kUnit;
    hold(weights), hold(mask), hold(places), hold(last), hold(half), hold(odd), hold(from);
  }

  // Sets v to a channel of each slice, lane % 4 / 2 * 8 + lane / 4, of pair lane % 2.
  __device__ __forceinline__ void compute(int pair, float* v) const {
    const uint32_t skip = pair * kCells * 4;
    uint32_t w[10], p[3];
    read_two(places + skip, p);
    p[2] = read_one(last + skip);
#pragma unroll
    for (int i = 0; i < 10; i += 2) read_two(weights + skip + i * 4, &w[i]);
    const uint32_t place[5] = {p[0] & 0xffff, p[1] & 0xffff, p[2] & 0xffff, select_bytes(p[0], p[1], half),
                               select_bytes(p[2], p[0], half)};
    float sum[S][4] = {};
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const uint32_t row = from + (place[i] ^ odd) * kUnit;
#pragma unroll
      for (int slice = 0; slice < S; ++slice) {
        uint32_t m[4] = {};
        if (i < 4 || with_centre) {
          load_matrices<true>(row ^ (slice * kUnit), m);
        } else {
          load_two_matrices(row ^ (slice * kUnit), m);
        }
        multiply_add<T>(m, w[2 * i] & mask, i < 4 || with_centre ? w[2 * i + 1] & mask : 0, sum[slice]);
      }
    }
#pragma unroll
    for (int slice = 0; slice < S; ++slice) {
      const float* const r = sum[slice];
      v[slice] = threadIdx.x % 2 ? r[2] + r[3] : r[0] + r[1];
    }
  }

  bool with_centre;
  uint32_t weights, places, last, mask, half, odd, from;
};

// Does what is not finite among a thread's results once more, by the definition.
template <class T, int S>
__device__ __noinline__ void repair(const Call& call, int64_t image, T* y) {
  for (int slice = 0; slice < S; ++slice) {
    T* const to = y + slice * 16;
    if (!is_finite(to_real(*to))) to_storage(sample_by_definition<T>(call, image, to), to);
  }
}

#endif

// T of x and y, N of records, S slices of 16 channels.
template <class T, class N, int S>
__global__ void __launch_bounds__(kTensorThreads)
    tensor_forward_kernel(const __grid_constant__ Call call, Maps maps) {
#if KERNEL_HAS_TENSOR_CORES
  const Problem& s = call.problem;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t image = blockIdx.x / maps.blocks_an_image;
  const int first_group = int(blockIdx.x - image * maps.blocks_an_image) * maps.groups;
  const int groups = maps.groups < int(s.group) - first_group ? maps.groups : int(s.group) - first_group;
  const int pairs = int(s.positions()) * groups;
  char* const planes = shared_memory<char>();
  uint32_t* const team = reinterpret_cast<uint32_t*>(planes + maps.groups * maps.bytes) + warp * kTeamWords;

  // Three threads a pair, kTeam apart: so what they write is in different banks.
  const int member = lane % kTeam, column = lane / kTeam;
  const bool in_team = column < 3;
  Walk at(s, groups, warp * kTeam + member, warps * kTeam);
  const uint32_t channels = uint32_t(s.channels()), row = uint32_t(call.offset.row);
  ColumnOfRecord<N> record(static_cast<const N*>(call.offset.data) + image * s.positions() * call.offset.row +
                               first_group * kNumbers,
                           column);
  const auto read = [&] {
    if (at.pair < pairs && in_team) record.read(at.position() * row + at.group * kNumbers, call.centre);
  };
  read();
  copy_maps<T, S>(call, maps, image, first_group, groups, planes);
  __syncthreads();

  const CellMaker<T, S> maker(call, maps, member, column, team);
  const Samples<T, S> samples(call, maps, planes, team);
  T* y = static_cast<T*>(call.y) + image * s.positions() * channels + first_group * 16 * S +
         lane % 4 / 2 * 8 + lane / 4;
  hold(y);
  const Divisor position_of(groups);
  for (int first = warp * kTeam; first < pairs; first += warps * kTeam) {
    maker.put(record, at, in_team);
    at.next();
    read();
    __syncwarp();
    const auto result = [&](int pair) {  // where its channels begin
      const uint32_t n = first + pair + lane % 2, position = position_of(n);
      return y + (position * channels + (n - position * groups) * (16 * S));
    };
    float poison = 0;
#pragma unroll
    for (int pair = 0; pair < kTeam; pair += 2) {
      float v[S];
      samples.compute(pair, v);
      T* const to = result(pair);
      const bool there = first + pair + lane % 2 < pairs;
#pragma unroll
      for (int slice = 0; slice < S; ++slice) {
        poison += v[slice] * 0;
        T stored;
        to_storage(v[slice], &stored);
        if (there) to[slice * 16] = stored;
      }
    }
    if (poison != 0) {
      for (int pair = 0; pair < kTeam && first + pair + lane % 2 < pairs; pair += 2) {
        repair<T, S>(call, image, result(pair));
      }
    }
    __syncwarp();
  }
#endif
}

}  // namespace dcnv3::cuda
