// y = gelu(x kernel + bias) on CUDA, in half precision: a matrix product on tensor cores whose results never
// leave the registers before bias and GELU.
//
// A block computes a tile of y, BM rows of BN columns, by walking over the inputs kDepth at a time. The
// tiles of x and of the kernel for the next steps are on their way into shared memory meanwhile. A warp
// computes a part of the tile, all of it in registers, as float32. The result goes through shared memory
// once more, so that what is written is whole rows.
#include <atomic>

#include "cuda_tensor_cores.h"
#include "gelu_cuda_device.h"
#include "linear_gelu_cuda.h"

namespace linear::cuda {
namespace {

using namespace xla_ops::cuda;

constexpr int kDepth = 32, kStages = 3;

// The places of pieces of 16 bytes in shared memory. The eight rows that a warp reads a matrix from at
// once would begin in the same banks, so each row has its pieces in another order.
__device__ __forceinline__ int place_of_x(int row, int piece) {
  return (row * (kDepth / 8) + (piece ^ (row / 2 & 3))) * 8;
}
template <int BN>
__device__ __forceinline__ int place_of_kernel(int row, int piece) {
  return (row * (BN / 8) + (piece ^ (row & 7))) * 8;
}

template <int BM, int BN>
constexpr int kTiles = kStages * (BM + BN) * kDepth;  // values in shared memory

// The block has WM x WN warps.
template <class T, int BM, int BN, int WM, int WN>
__global__ void __launch_bounds__(WM * WN * 32, 2) linear_gelu_kernel(const __grid_constant__ Call call) {
#if KERNEL_HAS_TENSOR_CORES
  constexpr int kThreads = WM * WN * 32, TM = BM / WM, TN = BN / WN, kPieces = BN / 8, kRow = BN + 8;
  static_assert(TM % 16 == 0 && TN % 16 == 0 && kPieces % 8 == 0 && BM * kRow <= kTiles<BM, BN>);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / WN * TM, warp_column = warp % WN * TN;
  const int inputs = int(call.inputs), outputs = int(call.outputs);
  // Neighbouring blocks have the same rows of x.
  const int64_t across = (outputs + BN - 1) / BN, block = blockIdx.x, down = quotient(block, across);
  const int64_t first_row = down * BM;
  const int first_column = int(block - down * across) * BN;
  const T* const x = static_cast<const T*>(call.x);
  const T* const kernel = static_cast<const T*>(call.kernel);
  T* const tiles = shared_memory<T>();
  const auto tile_of_x = [&](int step) { return tiles + step % kStages * (BM + BN) * kDepth; };
  const int steps = (inputs + kDepth - 1) / kDepth;

  // Starts what step `step` needs on its way, in a group of its own, which may be empty.
  const auto fetch = [&](int step) {
    T* const to_x = tile_of_x(step);
    T* const to_kernel = to_x + BM * kDepth;
    if (step < steps) {
      for (int i = thread; i < BM * (kDepth / 8); i += kThreads) {
        const int row = i / (kDepth / 8), piece = i % (kDepth / 8), k = step * kDepth + piece * 8;
        const bool there = first_row + row < call.rows && k < inputs;
        copy_ahead(to_x + place_of_x(row, piece), there ? x + (first_row + row) * inputs + k : x, there);
      }
      for (int i = thread; i < kDepth * kPieces; i += kThreads) {
        const int row = i / kPieces, piece = i % kPieces, k = step * kDepth + row;
        const int column = first_column + piece * 8;
        const bool there = k < inputs && column < outputs;
        copy_ahead(to_kernel + place_of_kernel<BN>(row, piece),
                   there ? kernel + int64_t(k) * outputs + column : kernel, there);
      }
    }
    end_group();
  };

  float sum[TM / 16][TN / 8][4] = {};
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_groups<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);  // to where the step before has read
    const T* const from_x = tile_of_x(step);
    const T* const from_kernel = from_x + BM * kDepth;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[TM / 16][4], b[TN / 16][4];
#pragma unroll
      for (int i = 0; i < TM / 16; ++i) {
        load_matrices<false>(from_x + place_of_x(warp_row + i * 16 + lane % 16, k / 8 + lane / 16), a[i]);
      }
#pragma unroll
      for (int j = 0; j < TN / 16; ++j) {
        const int piece = (warp_column + j * 16) / 8 + lane / 16;
        load_matrices<true>(from_kernel + place_of_kernel<BN>(k + lane % 16, piece), b[j]);
      }
#pragma unroll
      for (int i = 0; i < TM / 16; ++i) {
#pragma unroll
        for (int j = 0; j < TN / 8; ++j) {
          multiply_add<T>(a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], sum[i][j]);
        }
      }
    }
  }
  wait_for_groups<0>();
  __syncthreads();

#pragma unroll
  for (int j = 0; j < TN / 8; ++j) {
    const int column = warp_column + j * 8 + lane % 4 * 2;
    float bias[2] = {};
    if (first_column + column < outputs) {
      load_parameters<2, T>(call.bias, call.bias_type, first_column + column, bias);
    }
#pragma unroll
    for (int i = 0; i < TM / 16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float z[2] = {gelu_for<T, 1>(sum[i][j][2 * half] + bias[0]),
                            gelu_for<T, 1>(sum[i][j][2 * half + 1] + bias[1])};
        store<2>(z, tiles + (warp_row + i * 16 + half * 8 + lane / 4) * kRow + column);
      }
    }
  }
  __syncthreads();
  for (int i = thread; i < BM * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * 8;
    if (first_row + row >= call.rows || first_column + column >= outputs) continue;
    *reinterpret_cast<uint4*>(static_cast<T*>(call.y) + (first_row + row) * outputs + first_column + column) =
        *reinterpret_cast<const uint4*>(tiles + row * kRow + column);
  }
#endif
}

template <class T, int BM, int BN, int WM, int WN>
cudaError_t launch_tiles(cudaStream_t stream, const Call& call) {
  constexpr size_t kBytes = kTiles<BM, BN> * sizeof(T);
  static_assert(kBytes <= kPlainShared);
  const int64_t blocks = (call.rows + BM - 1) / BM * ((call.outputs + BN - 1) / BN);
  return launch(stream, blocks, WM * WN * 32, kBytes, linear_gelu_kernel<T, BM, BN, WM, WN>, call);
}

// The largest tiles of which there are enough for most multiprocessors.
template <class T>
cudaError_t launch_form(cudaStream_t stream, const Call& call) {
  Device device;
  if (cudaError_t error = find_device(&device)) return error;
  const int64_t enough = device.processors * 3 / 4;
  const auto tiles = [&](int64_t rows, int64_t columns) {
    return (call.rows + rows - 1) / rows * ((call.outputs + columns - 1) / columns);
  };
  if (tiles(128, 128) >= enough) return launch_tiles<T, 128, 128, 4, 2>(stream, call);
  if (tiles(64, 64) >= enough) return launch_tiles<T, 64, 64, 2, 2>(stream, call);
  return launch_tiles<T, 32, 64, 2, 2>(stream, call);
}

}  // namespace

const char* refusal(const Call& call) {
  if (!call.gelu || call.map.channels) return "expected GELU to follow the product";
  if (call.type != Type::kBFloat16 && call.type != Type::kFloat16) return "expected bfloat16 or float16";
  if (call.inputs % 8 || call.outputs % 8) return "expected inputs and outputs in eights";
  if (call.inputs > INT32_MAX / 2 || call.outputs > INT32_MAX / 2) return "more than 2^30 inputs or outputs";
  if (call.rows / 32 * (call.outputs / 8) >= INT32_MAX) return "more than 2^31 blocks";
  if (!aligned(call.x) || !aligned(call.kernel) || !aligned(call.bias) || !aligned(call.y)) {
    return "operands that do not begin at 16 bytes";
  }
  return nullptr;
}

cudaError_t serves(bool* answer) {
  // By the number of the GPU: 0 not known, 1 no, 2 yes.
  static std::atomic<int> known[64];
  int device;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  std::atomic<int>* const cell = device < 64 ? &known[device] : nullptr;
  int found = cell ? cell->load() : 0;
  if (!found) {
    cudaFuncAttributes attributes = {};
    const cudaError_t error =
        cudaFuncGetAttributes(&attributes, linear_gelu_kernel<BFloat16, 128, 128, 4, 2>);
    const bool none = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
    if (error && !none) return error;
    // Of the code that this GPU would run: an older one's, compiled anew, would have no body.
    found = !none && attributes.ptxVersion >= 80 ? 2 : 1;
    if (cell) cell->store(found);
  }
  *answer = found == 2;
  return cudaSuccess;
}

cudaError_t forward(cudaStream_t stream, const Call& call) {
  if (call.rows == 0) return cudaSuccess;
  return call.type == Type::kBFloat16 ? launch_form<BFloat16>(stream, call)
                                      : launch_form<Float16>(stream, call);
}

}  // namespace linear::cuda
