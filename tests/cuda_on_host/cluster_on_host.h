// benchmarks/cuda_cluster.h on the host: the same functions.
#pragma once

namespace xla_ops::cuda {

inline uint32_t cluster_rank() {
  return cuda_on_host::cluster.size() == 1 ? 0 : cuda_on_host::rank;
}

inline void wait_for_cluster() {
  cuda_on_host::wait_at(cuda_on_host::State::kAtCluster);
}

template <class V>
const V* in_block(const V* p, uint32_t rank) {
  if (rank == cluster_rank()) return p;
  const auto at = reinterpret_cast<const unsigned char*>(p) - cuda_on_host::shared;
  return reinterpret_cast<const V*>(cuda_on_host::cluster[rank].memory.data() + at);
}

}  // namespace xla_ops::cuda
