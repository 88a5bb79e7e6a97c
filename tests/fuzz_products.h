// Random calls of linear, convolution and mlp, and of the gradients of kernels, held against the definition,
// written out plainly in double. How a call is computed is the includer's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "fuzz_values.h"

#include "linear_call.h"

namespace {

// A kernel (inputs, outputs) in panels, as a call has it. What is beyond the columns matters to nobody.
inline Values in_panels(const Values& kernel, int64_t inputs, int64_t outputs) {
  constexpr int64_t n = linear::kPanelColumns;
  Values panels((outputs + n - 1) / n * inputs * n, 1e30);
  for (int64_t k = 0; k < inputs; ++k) {
    for (int64_t j = 0; j < outputs; ++j) panels[(j / n * inputs + k) * n + j % n] = kernel[k * outputs + j];
  }
  return panels;
}

// `compute` does the call; of a form that CUDA has, or of any.
template <class Compute>
bool linear_case(bool cuda, Compute compute) {
  linear::Call s = {};
  s.gelu = integer(0, 1);
  s.type = integer(0, 1) ? Type::kBFloat16 : Type::kFloat16;
  s.rows = integer(1, 150), s.inputs = 8 * integer(1, 13), s.outputs = 8 * integer(1, 20);
  if (!integer(0, 2)) s.rows = integer(1, 300), s.inputs = 8 * integer(14, 60), s.outputs = 8 * integer(1, 8);
  if (!integer(0, 3)) s.rows = integer(300, 1500), s.inputs = 8 * integer(1, 4);
  // Several rounds of all that computes a tile at a time, of any number of steps.
  if (cuda && !integer(0, 2)) {
    s.rows = integer(260, 900), s.inputs = 8 * integer(1, 60), s.outputs = 8 * integer(1, 3);
    if (integer(0, 1)) s.rows = integer(900, 1600), s.inputs = 8 * integer(1, 16);
  }
  if (!cuda) {
    if (integer(0, 1)) s.type = Type::kFloat32;
    const int64_t inputs[] = {1, 3, 17, 100, 256, 300, 1024};
    s.rows = integer(1, 40), s.inputs = inputs[integer(0, 6)], s.outputs = integer(1, 100);
    if (!integer(0, 3)) s.rows = integer(100, 300), s.inputs = integer(250, 600), s.outputs = integer(1, 160);
    s.image_rows = integer(0, 1) ? 1 : 1000;  // what it decides holds for any number of rows
    if (integer(0, 1)) {
      s.map = {integer(1, 9), integer(1, 9), integer(1, 40)};
      s.rows = integer(1, 2) * s.map.rows() * s.map.columns(), s.inputs = 9 * s.map.channels;
    }
    s.transposed = integer(0, 1);
    if (s.map.channels && s.transposed) std::swap(s.rows, s.inputs);
  }
  s.bias_type = size_of(s.type) == 2 && integer(0, 1) ? Type::kFloat32 : s.type;
  Values x = normal(s.numbers()), kernel = normal(s.inputs * s.outputs);
  const Values bias = normal(s.outputs);
  for (double& v : kernel) v = std::round(v * 8) / 64;  // products and their sums are exact in float32
  if (!cuda) spoil(&x), spoil(&kernel);
  s.panels = !cuda && integer(0, 1);
  const auto bk = stored(s.type, s.panels ? in_panels(kernel, s.inputs, s.outputs) : kernel);
  const auto bx = stored(s.type, x), bb = stored(s.bias_type, bias);
  std::vector<char> y(s.rows * s.outputs * size_of(s.type));
  s.x = bx.data(), s.kernel = bk.data(), s.bias = bb.data(), s.y = y.data();
  if (!compute(s)) return false;
  const auto at = [&](int64_t row, int64_t k) {  // of x as a matrix
    if (s.transposed) std::swap(row, k);
    if (!s.map.channels) return x[row * (s.transposed ? s.rows : s.inputs) + k];
    const int64_t pixels = s.map.rows() * s.map.columns(), tap = k / s.map.channels;
    const int64_t i = 2 * (row % pixels / s.map.columns()) + tap / 3 - 1;
    const int64_t j = 2 * (row % s.map.columns()) + tap % 3 - 1;
    if (i < 0 || i >= s.map.height || j < 0 || j >= s.map.width) return 0.0;
    return x[((row / pixels * s.map.height + i) * s.map.width + j) * s.map.channels + k % s.map.channels];
  };
  Values wanted(s.rows * s.outputs);
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t j = 0; j < s.outputs; ++j) {
      double z = bias[j];
      for (int64_t k = 0; k < s.inputs; ++k) z += at(i, k) * kernel[k * s.outputs + j];
      wanted[i * s.outputs + j] = s.gelu ? gelu_of(z) : z;
    }
  }
  return close("a product", s.type, y, wanted);
}

// `compute` does two calls, the second on the rows that the first gives.
template <class Compute>
bool mlp_case(bool cuda, Compute compute) {
  linear::Call first = {}, second = {};
  const Type types[] = {Type::kFloat32, Type::kFloat32, Type::kBFloat16, Type::kFloat16};
  const int64_t inputs[] = {1, 17, 64, 100, 256, 300, 1030};
  first.type = types[integer(0, 3)], first.rows = integer(1, integer(0, 1) ? 40 : 120),
  first.inputs = inputs[integer(0, 6)];
  first.outputs = integer(1, integer(0, 1) ? 100 : 600), first.gelu = true;
  first.image_rows = integer(0, 1) ? 1 : 1000;
  if (integer(0, 9) == 0) first.rows = integer(410, 430), first.inputs = 64;  // more than a tile's
  if (cuda) {
    const int64_t channels[] = {64, 80};
    first.type = integer(0, 1) ? Type::kBFloat16 : Type::kFloat16;
    first.inputs = channels[integer(0, 1)], first.outputs = 64 * integer(1, first.inputs == 80 ? 5 : 4);
  }
  first.bias_type = size_of(first.type) == 2 && integer(0, 1) ? Type::kFloat32 : first.type;
  second = first, second.gelu = false, second.inputs = first.outputs;
  second.outputs = cuda ? first.inputs : integer(1, 100);
  const int64_t rows = first.rows, n = first.inputs, between = first.outputs, m = second.outputs;
  const Values bias1 = normal(between), bias2 = normal(m);
  Values x = normal(rows * n);
  if (!cuda) spoil(&x);
  Values kernel1 = normal(n * between), kernel2 = normal(between * m);
  for (double& v : kernel1) v = std::round(v * 2) / 16;
  for (double& v : kernel2) v = std::round(v * 2) / 16;
  first.panels = !cuda && integer(0, 1), second.panels = !cuda && integer(0, 1);
  const auto bk1 = stored(first.type, first.panels ? in_panels(kernel1, n, between) : kernel1);
  const auto bk2 = stored(first.type, second.panels ? in_panels(kernel2, between, m) : kernel2);
  const auto bx = stored(first.type, x);
  const auto bb1 = stored(first.bias_type, bias1), bb2 = stored(first.bias_type, bias2);
  std::vector<char> y(rows * m * size_of(first.type));
  first.x = bx.data(), first.kernel = bk1.data(), first.bias = bb1.data();
  second.kernel = bk2.data(), second.bias = bb2.data(), second.y = y.data();
  if (!compute(first, second)) return false;
  Values hidden(rows * between), wanted(rows * m);
  double scale = 1e-3;  // what a sum of terms as large has as a rule, where these few nearly cancel
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < between; ++j) {
      double z = bias1[j];
      for (int64_t k = 0; k < n; ++k) z += x[i * n + k] * kernel1[k * between + j];
      hidden[i * between + j] = gelu_of(z);
    }
    for (int64_t j = 0; j < m; ++j) {
      double z = bias2[j], squares = z * z;
      for (int64_t k = 0; k < between; ++k) {
        const double term = hidden[i * between + k] * kernel2[k * m + j];
        z += term, squares += term * term;
      }
      wanted[i * m + j] = z;
      if (std::isfinite(squares)) scale = std::max(scale, std::sqrt(squares));
    }
  }
  return close("an MLP", first.type, y, wanted, 4, scale);  // what is between the products is rounded too
}

}  // namespace
