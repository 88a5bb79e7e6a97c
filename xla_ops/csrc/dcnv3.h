// The arithmetic of DCNv3, written once for host and device.
//
// Everything here is about one point of one (position, group): where it falls, what its four
// neighbours weigh, how these weights change with the location, the softmax's pieces. The vectors of
// a CPU and the threads of a GPU run the same lines, so the tests of the CPU kernel cover these on a
// GPU too; what each form does around them has tests of its own.
//
// A location is never tested for being outside. The bilinear weight of pixel k is the hat function
// max(0, 1 - |location - k|); of all pixels in the map only two neighbours can have one above zero,
// and `locate` returns such a pair that lies in the map wherever the location is. Outside, at
// infinity and at NaN both weights are zero. So the taps need no predicates and no border of zeros.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DCNV3_HD __host__ __device__ __forceinline__
#else
#define DCNV3_HD inline __attribute__((always_inline))
#endif

namespace dcnv3 {

// A call's sizes and settings. Points run x first: point p has column p / kernel_h and row
// p % kernel_h, the middle one left out with remove_center.
struct Problem {
  int64_t batch, height, width;   // N, H, W
  int64_t out_height, out_width;  // Ho, Wo
  int64_t group, depth, points;   // G, D channels a group, P
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  double offset_scale;
  bool remove_center;

  DCNV3_HD int64_t channels() const { return group * depth; }
  DCNV3_HD int64_t positions() const { return out_height * out_width; }  // of one image
};

// Column and row of point p within the kernel.
DCNV3_HD void point_in_kernel(const Problem& s, int64_t p, int64_t* column, int64_t* row) {
  if (s.remove_center && p >= s.kernel_h * s.kernel_w / 2) ++p;
  *column = p / s.kernel_h;
  *row = p % s.kernel_h;
}

// location = grid(position) + (step(point) + offset) * offset_scale, along one axis.
DCNV3_HD int64_t radius(int64_t kernel, int64_t dilation) {
  return dilation * (kernel - 1) / 2;
}
DCNV3_HD int64_t grid(int64_t i, int64_t stride, int64_t pad, int64_t kernel, int64_t dilation) {
  return i * stride - pad + radius(kernel, dilation);
}
DCNV3_HD int64_t step(int64_t a, int64_t kernel, int64_t dilation) {
  return a * dilation - radius(kernel, dilation);
}

// The smaller and the larger of two numbers; of a NaN and a number the second, or in float32 on a GPU,
// where one instruction does it, the number. Nothing here has its result depend on which.
template <class Real>
DCNV3_HD Real smaller(Real a, Real b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Real) == 4) return fminf(a, b);
#endif
  return a < b ? a : b;
}
template <class Real>
DCNV3_HD Real larger(Real a, Real b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Real) == 4) return fmaxf(a, b);
#endif
  return a > b ? a : b;
}

// What `locate` needs of an axis: the last pixel that a pair of neighbours can start at, and from how far
// on, counted from the first, the second has no weight: 2, or minus infinity where there is no second.
// Reals, made once: a test of integers does not vectorise well.
template <class Real>
struct Extent {
  Real last, end;
};
template <class Real>
DCNV3_HD Extent<Real> extent(int64_t size) {
  return {size > 1 ? Real(size - 2) : Real(0), size > 1 ? Real(2) : -Real(INFINITY)};
}

// A location along one axis: pixels `first` and `first + 1` hold all the weight there is. An axis of
// one pixel has no second: its weight is zero, and whoever reads it reads the first again.
template <class Real>
struct Axis {
  Real first, weight0, weight1;
};

// max(0, 1 - |t|); 0 where t is NaN. On a GPU an addition bounds its result to [0, 1] by itself.
template <class Real>
DCNV3_HD Real hat(Real t) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Real) == 4) return __saturatef(1.0f - fabsf(t));
#endif
  return larger(smaller(Real(1) + t, Real(1) - t), Real(0));
}

// The first of the two pixels.
template <class Real>
DCNV3_HD Real first_pixel(Real location, const Extent<Real>& extent) {
  const Real first = larger(std::floor(location), Real(0));  // 0 also where it is NaN
  return smaller(first, extent.last);
}

// From here on by t, how far the location is from the first pixel: in [0, 1) inside, below at the first
// pixel of the map, above at the last.
template <class Real>
DCNV3_HD Real second_weight(Real t, const Extent<Real>& extent) {
  return larger(smaller(t, extent.end - t), Real(0));
}
template <class Real>
DCNV3_HD Axis<Real> locate(Real location, const Extent<Real>& extent) {
  const Real first = first_pixel(location, extent), t = location - first;
  return {first, hat(t), second_weight(t, extent)};
}

// Derivatives of the two weights by the location: at a pixel the one to the right, outside zero.
template <class Real>
struct Slopes {
  Real weight0, weight1;
};
template <class Real>
DCNV3_HD Slopes<Real> slopes(Real t, const Extent<Real>& extent) {
  const Real of_first = t < 0 ? Real(1) : Real(-1), of_second = t < 1 ? Real(1) : Real(-1);
  return {std::fabs(t) < 1 ? of_first : Real(0), ((t >= 0) & (t < extent.end)) ? of_second : Real(0)};
}

// The same for one point: from the dots <dy, pixel> of its cell's four pixels to <dy, sample> and its
// derivatives by the location.
template <class Real>
struct Sample {
  Real value, slope_h, slope_w;
};
template <class Real>
DCNV3_HD Sample<Real> chain_in_cell(Real t_h, Real t_w, const Extent<Real>& height, const Extent<Real>& width,
                                    const Real* dot) {
  const Real h0 = hat(t_h), h1 = second_weight(t_h, height);
  const Real w0 = hat(t_w), w1 = second_weight(t_w, width);
  const Slopes<Real> slope_h = slopes(t_h, height), slope_w = slopes(t_w, width);
  const Real upper = w0 * dot[0] + w1 * dot[1];
  const Real lower = w0 * dot[2] + w1 * dot[3];
  return {h0 * upper + h1 * lower, slope_h.weight0 * upper + slope_h.weight1 * lower,
          h0 * (slope_w.weight0 * dot[0] + slope_w.weight1 * dot[1]) +
              h1 * (slope_w.weight0 * dot[2] + slope_w.weight1 * dot[3])};
}
template <class Real>
DCNV3_HD Sample<Real> chain(Real at_h, Real at_w, const Extent<Real>& height, const Extent<Real>& width,
                            const Real* dot) {
  return chain_in_cell(at_h - first_pixel(at_h, height), at_w - first_pixel(at_w, width), height, width, dot);
}

// exp(x) for x <= 0 to 1e-7 relative, without branches, so that a compiler can vectorise it; exactly
// zero where a float32 would be subnormal, and NaN for NaN.
DCNV3_HD float exp_nonpositive(float x) {
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + shifter;
  const float n = shifted - shifter;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // in [-ln 2 / 2, ln 2 / 2]
  float e = 1.9875691500e-4f;
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = (e * r) * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127u << 23);  // 2^n
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < -87.0f ? 0.0f : e * scale;
}
DCNV3_HD double exp_nonpositive(double x) {
  return std::exp(x);
}

template <class Real>
DCNV3_HD Real sigmoid(Real x) {
  const Real e = exp_nonpositive(x < 0 ? x : -x);
  return (x < 0 ? e : Real(1)) / (Real(1) + e);
}

// The definition of one sample, for inputs that are not finite: it reads only what counts, where
// `locate` reads a neighbour times zero. `at(row, column)` is the value of a pixel.
template <class Real>
DCNV3_HD bool is_inside(Real h, Real w, int64_t height, int64_t width) {
  return h > -1 && h < Real(height) && w > -1 && w < Real(width);
}

template <class Real, class At>
DCNV3_HD Sample<Real> sample_exactly(Real h, Real w, int64_t height, int64_t width, At at) {
  if (!is_inside(h, w, height, width)) return {0, 0, 0};
  const int64_t i = static_cast<int64_t>(std::floor(h)), j = static_cast<int64_t>(std::floor(w));
  const Real th = h - Real(i), tw = w - Real(j);
  const bool up = i >= 0, down = i + 1 < height, left = j >= 0, right = j + 1 < width;
  const Real v00 = up && left ? at(i, j) : Real(0), v01 = up && right ? at(i, j + 1) : Real(0);
  const Real v10 = down && left ? at(i + 1, j) : Real(0), v11 = down && right ? at(i + 1, j + 1) : Real(0);
  const Real upper = v00 + (v01 - v00) * tw, lower = v10 + (v11 - v10) * tw;
  return {upper + (lower - upper) * th, lower - upper, (v01 - v00) * (1 - th) + (v11 - v10) * th};
}

// Fixed point: sums of integers do not depend on their order. A gradient whose terms' magnitudes add up
// to at most `bound` is kept as a multiple of 2^-e with |sum| below 2^bits, to rounding; the factor 2^e
// is in two parts, since it may exceed what a Real can hold. A bound that is not finite has no such e.
template <class Real>
struct FixedPoint {
  Real part0, part1;  // their product is 2^e

  DCNV3_HD Real to_fixed(Real v) const { return v * part0 * part1; }
  DCNV3_HD Real from_fixed(Real v) const { return v / part0 / part1; }
};
template <class Real>
DCNV3_HD FixedPoint<Real> fixed_point(Real bound, int bits) {
  int above = 0;  // bound < 2^above
  if (bound > 0) std::frexp(bound, &above);
  const int e = bits - above;
  return {std::ldexp(Real(1), e / 2), std::ldexp(Real(1), e - e / 2)};
}

}  // namespace dcnv3
