// Matrix products of warpgroups, four warps whose first is a multiple of four, which compute capability 9.0
// has and no other: PTX's wgmma. They run beside what their threads go on to do. Code for 9.0 with its own
// instructions (sm_90a) has kernels that use this; all other code has them empty: see KERNEL_HAS_WARPGROUPS.
#pragma once

#include "cuda_tensor_cores.h"

#ifdef __CUDACC__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define KERNEL_HAS_WARPGROUPS 1
#else
#define KERNEL_HAS_WARPGROUPS 0
#endif

namespace xla_ops::cuda {

constexpr int kWarpgroup = 128;  // threads

#if KERNEL_HAS_WARPGROUPS

// A matrix in shared memory for the products below: cells of 8 rows of 16 bytes, 128 bytes in one piece.
// `lead` and `stride` are the bytes from a cell to the next: `lead` in the direction that is summed over,
// `stride` in the other.
__device__ __forceinline__ uint64_t matrix(const void* cells, uint32_t lead, uint32_t stride) {
  return uint64_t(shared_address(cells) >> 4) | uint64_t(lead >> 4) << 16 | uint64_t(stride >> 4) << 32;
}
// A matrix whose rows are of 128 bytes, eight of them an atom of 1024 that begins at a multiple of that, the
// pieces of 16 bytes of row i at their number, exclusive or i % 8. In a row there are 64 values: of those
// that are summed over (`lead` is of no account then, `stride` 1024), or of the others: then `lead` is the
// bytes to the next 64, and `stride` to the next rows, 1024 too.
__device__ __forceinline__ uint64_t matrix_of_rows(const void* atoms, uint32_t lead) {
  return matrix(atoms, lead, 1024) | uint64_t(1) << 62;
}
// The same so many bytes further.
__device__ __forceinline__ uint64_t further(uint64_t matrix, uint32_t bytes) {
  return matrix + (bytes >> 4);
}

// What this thread has written to shared memory, products after the next barrier read.
__device__ __forceinline__ void show_to_products() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Before products that take registers which were written since the last of these.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
// Makes a group of the products since the last.
__device__ __forceinline__ void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Waits until no more than N groups, the last, are under way.
template <int N>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}

// Keeps the compiler from reading what products have summed up before it has been waited for.
template <int N>
__device__ __forceinline__ void settle(float (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// Operands 0 to N - 1 of the assembler's line, and N numbers as these.
#define NAMES32                                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21," \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES40 NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES64                                                                                          \
  NAMES40                                                                                                \
  ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59" \
  ", %60, %61, %62, %63"
#define SUMS8(HOW, i)                                                                               \
  HOW(sum[i]), HOW(sum[i + 1]), HOW(sum[i + 2]), HOW(sum[i + 3]), HOW(sum[i + 4]), HOW(sum[i + 5]), \
      HOW(sum[i + 6]), HOW(sum[i + 7])
#define SUMS32(HOW) SUMS8(HOW, 0), SUMS8(HOW, 8), SUMS8(HOW, 16), SUMS8(HOW, 24)
#define SUMS40(HOW) SUMS32(HOW), SUMS8(HOW, 32)
#define SUMS64(HOW) SUMS40(HOW), SUMS8(HOW, 40), SUMS8(HOW, 48), SUMS8(HOW, 56)
#define ADDED_TO(v) "+f"(v)
#define WRITTEN(v) "=f"(v)
// A product of COLUMNS columns whose sums are COUNT numbers of each thread.
#define PRODUCT(COLUMNS, COUNT, HOW, TYPE, TAKEN, ADD, SETTINGS, ...)                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS \
               "k16.f32." TYPE "." TYPE " {" NAMES##COUNT "}, " TAKEN ", p, " SETTINGS ";\n}\n"           \
               : SUMS##COUNT(HOW)                                                                         \
               : __VA_ARGS__)
#define PRODUCT_OF(COLUMNS, COUNT, HOW, ...)           \
  if constexpr (std::is_same_v<T, BFloat16>) {         \
    PRODUCT(COLUMNS, COUNT, HOW, "bf16", __VA_ARGS__); \
  } else {                                             \
    PRODUCT(COLUMNS, COUNT, HOW, "f16", __VA_ARGS__);  \
  }

// sum += a b, or sum = a b, for a of 64 x 16 and b of 16 x N, both in shared memory: in a a row is of the
// sixteen that are summed over, in b of the columns. A thread's sums are, of each 8 columns, two next to each
// other of two rows 8 apart, as of `multiply_add`; a warp has 16 rows.
template <class T, bool add, int N>
__device__ __forceinline__ void multiply_shared(uint64_t a, uint64_t b, float (&sum)[N]) {
  static_assert(N == 32 || (N == 64 && add));
  if constexpr (N == 64) {
    PRODUCT_OF(128, 64, ADDED_TO, "%64, %65", "1", "1, 1, 0, 1", "l"(a), "l"(b))
  } else if constexpr (add) {
    PRODUCT_OF(64, 32, ADDED_TO, "%32, %33", "1", "1, 1, 0, 1", "l"(a), "l"(b))
  } else {
    PRODUCT_OF(64, 32, WRITTEN, "%32, %33", "0", "1, 1, 0, 1", "l"(a), "l"(b))
  }
}

// sum += a b, or sum = a b where it is not to be added to, with a in registers, as `multiply_add` takes it.
// They may be written again once this has been waited for.
template <class T, int N>
__device__ __forceinline__ void multiply_registers(const uint32_t (&a)[4], uint64_t b, bool add,
                                                   float (&sum)[N]) {
  static_assert(N == 32 || N == 40);
#define TAKEN_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add))
  if constexpr (N == 32) {
    PRODUCT_OF(64, 32, ADDED_TO, "{%32, %33, %34, %35}, %36", "%37", "1, 1, 1", TAKEN_REGISTERS)
  } else {
    PRODUCT_OF(80, 40, ADDED_TO, "{%40, %41, %42, %43}, %44", "%45", "1, 1, 1", TAKEN_REGISTERS)
  }
#undef TAKEN_REGISTERS
}

#endif

}  // namespace xla_ops::cuda

#else
#define KERNEL_HAS_WARPGROUPS 1
#include <warpgroup_on_host.h>  // of the tests
#endif

namespace xla_ops::cuda {

template <class Kernel>
cudaError_t has_warpgroups(Kernel* kernel, bool* answer) {
  // One that is not empty takes many registers.
  return has_code(kernel, answer, [](const cudaFuncAttributes& found) { return found.numRegs > 64; });
}

}  // namespace xla_ops::cuda
