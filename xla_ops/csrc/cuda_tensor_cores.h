// Tensor cores on 16-bit values, and copies into shared memory that run beside arithmetic. A GPU has both
// from compute capability 8.0 on, and code for older ones has no kernel that uses this: see
// KERNEL_HAS_TENSOR_CORES.
#pragma once

#include <atomic>

#include "cuda_device.h"

#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define KERNEL_HAS_TENSOR_CORES 0
#else
#define KERNEL_HAS_TENSOR_CORES 1
#endif

namespace xla_ops::cuda {

#if KERNEL_HAS_TENSOR_CORES

// Where p, in shared memory, is for the instructions below.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// Reads words of shared memory, and writes them.
__device__ __forceinline__ uint32_t read_one(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ void read_two(uint32_t address, uint32_t* v) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n" : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
}
__device__ __forceinline__ void read_four(uint32_t address, uint32_t* v) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void write_one(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void write_two(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};\n" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// Four bytes of two words, which count on from the one to the other, as the selector's digits name them; of a
// digit above 7 the byte's sign alone. (`__byte_perm` leaves out the signs.)
__device__ __forceinline__ uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(selector));
  return v;
}

// Starts to copy 16 bytes into shared memory; zeros, and nothing is read, where there are none.
__device__ __forceinline__ void copy_ahead(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
// Makes a group of the copies that this thread has started since the last.
__device__ __forceinline__ void end_group() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits until no more than N of this thread's groups, the last, are under way.
template <int N>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// A barrier of `threads` of the block's threads, whole warps; each team has a number of its own, 1 to 15.
__device__ __forceinline__ void wait_for_team(int team, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(team), "r"(threads) : "memory");
}

// The same barrier for threads that do not wait at it: they count among those that others wait for.
__device__ __forceinline__ void pass_team(int team, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(team), "r"(threads) : "memory");
}

// Loads four matrices of 8 x 8 from shared memory. Thread l of the warp names row l % 8 of matrix l / 8,
// and gets of each matrix the values (l / 4, l % 4 * 2) and the next in the row; of the transposed ones,
// if so asked.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t row, uint32_t (&m)[4]) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
  }
}
template <bool transposed>
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&m)[4]) {
  load_matrices<transposed>(shared_address(row), m);
}
// Only the first two of them, transposed, which the first half of the warp names.
__device__ __forceinline__ void load_two_matrices(uint32_t row, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(row)
               : "memory");
}

// Writes four matrices of 8 x 8 to shared memory: what `load_matrices` would load. From compute
// capability 9.0 on.
__device__ __forceinline__ void write_matrices(uint32_t row, const uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row), "r"(m[0]),
               "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

// Two numbers in half precision, the first in the lower half of the word.
__device__ __forceinline__ uint32_t pack(float a, float b, BFloat16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
  return word;
}
__device__ __forceinline__ uint32_t pack(float a, float b, Float16) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
  return word;
}

// sum += a b for a of 16 x 16, b of 16 x 8 and sum of 16 x 8, each as matrices of 8 x 8 that lie in the
// warp's threads as above, b transposed. Those of a go down, then right; those of b and sum down.
template <class T>
__device__ __forceinline__ void multiply_add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             float (&sum)[4]) {
#define MULTIPLY_ADD(TYPE)                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                   \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, BFloat16>) {
    MULTIPLY_ADD("bf16");
  } else {
    MULTIPLY_ADD("f16");
  }
#undef MULTIPLY_ADD
}

#endif

}  // namespace xla_ops::cuda

#else
#define KERNEL_HAS_TENSOR_CORES 1
#include <tensor_cores_on_host.h>  // of the tests
#endif

namespace xla_ops::cuda {

// Whether the code of a kernel that runs on the GPU in use is what `is_whole` wants: on a GPU whose
// instructions it cannot do without, there may be none, or an empty one. All kernels of this type are built
// alike.
template <class Kernel, class F>
cudaError_t has_code(Kernel* kernel, bool* answer, F is_whole) {
  // By the number of the GPU: 0 not known, 1 no, 2 yes.
  static std::atomic<int> known[64];
  int device;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  std::atomic<int>* const cell = device < 64 ? &known[device] : nullptr;
  int found = cell ? cell->load() : 0;
  if (!found) {
    cudaFuncAttributes attributes = {};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    const bool none = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
    if (error && !none) return error;
    found = !none && is_whole(attributes) ? 2 : 1;
    if (cell) cell->store(found);
  }
  *answer = found == 2;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t has_tensor_cores(Kernel* kernel, bool* answer) {
  // Of the code that this GPU would run: an older one's, compiled anew, would have no body.
  return has_code(kernel, answer, [](const cudaFuncAttributes& found) { return found.ptxVersion >= 80; });
}

}  // namespace xla_ops::cuda
