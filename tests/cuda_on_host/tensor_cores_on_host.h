// csrc/cuda_tensor_cores.h on the host: the same functions, of fibers for the threads of a warp. What they
// exchange lies as PTX's description of ldmatrix and mma.m16n8k16 has it.
#pragma once

namespace xla_ops::cuda {

// A copy is made at once, or when its group is waited for: as early or as late as it may be.
struct PendingCopy {
  void* to;
  const void* from;  // null for zeros
  void make() const {
    if (from) std::memcpy(to, from, 16);
    if (!from) std::memset(to, 0, 16);
  }
};
inline std::vector<std::vector<std::vector<PendingCopy>>> pending;  // of each thread, its groups

inline std::vector<std::vector<PendingCopy>>& groups_of_thread() {
  if (pending.size() < 1024) pending.resize(1024);
  auto& groups = pending[threadIdx.x];
  if (groups.empty()) groups.emplace_back();
  return groups;
}
inline void copy_ahead(void* to, const void* from, bool there) {
  const PendingCopy copy{to, there ? from : nullptr};
  if (cuda_on_host::chance() % 2) {
    copy.make();
  } else {
    groups_of_thread().back().push_back(copy);
  }
}
inline void end_group() {
  groups_of_thread().emplace_back();
}
template <int N>
void wait_for_groups() {
  auto& groups = groups_of_thread();
  while (groups.size() > N + 1) {  // the last is still open
    for (const PendingCopy& copy : groups.front()) copy.make();
    groups.erase(groups.begin());
  }
}

inline void wait_for_team(int team, int threads) {
  cuda_on_host::wait_for_team(team, threads);
}

template <bool transposed>
void load_matrices(const void* row, uint32_t (&m)[4]) {
  static const void* rows[1024];
  rows[threadIdx.x] = row;
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
  for (unsigned q = 0; q < 4; ++q) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned i = lane / 4, j = lane % 4 * 2 + e;
      const unsigned from = transposed ? j : i, at = transposed ? i : j;
      std::memcpy(&pair[e], static_cast<const uint16_t*>(rows[first + q * 8 + from]) + at, 2);
    }
    std::memcpy(&m[q], pair, 4);
  }
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
}

template <class T>
void multiply_add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&sum)[4]) {
  static uint32_t all[1024][6];
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(all[threadIdx.x], mine, sizeof mine);
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
  const auto value = [&](unsigned thread, unsigned which, unsigned e) {
    return to_real(T{uint16_t(all[first + thread][which] >> (16 * e))});
  };
  for (unsigned d = 0; d < 4; ++d) {
    const unsigned row = lane / 4 + d / 2 * 8, column = lane % 4 * 2 + d % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const float left = value(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
      const float right = value(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
      sum[d] += left * right;
    }
  }
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
}

}  // namespace xla_ops::cuda
