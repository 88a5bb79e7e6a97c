// A product of few rows, y = f(g(x) kernel + bias), in half precision: g may be LayerNorm, and f GELU or
// the addition of another map.
//
// A small product is over as soon as its memory has been waited for, so all that a block wants is on its way
// at once: a tile of 32 rows and 32 or 64 columns with all inputs, or a part of them. The parts of a tile are
// a cluster, whose blocks then sum up what each has, some rows each, always in the same order. The kernel and
// the vectors come before anything is waited for: while what the kernel before this one writes is not there
// yet.
#pragma once

#include "cuda_chain.h"
#include "gelu_cuda_device.h"
#include "layer_call.h"

namespace layer::cuda {
namespace {

using namespace xla_ops::cuda;

struct Product {
  int rows, inputs, outputs;
  bool early;  // of its launch: the kernel and the vectors were there before the kernel before this one
  bool gelu;
  float share, epsilon;  // of an input in a mean, and the norm's
  const void* x;         // (rows, inputs)
  Array scale, bias;     // (inputs), of the norm of x; null where there is none
  const void* added;     // (rows, inputs), to the norm of x; or null
  void* taken;           // (rows, inputs), where that is written too; or null
  const void* kernel;    // (inputs, outputs)
  Array offset;          // (outputs), what the product's sums begin with
  const void* residual;  // (rows, outputs); or null
  void* y;               // (rows, outputs)
};

constexpr int kRows = 32, kWarps = 8, kThreads = kWarps * 32;

// Of tiles of BN columns: a warp multiplies 32 rows by 16 columns, and every kDeep-th sixteen of the inputs.
template <class T, int BN>
struct Tile {
  static constexpr int kAcross = BN / 16, kDeep = kWarps / kAcross;
  // Rows in shared memory begin so far from each other that what a warp reads or writes at once does not meet
  // in a bank: pieces of 16 bytes, an odd number of them, and sums, eight banks further each row.
  static constexpr int kPitch = BN + 8;
  static constexpr int kUnits = kRows * BN / 4 / kThreads;  // of four columns that a thread finishes, at most
  static_assert(kAcross * kDeep == kWarps && kUnits * kThreads * 4 == kRows * BN && kPitch % 32 == 8);

  static __host__ __device__ int x_pitch(int depth) { return depth + 8; }
  static size_t bytes(int64_t depth, bool norm) {
    return (kRows * (depth + 8) + depth * kPitch) * sizeof(T) + kDeep * kRows * kPitch * sizeof(float) +
           (norm ? 2 * depth * sizeof(float) : 0);
  }
};

#if KERNEL_HAS_CLUSTERS

// A warp's four rows of x, in shared memory, become their norms.
template <class T>
__device__ __forceinline__ void normalise(const Product& p, int first_row, T* x, int pitch,
                                          const float* vectors, bool writes) {
  constexpr int kEach = kRows / kWarps;
  const int lane = threadIdx.x % 32, row = int(threadIdx.x / 32) * kEach;
  const auto for_pieces = [&](auto f) {
#pragma unroll 1
    for (int at = lane * 8; at < p.inputs; at += 32 * 8) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        float v[8];
        load<8>(x + (row + i) * pitch + at, v);
        f(at, i, v);
      }
    }
  };
  const auto sum_up = [](float (&v)[kEach]) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], mask);
    }
  };
  float mean[kEach] = {}, factor[kEach] = {};
  for_pieces([&](int, int i, const float* v) {
#pragma unroll
    for (int c = 0; c < 8; ++c) mean[i] += v[c];
  });
  sum_up(mean);
#pragma unroll
  for (int i = 0; i < kEach; ++i) mean[i] *= p.share;
  for_pieces([&](int, int i, const float* v) {
#pragma unroll
    for (int c = 0; c < 8; ++c) factor[i] += (v[c] - mean[i]) * (v[c] - mean[i]);
  });
  sum_up(factor);
#pragma unroll
  for (int i = 0; i < kEach; ++i) factor[i] = rsqrtf(factor[i] * p.share + p.epsilon);
  for_pieces([&](int at, int i, float* v) {
    const int64_t place = int64_t(first_row + row + i) * p.inputs + at;
    const bool there = first_row + row + i < p.rows;
    float added[8] = {};
    if (p.added && there) load<8>(static_cast<const T*>(p.added) + place, added);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      v[c] = (v[c] - mean[i]) * factor[i] * vectors[at + c] + vectors[p.inputs + at + c] + added[c];
    }
    store<8>(v, x + (row + i) * pitch + at);
    if (writes && there) store<8>(v, static_cast<T*>(p.taken) + place);
  });
}

#endif

// The cluster of a tile has `parts` blocks.
template <class T, int BN>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(const __grid_constant__ Product p, const __grid_constant__ int parts) {
#if KERNEL_HAS_CLUSTERS
  using Form = Tile<T, BN>;
  constexpr int kAcross = Form::kAcross, kDeep = Form::kDeep, kPitch = Form::kPitch, kUnits = Form::kUnits;
  const int across = (p.outputs + BN - 1) / BN, tile = int(blockIdx.x) / parts;
  const int part = int(blockIdx.x) - tile * parts;
  const int down = tile / across, first_row = down * kRows, first_column = (tile - down * across) * BN;
  const int depth = p.inputs / parts, first_input = part * depth, pitch = Form::x_pitch(depth);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* const x = shared_memory<T>();
  T* const kernel = x + kRows * pitch;
  float* const sums = reinterpret_cast<float*>(kernel + depth * kPitch);
  float* const vectors = sums + kDeep * kRows * kPitch;

  if (!p.early) wait_for_kernel_before();
  constexpr int kPieces = BN / 8;
  const int piece = threadIdx.x % kPieces, column = first_column + piece * 8;
#pragma unroll 4
  for (int row = threadIdx.x / kPieces; row < depth; row += kThreads / kPieces) {
    copy_ahead(kernel + row * kPitch + piece * 8,
               static_cast<const T*>(p.kernel) + int64_t(first_input + row) * p.outputs + column,
               column < p.outputs);
  }
  if (p.scale.data) {
    for (int at = threadIdx.x * 2; at < p.inputs; at += kThreads * 2) {
      float scale[2], bias[2];
      load_parameters<2, T>(p.scale.data, p.scale.type, at, scale);
      load_parameters<2, T>(p.bias.data, p.bias.type, at, bias);
      store<2>(scale, vectors + at);
      store<2>(bias, vectors + p.inputs + at);
    }
  }
  // What this thread is to finish: four columns of a row of the tile, or of two.
  const int rows_each = kRows / parts;
  const auto unit = [&](int u, int* row, int* column) {
    const int index = threadIdx.x + u * kThreads;
    *row = index / (BN / 4), *column = index % (BN / 4) * 4;
    const bool there = *row < rows_each && first_column + *column < p.outputs;
    *row += part * rows_each;
    return there && first_row + *row < p.rows;
  };
  float offset[kUnits][4] = {};
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    int row, column;
    if (!unit(u, &row, &column)) continue;
    load_parameters<4, T>(p.offset.data, p.offset.type, first_column + column, offset[u]);
  }
  if (p.early) wait_for_kernel_before();
  let_next_kernel_begin();

  for (int row = warp; row < kRows; row += kWarps) {
    const T* const from = static_cast<const T*>(p.x) + int64_t(first_row + row) * p.inputs + first_input;
    for (int at = lane * 8; at < depth; at += 32 * 8) {
      copy_ahead(x + row * pitch + at, from + at, first_row + row < p.rows);
    }
  }
  end_group();
  Word<T, 4> residual[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    int row, column;
    residual[u] = Word<T, 4>();
    if (!unit(u, &row, &column) || !p.residual) continue;
    residual[u] = *reinterpret_cast<const Word<T, 4>*>(
        static_cast<const T*>(p.residual) + int64_t(first_row + row) * p.outputs + first_column + column);
  }
  wait_for_groups<0>();
  __syncthreads();
  if (p.scale.data) {
    normalise(p, first_row, x, pitch, vectors, p.taken && first_column == 0);
    __syncthreads();
  }

  float sum[kRows / 16][2][4] = {};
  const int own_column = warp % kAcross * 16, deep = warp / kAcross;
#pragma unroll 4
  for (int k = deep * 16; k < depth; k += kDeep * 16) {
    uint32_t a[kRows / 16][4], b[4];
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      load_matrices<false>(x + (i * 16 + lane % 16) * pitch + k + lane / 16 * 8, a[i]);
    }
    load_matrices<true>(kernel + (k + lane % 16) * kPitch + own_column + lane / 16 * 8, b);
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      multiply_add<T>(a[i], b[0], b[1], sum[i][0]);
      multiply_add<T>(a[i], b[2], b[3], sum[i][1]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = i * 16 + half * 8 + lane / 4, column = own_column + j * 8 + lane % 4 * 2;
        store<2>(sum[i][j] + half * 2, sums + (deep * kRows + row) * kPitch + column);
      }
    }
  }
  if (parts > 1) {
    wait_for_cluster();
  } else {
    __syncthreads();
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    int row, column;
    if (!unit(u, &row, &column)) continue;
    float v[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) v[c] = offset[u][c];
    for (int block = 0; block < parts; ++block) {
#pragma unroll
      for (int i = 0; i < kDeep; ++i) {
        const float* const from = sums + (i * kRows + row) * kPitch + column;
        float more[4];
        if (parts > 1) {
          read_of_block(block, from, more);
        } else {
          load<4>(from, more);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) v[c] += more[c];
      }
    }
    if (p.gelu) {
#pragma unroll
      for (int c = 0; c < 4; ++c) v[c] = gelu_for<T, 1>(v[c]);
    }
    if (p.residual) {
      float base[4];
      unpack_word<T>(residual[u], base);
#pragma unroll
      for (int c = 0; c < 4; ++c) v[c] += base[c];
    }
    store<4>(v, static_cast<T*>(p.y) + int64_t(first_row + row) * p.outputs + first_column + column);
  }
  if (parts > 1) leave_cluster();
#endif
}

// What a block of any product may take of the inputs, and shared memory for so many.
constexpr int kMostInputs = 1024;
template <class T>
size_t most_bytes() {
  return Tile<T, 32>::bytes(kMostInputs, true);
}

// The largest tiles, and the fewest parts, with which most multiprocessors have a block; what has a norm is
// not cut into parts.
template <class T>
cudaError_t multiply(cudaStream_t stream, const Device& device, const Product& p) {
  const int64_t down = (p.rows + kRows - 1) / kRows, enough = device.processors * 3 / 4;
  const auto tiles = [&](int columns) { return down * ((p.outputs + columns - 1) / columns); };
  const auto bytes = [&](bool wide, int parts) {
    return (wide ? Tile<T, 64>::bytes : Tile<T, 32>::bytes)(p.inputs / parts, p.scale.data);
  };
  int most = 1;
  while (!p.scale.data && most < 8 && p.inputs % (32 * most) == 0 && p.inputs > 64 * most) most *= 2;
  const bool wide = tiles(64) * most >= enough && bytes(true, most) <= size_t(device.shared);
  const int64_t count = tiles(wide ? 64 : 32);
  int parts = 1;
  while (parts < most && (count * parts < enough || bytes(wide, parts) > size_t(device.shared))) parts *= 2;
  return launch_with({p.early, parts}, stream, device, count * parts, kThreads, bytes(wide, parts),
                     wide ? product_kernel<T, 64> : product_kernel<T, 32>, p, parts);
}

}  // namespace
}  // namespace layer::cuda
