// Results by the definition, where operands are not finite. Rare, so kept out of the way.
#pragma once

#include "dcnv3_cuda_device.h"

namespace dcnv3::cuda {

// One channel of y by the definition.
template <class T, class Real = RealOf<T>>
__device__ __noinline__ Real sample_by_definition(const Call& call, const Place& at, int64_t input) {
  const Problem& s = call.problem;
  const T* x = static_cast<const T*>(call.x) + input;
  const auto pixel = [&](int64_t i, int64_t j) { return to_real(x[(i * s.width + j) * s.channels()]); };
  Points<T> points(call, at);
  const Real share = points.share() * points.keep;
  Real sum = 0;
  for (int p = 0; p < points.count(); ++p) {
    points.next(p, 0);
    sum += points.weight(p) * share * sample_exactly(points.h, points.w, s.height, s.width, pixel).value;
  }
  return call.centre ? sum + points.blend * pixel(at.i, at.j) : sum;
}

// <dy, sample> and its derivatives by the definition.
template <class T, class Real>
__device__ __noinline__ Sample<Real> chain_by_definition(const Call& call, int64_t input, int64_t output,
                                                         Real h, Real w) {
  const Problem& s = call.problem;
  Sample<Real> total = {0, 0, 0};
  if (!is_inside(h, w, s.height, s.width)) {
    for (int64_t c = 0; c < s.depth; ++c)
      total.value += to_real(static_cast<const T*>(call.dy)[output + c]) * 0;
    return total;  // the location has no gradient, whatever dy is
  }
  for (int64_t c = 0; c < s.depth; ++c) {
    const T* x = static_cast<const T*>(call.x) + input + c;
    const auto pixel = [&](int64_t i, int64_t j) { return to_real(x[(i * s.width + j) * s.channels()]); };
    const Sample<Real> sample = sample_exactly(h, w, s.height, s.width, pixel);
    const Real g = to_real(static_cast<const T*>(call.dy)[output + c]);
    total.value += g * sample.value;
    total.slope_h += g * sample.slope_h;
    total.slope_w += g * sample.slope_w;
  }
  return total;
}

// The gradients of all learned numbers of a place in the fused form.
template <class T>
__device__ __noinline__ void gradients_by_definition(const Call& call, const Place& at) {
  using Real = RealOf<T>;
  const Problem& s = call.problem;
  const T* const x = static_cast<const T*>(call.x) + at.input(s);
  const T* const dy = static_cast<const T*>(call.dy) + at.output(s);
  Points<T> points(call, at);
  const Real share = points.share();
  const Numbers<T, char> to(static_cast<char*>(call.doffset), call.points_type,
                            points.first_number(call, at));
  const auto sample = [&](int p) {
    points.next(p, 0);
    return chain_by_definition<T>(call, at.input(s), at.output(s), points.h, points.w);
  };
  Real mean = 0;
  for (int p = 0; p < points.count(); ++p) mean += points.weight(p) * share * sample(p).value;
  points.restart();
  for (int p = 0; p < points.count(); ++p) {
    const Sample<Real> of = sample(p);
    const Real weight = points.weight(p) * share * points.keep, factor = weight * points.scale;
    // Zero outside, even where the weight is NaN.
    to.set(2 * p, of.slope_w != 0 ? factor * of.slope_w : Real(0));
    to.set(2 * p + 1, of.slope_h != 0 ? factor * of.slope_h : Real(0));
    to.set(2 * points.count() + p, weight * (of.value - mean));
  }
  Real centre = 0;
  if (call.centre) {
    const T* const own = x + (at.i * s.width + at.j) * s.channels();
    for (int64_t c = 0; c < s.depth; ++c) centre += to_real(dy[c]) * to_real(own[c]);
    centre = points.blend * points.keep * (centre - mean);
  }
  to.set(3 * points.count(), centre);
}

// Adds up the gradient of one channel of an image by the definition, term by term; `sums` has a pixel's
// every `step` elements, and a row of pixels every `row`.
template <class T, class Real = RealOf<T>>
__device__ __noinline__ void spread_by_definition(const Call& call, int64_t image, int channel, Real* sums,
                                                  int64_t step, int64_t row) {
  const Problem& s = call.problem;
  const Neighbours neighbour(s);
  const int group = channel / int(s.depth), width = int(s.width);
  const auto at_pixel = [=](int pixel) { return sums + pixel / width * row + pixel % width * step; };
  Place at = {image, 0, 0, group, channel - group * int(s.depth)};
  for (at.i = 0; at.i < int(s.out_height); ++at.i) {
    for (at.j = 0; at.j < int(s.out_width); ++at.j) {
      Points<T> points(call, at);
      const Real share = points.share() * points.keep;
      const Real g = to_real(static_cast<const T*>(call.dy)[at.output(s)]);
      for (int p = 0; p < points.count(); ++p) {
        points.next(p, 0);
        const Cell<Real> c = cell(points, Real(1));
        const Real weight = points.weight(p) * share;
        for (int k = 0; k < 4; ++k) {
          if (c.weight[k] > 0) *at_pixel(c.pixel + neighbour[k]) += c.weight[k] * weight * g;
        }
      }
      if (call.centre) *at_pixel(at.i * width + at.j) += points.blend * g;
    }
  }
}

}  // namespace dcnv3::cuda
