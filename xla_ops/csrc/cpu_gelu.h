// gelu.h for one instruction set; after cpu_simd.h.

// a * b + c rounded once, which a compiler's contraction may be or not.
template <int W>
CPU_FN Vec<float, W> fused_of(Vec<float, W> a, Vec<float, W> b, Vec<float, W> c) {
#if CPU_BYTES == 64
  if constexpr (W == 16) {
    return bits<Vec<float, 16>>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c)));
  }
#endif
#if CPU_BYTES >= 32
  if constexpr (W == 8) {
    return bits<Vec<float, 8>>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c)));
  }
#endif
  if constexpr (W == 1) {
    return static_cast<float>(double(a) * double(b) + double(c));
  } else {  // the product is exact
    using D = Vec<double, W>;
    const auto wide = [](Vec<float, W> v) CPU_TARGET { return __builtin_convertvector(v, D); };
    return __builtin_convertvector(wide(a) * wide(b) + wide(c), Vec<float, W>);
  }
}

// 2^x for x from -125.5 to 0.5, to 3e-6 relative: a fit of degree 4 between two integers.
template <int W>
CPU_FN Vec<float, W> exp2_of(Vec<float, W> x) {
  using V = Vec<float, W>;
  using U = Vec<uint32_t, W>;
  // Adding 1.5 * 2^23 rounds to an integer, in the low bits.
  const V shifted = x + 12582912.f, r = x - (shifted - 12582912.f);
  V e = V{} + 0.00957010034f;
  e = e * r + 0.0559178591f;
  e = e * r + 0.240247443f;
  e = e * r + 0.693121791f;
  e = e * r + 0.999999285f;
  return bits<V>(bits<U>(e) + (bits<U>(shifted) << 23));
}

// 1 / v, to 2e-7 relative: a step of Newton's after an estimate of 14 or 12 bits, where there is one.
template <int W>
CPU_FN Vec<float, W> reciprocal_of(Vec<float, W> v) {
#if CPU_BYTES == 64
  if constexpr (W == 16) {
    const Vec<float, W> r = bits<Vec<float, W>>(_mm512_rcp14_ps(bits<__m512>(v)));
    return r * (2.f - v * r);
  }
#endif
#if CPU_BYTES >= 32
  if constexpr (W == 8) {
    const Vec<float, W> r = bits<Vec<float, W>>(_mm256_rcp_ps(bits<__m256>(v)));
    return r * (2.f - v * r);
  }
#endif
  return 1.f / v;
}

// Of fewer instructions than the templates of these names.
#if CPU_BYTES >= 32
using Full = Vec<float, CPU_BYTES / 4>;
CPU_FN Full absolute(Full z) {
  return bits<Full>(bits<Vec<uint32_t, CPU_BYTES / 4>>(z) & 0x7fffffffu);
}
CPU_FN Full bounded(Full t, float most) {
#if CPU_BYTES == 64
  return bits<Full>(_mm512_min_ps(bits<__m512>(t), _mm512_set1_ps(most)));
#else
  return bits<Full>(_mm256_min_ps(bits<__m256>(t), _mm256_set1_ps(most)));
#endif
}
CPU_FN Full positive_part(Full z) {  // of a zero and of a NaN the instruction gives the second
#if CPU_BYTES == 64
  return bits<Full>(_mm512_max_ps(_mm512_setzero_ps(), bits<__m512>(z)));
#else
  return bits<Full>(_mm256_max_ps(_mm256_setzero_ps(), bits<__m256>(z)));
#endif
}
#endif

#define GELU_FN CPU_FN
#include "gelu.h"
#undef GELU_FN
