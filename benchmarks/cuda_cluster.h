// Clusters: blocks that run at the same time and read each other's shared memory, which GPUs have from
// compute capability 9.0 on. Code for older ones has kernels that use this empty: see KERNEL_HAS_CLUSTERS.
#pragma once

#include "cuda_device.h"

#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define KERNEL_HAS_CLUSTERS 0
#else
#define KERNEL_HAS_CLUSTERS 1
#endif

namespace xla_ops::cuda {

#if KERNEL_HAS_CLUSTERS

// The number of this block in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// A barrier of all threads of the cluster; what they have written to shared memory before it, all read after
// it.
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::
                   : "memory");
}

// Where the block of that rank has what this one has at p in its shared memory.
template <class V>
__device__ __forceinline__ const V* in_block(const V* p, uint32_t rank) {
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;\n" : "=l"(there) : "l"(p), "r"(rank));
  return reinterpret_cast<const V*>(there);
}

#endif

}  // namespace xla_ops::cuda

#else
#define KERNEL_HAS_CLUSTERS 1
#include <cluster_on_host.h>  // of the tests
#endif

namespace xla_ops::cuda {

// As `launch_with`, in clusters of so many blocks.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(cudaStream_t stream, const Device& device, int64_t clusters, int each,
                            int threads, size_t shared, void (*kernel)(Parameters...),
                            Arguments... arguments) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared);
  if (error) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(each), attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * each));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace xla_ops::cuda
