// Random calls of dwconv_norm_gelu, bias_gelu and the norms, and of their gradients, held against the
// definition, written out plainly in double. How a call is computed is the includer's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "fuzz_values.h"

#include "dwconv_call.h"
#include "gelu_call.h"
#include "norm_call.h"

namespace {

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

}  // namespace
