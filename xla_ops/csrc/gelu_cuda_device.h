// GELU of one number, on a GPU.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_device.h"

namespace xla_ops::cuda {

template <class R, int W>
using Vec = std::enable_if_t<W == 1, R>;
template <class V, class P>
__device__ __forceinline__ V load_raw(const P* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class To, class From>
__device__ __forceinline__ To bits(From from) {
  static_assert(sizeof(To) == sizeof from);
  return load_raw<To>(&from);
}

// a * b + c rounded once.
template <int W>
__device__ __forceinline__ float fused_of(float a, float b, float c) {
  return std::fma(a, b, c);
}

// One instruction each; of normal numbers, to 2^-22 relative.
template <int W>
__device__ __forceinline__ float exp2_of(float x) {
  return power_of_two(x);
}
template <int W>
__device__ __forceinline__ float reciprocal_of(float x) {
  return reciprocal(x);
}

// Of less instructions than the templates of these names.
__device__ __forceinline__ float absolute(float z) {
  return std::fabs(z);
}
__device__ __forceinline__ float bounded(float t, float most) {
  return std::fmin(t, most);
}
// From 13.3 on ex2 is 0.
__device__ __forceinline__ float magnitude_for_half(float z) {
  return std::fmin(std::fabs(z), 15.f);
}
__device__ __forceinline__ float positive_part(float z) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(z));
  return y;
#else
  return z < 0 ? 0 : z;
#endif
}

#define GELU_FN __device__ __forceinline__
#include "gelu.h"
#undef GELU_FN

}  // namespace xla_ops::cuda
