// y = gelu(x kernel1 + bias1) kernel2 + bias2 on CUDA, in half precision: both products of a narrow MLP on
// the tensor cores of compute capability 9.0, and what is between them never leaves the registers.
//
// A block stays on its multiprocessor and keeps both kernels in shared memory. Its warpgroups go their own
// ways: each takes 64 rows of x at a time, and walks over what is between the products kChunk columns at a
// time. A product makes them; GELU is applied where they are, as float32; rounded to T they are, in the same
// threads, what the second product takes, whose sums stay in registers to the end. While one applies GELU
// others multiply, and the rows that come next are on their way.
#include "mlp_cuda.h"

#include "cuda_warpgroup.h"
#include "gelu_cuda_device.h"

namespace linear::cuda {
namespace {

using namespace xla_ops::cuda;

struct MlpCall {
  Call first, second;
};

constexpr int kMlpRows = 64, kMlpGroups = 4, kMlpThreads = kMlpGroups * kWarpgroup;
constexpr int kChunk = 64;

// Of kChannels channels.
template <int kChannels>
struct MlpSizes {
  static constexpr int kPitch = kChannels + 8;  // of rows of y that wait to be written: not in the same banks
  static constexpr int kX = kMlpRows * kPitch;  // values of a warpgroup's rows, of x or y

  static size_t bytes(int64_t hidden) {
    return (kMlpGroups * 2 * kX + 2 * kChannels * hidden) * 2 + (hidden + kChannels) * sizeof(float);
  }
};

#if KERNEL_HAS_WARPGROUPS

// Starts to copy rows of values into cells: those of 8 columns lie below each other, rows * 16 bytes apart.
// Rows from `there` on are zeros. So many threads copy, this the one of that number. Eight of them copy a
// cell, which lies in one piece; a warp reads 64 bytes of each row.
template <int kThreads, class T>
__device__ __forceinline__ void fetch_cells(const T* from, int rows, int columns, int there, T* to,
                                            int thread) {
  const int pieces = columns / 8, units = rows * pieces;
#pragma unroll 4
  for (int unit = thread; unit < units; unit += kThreads) {
    const int cell = unit / 8, row = cell / pieces * 8 + unit % 8, piece = cell % pieces;
    copy_ahead(to + (piece * rows + row) * 8, from + int64_t(row) * columns + piece * 8, row < there);
  }
}

template <class T, int N>
__device__ __forceinline__ void fetch_vector(const void* from, Type type, int count, float* to, int thread) {
  for (int i = thread * 2; i < count; i += N * 2) {
    float at[2];
    load_parameters<2, T>(from, type, i, at);
    store<2>(at, to + i);
  }
}

// Adds the bias of the columns that the sums are of.
template <int N>
__device__ __forceinline__ void add_bias(const float* bias, int lane, float (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    float at[2];
    load<2>(bias + i * 2 + lane % 4 * 2, at);
#pragma unroll
    for (int d = 0; d < 4; ++d) sum[i + d] += at[d % 2];
  }
}

#endif

template <class T, int kChannels>
__global__ void __launch_bounds__(kMlpThreads, 1) mlp_kernel(const __grid_constant__ MlpCall call) {
#if KERNEL_HAS_WARPGROUPS
  using Sizes = MlpSizes<kChannels>;
  constexpr int kPitch = Sizes::kPitch;
  const int group = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  const int hidden = int(call.first.outputs);
  T* const x = shared_memory<T>() + group * 2 * Sizes::kX;
  T* const kernel1 = shared_memory<T>() + kMlpGroups * 2 * Sizes::kX;
  T* const kernel2 = kernel1 + kChannels * hidden;
  float* const bias1 = reinterpret_cast<float*>(kernel2 + kChannels * hidden);
  float* const bias2 = bias1 + hidden;

  const int tiles = int((call.first.rows + kMlpRows - 1) / kMlpRows), next = int(gridDim.x) * kMlpGroups;
  const int first_tile = group * int(gridDim.x) + int(blockIdx.x);
  const auto rows_of = [&](int tile) {
    const int64_t left = call.first.rows - int64_t(tile) * kMlpRows;
    return left < kMlpRows ? int(left) : kMlpRows;
  };
  // Starts a tile's rows on their way, in a group of its own, which may be empty.
  const auto fetch = [&](int tile, T* to) {
    if (tile < tiles) {
      fetch_cells<kWarpgroup>(static_cast<const T*>(call.first.x) + int64_t(tile) * (kMlpRows * kChannels),
                              kMlpRows, kChannels, rows_of(tile), to, thread);
    }
    end_group();
  };

  fetch_cells<kMlpThreads>(static_cast<const T*>(call.first.kernel), kChannels, hidden, kChannels, kernel1,
                           threadIdx.x);
  fetch_cells<kMlpThreads>(static_cast<const T*>(call.second.kernel), hidden, kChannels, hidden, kernel2,
                           threadIdx.x);
  fetch(first_tile, x);
  fetch_vector<T, kMlpThreads>(call.first.bias, call.first.bias_type, hidden, bias1, threadIdx.x);
  fetch_vector<T, kMlpThreads>(call.second.bias, call.second.bias_type, kChannels, bias2, threadIdx.x);
  wait_for_groups<0>();
  show_to_products();
  __syncthreads();

  int half = 0;  // of the warpgroup's memory, for the rows of every other tile
  for (int tile = first_tile; tile < tiles; tile += next, half ^= 1) {
    T* const mine = x + half * Sizes::kX;
    wait_for_groups<0>();
    show_to_products();
    wait_for_team(1 + group, kWarpgroup);
    // To where the last tile's have been read, and its results.
    fetch(tile + next, x + (half ^ 1) * Sizes::kX);

    float sum[kChannels / 2];
    uint32_t taken[kChunk / 16][4];
    for (int chunk = 0; chunk < hidden; chunk += kChunk) {
      float between[kChunk / 2];
      const uint64_t a = matrix(mine, kMlpRows * 16, 128);
      const uint64_t b1 = matrix(kernel1 + chunk * kChannels, 128, kChannels * 16);
      begin_products();
      multiply_shared<T, false>(a, b1, between);
#pragma unroll
      for (int k = 16; k < kChannels; k += 16) {
        multiply_shared<T, true>(further(a, k / 8 * kMlpRows * 16), further(b1, k * 16), between);
      }
      end_products();
      wait_for_products<0>();
      settle(between);
      add_bias(bias1 + chunk, lane, between);
#pragma unroll
      for (int i = 0; i < kChunk / 2; i += 2) {
        taken[i / 8][i % 8 / 2] = pack(gelu_for<T, 1>(between[i]), gelu_for<T, 1>(between[i + 1]), T());
      }
      const uint64_t b2 = matrix(kernel2 + chunk * 8, 128, hidden * 16);
      begin_products();
#pragma unroll
      for (int k = 0; k < kChunk / 16; ++k) {
        multiply_registers<T>(taken[k], further(b2, k * 256), k != 0 || chunk != 0, sum);
      }
      end_products();
    }
    wait_for_products<0>();
    settle(sum);
    add_bias(bias2, lane, sum);

    // A warp's rows go through its part of shared memory, where those of x were.
    wait_for_team(1 + group, kWarpgroup);
    const int warp_row = thread / 32 * 16;
    const uint32_t to = shared_address(mine + (warp_row + lane % 16) * kPitch + lane / 16 * 8);
#pragma unroll
    for (int i = 0; i < kChannels / 2; i += 8) {
      const uint32_t words[4] = {pack(sum[i], sum[i + 1], T()), pack(sum[i + 2], sum[i + 3], T()),
                                 pack(sum[i + 4], sum[i + 5], T()), pack(sum[i + 6], sum[i + 7], T())};
      write_matrices(to + i * 4, words);
    }
    __syncwarp();
    constexpr int kPieces = kChannels / 8;
    const int rows = rows_of(tile);
    T* const y = static_cast<T*>(call.second.y) + int64_t(tile) * (kMlpRows * kChannels);
#pragma unroll
    for (int unit = lane; unit < 16 * kPieces; unit += 32) {
      const int row = warp_row + unit / kPieces, piece = unit % kPieces;
      if (row < rows) {
        *reinterpret_cast<uint4*>(y + row * kChannels + piece * 8) =
            *reinterpret_cast<const uint4*>(mine + row * kPitch + piece * 8);
      }
    }
  }
#endif
}

template <class T, int kChannels>
cudaError_t launch_mlp(cudaStream_t stream, const Call& first, const Call& second) {
  Device device;
  if (cudaError_t error = find_device(&device)) return error;
  const int64_t tiles = (first.rows + kMlpRows - 1) / kMlpRows;
  const int64_t blocks = tiles < device.processors ? tiles : device.processors;
  return launch_with(stream, device, blocks, kMlpThreads, MlpSizes<kChannels>::bytes(first.outputs),
                     mlp_kernel<T, kChannels>, MlpCall{first, second});
}

// Calls f with the number of channels as a constant; false where the kernel does not take it.
template <class F>
bool with_channels(int64_t channels, F f) {
  if (channels == 64) return f(std::integral_constant<int, 64>()), true;
  if (channels == 80) return f(std::integral_constant<int, 80>()), true;
  return false;
}

}  // namespace

const char* mlp_refusal(const Call& first, const Call& second) {
  const bool taken = with_channels(first.inputs, [](auto) {});
  if (first.panels || second.panels) return "expected kernels in rows";
  if (first.type != Type::kBFloat16 && first.type != Type::kFloat16) return "expected bfloat16 or float16";
  if (!taken || second.outputs != first.inputs) return "expected 64 or 80 inputs, and as many outputs";
  if (first.outputs % kChunk || first.outputs > 4 * first.inputs) {
    return "expected columns between the products in 64s, up to four times the inputs";
  }
  if (first.rows / kMlpRows >= INT32_MAX / 8) return "more than 2^28 tiles";
  for (const void* p : {first.x, first.kernel, first.bias, second.kernel, second.bias}) {
    if (!aligned(p)) return "operands that do not begin at 16 bytes";
  }
  return aligned(second.y) ? nullptr : "a result that does not begin at 16 bytes";
}

cudaError_t mlp_serves(bool* answer) {
  return has_warpgroups(mlp_kernel<BFloat16, 64>, answer);
}

cudaError_t mlp(cudaStream_t stream, const Call& first, const Call& second) {
  if (first.rows == 0) return cudaSuccess;
  cudaError_t error = cudaErrorInvalidValue;
  with_channels(first.inputs, [&](auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    error = first.type == Type::kBFloat16 ? launch_mlp<BFloat16, kChannels>(stream, first, second)
                                          : launch_mlp<Float16, kChannels>(stream, first, second);
  });
  return error;
}

}  // namespace linear::cuda
