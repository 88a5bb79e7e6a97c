// Kernels that follow one another closely, and clusters of blocks, which compute capability 9.0 and later
// ones have. A kernel that is launched early (Manner) begins while the one before it on the stream still
// runs, and waits for its results where it wants them first; code for older GPUs waits for nothing, and there
// no kernel is launched early.
#pragma once

#include "cuda_tensor_cores.h"

#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define KERNEL_HAS_CLUSTERS 0
#else
#define KERNEL_HAS_CLUSTERS 1
#endif

namespace xla_ops::cuda {

// Until the kernel before has ended and all can be read that it and those before it wrote. Each kernel of a
// chain waits, so where this one goes on, all before it have ended.
__device__ __forceinline__ void wait_for_kernel_before() {
#if KERNEL_HAS_CLUSTERS
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
// The next kernel's blocks may come to the multiprocessors once all of this one's have said so.
__device__ __forceinline__ void let_next_kernel_begin() {
#if KERNEL_HAS_CLUSTERS
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Brings the line of memory that p points to into the second-level cache, ahead of its reader.
__device__ __forceinline__ void bring_near(const void* p) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p));
}

#if KERNEL_HAS_CLUSTERS

// A barrier of all threads of a cluster: what they wrote to shared memory before it, all may read after it.
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::
                   : "memory");
}
// Likewise where nothing was written that others are to read: until they have read what they were to. What
// was read has to have been used before, since nothing else puts the reads before this barrier.
__device__ __forceinline__ void leave_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}
// Reads four floats of shared memory where the cluster's block of that number has them.
__device__ __forceinline__ void read_of_block(int block, const float* p, float (&v)[4]) {
  uint32_t at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(at) : "r"(shared_address(p)), "r"(block));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(at)
               : "memory");
}

#endif

}  // namespace xla_ops::cuda

#else
#define KERNEL_HAS_CLUSTERS 1
#include <chain_on_host.h>  // of the tests
#endif

namespace xla_ops::cuda {

template <class Kernel>
cudaError_t has_clusters(Kernel* kernel, bool* answer) {
  return has_code(kernel, answer, [](const cudaFuncAttributes& found) { return found.ptxVersion >= 90; });
}

}  // namespace xla_ops::cuda
