// The kernels for one instruction set; included by cpu_targets.h.
//
// Work goes in blocks of kBlock (position, group) pairs, and a lane of a vector owns a pair:
//   load    the pairs' learned numbers, transposed: row r holds number r of every pair
//   soften  fused form: softmax over the points, share of the centre pixel
//   weigh   for each point the first pixel of its cell, and the weights of the cell's four pixels
// Then, pair by pair, vectors run over the D channels of a group and the weights are scalars:
//   sample  y = sum of weight * pixel                                              (forward)
//   spread  dx[pixel] += weight * dy, and the dots <dy, pixel>                     (backward)
// and, again with a pair a lane,
//   chain   from the dots to the gradients of the learned numbers                  (backward)
//
// A cell at the map's edge has a pixel of weight zero. Zero times infinity is NaN, so a pair whose
// operands are not finite (it shows in the result) is done again by the definition.

#include "cpu_simd.h"
#include "dcnv3_cpu_block.h"
#include "dcnv3_cpu_forward.h"
#include "dcnv3_cpu_backward.h"

// Picks the form compiled for this depth and number of points, or the one that takes any.
template <class T>
CPU_TARGET void forward_any(const Call& call, int64_t begin, int64_t end) {
  const bool nine = call.problem.points == 9 && !std::is_same_v<T, double>;
  if (nine && call.problem.depth == 16) return forward_of<T, 16, 9>(call, begin, end);
  if (nine && call.problem.depth == 32) return forward_of<T, 32, 9>(call, begin, end);
  forward_of<T, 0, 0>(call, begin, end);
}
template <class T>
CPU_TARGET void backward_any(const Call& call, int64_t image, int64_t g0, int64_t g1) {
  const bool nine = call.problem.points == 9 && !std::is_same_v<T, double>;
  if (nine && call.problem.depth == 16) return backward_of<T, 16, 9>(call, image, g0, g1);
  if (nine && call.problem.depth == 32) return backward_of<T, 32, 9>(call, image, g0, g1);
  backward_of<T, 0, 0>(call, image, g0, g1);
}

CPU_TARGET void forward(const Call& call, int64_t begin, int64_t end) {
  with_type(call.type, [&](auto t) CPU_TARGET { forward_any<decltype(t)>(call, begin, end); });
}
CPU_TARGET void backward(const Call& call, int64_t image, int64_t g0, int64_t g1) {
  with_type(call.type, [&](auto t) CPU_TARGET { backward_any<decltype(t)>(call, image, g0, g1); });
}
