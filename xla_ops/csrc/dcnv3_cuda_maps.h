// Whole maps of groups in a block's shared memory, for the nine points' forms on tensor cores, whose warps do
// a team of pairs (position, group) at a time.
//
// Eight rows of 16 bytes for `ldmatrix`, halves of the 16 channels of a cell's four pixels, never meet in a
// bank: that is what the layout is for.
#pragma once

#include <algorithm>

#include "cuda_tensor_cores.h"
#include "dcnv3_cuda_columns.h"

namespace dcnv3::cuda {

constexpr int kTensorThreads = 512;  // of a block at most
constexpr int kTeam = 10;            // pairs of a warp at once
constexpr int kPlaces = 6;           // words of the places of a pair's cells: see Places

constexpr int kUnit = 32;  // bytes; what places count

// The maps of a block in shared memory: a set is an image's of so many groups, its last may be of fewer;
// bytes of one map, units of a row of it. Then the block's warps. The first `whole` sets are a block's each;
// of each other one `parts` blocks have the maps, and a part of the positions.
struct Maps {
  int groups, sets_an_image, bytes, pitch, warps;
  uint32_t whole, parts, blocks;
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

// How many groups a set should have and how many warps: 16, or half as many where two blocks fit; beside
// one group's map that leaves little room, as many as there is room for, 8 at least. Each has `team_words`
// besides. No groups where this form is not for the call.
inline Maps shared_out(const Problem& s, const Device& device, int team_words) {
  constexpr int64_t kReserved = 1 << 10;
  const int64_t team_bytes = team_words * int64_t{sizeof(uint32_t)};
  Maps best = {};
  int64_t least = INT64_MAX;
  if (s.height * s.width * s.depth * 2 > device.shared) return best;
  if (s.positions() * s.group * s.group > UINT32_MAX) return best;  // see Divisor
  for (int groups = 1; groups <= s.group; ++groups) {
    Maps maps = maps_of(s);
    maps.groups = groups;
    maps.sets_an_image = int((s.group + groups - 1) / groups);
    const int64_t sets = s.batch * maps.sets_an_image, bytes = int64_t{groups} * maps.bytes;
    const bool two =
        sets > device.processors && 2 * (bytes + 8 * team_bytes + kReserved) <= device.shared + kReserved;
    maps.warps = two ? 8 : int(std::min<int64_t>(16, (device.shared - bytes) / team_bytes));
    // To begin a block takes a multiprocessor as long as 160 positions, and half of that where another block
    // goes on meanwhile (an H200).
    const int64_t each = groups * s.positions(), begin = two ? 80 : 160;
    // Sets that are left when as many as there is room for have run as often as they can are shared, by no
    // more blocks than leave each four times what it takes to begin, and a position.
    const int64_t at_once = device.processors * (two ? 2 : 1), left = sets % at_once;
    const int64_t most = std::min(each / (4 * begin), s.positions());
    const int64_t parts = left ? std::max<int64_t>(1, std::min(at_once / left, most)) : 1;
    const int64_t whole = parts > 1 ? sets - left : sets, blocks = whole + (sets - whole) * parts;
    if (bytes + 8 * team_bytes > device.shared || blocks * 4 < device.processors * 3) break;
    maps.whole = uint32_t(whole), maps.parts = uint32_t(parts), maps.blocks = uint32_t(blocks);
    if (groups > 1 && !two && maps.warps < 16) continue;
    // What the busiest multiprocessor has to do, in positions.
    const auto rounds = [&](int64_t of) { return (of + device.processors - 1) / device.processors; };
    const int64_t work = rounds(whole) * (each + begin) + rounds(blocks - whole) * (each / parts + begin);
    if (work < least || (work == least && two)) best = maps, least = work;
  }
  return best;
}

// The same, and none where this GPU or this build cannot run `kernel`.
template <class Kernel>
cudaError_t share_out(const Call& call, const Device& device, Kernel* kernel, int team_words, Maps* maps) {
  *maps = {};
  if (call.problem.depth != 16 && call.problem.depth != 32) return cudaSuccess;
  bool serves;
  if (cudaError_t error = has_tensor_cores(kernel, &serves)) return error;
  if (serves) *maps = shared_out(call.problem, device, team_words);
  return cudaSuccess;
}

inline cudaError_t launch_with_maps(cudaStream_t stream, const Call& call, const Device& device,
                                    void (*kernel)(Call, Maps), int team_words, const Maps& maps) {
  const int64_t bytes =
      int64_t{maps.groups} * maps.bytes + maps.warps * team_words * int64_t{sizeof(uint32_t)};
  return launch_with(stream, device, maps.blocks, maps.warps * 32, bytes, kernel, call, maps);
}

// A block's share of the call, and a warp's of that.
struct BlockOfMaps {
  __device__ __forceinline__ BlockOfMaps(const Problem& s, const Maps& maps) : planes(shared_memory<char>()) {
    uint32_t set = blockIdx.x;
    first_position = 0, last_position = int(s.positions());
    if (set >= maps.whole) {
      const uint32_t which = set - maps.whole, shared = which / maps.parts,
                     part = which - shared * maps.parts;
      const int each = last_position / int(maps.parts);
      set = maps.whole + shared;
      first_position = int(part) * each;
      if (part + 1 < maps.parts) last_position = first_position + each;
    }
    image = set / maps.sets_an_image;
    first_group = int(set - image * maps.sets_an_image) * maps.groups;
    groups = maps.groups < int(s.group) - first_group ? maps.groups : int(s.group) - first_group;
    pairs = last_position * groups;
  }

  // The warp's own memory.
  __device__ __forceinline__ uint32_t* team(const Maps& maps, int team_words) const {
    return reinterpret_cast<uint32_t*>(planes + maps.groups * maps.bytes) + threadIdx.x / 32 * team_words;
  }
  // Pairs count those of the set: the first of the warp's first team, and how far its next one is.
  __device__ __forceinline__ int first_pair() const {
    return first_position * groups + int(threadIdx.x) / 32 * kTeam;
  }
  __device__ __forceinline__ int step() const { return blockDim.x / 32 * kTeam; }

  // The image's records, or y or dy, from the block's first group on.
  template <class N, class Data>
  __device__ __forceinline__ auto* records(const Call& call, Data* data) const {
    using Number = std::conditional_t<std::is_const_v<Data>, const N, N>;
    return static_cast<Number*>(data) + image * call.problem.positions() * call.offset.row +
           first_group * kNumbers;
  }
  template <class T, class Data>
  __device__ __forceinline__ auto* results(const Call& call, Data* data) const {
    using Value = std::conditional_t<std::is_const_v<Data>, const T, T>;
    const Problem& s = call.problem;
    return static_cast<Value*>(data) + image * s.positions() * s.channels() + first_group * s.depth;
  }

  int64_t image;
  int first_group, groups, first_position, last_position, pairs;
  char* planes;
};

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

// Starts to copy the block's maps, a warp a row, a thread 16 bytes at a time.
template <class T, int S>
__device__ __forceinline__ void copy_maps(const Call& call, const Maps& maps, const BlockOfMaps& block) {
  const Problem& s = call.problem;
  const uint32_t pieces = block.groups * 2 * S, in_row = uint32_t(s.width) * pieces;
  const Divisor pixel(pieces);
  const uint32_t channels = uint32_t(s.channels());
  const T* from = static_cast<const T*>(call.x) + block.image * s.height * s.width * channels +
                  block.first_group * s.depth;
  for (int y = threadIdx.x / 32; y < int(s.height); y += blockDim.x / 32) {
    const T* const row = from + int64_t(y) * s.width * channels;
    char* const to = block.planes + y * maps.pitch * kUnit;
    const uint32_t exchange = S == 2 && y % 2 ? kUnit : 0;
    for (uint32_t i = threadIdx.x % 32; i < in_row; i += 32) {
      const uint32_t x = pixel(i), piece = i - x * pieces;
      const uint32_t in_pixel = piece % (2 * S) * 16 ^ exchange;
      copy_ahead(to + piece / (2 * S) * maps.bytes + x * S * kUnit + in_pixel, row + x * channels + piece * 8,
                 true);
    }
  }
  end_group();
}
__device__ __forceinline__ void wait_for_maps() {
  wait_for_groups<0>();
  __syncthreads();
}

// Where a cell's first pixel is, in units from the first of the block's maps. Found in float32, of a number
// that is 2^23 and more: its last bits are an integer's, the place in the last 16.
//
// Points are multiplied two at once: the first two of each column of the kernel, then the third of the first
// two columns, then that of the last and the tenth point, the pixel at the position. In shared memory a pair
// has the places of those that are first of two, of each column two in a word, and then of those that are
// second, the last column's before the others'.
template <int S>
struct Places {
  static constexpr float kInteger = 8388608;
  __device__ __forceinline__ explicit Places(const Maps& maps)
      : pitch(float(maps.pitch)), of_map(float(maps.bytes / kUnit)) {
    hold(pitch), hold(of_map);
  }
  __device__ __forceinline__ float of_group(int group) const { return float(group) * of_map + kInteger; }
  __device__ __forceinline__ uint32_t operator()(float of_group, float y, float x) const {
    const uint32_t place = __float_as_uint(y * pitch + (x * S + of_group));
    return S == 2 ? place | (__float_as_uint(y + kInteger) & 1) : place;
  }
  // Writes those of a column, and of the tenth point if it is the first column.
  static __device__ __forceinline__ void put(uint32_t to, int column, const uint32_t (&place)[3],
                                             uint32_t tenth) {
    write_one(to + column * 4, two(place[0], place[2]));
    write_one(to + (column < 2 ? 4 + column : 3) * 4, two(place[1], column == 1 ? place[2] : tenth));
  }
  static __device__ __forceinline__ uint32_t two(uint32_t a, uint32_t b) {
    return select_bytes(a, b, 0x5410);
  }
  float pitch, of_map;
};

// What a thread names for `ldmatrix` of cells: of one of two pairs that follow each other, one of two points
// at once, a pixel and 8 of the 16 channels. A pair's places are kStep words after the last one's.
template <int S, int kStep>
struct CellRows {
  __device__ __forceinline__ CellRows(const Call& call, const Maps& maps, const char* planes,
                                      const uint32_t* team_places, int pair, bool second, int pixel,
                                      int channels) {
    const Problem& s = call.problem;
    const int right = pixel % 2, down = pixel / 2;
    places = shared_address(team_places + pair * kStep + 4 * second);
    last_place = shared_address(team_places + pair * kStep + 2 + second);
    half = second ? 0xff76 : 0xbb32;
    odd = S == 2 && down && s.height > 1 ? 1 : 0;
    from = shared_address(planes) + channels * 16;
    if (right && s.width > 1) from += S * kUnit;
    if (down && s.height > 1) from += maps.pitch * kUnit;
    hold(places), hold(last_place), hold(half), hold(odd), hold(from);
  }

  // Where the cells of each two points are, in units from `from` on. That is for the first 16 channels; for
  // others a row's address differs in the bit kUnit.
  __device__ __forceinline__ void find(int pair, uint32_t (&place)[5]) const {
    uint32_t p[3];
    read_two(places + pair * kStep * 4, p);
    p[2] = read_one(last_place + pair * kStep * 4);
    place[0] = p[0] & 0xffff, place[1] = p[1] & 0xffff, place[2] = p[2] & 0xffff;
    place[3] = select_bytes(p[0], p[1], half), place[4] = select_bytes(p[2], p[0], half);
#pragma unroll
    for (int i = 0; i < 5; ++i) place[i] ^= odd;
  }
  uint32_t places, last_place, odd, from;
  // Which bytes of two words a third point's place is; the others are copies of its highest bit, which is
  // zero, since maps of 2^15 units do not fit.
  uint32_t half;
};

#endif

}  // namespace dcnv3::cuda
