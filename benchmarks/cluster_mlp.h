// A trial for small batches, not part of the library: an MLP, or a product alone, with the addition and the
// norm after it as one kernel, where there are three launches now. What a GPU says of it is not known yet.
//
// A cluster of blocks takes 16 rows. Each block has a part of what lies between the products: it makes that
// part from all of x (or, of a product alone, reads it), applies GELU, and multiplies it by its rows of the
// second kernel. That gives a part of all sums, which the blocks then add up by reading each other's shared
// memory, a few whole rows each; so a row's norm is made in one warp. Kernels go through a ring of stages of
// 32 rows, which is filled from the start: at such sizes it is waiting that counts.
//
// Axes: C channels, H columns between the products, c blocks in a cluster.
#pragma once

#include <cuda_runtime.h>

#include "cuda_cluster.h"
#include "cuda_tensor_cores.h"
#include "gelu_cuda_device.h"

namespace trial {

using namespace xla_ops::cuda;
using xla_ops::Type;

// y and total as `layer_norm::Call` has them. All of T but where said.
struct Call {
  int rows, channels, hidden;  // hidden is C where there is one product
  bool two, add_norm;          // products; whether the sum is normalised, or what is added
  float epsilon;
  const void *x, *kernel1, *bias1, *kernel2, *bias2, *residual, *scale, *offset;
  void *total, *y;
};

constexpr int kRows = 16, kThreads = 256, kWarps = kThreads / 32, kDeep = 32, kStages = 6;

// Where things are in shared memory, in values of T; rows are 16 bytes apart in banks.
struct Sizes {
  int x, between, stage;  // values of a row, with padding
  __host__ __device__ Sizes(const Call& call, int blocks)
      : x(rounded(call.two ? call.channels : 0) + 8),
        between(rounded(call.hidden / blocks) + 8),
        stage((call.hidden / blocks > call.channels && call.two ? call.hidden / blocks : call.channels) + 8) {
  }
  __host__ __device__ static int rounded(int count) { return (count + kDeep - 1) / kDeep * kDeep; }
  __host__ __device__ int values() const { return kRows * (x + between) + kStages * kDeep * stage; }
};

#if KERNEL_HAS_CLUSTERS

// Starts to copy rows of values, `columns` of each, a multiple of 8; zeros from row `rows` on, and in columns
// from there to `wide`.
template <class T>
__device__ __forceinline__ void fetch(const T* from, int64_t stride, int all, int rows, int columns, int wide,
                                      T* to, int pitch) {
  const int pieces = wide / 8;
  for (int i = threadIdx.x; i < all * pieces; i += kThreads) {
    const int row = i / pieces, column = i % pieces * 8;
    const bool there = row < rows && column < columns;
    copy_ahead(to + row * pitch + column, from + (there ? row * stride + column : 0), there);
  }
}

// sum += a b for 32 rows of b, `columns` of them, of which a warp has every eighth eight.
template <class T, int N>
__device__ __forceinline__ void multiply(const T* a, int a_pitch, const T* b, int b_pitch, int columns,
                                         float (&sum)[N][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t left[2][4];
  for (int k = 0; k < 2; ++k) load_matrices<false>(a + lane % 16 * a_pitch + k * 16 + lane / 16 * 8, left[k]);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int column = (warp + i * kWarps) * 8;
    if (column < columns) {
      uint32_t right[4];
      load_matrices<true>(b + lane * b_pitch + column, right);
      multiply_add<T>(left[0], right[0], right[1], sum[i]);
      multiply_add<T>(left[1], right[2], right[3], sum[i]);
    }
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

#endif

// N is how many eights of columns a warp has at most.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 1)
    cluster_mlp_kernel(const __grid_constant__ Call call, const __grid_constant__ int blocks) {
#if KERNEL_HAS_CLUSTERS
  const Sizes sizes(call, blocks);
  const int rank = int(cluster_rank()), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channels = call.channels, part = call.hidden / blocks;
  const int64_t first = int64_t(blockIdx.x / blocks) * kRows;
  const int rows = call.rows - first < kRows ? int(call.rows - first) : kRows;
  T* const x = shared_memory<T>();
  T* const between = x + kRows * sizes.x;
  T* const ring = between + kRows * sizes.between;

  const T* const rows_of_x = static_cast<const T*>(call.x) + first * channels;
  if (call.two) {
    fetch(rows_of_x, channels, kRows, rows, channels, Sizes::rounded(channels), x, sizes.x);
  } else {
    fetch(rows_of_x + rank * part, channels, kRows, rows, part, Sizes::rounded(part), between, sizes.between);
  }
  const int first_stages = call.two ? (channels + kDeep - 1) / kDeep : 0;
  const int stages = first_stages + (part + kDeep - 1) / kDeep;
  // Of the first kernel all rows and this block's columns, of the second this block's rows.
  const auto fetch_stage = [&](int stage) {
    T* const to = ring + stage % kStages * (kDeep * sizes.stage);
    if (stage < first_stages) {
      const int row = stage * kDeep;
      fetch(static_cast<const T*>(call.kernel1) + int64_t(row) * call.hidden + rank * part, call.hidden,
            kDeep, channels - row, part, part, to, sizes.stage);
    } else if (stage < stages) {
      const int row = (stage - first_stages) * kDeep;
      fetch(static_cast<const T*>(call.kernel2) + int64_t(rank * part + row) * channels, channels, kDeep,
            part - row, channels, channels, to, sizes.stage);
    }
    end_group();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) fetch_stage(stage);

  float sum[N][4] = {};
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_groups<kStages - 2>();
    __syncthreads();
    fetch_stage(stage + kStages - 1);  // to where the stage before this one has been read
    const T* const b = ring + stage % kStages * (kDeep * sizes.stage);
    if (stage >= first_stages) {
      const T* const a = between + (stage - first_stages) * kDeep;
      multiply(a, sizes.between, b, sizes.stage, channels, sum);
      continue;
    }
    multiply(x + stage * kDeep, sizes.x, b, sizes.stage, part, sum);
    if (stage + 1 < first_stages) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) {  // of a thread two columns of two rows, 8 apart
      const int column = (warp + i * kWarps) * 8 + lane % 4 * 2;
      if (column < Sizes::rounded(part)) {
        float bias[2] = {};
        if (column < part) load<2>(static_cast<const T*>(call.bias1) + rank * part + column, bias);
        for (int half = 0; half < 2; ++half) {
          const float u = gelu_for<T, 1>(sum[i][half * 2] + bias[0]);
          const float v = gelu_for<T, 1>(sum[i][half * 2 + 1] + bias[1]);
          const uint32_t word = column < part ? pack(u, v, T()) : 0;  // beyond, the next product takes zeros
          *reinterpret_cast<uint32_t*>(between + (lane / 4 + half * 8) * sizes.between + column) = word;
        }
      }
      for (float& v : sum[i]) v = 0;
    }
  }

  // This block's part of all sums, where the ring was: (kRows, C) of float32, for the cluster to read.
  wait_for_groups<0>();
  __syncthreads();
  float* const parts = reinterpret_cast<float*>(ring);
  const int pitch = channels + 8;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int column = (warp + i * kWarps) * 8 + lane % 4 * 2;
    if (column < channels) {
      store<2>(sum[i], parts + lane / 4 * pitch + column);
      store<2>(sum[i] + 2, parts + (lane / 4 + 8) * pitch + column);
    }
  }
  wait_for_cluster();

  constexpr int kFours = (N * kWarps * 8 + 127) / 128;  // of columns, of a lane
  const int each = kRows / blocks;                      // rows of a block
  for (int mine = warp; mine < each; mine += kWarps) {
    const int row = rank * each + mine;
    const int64_t at = (first + row) * channels;
    float v[kFours][4];
    float total = 0;
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
      const int column = (j * 32 + lane) * 4;
      if (row >= rows || column >= channels) continue;
      load<4>(static_cast<const T*>(call.bias2) + column, v[j]);
      for (int block = 0; block < blocks; ++block) {
        float other[4];
        load<4>(in_block(parts, block) + row * pitch + column, other);
        for (int d = 0; d < 4; ++d) v[j][d] += other[d];
      }
      if (call.add_norm) {  // the sum is rounded before it is normalised, as by `layer_norm`
        float residual[4];
        load<4>(static_cast<const T*>(call.residual) + at + column, residual);
        for (int d = 0; d < 4; ++d) v[j][d] += residual[d];
        store<4>(v[j], static_cast<T*>(call.total) + at + column);
        T rounded[4];
        for (int d = 0; d < 4; ++d) to_storage(v[j][d], &rounded[d]), v[j][d] = to_real(rounded[d]);
      }
      for (int d = 0; d < 4; ++d) total += v[j][d];
    }
    const float mean = warp_sum(total) / channels;
    float squares = 0;
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
      if (row >= rows || (j * 32 + lane) * 4 >= channels) continue;
      for (int d = 0; d < 4; ++d) v[j][d] -= mean, squares += v[j][d] * v[j][d];
    }
    const float factor = __frsqrt_rn(warp_sum(squares) / channels + call.epsilon);
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
      const int column = (j * 32 + lane) * 4;
      if (row >= rows || column >= channels) continue;
      float scale[4], offset[4], residual[4] = {};
      load<4>(static_cast<const T*>(call.scale) + column, scale);
      load<4>(static_cast<const T*>(call.offset) + column, offset);
      if (!call.add_norm) load<4>(static_cast<const T*>(call.residual) + at + column, residual);
      for (int d = 0; d < 4; ++d) v[j][d] = v[j][d] * factor * scale[d] + offset[d] + residual[d];
      store<4>(v[j], static_cast<T*>(call.y) + at + column);
    }
  }
  wait_for_cluster();  // what is read of a block stays until all have read it
#endif
}

// What a call has that the kernel does not take in clusters of so many blocks, or null.
inline const char* refusal(const Call& call, int blocks, int shared) {
  if (blocks != 1 && blocks != 2 && blocks != 4 && blocks != 8) return "expected 1, 2, 4 or 8 blocks";
  if (call.channels % 8 || call.hidden % (8 * blocks)) return "expected channels in eights for each block";
  if (!call.two && call.hidden != call.channels) return "expected as many columns as channels of one product";
  if (call.channels > 896 || (call.two && call.hidden / blocks > 896)) return "expected up to 896 columns";
  const Sizes sizes(call, blocks);
  if (sizes.values() * 2 > shared) return "more shared memory than there is";
  return nullptr;
}

// Puts the kernel on the stream. In a cluster there are `blocks` blocks.
template <class T>
cudaError_t launch(cudaStream_t stream, const Call& call, int blocks) {
  Device device;
  if (cudaError_t error = find_device(&device)) return error;
  if (refusal(call, blocks, device.shared)) return cudaErrorInvalidValue;
  const int widest = call.two && call.hidden / blocks > call.channels ? call.hidden / blocks : call.channels;
  const auto with = [&](auto eights) {
    return launch_clusters(stream, device, (call.rows + kRows - 1) / kRows, blocks, kThreads,
                           size_t(Sizes(call, blocks).values()) * sizeof(T),
                           cluster_mlp_kernel<T, decltype(eights)::value>, call, blocks);
  };
  if (widest <= 128) return with(std::integral_constant<int, 2>());
  if (widest <= 256) return with(std::integral_constant<int, 4>());
  if (widest <= 512) return with(std::integral_constant<int, 8>());
  return with(std::integral_constant<int, 14>());
}

}  // namespace trial
