// What random calls of the layers' operators share: numbers, buffers of each dtype that have exactly their
// size, so that a sanitizer sees any access beyond it, and the comparison with what is worked out in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "types.h"

using xla_ops::Type;
using Values = std::vector<double>;

namespace {

std::mt19937 engine;
int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(engine);
}

// Normal numbers that every dtype can hold: of eight binary digits.
Values normal(int64_t n, double mean = 0) {
  Values values(n);
  for (double& v : values) {
    v = std::round((mean + std::normal_distribution<double>()(engine)) * 64) / 64;
    v = std::clamp(v, -3.984375, 3.984375);
  }
  return values;
}

size_t size_of(Type type) {
  return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2;
}

std::vector<char> stored(Type type, const Values& values) {
  std::vector<char> bytes(values.size() * size_of(type));
  for (size_t i = 0; i < values.size(); ++i) {
    const float single = static_cast<float>(values[i]);
    uint32_t word;
    std::memcpy(&word, &single, 4);
    // Exact: the digits that are cut off are zero. float16's exponent is smaller by 112.
    const uint16_t sign = uint16_t(word >> 16 & 0x8000u), upper = uint16_t(word >> 16);
    uint16_t half = single == 0 ? sign : uint16_t(sign | ((word & 0x7fffffffu) - (112u << 23)) >> 13);
    if (!std::isfinite(single)) half = uint16_t(sign | 0x7c00u | (std::isnan(single) ? 0x200u : 0u));
    if (type == Type::kFloat64) std::memcpy(&bytes[8 * i], &values[i], 8);
    if (type == Type::kFloat32) std::memcpy(&bytes[4 * i], &single, 4);
    if (type == Type::kBFloat16) std::memcpy(&bytes[2 * i], &upper, 2);
    if (type == Type::kFloat16) std::memcpy(&bytes[2 * i], &half, 2);
  }
  return bytes;
}

double value_of(Type type, const char* bytes) {
  double wide;
  float single;
  uint16_t half;
  if (type == Type::kFloat64) return std::memcpy(&wide, bytes, 8), wide;
  if (type == Type::kFloat32) return std::memcpy(&single, bytes, 4), single;
  std::memcpy(&half, bytes, 2);
  if (type == Type::kBFloat16) {
    const uint32_t word = uint32_t(half) << 16;
    return std::memcpy(&single, &word, 4), single;
  }
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
  return half >> 15 ? -magnitude : magnitude;
}

// Error allowed, as a part of the largest value.
double tolerance(Type type) {
  switch (type) {
    case Type::kFloat64:
      return 1e-11;
    case Type::kFloat32:
      return 2e-4;
    case Type::kBFloat16:
      return 0.004;
    case Type::kFloat16:
      return 0.0008;
  }
  return 0;
}

bool close(const char* name, Type type, const std::vector<char>& got, const Values& wanted, double factor = 1,
           double scale = 1e-3) {
  for (double w : wanted) {
    if (std::isfinite(w)) scale = std::max(scale, std::fabs(w));
  }
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double value = value_of(type, &got[size_of(type) * i]);
    if (std::isnan(wanted[i]) ? std::isnan(value) : value == wanted[i]) continue;
    if (std::fabs(value - wanted[i]) <= factor * tolerance(type) * scale) continue;
    return std::printf("%s[%zu] of dtype %d: got %g, expected %g\n", name, i, int(type), value, wanted[i]),
           false;
  }
  return true;
}

double phi(double z) {
  return 0.5 * std::erfc(-z / std::sqrt(2.0));
}
double gelu_of(double z) {
  return z == -INFINITY ? 0 : z * phi(z);
}
double slope(double z) {
  return phi(z) + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
}

Type any_type() {
  const Type types[] = {Type::kFloat32, Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16};
  return types[integer(0, 4)];
}

// Now and then a few numbers that are not finite.
void spoil(Values* x) {
  if (x->empty() || integer(0, 2)) return;
  const double values[] = {NAN, INFINITY, -INFINITY};
  for (int64_t n = integer(1, 3); n > 0; --n) (*x)[integer(0, x->size() - 1)] = values[integer(0, 2)];
}

// Runs `one` for each of COUNT seeds from SEED on, the arguments of a program.
template <class One>
int fuzz(int count, int seed, One one) {
  for (int i = 0; i < count; ++i) {
    engine.seed(seed + i);
    if (one()) continue;
    std::printf("shape of seed %d\n", seed + i);
    return 1;
  }
  std::printf("%d shapes\n", count);
  return 0;
}

}  // namespace
