// Random calls of the layers' operators and of their gradients, held against the definition, written out
// plainly in double. Every buffer has exactly its size, so that a sanitizer sees any
// access beyond it. How a call is computed is the includer's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "dwconv_call.h"
#include "gelu_call.h"
#include "linear_call.h"
#include "norm_call.h"

using xla_ops::Type;
using Values = std::vector<double>;

namespace {

std::mt19937 engine;
int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(engine);
}

// Normal numbers that every dtype can hold: of eight binary digits.
Values normal(int64_t n, double mean = 0) {
  Values values(n);
  for (double& v : values) {
    v = std::round((mean + std::normal_distribution<double>()(engine)) * 64) / 64;
    v = std::clamp(v, -3.984375, 3.984375);
  }
  return values;
}

size_t size_of(Type type) {
  return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2;
}

std::vector<char> stored(Type type, const Values& values) {
  std::vector<char> bytes(values.size() * size_of(type));
  for (size_t i = 0; i < values.size(); ++i) {
    const float single = static_cast<float>(values[i]);
    uint32_t word;
    std::memcpy(&word, &single, 4);
    // Exact: the digits that are cut off are zero. float16's exponent is smaller by 112.
    const uint16_t sign = uint16_t(word >> 16 & 0x8000u), upper = uint16_t(word >> 16);
    uint16_t half = single == 0 ? sign : uint16_t(sign | ((word & 0x7fffffffu) - (112u << 23)) >> 13);
    if (!std::isfinite(single)) half = uint16_t(sign | 0x7c00u | (std::isnan(single) ? 0x200u : 0u));
    if (type == Type::kFloat64) std::memcpy(&bytes[8 * i], &values[i], 8);
    if (type == Type::kFloat32) std::memcpy(&bytes[4 * i], &single, 4);
    if (type == Type::kBFloat16) std::memcpy(&bytes[2 * i], &upper, 2);
    if (type == Type::kFloat16) std::memcpy(&bytes[2 * i], &half, 2);
  }
  return bytes;
}

double value_of(Type type, const char* bytes) {
  double wide;
  float single;
  uint16_t half;
  if (type == Type::kFloat64) return std::memcpy(&wide, bytes, 8), wide;
  if (type == Type::kFloat32) return std::memcpy(&single, bytes, 4), single;
  std::memcpy(&half, bytes, 2);
  if (type == Type::kBFloat16) {
    const uint32_t word = uint32_t(half) << 16;
    return std::memcpy(&single, &word, 4), single;
  }
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
  return half >> 15 ? -magnitude : magnitude;
}

// Error allowed, as a part of the largest value.
double tolerance(Type type) {
  switch (type) {
    case Type::kFloat64:
      return 1e-11;
    case Type::kFloat32:
      return 2e-4;
    case Type::kBFloat16:
      return 0.004;
    case Type::kFloat16:
      return 0.0008;
  }
  return 0;
}

bool close(const char* name, Type type, const std::vector<char>& got, const Values& wanted, double factor = 1,
           double scale = 1e-3) {
  for (double w : wanted) {
    if (std::isfinite(w)) scale = std::max(scale, std::fabs(w));
  }
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double value = value_of(type, &got[size_of(type) * i]);
    if (std::isnan(wanted[i]) ? std::isnan(value) : value == wanted[i]) continue;
    if (std::fabs(value - wanted[i]) <= factor * tolerance(type) * scale) continue;
    return std::printf("%s[%zu] of dtype %d: got %g, expected %g\n", name, i, int(type), value, wanted[i]),
           false;
  }
  return true;
}

double phi(double z) {
  return 0.5 * std::erfc(-z / std::sqrt(2.0));
}
double gelu_of(double z) {
  return z == -INFINITY ? 0 : z * phi(z);
}
double slope(double z) {
  return phi(z) + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
}

Type any_type() {
  const Type types[] = {Type::kFloat32, Type::kFloat32, Type::kFloat64, Type::kBFloat16, Type::kFloat16};
  return types[integer(0, 4)];
}

// Now and then a few numbers that are not finite.
void spoil(Values* x) {
  if (x->empty() || integer(0, 2)) return;
  const double values[] = {NAN, INFINITY, -INFINITY};
  for (int64_t n = integer(1, 3); n > 0; --n) (*x)[integer(0, x->size() - 1)] = values[integer(0, 2)];
}

// `compute` does a whole call: y, dx and partial. With `rows_are_chunks`, every row is a chunk.
template <class Compute>
bool dwconv_case(bool rows_are_chunks, Compute compute) {
  dwconv::Call s = {};
  s.batch = integer(1, 3), s.height = integer(1, 9), s.width = integer(1, 9), s.size = 2 * integer(0, 3) + 1;
  const int64_t channels[] = {1, 2, 3, 7, 8, 16, 19, 33, 40, 64, 80, 112, 200, 320, 1280, 2560};
  s.channels = channels[integer(0, 15)];
  if (s.channels > 64) s.batch = 1, s.height = integer(1, 3), s.width = integer(1, 6);
  s.chunks = rows_are_chunks ? s.height : integer(1, s.height);
  s.shared = integer(0, 1) ? s.batch : 1, s.epsilon = 1e-3;
  s.type = any_type();
  if (s.type == Type::kFloat64) s.channels = std::min<int64_t>(s.channels, 2048);  // as many as CUDA takes
  s.parameters_type = size_of(s.type) == 2 && integer(0, 1) ? Type::kFloat32 : s.type;
  const int64_t sets = s.batch / s.shared, c = s.channels, taps = s.size * s.size, rows = 3 + taps;
  const int64_t count = s.batch * s.height * s.width * c;
  const Values x = normal(count), dy = normal(count), kernel = normal(sets * taps * c);
  const Values bias = normal(sets * c, 1), scale = normal(sets * c, 1), offset = normal(sets * c);
  const auto bx = stored(s.type, x), bdy = stored(s.type, dy), bk = stored(s.parameters_type, kernel);
  const auto bb = stored(s.parameters_type, bias), bs = stored(s.parameters_type, scale);
  const auto bo = stored(s.parameters_type, offset);
  const Type real = s.type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32;
  std::vector<char> y(bx.size()), dx(bx.size());
  std::vector<char> partial(s.batch * s.chunks * rows * c * size_of(real));
  s.x = bx.data(), s.dy = bdy.data(), s.kernel = bk.data(), s.bias = bb.data(), s.scale = bs.data();
  s.offset = bo.data(), s.y = y.data(), s.dx = dx.data(), s.partial = partial.data();
  if (!compute(s)) return false;

  Values wanted(count), wanted_dx(count), parts(s.batch * s.chunks * rows * c);
  for (int64_t pixel = 0; pixel < s.batch * s.height * s.width; ++pixel) {
    const int64_t image = pixel / (s.height * s.width), i = pixel / s.width % s.height, j = pixel % s.width;
    const int64_t set = image / s.shared, at = pixel * c;
    int64_t chunk = 0;  // whose row is i
    while ((chunk + 1) * s.height / s.chunks <= i) ++chunk;
    double* sums = &parts[(image * s.chunks + chunk) * rows * c];
    const auto each_tap = [&](auto f) {  // f(tap, first element of its pixel)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t row = i + tap / s.size - s.size / 2, column = j + tap % s.size - s.size / 2;
        if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
        f(tap, ((image * s.height + row) * s.width + column) * c);
      }
    };
    Values v(&bias[set * c], &bias[set * c] + c), u(c), du(c);
    each_tap([&](int64_t tap, int64_t from) {
      for (int64_t k = 0; k < c; ++k) v[k] += kernel[(set * taps + tap) * c + k] * x[from + k];
    });
    double mean = 0, variance = 0, du_mean = 0, du_u = 0;
    for (double value : v) mean += value / c;
    for (double value : v) variance += (value - mean) * (value - mean) / c;
    const double factor = 1 / std::sqrt(variance + s.epsilon);
    for (int64_t k = 0; k < c; ++k) {
      u[k] = (v[k] - mean) * factor;
      const double z = u[k] * scale[set * c + k] + offset[set * c + k], dz = dy[at + k] * slope(z);
      wanted[at + k] = z * phi(z);
      sums[k] += dz, sums[c + k] += dz * u[k];
      du[k] = dz * scale[set * c + k];
      du_mean += du[k] / c, du_u += du[k] * u[k] / c;
    }
    for (int64_t k = 0; k < c; ++k) {
      const double dv = factor * (du[k] - du_mean - u[k] * du_u);
      sums[2 * c + k] += dv;
      each_tap([&](int64_t tap, int64_t from) {
        sums[(3 + tap) * c + k] += dv * x[from + k];
        wanted_dx[from + k] += dv * kernel[(set * taps + tap) * c + k];
      });
    }
  }
  return close("y", s.type, y, wanted) && close("dx", s.type, dx, wanted_dx) &&
         close("partial", real, partial, parts);
}

// `compute` does the call: the forward, or the backward if it has a dy.
template <class Compute>
bool gelu_case(Compute compute) {
  gelu::Call s = {};
  s.shared = integer(1, 4), s.rows = s.shared * integer(1, 3), s.channels = integer(1, 40);
  s.type = any_type();
  s.bias_type = size_of(s.type) == 2 && integer(0, 1) ? Type::kFloat32 : s.type;
  const int64_t count = s.rows * s.channels;
  Values x = normal(count);
  for (double& v : x) v *= 4;
  const Values bias = normal(s.rows / s.shared * s.channels), dy = normal(count);
  const auto bx = stored(s.type, x), bb = stored(s.bias_type, bias), bdy = stored(s.type, dy);
  std::vector<char> y(bx.size()), dx(bx.size());
  s.x = bx.data(), s.bias = bb.data(), s.result = y.data();
  if (!compute(s)) return false;
  s.dy = bdy.data(), s.result = dx.data();
  if (!compute(s)) return false;
  Values wanted(count), wanted_dx(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = i / s.channels;
    const double z = x[i] + bias[row / s.shared * s.channels + i % s.channels];
    wanted[i] = z * phi(z), wanted_dx[i] = dy[i] * slope(z);
  }
  return close("gelu", s.type, y, wanted) && close("its gradient", s.type, dx, wanted_dx);
}

// `compute` does the call.
template <class Compute>
bool norm_case(Compute compute) {
  layer_norm::Call s = {};
  s.shared = integer(1, 5), s.rows = s.shared * integer(1, 3), s.channels = integer(1, 80), s.epsilon = 1e-3;
  const int64_t wide[] = {112, 160, 256, 320, 512, 776, 1003, 1280, 2304};
  if (integer(0, 3) == 0) s.channels = wide[integer(0, 8)];
  s.type = any_type();
  s.parameters_type = size_of(s.type) == 2 && integer(0, 1) ? Type::kFloat32 : s.type;
  const int64_t n = s.channels, count = s.rows * n;
  Values x = normal(count, 1);
  const Values scale = normal(s.rows / s.shared * n, 1), bias = normal(s.rows / s.shared * n);
  const auto bx = stored(s.type, x), bs = stored(s.parameters_type, scale),
             bb = stored(s.parameters_type, bias);
  const auto add = layer_norm::Add(integer(0, 2));
  const Values residual = normal(count);
  const auto br = stored(s.type, residual);
  std::vector<char> y(bx.size()), total(br.size());
  s.x = bx.data(), s.scale = bs.data(), s.bias = bb.data(), s.y = y.data();
  if (add != layer_norm::Add::kNot) s.residual = br.data();
  if (add == layer_norm::Add::kBefore) s.total = total.data();
  if (!compute(s)) return false;
  if (add == layer_norm::Add::kBefore) {
    for (int64_t i = 0; i < count; ++i) x[i] += residual[i];
    if (!close("a sum", s.type, total, x)) return false;
    for (int64_t i = 0; i < count; ++i) x[i] = value_of(s.type, total.data() + i * size_of(s.type));
  }
  Values wanted(count);
  for (int64_t row = 0; row < s.rows; ++row) {
    double mean = 0, variance = 0;
    for (int64_t k = 0; k < n; ++k) mean += x[row * n + k] / n;
    for (int64_t k = 0; k < n; ++k) variance += (x[row * n + k] - mean) * (x[row * n + k] - mean) / n;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t parameter = row / s.shared * n + k;
      const double u = (x[row * n + k] - mean) / std::sqrt(variance + s.epsilon);
      wanted[row * n + k] = u * scale[parameter] + bias[parameter];
      if (add == layer_norm::Add::kAfter) wanted[row * n + k] += residual[row * n + k];
    }
  }
  return close("a norm", s.type, y, wanted);
}

// `compute` does the call.
template <class Compute>
bool norm_backward_case(Compute compute) {
  layer_norm::BackwardCall s = {};
  s.parts_of_image = integer(1, 3), s.image_rows = integer(0, 20), s.channels = integer(1, 80);
  const int64_t images_of_set = integer(1, 2), sets = integer(1, 2), images = sets * images_of_set;
  s.shared = images_of_set * s.parts_of_image, s.parts = images * s.parts_of_image, s.epsilon = 1e-3;
  s.type = any_type();
  s.parameters_type = size_of(s.type) == 2 && integer(0, 1) ? Type::kFloat32 : s.type;
  const int64_t n = s.channels, rows = images * s.image_rows, count = rows * n;
  const Values x = normal(count, 1), dy = normal(count), dtotal = normal(count), scale = normal(sets * n, 1);
  const auto bx = stored(s.type, x), bdy = stored(s.type, dy), bdt = stored(s.type, dtotal);
  const auto bs = stored(s.parameters_type, scale);
  const Type real = s.type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32;
  std::vector<char> dx(bx.size()), dparameters(s.parts * 2 * n * size_of(real), 1);
  s.x = bx.data(), s.scale = bs.data(), s.dy = bdy.data(), s.dx = dx.data();
  s.dparameters = dparameters.data();
  if (integer(0, 1)) s.dtotal = bdt.data();
  if (!compute(s)) return false;
  Values wanted(count), sums(s.parts * 2 * n);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t image = row / s.image_rows, i = row % s.image_rows;
    int64_t part = 0;  // whose row is i
    while ((part + 1) * s.image_rows / s.parts_of_image <= i) ++part;
    double* const to = &sums[(image * s.parts_of_image + part) * 2 * n];
    double mean = 0, variance = 0, g_mean = 0, g_z = 0;
    for (int64_t k = 0; k < n; ++k) mean += x[row * n + k] / n;
    for (int64_t k = 0; k < n; ++k) variance += (x[row * n + k] - mean) * (x[row * n + k] - mean) / n;
    const double factor = 1 / std::sqrt(variance + s.epsilon);
    Values g(n), z(n);
    for (int64_t k = 0; k < n; ++k) {
      const double d = dy[row * n + k];
      g[k] = d * scale[image / images_of_set * n + k], z[k] = (x[row * n + k] - mean) * factor;
      g_mean += g[k] / n, g_z += g[k] * z[k] / n;
      to[k] += d * z[k], to[n + k] += d;
    }
    for (int64_t k = 0; k < n; ++k) {
      wanted[row * n + k] = factor * (g[k] - g_mean - z[k] * g_z) + (s.dtotal ? dtotal[row * n + k] : 0);
    }
  }
  return close("a norm's gradient", s.type, dx, wanted) &&
         close("its parameters' gradients", real, dparameters, sums);
}

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

// Runs `one` for each of COUNT seeds from SEED on, the arguments of a program.
template <class One>
int fuzz(int count, int seed, One one) {
  for (int i = 0; i < count; ++i) {
    engine.seed(seed + i);
    if (one()) continue;
    std::printf("shape of seed %d\n", seed + i);
    return 1;
  }
  std::printf("%d shapes\n", count);
  return 0;
}

}  // namespace
