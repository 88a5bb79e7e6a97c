// What the programs that fuzz a kernel share: random calls, held against the definition, written out
// plainly in double. Every buffer has exactly its size, so that a sanitizer sees any access beyond it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "dcnv3_call.h"

using dcnv3::Call;
using dcnv3::Problem;
using dcnv3::Type;
using Values = std::vector<double>;

inline std::mt19937 engine;
inline int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(engine);
}
inline double normal() {
  return std::normal_distribution<double>()(engine);
}

// A buffer of a dtype and its values after rounding to it. Half precision is bfloat16.
struct Buffer {
  Buffer(Type t, int64_t n) : type(t), bytes(n * size()) {}
  Buffer(Type t, const Values& values) : Buffer(t, static_cast<int64_t>(values.size())) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  size_t size() const { return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2; }
  int64_t count() const { return static_cast<int64_t>(bytes.size() / size()); }
  void set(size_t i, double value) {
    const float single = static_cast<float>(value);
    if (type == Type::kFloat64) std::memcpy(&bytes[8 * i], &value, 8);
    if (type == Type::kFloat32) std::memcpy(&bytes[4 * i], &single, 4);
    if (type == Type::kBFloat16) std::memcpy(&bytes[2 * i], reinterpret_cast<const char*>(&single) + 2, 2);
  }
  double get(size_t i) const {
    double value = 0;
    float single = 0;
    if (type == Type::kFloat64) std::memcpy(&value, &bytes[8 * i], 8);
    if (type == Type::kFloat32) std::memcpy(&single, &bytes[4 * i], 4);
    if (type == Type::kBFloat16) std::memcpy(reinterpret_cast<char*>(&single) + 2, &bytes[2 * i], 2);
    return type == Type::kFloat64 ? value : single;
  }
  Values values() const {
    Values all(count());
    for (int64_t i = 0; i < count(); ++i) all[i] = get(i);
    return all;
  }
  Type type;
  std::vector<char> bytes;
};

struct Outcome {
  Values y, dx, doffset, dmask, dcentre;
};

// The definition for masks as they are; `blend` is each pair's share of the pixel at its position.
inline Outcome definition(const Problem& s, const Values& x, const Values& offset, const Values& mask,
                          const Values& blend, const Values& dy, bool centre) {
  Outcome out{Values(dy.size()), Values(x.size()), Values(offset.size()), Values(mask.size()),
              Values(blend.size())};
  const int64_t channels = s.group * s.depth;
  for (int64_t pair = 0; pair < s.batch * s.positions() * s.group; ++pair) {
    const int64_t position = pair / s.group, g = pair % s.group, image = position / s.positions();
    const int64_t i = position % s.positions() / s.out_width, j = position % s.out_width;
    const double keep = 1 - blend[pair];
    for (int64_t p = 0; p < s.points; ++p) {
      const int64_t q = p + (s.remove_center && p >= s.kernel_h * s.kernel_w / 2);
      const int64_t rh = s.dilation_h * (s.kernel_h - 1) / 2, rw = s.dilation_w * (s.kernel_w - 1) / 2;
      const double h =
          i * s.stride_h - s.pad_h + rh +
          (q % s.kernel_h * s.dilation_h - rh + offset[(pair * s.points + p) * 2 + 1]) * s.offset_scale;
      const double w =
          j * s.stride_w - s.pad_w + rw +
          (q / s.kernel_h * s.dilation_w - rw + offset[(pair * s.points + p) * 2]) * s.offset_scale;
      if (!(h > -1 && h < s.height && w > -1 && w < s.width)) continue;
      const double m = mask[pair * s.points + p] * keep, fh = h - std::floor(h), fw = w - std::floor(w);
      for (int k = 0; k < 4; ++k) {
        const int64_t row = static_cast<int64_t>(std::floor(h)) + k / 2,
                      col = static_cast<int64_t>(std::floor(w)) + k % 2;
        if (row < 0 || row >= s.height || col < 0 || col >= s.width) continue;
        const double th = k / 2 ? fh : 1 - fh, tw = k % 2 ? fw : 1 - fw;
        for (int64_t c = 0; c < s.depth; ++c) {
          const int64_t at = ((image * s.height + row) * s.width + col) * channels + g * s.depth + c;
          const double grad = dy[pair * s.depth + c];
          out.y[pair * s.depth + c] += m * th * tw * x[at];
          out.dx[at] += m * th * tw * grad;
          out.doffset[(pair * s.points + p) * 2] += m * s.offset_scale * th * (k % 2 ? 1 : -1) * x[at] * grad;
          out.doffset[(pair * s.points + p) * 2 + 1] +=
              m * s.offset_scale * tw * (k / 2 ? 1 : -1) * x[at] * grad;
          out.dmask[pair * s.points + p] += th * tw * x[at] * grad;
        }
      }
    }
    for (int64_t c = 0; centre && c < s.depth; ++c) {
      const int64_t at = ((image * s.height + i) * s.width + j) * channels + g * s.depth + c;
      out.y[pair * s.depth + c] += blend[pair] * x[at];
      out.dx[at] += blend[pair] * dy[pair * s.depth + c];
      out.dcentre[pair] += x[at] * dy[pair * s.depth + c];
    }
  }
  return out;
}

inline bool close(const char* name, const Values& got, const Values& expected, double tolerance) {
  double scale = 1e-30;
  for (double e : expected) scale = std::max(scale, std::fabs(e));
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(std::fabs(got[i] - expected[i]) <= tolerance * scale)) {
      std::printf("%s[%zu]: got %g, expected %g\n", name, i, got[i], expected[i]);
      return false;
    }
  }
  return true;
}

// Makes a call, hands it to `run`, which computes y and the gradients, and checks what it left.
template <class Run>
bool one(Run run) {
  Call call = {};
  Problem& s = call.problem;
  s.kernel_h = integer(1, 4), s.kernel_w = integer(1, 4);
  s.remove_center = integer(0, 3) == 0;
  if (integer(0, 1) || s.remove_center) s.kernel_h = s.kernel_w = 3;
  s.stride_h = integer(1, 3), s.stride_w = integer(1, 3), s.pad_h = integer(0, 3), s.pad_w = integer(0, 3);
  s.dilation_h = integer(1, 3), s.dilation_w = integer(1, 3);
  call.fused = integer(0, 1), call.centre = call.fused && integer(0, 1);
  if (call.centre) {  // an output of the input's size
    s.kernel_h = s.kernel_w = 3, s.stride_h = s.stride_w = 1;
    s.pad_h = s.dilation_h, s.pad_w = s.dilation_w;
  }
  s.points = s.kernel_h * s.kernel_w - s.remove_center;
  const double scales[] = {1, 1, 2, 0.5};
  s.offset_scale = scales[integer(0, 3)];
  const int64_t depths[] = {1, 2, 3, 4, 5, 8, 16, 16, 19, 32, 32, 33};
  s.group = integer(1, 4), s.depth = depths[integer(0, 11)], s.batch = integer(1, 2);
  const int64_t span_h = s.dilation_h * (s.kernel_h - 1) + 1, span_w = s.dilation_w * (s.kernel_w - 1) + 1;
  s.height = std::max<int64_t>(1, span_h - 2 * s.pad_h) + integer(0, 7);
  s.width = std::max<int64_t>(1, span_w - 2 * s.pad_w) + integer(0, 7);
  // Now and then too wide for the CPU's backward to do all groups at once.
  if (s.channels() >= 32 && integer(0, 3) == 0) s.width += (1 << 13) / s.channels();
  s.out_height = (s.height + 2 * s.pad_h - span_h) / s.stride_h + 1;
  s.out_width = (s.width + 2 * s.pad_w - span_w) / s.stride_w + 1;

  const Type types[] = {Type::kFloat32, Type::kFloat32, Type::kFloat64, Type::kBFloat16};
  call.type = types[integer(0, 3)];
  call.points_type = call.type == Type::kBFloat16 && call.fused && integer(0, 1) ? Type::kFloat32 : call.type;
  const int64_t pairs = s.batch * s.positions() * s.group;
  Values x(s.batch * s.height * s.width * s.group * s.depth), dy(pairs * s.depth);
  for (double& v : x) v = normal();
  for (double& v : dy) v = normal();
  // Offsets whose locations stay off the pixels, where the derivative jumps; exact in bfloat16.
  Values offset(pairs * s.points * 2), mask(pairs * s.points), centre(pairs);
  const double reach = integer(0, 3) ? 1.5 : 15;
  for (double& v : offset) v = (std::round(reach * normal()) + integer(1, 3) / 4.0) / s.offset_scale;
  if (integer(0, 3) == 0) {
    const double extremes[] = {1e30, -1e30, 3e9, INFINITY, -INFINITY, NAN};
    for (double& v : offset) v = integer(0, 9) ? v : extremes[integer(0, 5)];
  }
  for (double& v : mask) v = normal();
  for (double& v : centre) v = normal();

  const int64_t each = (3 * s.points + 1 + 3) / 4 * 4, width = (s.group * each + 7) / 8 * 8;
  Values record(s.batch * s.positions() * width);
  for (double& v : record) v = normal();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    double* row = &record[pair / s.group * width + pair % s.group * each];
    std::copy_n(&offset[pair * s.points * 2], s.points * 2, row);
    std::copy_n(&mask[pair * s.points], s.points, row + 2 * s.points);
    row[3 * s.points] = centre[pair];
  }
  const Buffer bx(call.type, x), bdy(call.type, dy), boffset(call.points_type, call.fused ? record : offset);
  const Buffer bmask(call.points_type, call.fused ? Values() : mask);
  Buffer y(call.type, bdy.count()), dx(call.type, bx.count());
  Buffer doffset(call.points_type, boffset.count()), dmask(call.points_type, bmask.count());
  call.x = bx.bytes.data(), call.dy = bdy.bytes.data();
  call.y = y.bytes.data(), call.dx = dx.bytes.data();
  call.doffset = doffset.bytes.data(), call.dweight = dmask.bytes.data();
  call.offset = {boffset.bytes.data(), width, each};
  if (!call.fused) {
    call.offset = {boffset.bytes.data(), s.group * s.points * 2, s.points * 2};
    call.weight = {bmask.bytes.data(), s.group * s.points, s.points};
  }
  if (!run(call)) return false;

  // What the definition sees are the values as stored.
  Values blend(pairs);
  const Values points = boffset.values(), masks = bmask.values();
  if (!call.fused) offset = points, mask = masks;
  for (int64_t pair = 0; call.fused && pair < pairs; ++pair) {
    const double* row = &points[pair / s.group * width + pair % s.group * each];
    std::copy_n(row, s.points * 2, &offset[pair * s.points * 2]);
    double total = 0;
    for (int64_t p = 0; p < s.points; ++p) total += std::exp(row[2 * s.points + p]);
    for (int64_t p = 0; p < s.points; ++p)
      mask[pair * s.points + p] = std::exp(row[2 * s.points + p]) / total;
    if (call.centre) blend[pair] = 1 / (1 + std::exp(-row[3 * s.points]));
  }
  const Values gradient = bdy.values();
  Outcome expected = definition(s, bx.values(), offset, mask, blend, gradient, call.centre);
  Values drecord(points.size());
  for (int64_t pair = 0; call.fused && pair < pairs; ++pair) {
    double* row = &drecord[pair / s.group * width + pair % s.group * each];
    double mean = 0;
    for (int64_t p = 0; p < s.points; ++p)
      mean += mask[pair * s.points + p] * expected.dmask[pair * s.points + p];
    std::copy_n(&expected.doffset[pair * s.points * 2], s.points * 2, row);
    for (int64_t p = 0; p < s.points; ++p) {
      const int64_t at = pair * s.points + p;
      row[2 * s.points + p] = (1 - blend[pair]) * mask[at] * (expected.dmask[at] - mean);
    }
    if (call.centre) row[3 * s.points] = blend[pair] * (1 - blend[pair]) * (expected.dcentre[pair] - mean);
  }
  const double tolerance = call.type == Type::kFloat64   ? 1e-11
                           : call.type == Type::kFloat32 ? 1e-5
                                                         : 1.0 / 128;
  const double points_tolerance = call.points_type == Type::kFloat32 ? 1e-5 : tolerance;
  bool good =
      close("y", y.values(), expected.y, tolerance) && close("dx", dx.values(), expected.dx, tolerance);
  if (call.fused) return good && close("drecord", doffset.values(), drecord, points_tolerance);
  return good && close("doffset", doffset.values(), expected.doffset, points_tolerance) &&
         close("dmask", dmask.values(), expected.dmask, points_tolerance);
}

// Memory of the given size without a cost until it is touched.
inline char* reserve(int64_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}

// The last image of a batch with more than 2^31 elements, over memory that is reserved but for that image
// never touched, and the same image alone.
struct Huge {
  static constexpr int64_t kGroup = 8, kChannels = 16 * kGroup, kWidth = 28 * kGroup;
  static constexpr int64_t kMap = 16 * 16 * kChannels, kRows = 16 * 16 * kWidth, kLast = 65999;
  static_assert(kLast * kMap > int64_t{1} << 31, "");

  Huge() : x(kMap), dy(kMap), record(kRows), y(kMap), dx(kMap), drecord(kRows) {
    Problem& s = alone.problem;
    s.batch = 1, s.group = kGroup, s.depth = 16, s.points = 9, s.offset_scale = 1;
    s.height = s.width = s.out_height = s.out_width = 16;
    s.kernel_h = s.kernel_w = 3;
    s.stride_h = s.stride_w = s.pad_h = s.pad_w = s.dilation_h = s.dilation_w = 1;
    alone.type = alone.points_type = Type::kFloat32;
    alone.fused = alone.centre = true;
    for (float& v : x) v = float(normal());
    for (float& v : dy) v = float(normal());
    for (float& v : record) v = float(normal());
    alone.x = x.data(), alone.dy = dy.data(), alone.y = y.data(), alone.dx = dx.data();
    alone.doffset = drecord.data(), alone.offset = {record.data(), kWidth, 28};

    whole = alone;
    whole.problem.batch = kLast + 1;
    for (char*& m : maps) m = reserve((kLast + 1) * kMap * 4);
    for (char*& m : records) m = reserve((kLast + 1) * kRows * 4);
    if (!there()) return;
    std::memcpy(maps[0] + kLast * kMap * 4, x.data(), kMap * 4);
    std::memcpy(maps[1] + kLast * kMap * 4, dy.data(), kMap * 4);
    std::memcpy(records[0] + kLast * kRows * 4, record.data(), kRows * 4);
    whole.x = maps[0], whole.dy = maps[1], whole.y = maps[2], whole.dx = maps[3];
    whole.offset.data = records[0], whole.doffset = records[1];
  }
  // Whether there was room to reserve.
  bool there() const { return maps[0] && maps[1] && maps[2] && maps[3] && records[0] && records[1]; }
  // Whether the two came out the same.
  bool same() const {
    return !std::memcmp(maps[2] + kLast * kMap * 4, y.data(), kMap * 4) &&
           !std::memcmp(maps[3] + kLast * kMap * 4, dx.data(), kMap * 4) &&
           !std::memcmp(records[1] + kLast * kRows * 4, drecord.data(), kRows * 4);
  }

  std::vector<float> x, dy, record, y, dx, drecord;
  Call alone = {}, whole;
  char *maps[4], *records[2];
};
