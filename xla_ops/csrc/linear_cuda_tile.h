// A tile of y = f(x kernel + bias) on CUDA: what a team of warps does to compute it, for the kernels of
// linear_cuda.cu and linear_cuda_wide.h.
#pragma once

#include "cuda_warpgroup.h"
#include "gelu_cuda_device.h"
#include "linear_cuda.h"

namespace linear::cuda {
namespace {

using namespace xla_ops::cuda;

constexpr int kDepth = 64;

// The place of a piece of 16 bytes in rows of so many. The eight rows that a warp reads a matrix from at once
// would begin in the same banks, so neighbours have their pieces in another order.
template <int kPieces>
__device__ __forceinline__ int place(int row, int piece) {
  constexpr int kSame = kPieces < 8 ? 8 / kPieces : 1, kOrders = kPieces < 8 ? kPieces : 8;
  return (row * kPieces + (piece ^ (row / kSame & (kOrders - 1)))) * 8;
}

// A tile of a team of WM x WN warps.
template <class T, int BM, int BN, int WM, int WN>
struct Tile {
  static constexpr int kThreads = WM * WN * 32, TM = BM / WM, TN = BN / WN;
  static constexpr int kX = BM * kDepth, kKernel = kDepth * BN;  // values of a step
  static constexpr int kAside = TN < 64 ? TN : 64;               // columns of a warp's rows on their way
  static constexpr int kResults = WM * WN * 16 * kAside;         // that wait to be written
  static_assert(kKernel % 8 == 0 && TM % 16 == 0 && TN % 16 == 0 && (TN & (TN - 1)) == 0);

#if KERNEL_HAS_TENSOR_CORES
  using Sums = float[TM / 16][TN / 8][4];

  const Call& call;
  const int thread, lane, warp_row, warp_column, first_column;
  const bool works;  // whether the warp has columns at all
  // Where the thread reads the first matrices of a step. Those further right are an exclusive or away:
  // neither the orders of the pieces nor what a warp begins with carry into that.
  const int from_x, from_kernel;

  __device__ Tile(const Call& call, int thread, int first_column)
      : call(call),
        thread(thread),
        lane(thread % 32),
        warp_row(thread / 32 / WN * TM),
        warp_column(thread / 32 % WN * TN),
        first_column(first_column),
        works(first_column + warp_column < call.outputs),
        from_x(place<kDepth / 8>(warp_row + lane % 16, lane / 16)),
        from_kernel(place<BN / 8>(lane % 16, warp_column / 8 + lane / 16)) {}

  // How many inputs there are from k on, in sixteens as they are multiplied: zeros fill the last.
  __device__ int inputs_from(int k) const { return (int(call.inputs) - k + 15) / 16 * 16; }

  // How many rows the tile has from `first` on.
  __device__ int rows_from(int64_t first) const {
    const int64_t left = call.rows - first;
    return left < BM ? int(left) : BM;
  }

  // Starts to copy the tile of x of the step that begins with input `first`: its sixteens, or the whole step.
  __device__ void fetch_x(int64_t first_row, int first, T* to, bool whole = false) const {
    constexpr int kPieces = kDepth / 8, kDown = kThreads / kPieces;
    static_assert(kDown % 8 == 0);  // so the order of the pieces is the same
    const int row = thread / kPieces, piece = thread % kPieces, k = first + piece * 8;
    if (!whole && piece * 8 >= inputs_from(first)) return;
    const int rows = k < call.inputs ? rows_from(first_row) : 0;
    const T* from = static_cast<const T*>(call.x) + (first_row + row) * call.inputs + k;
    to += place<kPieces>(row, piece);
#pragma unroll
    for (int down = 0; down < BM; down += kDown) {
      copy_ahead(to + down * kDepth, from, row + down < rows);
      from += kDown * call.inputs;
    }
  }

  // Likewise `count` rows of the kernel from `first` on, by so many threads.
  static __device__ void fetch_kernel(const Call& call, int first_column, int first, int count, T* to,
                                      int thread, int threads) {
    constexpr int kPieces = BN / 8;
    const int top = thread / kPieces, piece = thread % kPieces, column = first_column + piece * 8;
    const int rows = column < call.outputs ? int(call.inputs) - first : 0;
    const T* from = static_cast<const T*>(call.kernel) + int64_t(first + top) * call.outputs + column;
    const int64_t next = threads / kPieces * call.outputs;
#pragma unroll 2
    for (int row = top; row < count; row += threads / kPieces) {
      copy_ahead(to + place<kPieces>(row, piece), from, row < rows);
      from += next;
    }
  }

  // The bias of the tile's columns, as float32.
  static __device__ void fetch_bias(const Call& call, int first_column, float* to, int thread, int threads) {
    for (int i = thread * 2; i < BN; i += threads * 2) {
      float bias[2] = {};
      if (first_column + i < call.outputs) {
        load_parameters<2, T>(call.bias, call.bias_type, first_column + i, bias);
      }
      store<2>(bias, to + i);
    }
  }

  __device__ void begin(const float* bias, Sums& sum) const {
#pragma unroll
    for (int j = 0; j < TN / 8; ++j) {
      float at[2];
      load<2>(bias + warp_column + j * 8 + lane % 4 * 2, at);
#pragma unroll
      for (int i = 0; i < TM / 16; ++i) {
#pragma unroll
        for (int d = 0; d < 4; ++d) sum[i][j][d] = at[d % 2];
      }
    }
  }

  // Adds the products of a step, of the first `depth` inputs in it.
  __device__ void multiply(const T* x, const T* kernel, int depth, Sums& sum) const {
    if (!works) return;
    if (depth >= kDepth) {
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) multiply_at(x, kernel, k, sum);
    } else {
#pragma unroll 1
      for (int k = 0; k < depth; k += 16) multiply_at(x, kernel, k, sum);
    }
  }
  __device__ __forceinline__ void multiply_at(const T* x, const T* kernel, int k, Sums& sum) const {
    uint32_t a[TM / 16][4], b[TN / 16][4];
#pragma unroll
    for (int i = 0; i < TM / 16; ++i) {
      load_matrices<false>(x + i * 16 * kDepth + (from_x ^ k), a[i]);
    }
#pragma unroll
    for (int j = 0; j < TN / 16; ++j) {
      load_matrices<true>(kernel + k * BN + (from_kernel ^ j * 16), b[j]);
    }
#pragma unroll
    for (int i = 0; i < TM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < TN / 8; ++j) {
        multiply_add<T>(a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], sum[i][j]);
      }
    }
  }

  // Writes the sums, or GELU of them. No other warp waits, or is waited for: `results` is the team's, a part
  // of it this warp's.
  template <bool gelu = true>
  __device__ void finish(const Sums& sum, int64_t first_row, T* results) const {
    if (!works) return;
    constexpr int kPieces = kAside / 8;
    T* const mine = results + thread / 32 * (16 * kAside);
    const int piece = lane % kPieces;
    const auto word = [](const float* z) {
      return gelu ? pack(gelu_for<T, 1>(z[0]), gelu_for<T, 1>(z[1]), T()) : pack(z[0], z[1], T());
    };
#if KERNEL_HAS_WARPGROUPS
    const uint32_t to_mine = shared_address(mine + place<kPieces>(lane % 16, lane / 16));
#else
    const int to_mine = place<kPieces>(lane / 4, 0) + lane % 4 * 2;
#endif
#pragma unroll
    for (int i = 0; i < TM / 16; ++i) {
#pragma unroll
      for (int part = 0; part < TN; part += kAside) {
        __syncwarp();  // what lay there has been read
#pragma unroll
        for (int j = 0; j < kPieces; j += 2) {
          const auto& left = sum[i][part / 8 + j];
          const auto& right = sum[i][part / 8 + j + 1];
          const uint32_t words[4] = {word(left), word(left + 2), word(right), word(right + 2)};
#if KERNEL_HAS_WARPGROUPS
          write_matrices(to_mine ^ j * 16, words);
#else
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            *reinterpret_cast<uint32_t*>(mine + w % 2 * 8 * kAside + (to_mine ^ (j + w / 2) * 8)) = words[w];
          }
#endif
        }
        __syncwarp();
        const int column = first_column + warp_column + part + piece * 8;
        const int rows = column < call.outputs ? rows_from(first_row) : 0;
        const int row = warp_row + i * 16 + lane / kPieces;
        T* to = static_cast<T*>(call.y) + (first_row + row) * call.outputs + column;
#pragma unroll
        for (int down = 0; down < 16; down += 32 / kPieces) {
          if (row + down < rows) {
            *reinterpret_cast<uint4*>(to) =
                *reinterpret_cast<const uint4*>(mine + place<kPieces>(down + lane / kPieces, piece));
          }
          to += 32 / kPieces * call.outputs;
        }
      }
    }
  }
#endif
};

}  // namespace
}  // namespace linear::cuda
