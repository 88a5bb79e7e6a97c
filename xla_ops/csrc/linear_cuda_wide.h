// y = f(x kernel + bias) on CUDA by products of warpgroups, for compute capability 9.0: f is GELU or nothing.
//
// Blocks stay, each with 128 columns of the kernel, whose inputs it keeps in shared memory. A team is a
// warpgroup and takes tiles of 64 rows.
#pragma once

#include <algorithm>

#include "linear_cuda_tile.h"

namespace linear::cuda {
namespace {

constexpr int kWideRows = 64, kWideColumns = 128;
constexpr int64_t kMostWideInputs = 512;  // for more of the kernel there is no room

template <class T>
using Wide = Tile<T, kWideRows, kWideColumns, 4, 1>;

// Of kGroups teams with kStages steps of x each; kWhole: these are all steps of a tile. It is also the
// product without GELU.
template <class T, bool gelu, int kGroups, int kStages, bool kWhole>
__global__ void __launch_bounds__(kWarpgroup* kGroups, 1)
    linear_wide_kernel(const __grid_constant__ Call call) {
#if KERNEL_HAS_WARPGROUPS
  using Form = Wide<T>;
  using Half = Tile<T, 64, 64, 2, 2>;  // 64 columns of the kernel, in rows of 128 bytes as those of x
  static_assert(Form::kThreads == kWarpgroup && kWideColumns == 128);
  constexpr int kThreads = kGroups * kWarpgroup;
  const int team = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const int across = int((call.outputs + kWideColumns - 1) / kWideColumns), along = gridDim.x / across;
  const int first_column = int(blockIdx.x % across) * kWideColumns;
  const int next = kGroups * along, tiles = int((call.rows + kWideRows - 1) / kWideRows);
  const int steps = int((call.inputs + kDepth - 1) / kDepth), half = steps * kDepth * 64;
  const Form tile(call, thread, first_column);
  T* const kernel = shared_memory<T>();
  T* const stages = kernel + 2 * half + team * kStages * Form::kX;
  T* const results = kernel + 2 * half + kGroups * kStages * Form::kX + team * Form::kResults;
  float* const bias =
      reinterpret_cast<float*>(kernel + 2 * half + kGroups * (kStages * Form::kX + Form::kResults));
  // Steps whose products may go on while the next begins, and those that are copied ahead.
  constexpr int kBeside = kStages > 2 ? 1 : 0, kAhead = kWhole ? kStages : kStages - 1 - kBeside;

  int coming = int(blockIdx.x / across) + team * along, coming_step = 0, coming_stage = 0;
  const auto fetch = [&] {
    if (coming < tiles) {
      T* const to = stages + coming_stage * Form::kX;
      tile.fetch_x(int64_t(coming) * kWideRows, coming_step * kDepth, to, true);
      if (++coming_stage == kStages) coming_stage = 0;
      if (++coming_step == steps) coming_step = 0, coming += next;
    }
    end_group();
  };

  for (int i = 0; i < 2; ++i) {
    Half::fetch_kernel(call, first_column + i * 64, 0, steps * kDepth, kernel + i * half, threadIdx.x,
                       kThreads);
  }
  end_group();
  for (int i = 0; i < kAhead; ++i) fetch();
  Form::fetch_bias(call, first_column, bias, threadIdx.x, kThreads);
  wait_for_groups<kAhead>();
  show_to_products();
  __syncthreads();

  // Where all that a tile wants is there, the teams multiply in turns, so that they come to GELU one after
  // another: all at once they would have the tensor cores idle then. The last team passes its turn on only
  // where there is another round.
  const bool in_turns = kWhole || steps <= kAhead;
  const int turn = 1 + kGroups + team, turn_after = 1 + kGroups + (team + 1) % kGroups;
  const auto wait_for_turn = [&] {
    if (in_turns) wait_for_team(turn, 2 * kWarpgroup);
  };
  const auto pass_turn = [&](bool others) {
    if (in_turns && others) pass_team(turn_after, 2 * kWarpgroup);
  };
  const auto multiply = [&](int step, int stage, float (&sums)[64]) {
    const uint64_t x = matrix_of_rows(stages + stage * Form::kX, 0);
    const uint64_t k = matrix_of_rows(kernel + step * kDepth * 64, half * 2);
    begin_products();
#pragma unroll
    for (int i = 0; i < kDepth; i += 16)
      multiply_shared<T, true>(further(x, i * 2), further(k, i * 128), sums);
    end_products();
  };
  pass_turn(team == kGroups - 1);
  int stage = 0, at = int(blockIdx.x / across) + team * along;
  for (; at < tiles; at += next) {
    typename Form::Sums sum;
    auto& sums = reinterpret_cast<float (&)[64]>(sum);
    // The sums begin as the bias; read for each, since copies would be instructions too.
    const uint32_t from = shared_address(bias + threadIdx.x % 4 * 2);
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
      uint32_t words[2];
      read_two(from + i / 4 * 32, words);
      sums[i] = __uint_as_float(words[0]), sums[i + 1] = __uint_as_float(words[1]);
    }
    settle(sums);
    if constexpr (kWhole) {
      wait_for_groups<0>();
      show_to_products();
      wait_for_team(1 + team, kWarpgroup);
      wait_for_turn();
#pragma unroll 1  // the places of all operands would take many registers
      for (int step = 0; step < kStages; ++step) multiply(step, step, sums);
    } else {
      wait_for_turn();
      for (int step = 0; step < steps; ++step) {
        wait_for_groups<kAhead - 1>();
        show_to_products();
        wait_for_team(1 + team, kWarpgroup);
        fetch();  // to where a step before has read
        multiply(step, stage, sums);
        wait_for_products<kBeside>();
        if (++stage == kStages) stage = 0;
      }
    }
    pass_turn(team != kGroups - 1 || at - team * along + next < tiles);
    wait_for_products<0>();
    settle(sums);
    if constexpr (kWhole) {
      wait_for_team(1 + team, kWarpgroup);
#pragma unroll 1
      for (int step = 0; step < kStages; ++step) fetch();  // to where all have read
    }
    tile.template finish<gelu>(sum, int64_t(at) * kWideRows, results);
  }
  if (at - team * along < tiles) {  // others have a tile more
    wait_for_turn();
    pass_turn(team != kGroups - 1);
  }
#endif
}

template <class T, int kGroups, int kStages>
size_t wide_bytes(const Call& call) {
  using Form = Wide<T>;
  const size_t kernel = (call.inputs + kDepth - 1) / kDepth * kDepth * kWideColumns;
  return (kernel + kGroups * (kStages * Form::kX + Form::kResults)) * sizeof(T) +
         kWideColumns * sizeof(float);
}
template <class T, int kGroups, int kStages, bool kWhole>
cudaError_t launch_wide(cudaStream_t stream, const Device& device, const Call& call) {
  const int64_t across = (call.outputs + kWideColumns - 1) / kWideColumns;
  const int64_t tiles = (call.rows + kWideRows - 1) / kWideRows;
  const int64_t along = std::clamp<int64_t>(device.processors / across, 1, tiles);
  const auto kernel = call.gelu ? linear_wide_kernel<T, true, kGroups, kStages, kWhole>
                                : linear_wide_kernel<T, false, kGroups, kStages, kWhole>;
  return launch_with(stream, device, across * along, kWarpgroup * kGroups,
                     wide_bytes<T, kGroups, kStages>(call), kernel, call);
}

// For up to kMostWideInputs inputs, which fit all forms' shared memory of 227 KB.
template <class T>
cudaError_t launch_wide(cudaStream_t stream, const Device& device, const Call& call) {
  const int64_t steps = (call.inputs + kDepth - 1) / kDepth;
  if (steps <= 2) return launch_wide<T, 4, 4, false>(stream, device, call);
  if (steps == 3) return launch_wide<T, 4, 3, true>(stream, device, call);
  if (steps == 4) return launch_wide<T, 4, 4, true>(stream, device, call);
  if (steps == 5) return launch_wide<T, 3, 5, true>(stream, device, call);
  return launch_wide<T, 4, 2, false>(stream, device, call);
}

}  // namespace
}  // namespace linear::cuda
