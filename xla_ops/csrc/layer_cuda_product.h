// A product of few rows, y = f(g(x) kernel + bias), in half precision: g may be LayerNorm, and f GELU or
// the addition of another map.
//
// A small product is over as soon as its memory has been waited for, so all that a block wants is on its way
// at once: a tile of 32 rows and 32 or 64 columns with all inputs, or a part of them. The parts of a tile are
// a cluster, whose blocks then sum up what each has, some rows each, always in the same order. The weights
// and the vectors are fetched before anything is waited for, while the kernel before this one may still be
// writing.
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
  // Rows in shared memory begin so far from each other that matrices and sums do not meet in a bank: an odd
  // number of pieces of 16 bytes, and eight banks further each row.
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
  const auto place = [&](int i) { return int64_t(first_row + row + i) * p.inputs; };  // of a row of a map
  const auto for_pieces = [&](auto f) {  // f(first input, values of the rows)
#pragma unroll 1
    for (int at = lane * 8; at < p.inputs; at += 32 * 8) {
      float v[kEach][8];
#pragma unroll
      for (int i = 0; i < kEach; ++i) load<8>(x + (row + i) * pitch + at, v[i]);
      f(at, v);
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
  for_pieces([&](int, const float (&v)[kEach][8]) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int c = 0; c < 8; ++c) mean[i] += v[i][c];
    }
  });
  sum_up(mean);
#pragma unroll
  for (int i = 0; i < kEach; ++i) mean[i] *= p.share;
  for_pieces([&](int, const float (&v)[kEach][8]) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int c = 0; c < 8; ++c) factor[i] += (v[i][c] - mean[i]) * (v[i][c] - mean[i]);
    }
  });
  sum_up(factor);
#pragma unroll
  for (int i = 0; i < kEach; ++i) factor[i] = rsqrtf(factor[i] * p.share + p.epsilon);
  for_pieces([&](int at, const float (&v)[kEach][8]) {
    uint4 added[kEach];  // of all rows before any is used
    float scale[8], bias[8];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      added[i] = uint4();
      if (!p.added || first_row + row + i >= p.rows) continue;
      added[i] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.added) + place(i) + at);
    }
    load<8>(vectors + at, scale);
    load<8>(vectors + p.inputs + at, bias);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float more[8], normal[8];
      unpack_word<T>(added[i], more);
#pragma unroll
      for (int c = 0; c < 8; ++c) normal[c] = (v[i][c] - mean[i]) * factor[i] * scale[c] + bias[c] + more[c];
      store<8>(normal, x + (row + i) * pitch + at);
      if (writes && first_row + row + i < p.rows) {
        store<8>(normal, static_cast<T*>(p.taken) + place(i) + at);
      }
    }
  });
}

#endif

// The cluster of a tile has `parts` blocks.
template <class T, int BN>
__global__ void __launch_bounds__(kThreads, 3)
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
  // Eight threads copy a row of x.
  const int x_row = threadIdx.x / 8, x_first = threadIdx.x % 8 * 8;
  const T* const x_from = static_cast<const T*>(p.x) + int64_t(first_row + x_row) * p.inputs + first_input;
  T* const x_to = x + x_row * pitch;
  const bool x_there = first_row + x_row < p.rows;
  if (p.early) wait_for_kernel_before();
  let_next_kernel_begin();

#pragma unroll 4
  for (int at = x_first; at < depth; at += 64) copy_ahead(x_to + at, x_from + at, x_there);
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
  __syncwarp();  // beyond which compilers do not put these reads off
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

// How a product is cut up: tiles of 64 columns or of 32, and the parts of a tile.
struct Cut {
  bool wide;
  int parts;
};
template <class T>
size_t bytes_of_block(const Product& p, Cut cut) {
  return (cut.wide ? Tile<T, 64>::bytes : Tile<T, 32>::bytes)(p.inputs / cut.parts, p.scale.data);
}
inline int64_t blocks_of(const Product& p, Cut cut) {
  const int columns = cut.wide ? 64 : 32;
  return int64_t((p.rows + kRows - 1) / kRows) * ((p.outputs + columns - 1) / columns) * cut.parts;
}
// What has a norm has to be whole, and a part whole sixteens.
inline bool allows(const Product& p, Cut cut) {
  return cut.parts == 1 || (!p.scale.data && p.inputs % (cut.parts * 16) == 0);
}

// That with which a multiprocessor has the least to copy, where the barriers of a cluster count as so much.
constexpr size_t kBarriers = 32 << 10;
template <class T>
Cut cut_of(const Device& device, const Product& p) {
  Cut best = {};
  size_t least = SIZE_MAX;
  for (const int parts : {1, 2, 4, 8}) {
    for (const bool wide : {true, false}) {
      const Cut cut = {wide, parts};
      const size_t bytes = bytes_of_block<T>(p, cut), columns = wide ? 64 : 32;
      if (!allows(p, cut) || bytes > size_t(device.shared)) continue;
      const size_t rounds = (blocks_of(p, cut) + device.processors - 1) / device.processors;
      const size_t copied = rounds * (kRows + columns) * (p.inputs / parts) * sizeof(T);
      const size_t cost = copied + (parts > 1 ? kBarriers : 0);
      if (cost < least) best = cut, least = cost;
    }
  }
  return best;
}

template <class T>
cudaError_t launch_product(cudaStream_t stream, const Device& device, const Product& p, Cut cut) {
  return launch_with({p.early, cut.parts}, stream, device, blocks_of(p, cut), kThreads,
                     bytes_of_block<T>(p, cut), cut.wide ? product_kernel<T, 64> : product_kernel<T, 32>, p,
                     cut.parts);
}
template <class T>
cudaError_t multiply(cudaStream_t stream, const Device& device, const Product& p) {
  const Cut cut = cut_of<T>(device, p);
  return cut.parts ? launch_product<T>(stream, device, p, cut) : cudaErrorInvalidConfiguration;
}

}  // namespace
}  // namespace layer::cuda
