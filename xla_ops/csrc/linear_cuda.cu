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
//
// On compute capability 9.0 products of warpgroups do it where there are many tiles (linear_cuda_wide.h), and
// the product without GELU too.
#include "linear_cuda.h"

#include "linear_cuda_wide.h"

namespace linear::cuda {
namespace {

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

// Products of warpgroups where there are as many tiles as multiprocessors; else blocks that stay where each
// of their teams has a tile; else the largest tiles of which there are enough for most multiprocessors.
template <class T>
cudaError_t launch_form(cudaStream_t stream, const Call& call) {
  Device device;
  if (cudaError_t error = find_device(&device)) return error;
  const size_t shared = device.shared;
  const auto tiles = [&](int64_t rows, int64_t columns) {
    return (call.rows + rows - 1) / rows * ((call.outputs + columns - 1) / columns);
  };
  bool wide = !call.gelu;
  if (!wide && call.inputs <= kMostWideInputs && tiles(kWideRows, kWideColumns) >= device.processors) {
    if (cudaError_t error = serves_plain(&wide)) return error;
  }
  if (wide) return launch_wide<T>(stream, device, call);
  if (tiles(kStayingRows, kStayingColumns) >= kTeams * device.processors) {
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
  if (call.map.channels) return "expected no convolution";
  if (!call.gelu && call.inputs > kMostWideInputs) return "expected up to 512 inputs, or GELU";
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

cudaError_t serves_plain(bool* answer) {
  return has_warpgroups(linear_wide_kernel<BFloat16, false, 4, 4, true>, answer);
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
