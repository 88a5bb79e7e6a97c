// The part of CUDA that the kernels use, on the host: so that the very code a GPU runs is tested without
// one, under sanitizers. Found before the real header of this name. Blocks run one after the other in
// random order; the threads of a block are fibers. Between two barriers of the block its warps run one after
// the other, in random order, and so do a warp's threads between two of its own: of two accesses that no
// barrier orders, either may come first. Blocks of a cluster take turns from one of its barriers to the next.
// Launches are made one at a time, by any thread; one that is made early has to wait for the kernel before.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <vector>

#include "stacks.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorInvalidDeviceFunction,
  cudaErrorInsufficientDriver,
  cudaErrorNoKernelImageForDevice
};
using cudaStream_t = struct Stream*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_on_host {

constexpr size_t kShared = 227 << 10, kStack = 128 << 10;
inline unsigned char* shared;  // kShared bytes, where the kernels' dynamic shared memory is declared

struct Settings {
  unsigned seed = 0;  // of the next launch's order of blocks, warps and threads; then of the one after
  int64_t part = 1;   // only the last 1/part of each launch's blocks runs
  bool clear = true;  // whether memory is set at all
  size_t shared_limit = kShared;
  int processors = 4;
  int ptx_version = 90;
  int registers = 128;  // of a kernel's threads
  int device = 0;       // its number
};
inline Settings settings;

enum class State { kReady, kAtWarp, kAtTeam, kAtBlock, kAtCluster, kDone };  // kAt: at a barrier

struct Fiber {
  std::vector<char> stack = std::vector<char>(kStack);
  Place place;  // where it goes on
  void* saved;  // of the sanitizer
  State state;
  int team, members;  // where it waits, and for how many with itself
  bool has_waited;    // for the kernel before
};
inline std::vector<Fiber> fibers;
inline std::map<int, int> passed;  // of each team's barrier, threads that do not wait there
inline Fiber* current;
inline Place scheduler;
inline const void* scheduler_stack;
inline size_t scheduler_size;
inline std::function<void()> body;
inline std::mt19937 chance;
// Whether the threads of this launch have to wait for the kernel before, and what that writes: not to be
// touched by a block's threads until the first of them has waited.
inline bool has_to_wait;
inline std::vector<std::pair<const void*, size_t>> of_kernel_before;

inline void leave(State state, void** saved) {
  current->state = state;
  __sanitizer_start_switch_fiber(saved, scheduler_stack, scheduler_size);
  go(current->place, scheduler);
}
inline void wait_at(State barrier) {
  leave(barrier, &current->saved);
  __sanitizer_finish_switch_fiber(current->saved, &scheduler_stack, &scheduler_size);
}
inline void wait_for_team(int team, int members) {
  current->team = team, current->members = members;
  wait_at(State::kAtTeam);
}
inline void entry() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
  body();
  leave(State::kDone, nullptr);
}
inline void resume(Fiber& fiber, unsigned thread) {
  void* saved = nullptr;
  current = &fiber;
  threadIdx.x = thread;
  __sanitizer_start_switch_fiber(&saved, fiber.stack.data(), kStack);
  go(scheduler, fiber.place);
  __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
}

// Runs the threads from `first` to `end` until each is at a barrier of the block or a team, or done.
inline void run_warp(unsigned first, unsigned end) {
  std::vector<unsigned> order;
  for (unsigned i = first; i < end; ++i) order.push_back(i);
  const auto count = [&](State state) {
    return std::count_if(order.begin(), order.end(), [&](unsigned i) { return fibers[i].state == state; });
  };
  while (count(State::kReady)) {
    std::shuffle(order.begin(), order.end(), chance);
    for (unsigned i : order) {
      if (fibers[i].state == State::kReady) resume(fibers[i], i);
    }
    if (!count(State::kAtWarp)) continue;
    if (count(State::kAtWarp) < int(end - first)) {
      std::fputs("not all threads of a warp have come to its exchange\n", stderr);
      std::abort();
    }
    for (unsigned i : order) fibers[i].state = State::kReady;
  }
}

// Lets teams go on of which all have come: some of them, so that one may be ahead of another.
inline bool release_teams(unsigned threads) {
  std::map<int, std::vector<unsigned>> teams;
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i].state == State::kAtTeam) teams[fibers[i].team].push_back(i);
  }
  std::vector<int> ready;
  for (const auto& [team, members] : teams) {
    if (int(members.size()) + passed[team] == fibers[members.front()].members) ready.push_back(team);
  }
  std::shuffle(ready.begin(), ready.end(), chance);
  for (size_t i = 0; i < ready.size(); ++i) {
    if (i && chance() % 2) continue;
    for (unsigned member : teams[ready[i]]) fibers[member].state = State::kReady;
    passed[ready[i]] = 0;
  }
  return !ready.empty();
}

inline void begin_block(unsigned threads) {
  if (has_to_wait) {
    for (const auto& [data, bytes] : of_kernel_before) ASAN_POISON_MEMORY_REGION(data, bytes);
  }
  if (fibers.size() < threads) fibers.resize(threads);
  passed.clear();
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::kReady, fiber.has_waited = false;
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack.data(), kStack);  // of calls that never returned
    begin(fiber.place, fiber.stack.data(), kStack, entry);
  }
}

// Runs a block's threads until each is at a barrier of its cluster, or done; whether they are not done.
inline bool run_block(unsigned threads) {
  std::vector<unsigned> warps;
  for (unsigned i = 0; i < threads; i += 32) warps.push_back(i);
  const auto count = [&](State state) {
    return std::count_if(fibers.begin(), fibers.begin() + threads,
                         [&](const Fiber& fiber) { return fiber.state == state; });
  };
  while (true) {
    std::shuffle(warps.begin(), warps.end(), chance);
    for (unsigned first : warps) run_warp(first, std::min(first + 32, threads));
    if (release_teams(threads)) continue;
    const unsigned in_cluster = count(State::kAtCluster);
    if (count(State::kAtTeam) || (in_cluster && in_cluster < threads)) {
      std::fputs("not all threads of a team, or a cluster, have come to its barrier\n", stderr);
      std::abort();
    }
    const bool done = count(State::kDone) == threads;
    for (unsigned i = 0; i < threads && done && has_to_wait; ++i) {
      if (fibers[i].has_waited) continue;
      std::fputs("a thread that was launched early has not waited for the kernel before\n", stderr);
      std::abort();
    }
    if (in_cluster || done) return in_cluster;
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i].state == State::kAtBlock) fibers[i].state = State::kReady;
    }
  }
}

// Blocks of a cluster take turns with the threads and the shared memory that there are; what others have of
// the memory is kept here meanwhile.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  bool running = true;
};
inline std::vector<Block> cluster;
inline unsigned turn;

inline const unsigned char* shared_of_block(unsigned block) {
  return block == turn ? shared : cluster[block].shared.data();
}

inline void run_cluster(unsigned first, unsigned blocks, unsigned threads, size_t bytes) {
  const auto take_turn = [&](unsigned block) {
    turn = block, blockIdx.x = first + block;
    std::swap(fibers, cluster[block].fibers);
    std::memcpy(shared, cluster[block].shared.data(), bytes);
  };
  const auto end_turn = [&](bool running) {
    Block& own = cluster[turn];
    std::swap(fibers, own.fibers);
    std::memcpy(own.shared.data(), shared, bytes);
    if (!running) std::fill(own.shared.begin(), own.shared.end(), 0xa5);  // nobody may read what it had
    own.running = running;
  };
  std::vector<unsigned> order;
  if (cluster.size() < blocks) cluster.resize(blocks);
  for (unsigned block = 0; block < blocks; ++block) {
    order.push_back(block);
    cluster[block].shared.assign(bytes, 0xa5);
    take_turn(block);
    begin_block(threads);
    end_turn(true);
  }
  for (bool running = true; running;) {
    running = false;
    std::shuffle(order.begin(), order.end(), chance);
    for (unsigned block : order) {
      if (!cluster[block].running) continue;
      take_turn(block);
      for (unsigned i = 0; i < threads; ++i) {
        if (fibers[i].state == State::kAtCluster) fibers[i].state = State::kReady;
      }
      end_turn(run_block(threads));
      running |= cluster[block].running;
    }
  }
}

inline void wait_for_kernel_before() {
  current->has_waited = true;
  for (const auto& [data, bytes] : of_kernel_before) ASAN_UNPOISON_MEMORY_REGION(data, bytes);
}

inline std::vector<char> launched;       // whether each launch was early
inline std::mutex one_launch;            // at a time
inline std::map<void*, size_t> allowed;  // dynamic shared memory beyond what any kernel may have

}  // namespace cuda_on_host

inline void __syncthreads() {
  cuda_on_host::wait_at(cuda_on_host::State::kAtBlock);
}
inline void __syncwarp() {
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
}

// A warp's threads exchange values: here all of them take part.
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  static unsigned char all[1024][8];
  std::memcpy(all[threadIdx.x], &value, sizeof value);
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
  std::memcpy(&value, all[threadIdx.x / 32 * 32 + unsigned(lane) % 32], sizeof value);
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, int(threadIdx.x % 32) ^ lanes);
}

inline bool __any_sync(unsigned, bool value) {
  bool any = false;
  for (int i = 0; i < 32; ++i) any |= __shfl_sync(~0u, value, i);
  return any;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  using namespace cuda_on_host;
  const std::lock_guard<std::mutex> lock(one_launch);
  const size_t bytes = config->dynamicSmemBytes, limit = allowed[reinterpret_cast<void*>(kernel)];
  if (config->gridDim.x < 1 || config->gridDim.x > INT32_MAX || config->blockDim.x < 1 ||
      config->blockDim.x > 1024 || bytes > std::max<size_t>(limit, 48 << 10)) {
    return cudaErrorInvalidConfiguration;
  }
  body = [&] { kernel(arguments...); };
  gridDim = config->gridDim, blockDim = config->blockDim;
  unsigned size = 1;  // of a cluster
  bool early = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) size = attribute.val.clusterDim.x;
    early |= attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization;
  }
  if (size < 1 || size > 8 || gridDim.x % size) return cudaErrorInvalidConfiguration;
  const unsigned all = gridDim.x / size;
  const int64_t count = all / settings.part;
  std::vector<unsigned> order(count);
  for (int64_t i = 0; i < count; ++i) order[i] = unsigned(all - count + i);
  chance.seed(settings.seed++);
  std::shuffle(order.begin(), order.end(), chance);
  ASAN_POISON_MEMORY_REGION(shared, kShared);
  ASAN_UNPOISON_MEMORY_REGION(shared, bytes);
  has_to_wait = early;
  launched.push_back(early);
  for (unsigned i : order) run_cluster(i * size, size, blockDim.x, bytes);
  ASAN_UNPOISON_MEMORY_REGION(shared, kShared);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (cuda_on_host::settings.clear) std::memset(to, value, bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "a launch that is not allowed";
}
template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard<std::mutex> lock(cuda_on_host::one_launch);
  if (size_t(value) > cuda_on_host::settings.shared_limit) return cudaErrorInvalidValue;
  cuda_on_host::allowed[reinterpret_cast<void*>(kernel)] = value;
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion, numRegs;
};
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F*) {
  attributes->ptxVersion = cuda_on_host::settings.ptx_version;
  attributes->numRegs = cuda_on_host::settings.registers;
  return cudaSuccess;
}
#define CUDART_VERSION 13000
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_host::settings.device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool shared = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
  *value = shared ? int(cuda_on_host::settings.shared_limit) : cuda_on_host::settings.processors;
  return cudaSuccess;
}

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  if (__builtin_add_overflow(before, value, to)) std::abort();  // a sum that no longer fits
  return before;
}
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  const unsigned long long before = *to;
  long long sum;
  if (__builtin_add_overflow((long long)before, (long long)value, &sum)) std::abort();
  *to = (unsigned long long)sum;
  return before;
}

inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float rsqrtf(float v) {
  return 1 / std::sqrt(v);
}
inline float __frsqrt_rn(float v) {
  return float(1 / std::sqrt(double(v)));
}
inline int __float2int_rn(float v) {
  if (v >= 2147483648.0f) return INT32_MAX;
  if (v < -2147483648.0f) return INT32_MIN;
  return v != v ? 0 : int(std::nearbyint(v));
}
inline long long __float2ll_rn(float v) {
  return (long long)std::nearbyint(v);
}
inline long long __double2ll_rn(double v) {
  return (long long)std::nearbyint(v);
}
