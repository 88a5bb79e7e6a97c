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

#define GELU_FN __device__ __forceinline__
#include "gelu.h"
#undef GELU_FN

// One instruction each; of normal numbers, to 2^-22 relative.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
__device__ __forceinline__ float reciprocal_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

// `normal` for results in half precision: relative error below 2e-5, far out too, where rounding to float16
// makes 5e-4, for two fifths of the instructions.
__device__ __forceinline__ Normal<float> normal_for_half(float t) {
  t = t < 13.f ? t : 13.f;
  const float density = exp2_of(-0.72134752f * (t * t));
  // As there, about 3: a fit of degree 6, relative error 2.7e-6.
  const float d = reciprocal_of(t + 3.f), s = (t - 3.f) * d;
  float p = 0.00147970184f;
  p = p * s + 0.00625887699f;
  p = p * s - 0.0108240871f;
  p = p * s - 0.0470957495f;
  p = p * s + 0.230077267f;
  p = p * s - 0.509343982f;
  p = p * s + 0.729082465f;
  return {density * (d * p), density};
}

// GELU and its derivative, as exact as results of type T can tell.
template <class T>
__device__ __forceinline__ RealOf<T> gelu_for(RealOf<T> z) {
  if constexpr (sizeof(T) == 2) {
    return gelu_from<float>(z, normal_for_half(absolute(z)));
  } else {
    return gelu<T, 1>(z);
  }
}
template <class T>
__device__ __forceinline__ RealOf<T> gelu_slope_for(RealOf<T> z) {
  if constexpr (sizeof(T) == 2) {
    return gelu_slope_from<float>(z, normal_for_half(absolute(z)));
  } else {
    return gelu_slope<T, 1>(z);
  }
}

}  // namespace xla_ops::cuda
