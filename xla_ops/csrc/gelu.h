// GELU, z * Phi(z) with Phi the distribution function of the normal law, and its derivative, of
// vectors of W numbers on a CPU and of one number, W = 1, on a GPU: the same lines on both. Included with
// GELU_FN, RealOf, Vec, bits, load_raw, fused_of, exp2_of and reciprocal_of defined: once for each
// instruction set, by cpu_gelu.h, and by gelu_cuda_device.h.
//
// Phi(-t) = exp(-t^2 / 2) m(t) for t = |z| with m smooth, so one exponential and one polynomial serve the
// whole line: relative error below 6e-7, also where Phi(z) is far below the rounding of 1, down to -12.9 (see
// kFarthest); further down, value and slope stay what they are there, -3e-37 and -4e-36.

template <class V>
struct Normal {
  V tail;     // Phi(-|z|)
  V density;  // exp(-z^2 / 2)
};

template <class V>
GELU_FN V absolute(V z) {
  return z > 0 ? z : 0 - z;  // of -0 it is 0
}
template <class V>
GELU_FN V positive_part(V z) {
  return z < 0 ? V{} : z;  // NaN stays NaN
}

template <class V>
GELU_FN V bounded(V t, float most) {
  return t < most ? t : V{} + most;
}

// |z|, at most so large that Phi(-|z|) is a normal number: for float32 2e-38. With denormal ones a CPU takes
// ten times as long.
constexpr float kFarthest = 12.9f;
template <int W>
GELU_FN Vec<float, W> magnitude(Vec<float, W> z) {
  return bounded(absolute(z), kFarthest);
}
template <int W>
GELU_FN Vec<double, W> magnitude(Vec<double, W> z) {
  const Vec<double, W> t = absolute(z);
  return t < 40. ? t : Vec<double, W>{} + 40.;
}

// For t from `magnitude`.
template <int W>
GELU_FN Normal<Vec<float, W>> normal(Vec<float, W> t) {
  using V = Vec<float, W>;
  using U = Vec<uint32_t, W>;
  // exp(-t^2 / 2) = 2^(c t^2) = 2^n 2^r, |r| <= 0.5, where the last bits of c and of t^2 count, which the
  // rounded ones have lost. Adding 1.5 * 2^23 rounds to an integer, in the low bits.
  constexpr float c = -0.72134752044448170;
  const V c0 = V{} + c, c1 = V{} + float(-0.72134752044448170 - c);
  const V square = t * t, lost = fused_of<W>(t, t, -square);
  const V shifted = fused_of<W>(square, c0, V{} + 12582912.f), n = shifted - 12582912.f;
  const V r = fused_of<W>(square, c1, fused_of<W>(lost, c0, fused_of<W>(square, c0, -n)));
  V e = V{} + 0.00132764666f;  // a fit of degree 5, relative error 7.5e-8
  e = e * r + 0.00967554096f;
  e = e * r + 0.0555071346f;
  e = e * r + 0.240221202f;
  e = e * r + 0.693146944f;
  e = e * r + 1.f;
  const V density = bits<V>(bits<U>(e) + (bits<U>(shifted) << 23));
  // m(t) = p(s) / (t + 3.3), s = (t - 3.3) / (t + 3.3): a fit of degree 7, relative error 7.9e-8.
  const V d = 1.f / (t + 3.3f), s = 1.f - 6.6f * d;
  V p = V{} - 0.000952495204f;
  p = p * s - 0.00144265604f;
  p = p * s + 0.00822623633f;
  p = p * s + 0.00396646513f;
  p = p * s - 0.0878784209f;
  p = p * s + 0.282931358f;
  p = p * s - 0.545006156f;
  p = p * s + 0.738934159f;
  return {density * (d * p), density};
}

template <int W>
GELU_FN Normal<Vec<double, W>> normal(Vec<double, W> t) {
  double lanes[W], tail[W], density[W];
  __builtin_memcpy(lanes, &t, sizeof t);
  for (int l = 0; l < W; ++l) {
    tail[l] = 0.5 * std::erfc(lanes[l] * 0.70710678118654752440);
    density[l] = std::exp(-0.5 * lanes[l] * lanes[l]);
  }
  return {load_raw<Vec<double, W>>(tail), load_raw<Vec<double, W>>(density)};
}

template <class Real, int W>
GELU_FN Vec<Real, W> gelu(Vec<Real, W> z) {
  const Vec<Real, W> t = magnitude<W>(z);
  return positive_part(z) - t * normal<W>(t).tail;
}

// The derivative: Phi(z) + z * exp(-z^2 / 2) / sqrt(2 pi).
template <class Real, class V>
GELU_FN V gelu_slope_from(V z, const Normal<V>& at) {
  constexpr Real far = sizeof(Real) == 4 ? 15 : 40;            // where the density is as good as zero
  const V x = z < -far ? V{} - far : z > far ? V{} + far : z;  // NaN stays NaN
  return (z < 0 ? at.tail : 1 - at.tail) + x * at.density * Real(0.39894228040143267794);
}
template <class Real, int W>
GELU_FN Vec<Real, W> gelu_slope(Vec<Real, W> z) {
  return gelu_slope_from<Real>(z, normal<W>(magnitude<W>(z)));
}

// z Phi(z) for results of type T in half precision: Phi(-t) is 2 to a polynomial, whose relative
// error, 1.3e-4 for bfloat16 and 6e-6 for float16, is a fifteenth and a fortieth of what rounding makes.
// Below -5.8 float16 has zeros, and below -12.9 bfloat16 what it has there, -3e-37.
template <class T, int W>
GELU_FN Vec<float, W> gelu_for_half(Vec<float, W> z) {
  using V = Vec<float, W>;
  constexpr bool wide = std::is_same_v<T, BFloat16>;
  const V t = bounded(absolute(z), wide ? kFarthest : 5.8f);
  V p = V{} + (wide ? 2.93534335e-8f : -1.82873021e-6f);
  if constexpr (wide) {
    p = p * t - 1.83705242e-6f;
    p = p * t + 4.96132125e-5f;
    p = p * t - 0.000764294353f;
    p = p * t + 0.00753158052f;
    p = p * t - 0.0511385426f;
    p = p * t - 0.462292463f;
    p = p * t - 1.14930739f;
    p = p * t - 1.00015962f;
  } else {
    p = p * t + 6.14948731e-5f;
    p = p * t - 0.000929846952f;
    p = p * t + 0.00850573648f;
    p = p * t - 0.0539566502f;
    p = p * t - 0.458466887f;
    p = p * t - 1.15125036f;
    p = p * t - 0.999995351f;
  }
  return positive_part(z) - t * exp2_of<W>(p);
}

// `magnitude` for derivatives in half precision, for which a GPU has another.
template <class V>
GELU_FN V magnitude_for_half(V z) {
  return bounded(absolute(z), kFarthest);
}

// `normal` for t from there and derivatives in half precision: relative error below 2e-5, far out too, for a
// third of the instructions.
template <int W>
GELU_FN Normal<Vec<float, W>> normal_for_half(Vec<float, W> t) {
  using V = Vec<float, W>;
  const V density = exp2_of<W>(-0.72134752f * (t * t));
  // m(t) = d q(d), d = 1 / (t + 3): a fit of degree 6, relative error 2.6e-6.
  const V d = reciprocal_of<W>(t + 3.f);
  V q = V{} + 69.0357991f;
  q = q * d - 117.704689f;
  q = q * d + 55.2943323f;
  q = q * d - 0.386664951f;
  q = q * d + 3.91065738f;
  q = q * d + 1.16160366f;
  q = q * d + 0.399634451f;
  return {density * (d * q), density};
}

// GELU and its derivative, as exact as results of type T can tell.
template <class T, int W>
GELU_FN Vec<RealOf<T>, W> gelu_for(Vec<RealOf<T>, W> z) {
  if constexpr (sizeof(T) == 2) {
    return gelu_for_half<T, W>(z);
  } else {
    return gelu<T, W>(z);
  }
}
template <class T, int W>
GELU_FN Vec<RealOf<T>, W> gelu_slope_for(Vec<RealOf<T>, W> z) {
  if constexpr (sizeof(T) == 2) {
    return gelu_slope_from<float>(z, normal_for_half<W>(magnitude_for_half(z)));
  } else {
    return gelu_slope<T, W>(z);
  }
}
