// The dtypes of arrays, for all operators and platforms.
#pragma once

#include <cstdint>
#include <type_traits>

namespace xla_ops {

enum class Type { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Storage of the half-precision dtypes; arithmetic on them is float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which sums run.
template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace xla_ops
