// LayerNorm on CUDA: a row is read once, and waits in registers for its mean and its variance. So are the two
// rows of add_norm, whose sum is written and waits, and those of norm_add, whose residual waits until the row
// is normalised.
//
// A thread owns pieces of C channels, as many as 16 bytes hold, or one. A team of up to 32 neighbouring
// threads, a power of two, owns a row, R pieces for each thread; the sums go through the team by shuffles,
// always in the same order. Where there are many rows a team takes K of them and reads them all before it
// uses the first, since memory is what such a launch waits for.
//
// A row of more pieces than a team can hold is a block's, whose threads read it once more, from their
// cache, for the variance and once for the result.
#include "norm_cuda.h"

#include "cuda_chain.h"

namespace layer_norm::cuda {
namespace {

using namespace xla_ops::cuda;

constexpr int kThreads = 128, kWideThreads = 256;
constexpr int kMostPieces = 4;      // of a thread, over all its rows
constexpr int kResident = 2 << 10;  // threads that a multiprocessor has at a time, at most

// The sums over a team of each of K values; every thread has the same bits of them.
template <int K, class Real>
__device__ __forceinline__ void team_sums(Real (&v)[K], int lanes) {
  for (int mask = lanes >> 1; mask > 0; mask >>= 1) {
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] += __shfl_xor_sync(0xffffffffu, v[k], mask);
  }
}

// The sums of the values of T in two words, rounded to T.
template <class T, class W>
__device__ __forceinline__ W add_words(W a, W b) {
  constexpr int kEach = sizeof(W) / sizeof(T);
  RealOf<T> u[kEach], v[kEach];
  unpack_word<T>(a, u), unpack_word<T>(b, v);
  T sums[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) to_storage(u[j] + v[j], &sums[j]);
  W word;
  memcpy(&word, sums, sizeof word);
  return word;
}

// 1 / sqrt(v), rounded once.
__device__ __forceinline__ float rsqrt_of(float v) {
  return __frsqrt_rn(v);
}
__device__ __forceinline__ double rsqrt_of(double v) {
  return 1 / sqrt(v);
}

// What a kernel has from the call, converted once for all threads.
template <class Real>
struct Numbers {
  explicit Numbers(const Call& call) : part(Real(1) / Real(call.channels)), epsilon(Real(call.epsilon)) {}
  Real part, epsilon;  // of a channel in a mean
};

// P is the parameters' type; a team has 1 << shift threads.
template <Add A, class T, class P, int C, int R, int K>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const __grid_constant__ Call call, const __grid_constant__ Numbers<RealOf<T>> numbers,
                const __grid_constant__ int shift) {
  using Real = RealOf<T>;
  using W = Word<T, C>;
  const int lanes = 1 << shift, lane = int(threadIdx.x) & (lanes - 1), channels = int(call.channels);
  const int teams = kThreads >> shift;  // of a block; they take a row each, and then the next
  const int64_t first = int64_t(blockIdx.x) * (teams * K) + (int(threadIdx.x) >> shift);
  const int64_t rest = call.rows - first;
  const int left = rest < teams * K ? int(rest) : teams * K;  // below 1 where there is no row
  const int64_t from = first * channels + lane * C, next = int64_t(teams) * channels;
  // Only a thread's last piece can lie beyond the row.
  const bool whole = ((R - 1) * lanes + lane) * C < channels;
  const auto there = [&](int k, int r) { return k * teams < left && (r + 1 < R || whole); };

  wait_for_kernel_before();
  let_next_kernel_begin();
  W words[K][R], residual[A != Add::kNot ? K : 1][R];
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t at = from + k * next + r * lanes * C;
      const auto read = [&](const void* p) {
        return there(k, r) ? *reinterpret_cast<const W*>(static_cast<const T*>(p) + at) : W();
      };
      words[k][r] = read(call.x);
      if constexpr (A != Add::kNot) residual[k][r] = read(call.residual);
    }
  }
  // K is 1 where not all rows use the same parameters.
  const bool one = K > 1 || call.shared >= call.rows;
  const int64_t set = one || left < 1 ? 0 : quotient(first, call.shared);
  Real scale[R][C], bias[R][C];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t at = set * channels + (r + 1 < R || whole ? (r * lanes + lane) * C : 0);
    load<C>(static_cast<const P*>(call.scale) + at, scale[r]);
    load<C>(static_cast<const P*>(call.bias) + at, bias[r]);
  }

  Real v[K][R][C], sums[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    sums[k] = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if constexpr (A == Add::kBefore) {
        T* const p = static_cast<T*>(call.total) + from + k * next + r * lanes * C;
        words[k][r] = add_words<T>(words[k][r], residual[k][r]);
        if (there(k, r)) *reinterpret_cast<W*>(p) = words[k][r];
      }
      unpack_word<T>(words[k][r], v[k][r]);
      Real sum = 0;
#pragma unroll
      for (int c = 0; c < C; ++c) sum += v[k][r][c];
      sums[k] += sum;
    }
  }
  team_sums(sums, lanes);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const Real mean = sums[k] * numbers.part;
    sums[k] = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Real squares = 0;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        v[k][r][c] -= mean;
        squares += v[k][r][c] * v[k][r][c];
      }
      sums[k] += r + 1 < R || whole ? squares : 0;
    }
  }
  team_sums(sums, lanes);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const Real factor = rsqrt_of(sums[k] * numbers.part + numbers.epsilon);
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < C; ++c) v[k][r][c] = v[k][r][c] * (scale[r][c] * factor) + bias[r][c];
      if constexpr (A == Add::kAfter) {
        Real u[C];
        unpack_word<T>(residual[k][r], u);
#pragma unroll
        for (int c = 0; c < C; ++c) v[k][r][c] += u[c];
      }
      if (there(k, r)) store<C>(v[k][r], static_cast<T*>(call.y) + from + k * next + r * lanes * C);
    }
  }
}

// The sum over a block, in one order; each `use` has shared memory of its own.
template <class Real>
__device__ __forceinline__ Real block_sum(Real v, int use) {
  constexpr int kWarps = kWideThreads / 32;
  Real* const parts = shared_memory<Real>() + use * kWarps;
  Real sum[1] = {v};
  team_sums(sum, 32);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum[0];
  __syncthreads();
  v = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) v += parts[i];
  return v;
}

template <Add A, class T, class P, int C>
__global__ void __launch_bounds__(kWideThreads)
    norm_wide_kernel(const __grid_constant__ Call call, const __grid_constant__ Numbers<RealOf<T>> numbers) {
  using Real = RealOf<T>;
  const int64_t row = blockIdx.x, channels = call.channels;
  const int64_t set = call.shared >= call.rows ? 0 : quotient(row, call.shared);
  const T* const x = static_cast<const T*>(call.x) + row * channels;
  constexpr bool kBefore = A == Add::kBefore;
  T* const total = kBefore ? static_cast<T*>(call.total) + row * channels : nullptr;
  const auto over = [&](auto f) {  // f(first channel, values) for each of the thread's pieces
    for (int64_t i = threadIdx.x * C; i < channels; i += kWideThreads * C) {
      Real v[C];
      load<C>(kBefore ? total + i : x + i, v);
      f(i, v);
    }
  };
  wait_for_kernel_before();
  let_next_kernel_begin();
  if constexpr (kBefore) {  // a thread reads again what it wrote itself
    using W = Word<T, C>;
    const T* const residual = static_cast<const T*>(call.residual) + row * channels;
    for (int64_t i = threadIdx.x * C; i < channels; i += kWideThreads * C) {
      *reinterpret_cast<W*>(total + i) =
          add_words<T>(*reinterpret_cast<const W*>(x + i), *reinterpret_cast<const W*>(residual + i));
    }
  }
  Real sum = 0, squares = 0;
  over([&](int64_t, const Real* v) {
#pragma unroll
    for (int c = 0; c < C; ++c) sum += v[c];
  });
  const Real mean = block_sum(sum, 0) * numbers.part;
  over([&](int64_t, const Real* v) {
#pragma unroll
    for (int c = 0; c < C; ++c) squares += (v[c] - mean) * (v[c] - mean);
  });
  const Real factor = rsqrt_of(block_sum(squares, 1) * numbers.part + numbers.epsilon);
  over([&](int64_t i, Real* v) {
    Real scale[C], bias[C];
    load<C>(static_cast<const P*>(call.scale) + set * channels + i, scale);
    load<C>(static_cast<const P*>(call.bias) + set * channels + i, bias);
#pragma unroll
    for (int c = 0; c < C; ++c) v[c] = (v[c] - mean) * (scale[c] * factor) + bias[c];
    if constexpr (A == Add::kAfter) {
      Real u[C];
      load<C>(static_cast<const T*>(call.residual) + row * channels + i, u);
#pragma unroll
      for (int c = 0; c < C; ++c) v[c] += u[c];
    }
    store<C>(v, static_cast<T*>(call.y) + row * channels + i);
  });
}

// How threads divide a row: the pieces of each, and their number as a power of two.
struct Plan {
  int pieces, shift;
};

// Leaves as few threads without a piece as it can, and gives a row at least 64 bytes at a time.
inline Plan make_plan(int64_t pieces) {
  Plan plan = {};
  int64_t fewest = INT64_MAX;
  for (int shift = 5; shift >= 0; --shift) {
    const int64_t lanes = int64_t(1) << shift, each = (pieces + lanes - 1) / lanes;
    if (each > kMostPieces || (each > 1 && lanes < 4) || each * lanes >= fewest) continue;
    fewest = each * lanes;
    plan = {int(each), shift};
  }
  return plan;
}

template <Add A, class T, class P, int C, int R>
cudaError_t launch_teams(Manner manner, cudaStream_t stream, const Call& call, int shift) {
  constexpr int kMost = kMostPieces / (A != Add::kNot ? 2 : 1);  // two operands are as many pieces in flight
  constexpr int kRows = C > 1 && kMost > R ? kMost / R : 1;      // a form less to compile for what is rare
  const Numbers<RealOf<T>> numbers(call);
  const auto blocks = [&](int rows) {
    const int64_t each = (kThreads >> shift) * rows;
    return (call.rows + each - 1) / each;
  };
  if constexpr (kRows > 1) {
    Device device;
    if (cudaError_t error = find_device(&device)) return error;
    const bool many = call.rows << shift > int64_t(device.processors) * kResident;
    if (many && call.shared >= call.rows) {
      return launch(manner, stream, blocks(kRows), kThreads, 0, norm_kernel<A, T, P, C, R, kRows>, call,
                    numbers, shift);
    }
  }
  return launch(manner, stream, blocks(1), kThreads, 0, norm_kernel<A, T, P, C, R, 1>, call, numbers, shift);
}

template <Add A, class T, class P, int C>
cudaError_t launch_pieces(Manner manner, cudaStream_t stream, const Call& call) {
  const int64_t pieces = call.channels / C;
  if (pieces > 32 * kMostPieces) {
    const size_t shared = 2 * kWideThreads / 32 * sizeof(RealOf<T>);
    return launch(manner, stream, call.rows, kWideThreads, shared, norm_wide_kernel<A, T, P, C>, call,
                  Numbers<RealOf<T>>(call));
  }
  const Plan plan = make_plan(pieces);
  switch (plan.pieces) {
    case 1:
      return launch_teams<A, T, P, C, 1>(manner, stream, call, plan.shift);
    case 2:
      return launch_teams<A, T, P, C, 2>(manner, stream, call, plan.shift);
    case 3:
      return launch_teams<A, T, P, C, 3>(manner, stream, call, plan.shift);
    default:
      return launch_teams<A, T, P, C, 4>(manner, stream, call, plan.shift);
  }
}

template <Add A, class T, class P>
cudaError_t launch_rows(Manner manner, cudaStream_t stream, const Call& call) {
  const bool whole = call.channels % kPiece<T> == 0 && aligned(call.x) && aligned(call.scale) &&
                     aligned(call.bias) && aligned(call.y) && aligned(call.residual) && aligned(call.total);
  return whole ? launch_pieces<A, T, P, kPiece<T>>(manner, stream, call)
               : launch_pieces<A, T, P, 1>(manner, stream, call);
}

template <class T, class P>
cudaError_t launch_norm(Manner manner, cudaStream_t stream, const Call& call) {
  switch (call.add()) {
    case Add::kNot:
      return launch_rows<Add::kNot, T, P>(manner, stream, call);
    case Add::kBefore:
      return launch_rows<Add::kBefore, T, P>(manner, stream, call);
    case Add::kAfter:
      return launch_rows<Add::kAfter, T, P>(manner, stream, call);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

const char* refusal(const Call& call) {
  // A team has less than two threads for each piece, and a block for one row has 128 pieces.
  return call.rows * call.channels / (kThreads / 2) >= INT32_MAX ? "more than 2^31 blocks" : nullptr;
}

cudaError_t forward(cudaStream_t stream, const Call& call, bool early) {
  if (call.rows == 0) return cudaSuccess;
  Manner manner;
  manner.early = early;
  return with_type(call.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) == 2) {
      if (call.parameters_type == Type::kFloat32) return launch_norm<T, float>(manner, stream, call);
    }
    return launch_norm<T, T>(manner, stream, call);
  });
}

}  // namespace layer_norm::cuda
