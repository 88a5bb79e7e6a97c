// csrc/cuda_warpgroup.h on the host: the same functions. What threads have and where matrices lie in shared
// memory is as PTX's description of wgmma.m64nNk16 has it, for matrices without swizzling and of 128 bytes.
#pragma once

namespace xla_ops::cuda {

constexpr int kWarpgroup = 128;

inline uint64_t matrix(const void* cells, uint32_t lead, uint32_t stride) {
  const uint64_t fields[3] = {shared_address(cells) / 16, lead / 16, stride / 16};
  if (shared_address(cells) % 16 || lead % 16 || stride % 16 || (fields[0] | fields[1] | fields[2]) >> 14) {
    std::fputs("a matrix is not where products can read it\n", stderr);
    std::abort();
  }
  return fields[0] | fields[1] << 16 | fields[2] << 32;
}
inline uint64_t matrix_of_rows(const void* atoms, uint32_t lead) {
  return matrix(atoms, lead, 1024) | uint64_t(1) << 62;
}
inline uint64_t further(uint64_t matrix, uint32_t bytes) {
  return matrix + bytes / 16;
}

// Two neighbours of a row in memory: at k of the sixteen that are summed over and `other` of the rest, and
// one further in the direction that `sums_in_rows` says. The first of them is at an even place.
template <class T>
void read_pair(uint64_t matrix, bool sums_in_rows, unsigned k, unsigned other, float* first, float* second) {
  const uint64_t lead = (matrix >> 16 & 0x3fff) * 16, stride = (matrix >> 32 & 0x3fff) * 16;
  uint64_t at = (matrix & 0x3fff) * 16;
  if (matrix >> 62 == 0) {
    at += k / 8 * lead + other / 8 * stride;
    at += sums_in_rows ? other % 8 * 16 + k % 8 * 2 : k % 8 * 16 + other % 8 * 2;
  } else {
    at += sums_in_rows ? other / 8 * stride + other % 8 * 128 + k * 2
                       : other / 64 * lead + k / 8 * stride + k % 8 * 128 + other % 64 * 2;
    at ^= at >> 3 & 0x70;
  }
  uint32_t word;
  std::memcpy(&word, dynamic_shared_memory + at, 4);
  *first = to_real(T{uint16_t(word)}), *second = to_real(T{uint16_t(word >> 16)});
}

// A product is made at once, or when its group is waited for: as early or as late as it may be.
using PendingProduct = std::function<void()>;
inline std::vector<std::vector<std::vector<PendingProduct>>> pending_products;  // of each thread, its groups

inline std::vector<std::vector<PendingProduct>>& products_of_thread() {
  if (pending_products.size() < 1024) pending_products.resize(1024);
  auto& groups = pending_products[threadIdx.x];
  if (groups.empty()) groups.emplace_back();
  return groups;
}
// Products into the same sums are made in their order: one that comes after one that waits waits too.
inline void make_product(PendingProduct product) {
  auto& groups = products_of_thread();
  bool waiting = false;
  for (const auto& group : groups) waiting |= !group.empty();
  if (!waiting && cuda_on_host::chance() % 2) {
    product();
  } else {
    groups.back().push_back(std::move(product));
  }
}

inline void show_to_products() {}
inline void begin_products() {}
inline void end_products() {
  products_of_thread().emplace_back();
}
template <int N>
void wait_for_products() {
  auto& groups = products_of_thread();
  while (groups.size() > N + 1) {  // the last is still open
    for (const PendingProduct& product : groups.front()) product();
    groups.erase(groups.begin());
  }
}
template <int N>
void settle(float (&)[N]) {}

// The row and column of a thread's sum of that number.
inline unsigned row_of(unsigned sum) {
  return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4 + sum % 4 / 2 * 8;
}
inline unsigned column_of(unsigned sum) {
  return sum / 4 * 8 + threadIdx.x % 4 * 2 + sum % 2;
}

// A thread's sums, of the sixteen values of its two rows and the matrix b.
template <class T, int N>
void multiply_rows(const float (&rows)[2][16], uint64_t b, bool add, float (&sum)[N]) {
  for (unsigned i = 0; i < N; i += 4) {
    float one[4] = {};
    if (add) std::memcpy(one, sum + i, sizeof one);
    for (unsigned k = 0; k < 16; ++k) {
      float left, right;  // of the two columns
      read_pair<T>(b, false, k, column_of(i), &left, &right);
      one[0] += rows[0][k] * left, one[1] += rows[0][k] * right;
      one[2] += rows[1][k] * left, one[3] += rows[1][k] * right;
    }
    std::memcpy(sum + i, one, sizeof one);
  }
}

template <class T, bool add, int N>
void multiply_shared(uint64_t a, uint64_t b, float (&sum)[N]) {
  make_product([=, &sum] {
    float rows[2][16];
    for (unsigned half = 0; half < 2; ++half) {
      for (unsigned k = 0; k < 16; k += 2) {
        read_pair<T>(a, true, k, row_of(2 * half), &rows[half][k], &rows[half][k + 1]);
      }
    }
    multiply_rows<T>(rows, b, add, sum);
  });
}

template <class T, int N>
void multiply_registers(const uint32_t (&a)[4], uint64_t b, bool add, float (&sum)[N]) {
  static uint32_t all[1024][4];
  std::memcpy(all[threadIdx.x], a, sizeof a);
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
  struct Taken {
    float value[2][16];  // of the two rows of this thread's sums
    uint32_t registers[4];
  } taken;
  std::memcpy(taken.registers, a, sizeof a);
  for (unsigned half = 0; half < 2; ++half) {
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t word = all[threadIdx.x / 4 * 4 + k % 8 / 2][half + k / 8 * 2];
      taken.value[half][k] = to_real(T{uint16_t(word >> k % 2 * 16)});
    }
  }
  cuda_on_host::wait_at(cuda_on_host::State::kAtWarp);
  make_product([=, &a, &sum] {
    if (std::memcmp(taken.registers, a, sizeof a)) {
      std::fputs("registers were written before the product that takes them was waited for\n", stderr);
      std::abort();
    }
    multiply_rows<T>(taken.value, b, add, sum);
  });
}

}  // namespace xla_ops::cuda
