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

inline void pass_team(int team, int) {
  ++cuda_on_host::passed[team];
}

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - dynamic_shared_memory);
}
inline uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> 4 * i, byte = uint32_t(both >> (digit & 7) * 8 & 255);
    result |= (digit & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}

inline uint32_t read_one(uint32_t address) {
  uint32_t v;
  std::memcpy(&v, dynamic_shared_memory + address, 4);
  return v;
}
inline void read_two(uint32_t address, uint32_t* v) {
  std::memcpy(v, dynamic_shared_memory + address, 8);
}
inline void read_four(uint32_t address, uint32_t* v) {
  std::memcpy(v, dynamic_shared_memory + address, 16);
}
inline void write_one(uint32_t address, uint32_t v) {
  std::memcpy(dynamic_shared_memory + address, &v, 4);
}
inline void write_two(uint32_t address, uint32_t a, uint32_t b) {
  const uint32_t v[2] = {a, b};
  std::memcpy(dynamic_shared_memory + address, v, 8);
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

template <bool transposed>
void load_matrices(uint32_t row, uint32_t (&m)[4]) {
  load_matrices<transposed>(dynamic_shared_memory + row, m);
}
inline void load_two_matrices(uint32_t row, uint32_t (&m)[4]) {
  const uint32_t before[2] = {m[2], m[3]};
  const uint32_t named = __shfl_sync(~0u, row, threadIdx.x % 16);  // the first half names all there are
  load_matrices<true>(named, m);
  m[2] = before[0], m[3] = before[1];
}

inline void write_matrices(uint32_t row, const uint32_t (&m)[4]) {
  static uint32_t rows[1024];
  rows[threadIdx.x] = row;
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
  for (unsigned q = 0; q < 4; ++q) {
    std::memcpy(dynamic_shared_memory + rows[first + q * 8 + lane / 4] + lane % 4 * 4, &m[q], 4);
  }
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
}

template <class T>
uint32_t pack(float a, float b, T) {
  T pair[2];
  to_storage(a, &pair[0]);
  to_storage(b, &pair[1]);
  uint32_t word;
  std::memcpy(&word, pair, sizeof word);
  return word;
}

template <class T>
void multiply_add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&sum)[4]) {
  static float all[1024][12];
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (unsigned i = 0; i < 12; ++i) all[threadIdx.x][i] = to_real(T{uint16_t(mine[i / 2] >> i % 2 * 16)});
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
  for (unsigned d = 0; d < 4; ++d) {
    const unsigned row = lane / 4 + d / 2 * 8, column = lane % 4 * 2 + d % 2;
    float one = sum[d];
    for (unsigned k = 0; k < 16; ++k) {
      const float left = all[first + row % 8 * 4 + k % 8 / 2][row / 8 * 2 + k / 8 * 4 + k % 2];
      const float right = all[first + column * 4 + k % 8 / 2][8 + k / 8 * 2 + k % 2];
      one += left * right;
    }
    sum[d] = one;
  }
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
}

}  // namespace xla_ops::cuda
