// The handler's part of `layers` that knows no platform: from a custom call's buffers and attributes to
// checked calls. Operands: x (..., H, W, C) and the parameters of each layer in the order of
// layer::Parameter, those of products as (inputs, outputs), the depthwise kernel (K, K, C). What precedes a
// parameter's own axes also precedes x's, and says which images use which parameters: `vmap` over them adds
// an axis to all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "ffi_types.h"
#include "layer_call.h"

namespace layer {

using namespace xla_ops;

constexpr char kName[] = "internimage_layers";

struct Settings {
  int64_t group;
  double offset_scale, epsilon;
  bool post_norm, early;
  int64_t version;
};

// A parameter's own axes; those of products have two.
inline std::vector<int64_t> shape_of(const Call& s, int parameter) {
  const int64_t c = s.channels;
  switch (parameter) {
    case kDwKernel:
      return {s.size, s.size, c};
    case kInputKernel:
    case kOutputKernel:
      return {c, c};
    case kRecordKernel:
      return {c, s.record};
    case kRecordBias:
      return {s.record};
    case kFc1Kernel:
      return {c, s.hidden};
    case kFc1Bias:
      return {s.hidden};
    case kFc2Kernel:
      return {s.hidden, c};
    default:
      return {c};
  }
}

// The call of the first set of parameters; there are `sets`, one after the other in all buffers.
inline ffi::Error describe(Operand x, ffi::RemainingArgs parameters, Result y, Result scratch,
                           const Settings& settings, Call* call, int64_t* sets) {
  Call& s = *call;
  if (ffi::Error error = check_version(kName, settings.version); error.failure()) return error;
  s.group = settings.group, s.offset_scale = settings.offset_scale, s.epsilon = settings.epsilon;
  s.early = settings.early;
  s.post_norm = settings.post_norm;
  const size_t layers = parameters.size() / kParameters;
  if (layers < 1 || parameters.size() % kParameters) {
    return invalid(kName, "expected " + std::to_string(kParameters) + " parameters for each layer");
  }
  std::vector<Operand> given;
  for (size_t i = 0; i < parameters.size(); ++i) {
    auto one = parameters.get<Operand>(i);
    if (!one) return one.error();
    given.push_back(*one);
  }

  const auto xs = x.dimensions(), kernel = given[kDwKernel].dimensions(),
             hidden = given[kFc1Bias].dimensions();
  if (kernel.size() < 3 || hidden.size() < 1 || xs.size() < kernel.size()) {
    return invalid(kName, "expected x (..., H, W, C), a depthwise kernel (..., K, K, C) and vectors");
  }
  const size_t axes = kernel.size() - 3;  // of sets
  s.height = xs[xs.size() - 3], s.width = xs[xs.size() - 2], s.channels = xs.back();
  s.size = kernel[axes], s.hidden = hidden.back(), s.record = (s.group * 28 + 7) / 8 * 8;
  if (s.height < 1 || s.width < 1 || s.channels < 1 || s.group < 1 || s.channels % s.group) {
    return invalid(kName, "expected a map of a pixel or more, and groups that divide its channels");
  }
  if (s.size % 2 == 0 || s.hidden < 1) return invalid(kName, "expected a depthwise kernel of an odd side");
  *sets = s.batch = 1;
  for (size_t i = 0; i + 3 < xs.size(); ++i) (i < axes ? *sets : s.batch) *= xs[i];
  if (!type_of(x.element_type(), &s.type)) return invalid(kName, "expected half precision");
  s.layers.resize(layers);
  for (size_t at = 0; at < given.size(); ++at) {
    const int i = int(at % kParameters);
    std::vector<int64_t> wanted(xs.begin(), xs.begin() + axes);
    const std::vector<int64_t> own = shape_of(s, i);
    const auto found = given[at].dimensions();
    wanted.insert(wanted.end(), own.begin(), own.end());
    Array& to = s.layers[at / kParameters][i];
    to.data = given[at].untyped_data();
    const bool fits = std::equal(wanted.begin(), wanted.end(), found.begin(), found.end());
    const bool known = type_of(given[at].element_type(), &to.type);
    const bool taken = to.type == s.type || (own.size() != 2 && to.type == Type::kFloat32);
    if (!fits || !known || !taken) {
      return invalid(kName,
                     "parameter " + std::to_string(at) + " has not the shape or the dtype of its place");
    }
  }
  for (const Parameters& layer : s.layers) {
    const auto alike = [&layer](int a, int b) { return layer[a].type == layer[b].type; };
    if (!alike(kDwKernel, kDwBias) || !alike(kDwKernel, kDwScale) || !alike(kDwKernel, kDwOffset) ||
        !alike(kNorm2Scale, kNorm2Bias)) {
      return invalid(kName, "expected one dtype of the depthwise kernel's parameters, and of a norm's");
    }
  }
  if (!same(*y, x)) return invalid(kName, "the result does not fit");
  if (!holds(*scratch, *sets * s.pixels() * s.scratch_width(), x.element_type())) {
    return invalid(kName, "the scratch does not fit");
  }
  s.x = x.untyped_data(), s.y = y->untyped_data(), s.scratch = scratch->untyped_data();
  return ffi::Error::Success();
}

// The call of another set of parameters, by its number.
inline Call of_set(Call s, int64_t set) {
  const auto move = [set](auto* p, int64_t numbers, Type type) {
    const int64_t bytes = type == Type::kFloat32 ? 4 : 2;
    *p = const_cast<char*>(static_cast<const char*>(*p)) + set * numbers * bytes;
  };
  move(&s.x, s.pixels() * s.channels, s.type);
  move(&s.y, s.pixels() * s.channels, s.type);
  move(&s.scratch, s.pixels() * s.scratch_width(), s.type);
  for (int i = 0; i < kParameters; ++i) {
    int64_t numbers = 1;
    for (int64_t size : shape_of(s, i)) numbers *= size;
    for (Parameters& layer : s.layers) move(&layer[i].data, numbers, layer[i].type);
  }
  return s;
}

}  // namespace layer
