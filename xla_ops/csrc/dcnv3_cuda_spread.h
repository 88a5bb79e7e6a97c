// What the forms of DCNv3's gradient of x share.
#pragma once

#include "dcnv3_cuda_device.h"

namespace dcnv3::cuda {

// Adds up the gradient of one channel of an image by the definition, term by term; `sums` has a pixel's
// every `step` elements, and a row of pixels every `row`. Rare, so kept out of the way.
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
