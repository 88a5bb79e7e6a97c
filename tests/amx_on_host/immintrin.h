// AMX's tile unit in plain C++, for tests of its kernels on a processor that has all else that they use.
// Found before the compiler's header of this name, which it includes; then that processor says that it has
// AMX.
//
// What the real unit refuses or leaves open is an error here: no configuration, sizes that do not fit.
#pragma once

#include_next <immintrin.h>

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_on_host {

struct Tile {
  int rows, bytes;
  uint8_t row[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}
inline Tile& tile(int i) {
  expect(configured, "a tile is used that is not configured");
  return tiles[i];
}

inline void configure(const void* from) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } wanted;
  static_assert(sizeof wanted == 64);
  std::memcpy(&wanted, from, sizeof wanted);
  expect(wanted.palette == 1 && wanted.start_row == 0, "another palette or first row");
  for (uint8_t byte : wanted.reserved) expect(byte == 0, "a reserved byte is set");
  for (int i = 0; i < 16; ++i) {
    const int rows = wanted.rows[i], bytes = wanted.bytes[i];
    if (i >= 8) expect(rows == 0 && bytes == 0, "more than eight tiles");
    if (i < 8) expect(0 < rows && rows <= 16 && 0 < bytes && bytes <= 64, "a tile of this size");
    if (i < 8) tiles[i] = {rows, bytes, {}};
  }
  configured = true;
}
inline void release() {
  configured = false;
}
inline void zero(int i) {
  std::memset(tile(i).row, 0, sizeof tile(i).row);
}
inline void load(int i, const void* from, int64_t stride) {
  zero(i);
  for (int r = 0; r < tile(i).rows; ++r) {
    std::memcpy(tile(i).row[r], static_cast<const char*>(from) + r * stride, tile(i).bytes);
  }
}
inline void store(int i, void* to, int64_t stride) {
  for (int r = 0; r < tile(i).rows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile(i).row[r], tile(i).bytes);
  }
}

inline float without_denormal(float v) {
  return std::fabs(v) < 0x1p-126f ? std::copysign(0.f, v) : v;
}
inline float widened(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float v;
  std::memcpy(&v, &word, sizeof v);
  return without_denormal(v);
}
inline void add_products(int sums, int a, int b) {
  Tile &to = tile(sums), &x = tile(a), &kernel = tile(b);
  expect(to.rows == x.rows && to.bytes == kernel.bytes && x.bytes / 4 == kernel.rows, "sizes do not fit");
  for (int r = 0; r < to.rows; ++r) {
    for (int k = 0; k < x.bytes / 4; ++k) {
      uint16_t left[2];
      std::memcpy(left, x.row[r] + 4 * k, sizeof left);
      for (int c = 0; c < to.bytes / 4; ++c) {
        uint16_t right[2];
        float sum;
        std::memcpy(right, kernel.row[k] + 4 * c, sizeof right);
        std::memcpy(&sum, to.row[r] + 4 * c, sizeof sum);
        for (int i = 0; i < 2; ++i) {
          sum = without_denormal(std::fma(widened(left[i]), widened(right[i]), without_denormal(sum)));
        }
        std::memcpy(to.row[r] + 4 * c, &sum, sizeof sum);
      }
    }
  }
}

inline int cpuid(unsigned leaf, unsigned part, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  const int found = __get_cpuid_count(leaf, part, a, b, c, d);
  if (leaf == 7 && part == 0) *d |= 1u << 22 | 1u << 24;
  return found;
}

}  // namespace amx_on_host

#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_release
#define _tile_loadconfig(from) amx_on_host::configure(from)
#define _tile_loadd(i, from, stride) amx_on_host::load(i, from, stride)
#define _tile_stored(i, to, stride) amx_on_host::store(i, to, stride)
#define _tile_zero(i) amx_on_host::zero(i)
#define _tile_dpbf16ps(sums, a, b) amx_on_host::add_products(sums, a, b)
#define _tile_release() amx_on_host::release()
#define __get_cpuid_count amx_on_host::cpuid
#define syscall(...) 0
