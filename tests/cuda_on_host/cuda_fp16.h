// float16 for the kernels on the host; see cuda_runtime.h.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) {
  return {bits};
}
inline uint16_t __half_as_ushort(__half v) {
  return v.bits;
}
struct AllHalves {  // looked up: kernels on the host do little else
  AllHalves() {
    for (int bits = 0; bits < 1 << 16; ++bits) {
      const int exponent = bits >> 10 & 31, fraction = bits & 1023;
      const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                              : exponent == 0 ? std::ldexp(float(fraction), -24)
                                              : std::ldexp(float(1024 + fraction), exponent - 25);
      values[bits] = bits >> 15 ? -magnitude : magnitude;
    }
  }
  float values[1 << 16];
};
inline const AllHalves all_halves;
inline float __half2float(__half v) {
  return all_halves.values[v.bits];
}
inline __half __float2half_rn(float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const float magnitude = std::fabs(v);
  if (std::isnan(v)) return {0x7fff};
  if (magnitude >= 65520) return {uint16_t(sign | 0x7c00)};
  int exponent = -24;
  if (magnitude > 0) std::frexp(magnitude, &exponent);    // magnitude in [2^(exponent - 1), 2^exponent)
  const int unit = exponent < -13 ? -24 : exponent - 11;  // the last place's
  const int count = int(std::nearbyint(std::ldexp(magnitude, -unit)));
  return {uint16_t(sign | (unit == -24 ? count : ((exponent + 13) << 10) + count))};
}
