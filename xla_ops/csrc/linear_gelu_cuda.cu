// y = gelu(x kernel + bias) on CUDA, in half precision: a matrix product on tensor cores whose results never
// leave the registers before GELU.
//
// A team of warps computes a tile of y, BM rows of BN columns, by walking over the inputs kDepth at a time.
// What the next steps need is on its way into shared memory meanwhile. A warp computes a part of the tile,
// all of it in registers, as float32, and takes it through shared memory of its own, so that what is written
// is whole rows.
//
// Few inputs leave little to multiply between one tile's first copy and its last write, so where there are
// many tiles a block stays, with several teams: while some multiply, others apply GELU or wait for memory.
// The block keeps the columns of the kernel that its tiles want. Where there are few tiles each is a block.
#include <atomic>

#include "cuda_tensor_cores.h"
#include "gelu_cuda_device.h"
#include "linear_gelu_cuda.h"

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
  static constexpr int kResults = WM * WN * 16 * TN;             // that wait to be written
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

  // Starts to copy the tile of x of the step that begins with input `first`.
  __device__ void fetch_x(int64_t first_row, int first, T* to) const {
    constexpr int kPieces = kDepth / 8, kDown = kThreads / kPieces;
    static_assert(kDown % 8 == 0);  // so the order of the pieces is the same
    const int row = thread / kPieces, piece = thread % kPieces, k = first + piece * 8;
    if (piece * 8 >= inputs_from(first)) return;
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

  // Writes GELU of the sums. No other warp waits, or is waited for: `results` is the team's, a part of it
  // this warp's.
  __device__ void finish(const Sums& sum, int64_t first_row, T* results) const {
    if (!works) return;
    constexpr int kPieces = TN / 8;
    T* const mine = results + thread / 32 * (16 * TN);
    const int to_mine = place<kPieces>(lane / 4, 0) + lane % 4 * 2;
    const int piece = lane % kPieces, column = first_column + warp_column + piece * 8;
    const int rows = column < call.outputs ? rows_from(first_row) : 0;
#pragma unroll
    for (int i = 0; i < TM / 16; ++i) {
      __syncwarp();  // what lay there has been read
#pragma unroll
      for (int j = 0; j < TN / 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float z[2] = {gelu_for<T, 1>(sum[i][j][2 * half]), gelu_for<T, 1>(sum[i][j][2 * half + 1])};
          store<2>(z, mine + half * 8 * TN + (to_mine ^ j * 8));
        }
      }
      __syncwarp();
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
#endif
};

// A tile of a block: its steps of x and of the kernel lie side by side.
template <class T, int BM, int BN, int WM, int WN, int kStages>
__global__ void __launch_bounds__(WM * WN * 32, 2) linear_gelu_kernel(const __grid_constant__ Call call) {
#if KERNEL_HAS_TENSOR_CORES
  using Form = Tile<T, BM, BN, WM, WN>;
  // Neighbouring blocks have the same rows of x.
  const int64_t across = (call.outputs + BN - 1) / BN, block = blockIdx.x, down = quotient(block, across);
  const int64_t first_row = down * BM;
  const int thread = threadIdx.x, first_column = int(block - down * across) * BN;
  const int steps = int((call.inputs + kDepth - 1) / kDepth);
  const Form tile(call, thread, first_column);
  constexpr int kStep = Form::kX + Form::kKernel;
  T* const stages = shared_memory<T>();
  T* const results = stages + kStages * kStep;
  float* const bias = reinterpret_cast<float*>(results + Form::kResults);

  // Starts what step `step` needs on its way, in a group of its own, which may be empty.
  const auto fetch = [&](int step) {
    if (step < steps) {
      T* const to = stages + step % kStages * kStep;
      const int k = step * kDepth, left = tile.inputs_from(k);
      tile.fetch_x(first_row, k, to);
      Form::fetch_kernel(call, first_column, k, left < kDepth ? left : kDepth, to + Form::kX, thread,
                         Form::kThreads);
    }
    end_group();
  };

  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  Form::fetch_bias(call, first_column, bias, thread, Form::kThreads);
  __syncthreads();
  typename Form::Sums sum;
  tile.begin(bias, sum);
  for (int step = 0; step < steps; ++step) {
    wait_for_groups<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);  // to where the step before has read
    const T* const from = stages + step % kStages * kStep;
    tile.multiply(from, from + Form::kX, tile.inputs_from(step * kDepth), sum);
  }
  tile.finish(sum, first_row, results);
#endif
}

// Tiles of a block that stays, kTeams at a time; it keeps all the inputs of its columns of the kernel.
constexpr int kTeams = 4, kStayingRows = 64, kStayingColumns = 128;
template <class T>
using Staying = Tile<T, kStayingRows, kStayingColumns, 2, 2>;

template <class T, int kStages>
__global__ void __launch_bounds__(Staying<T>::kThreads* kTeams, 1)
    linear_gelu_staying_kernel(const __grid_constant__ Call call) {
#if KERNEL_HAS_TENSOR_CORES
  using Form = Staying<T>;
  constexpr int kThreads = Form::kThreads;
  const int team = threadIdx.x / kThreads, thread = threadIdx.x % kThreads;
  // Neighbouring blocks have the same rows of x. Tiles that are too many for a round go to different blocks.
  const int across = int((call.outputs + kStayingColumns - 1) / kStayingColumns), along = gridDim.x / across;
  const int first_column = int(blockIdx.x % across) * kStayingColumns;
  const int first_tile = team * along + blockIdx.x / across, next = kTeams * along;
  const int tiles = int((call.rows + kStayingRows - 1) / kStayingRows);
  const int steps = int((call.inputs + kDepth - 1) / kDepth);
  const Form tile(call, thread, first_column);
  const int inputs = tile.inputs_from(0);
  T* const kernel = shared_memory<T>();
  T* const stages = kernel + inputs * kStayingColumns + team * (kStages * Form::kX + Form::kResults);
  T* const results = stages + kStages * Form::kX;
  float* const bias = reinterpret_cast<float*>(kernel + inputs * kStayingColumns +
                                               kTeams * (kStages * Form::kX + Form::kResults));

  // Starts the next step's part of x on its way, in a group of its own, which may be empty.
  int coming = first_tile, coming_step = 0, coming_stage = 0;
  const auto fetch = [&] {
    if (coming < tiles) {
      tile.fetch_x(int64_t(coming) * kStayingRows, coming_step * kDepth, stages + coming_stage * Form::kX);
      coming_stage = (coming_stage + 1) % kStages;
      if (++coming_step == steps) coming_step = 0, coming += next;
    }
    end_group();
  };

  Form::fetch_kernel(call, first_column, 0, inputs, kernel, threadIdx.x, kThreads * kTeams);
  end_group();
  for (int i = 0; i < kStages - 1; ++i) fetch();
  Form::fetch_bias(call, first_column, bias, threadIdx.x, kThreads * kTeams);
  wait_for_groups<kStages - 1>();
  __syncthreads();

  int stage = 0;
  for (int at = first_tile; at < tiles; at += next) {
    typename Form::Sums sum;
    tile.begin(bias, sum);
    for (int step = 0; step < steps; ++step) {
      wait_for_groups<kStages - 2>();
      wait_for_team(1 + team, kThreads);
      fetch();  // to where the step before has read
      tile.multiply(stages + stage * Form::kX, kernel + step * Form::kKernel, tile.inputs_from(step * kDepth),
                    sum);
      stage = (stage + 1) % kStages;
    }
    tile.finish(sum, int64_t(at) * kStayingRows, results);
  }
#endif
}

template <class... Parameters>
cudaError_t launch_with(cudaStream_t stream, const Device& device, int64_t blocks, int threads, size_t shared,
                        void (*kernel)(Parameters...), const Call& call) {
  if (shared > kPlainShared) {  // the same for all calls: others may be launching this kernel
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared);
    if (error) return error;
  }
  return launch(stream, blocks, threads, shared, kernel, call);
}

template <class T, int BM, int BN, int WM, int WN, int kStages>
cudaError_t launch_tiles(cudaStream_t stream, const Device& device, const Call& call) {
  using Form = Tile<T, BM, BN, WM, WN>;
  constexpr size_t kBytes =
      (kStages * (Form::kX + Form::kKernel) + Form::kResults) * sizeof(T) + BN * sizeof(float);
  static_assert(kBytes <= (99 << 10));  // what a block may have on any GPU with tensor cores of this kind
  const int64_t blocks = (call.rows + BM - 1) / BM * ((call.outputs + BN - 1) / BN);
  return launch_with(stream, device, blocks, Form::kThreads, kBytes,
                     linear_gelu_kernel<T, BM, BN, WM, WN, kStages>, call);
}

template <class T, int kStages>
size_t staying_bytes(const Call& call) {
  using Form = Staying<T>;
  const size_t kernel = (call.inputs + 15) / 16 * 16 * kStayingColumns;
  return (kernel + kTeams * (kStages * Form::kX + Form::kResults)) * sizeof(T) +
         kStayingColumns * sizeof(float);
}
template <class T, int kStages>
cudaError_t launch_staying(cudaStream_t stream, const Device& device, const Call& call) {
  const int64_t across = (call.outputs + kStayingColumns - 1) / kStayingColumns;
  const int64_t along = across < device.processors ? device.processors / across : 1;
  return launch_with(stream, device, across * along, Staying<T>::kThreads * kTeams,
                     staying_bytes<T, kStages>(call), linear_gelu_staying_kernel<T, kStages>, call);
}

// Blocks that stay where each of their teams has a tile; else the largest tiles of which there are enough for
// most multiprocessors.
template <class T>
cudaError_t launch_form(cudaStream_t stream, const Call& call) {
  Device device;
  if (cudaError_t error = find_device(&device)) return error;
  const auto tiles = [&](int64_t rows, int64_t columns) {
    return (call.rows + rows - 1) / rows * ((call.outputs + columns - 1) / columns);
  };
  if (tiles(kStayingRows, kStayingColumns) >= kTeams * device.processors) {
    const size_t shared = device.shared;
    if (staying_bytes<T, 4>(call) <= shared) return launch_staying<T, 4>(stream, device, call);
    if (staying_bytes<T, 2>(call) <= shared) return launch_staying<T, 2>(stream, device, call);
  }
  const int64_t enough = device.processors * 3 / 4;
  if (tiles(128, 128) >= 2 * device.processors)
    return launch_tiles<T, 128, 128, 4, 2, 2>(stream, device, call);
  if (tiles(64, 64) >= enough) return launch_tiles<T, 64, 64, 2, 2, 4>(stream, device, call);
  if (tiles(32, 64) >= enough) return launch_tiles<T, 32, 64, 2, 2, 5>(stream, device, call);
  return launch_tiles<T, 32, 32, 2, 2, 9>(stream, device, call);
}

}  // namespace

const char* refusal(const Call& call) {
  if (!call.gelu || call.map.channels) return "expected GELU to follow the product";
  if (call.panels) return "expected a kernel in rows";
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
  return has_tensor_cores(linear_gelu_kernel<BFloat16, 64, 64, 2, 2, 4>, answer);
}

cudaError_t forward(cudaStream_t stream, const Call& call) {
  if (call.rows == 0) return cudaSuccess;
  return call.type == Type::kBFloat16 ? launch_form<BFloat16>(stream, call)
                                      : launch_form<Float16>(stream, call);
}

}  // namespace linear::cuda
