// The handlers' part of `linear`, `convolution` and `mlp` that knows no platform: from a custom call's
// buffers and attributes to checked calls.
//
// Operands: x (..., C), kernel (..., C, K) and bias (..., K), of an MLP two kernels and biases, or of a
// convolution x (..., H, W, C) and kernel (..., 3, 3, C, K). A kernel may come in panels of 32 columns too,
// (..., K / 32 rounded up, C, 32), a convolution's with 9 C in place of C. What precedes the parameters' own
// axes also precedes x's, and says which rows use which parameters: `vmap` over them adds an axis to all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "ffi_types.h"
#include "linear_call.h"

namespace linear {

using namespace xla_ops;

enum class Form { kProduct, kGelu, kConvolution };

constexpr char kMlp[] = "internimage_mlp";

constexpr const char* name_of(Form form) {
  return form == Form::kProduct ? "internimage_linear"
         : form == Form::kGelu  ? "internimage_linear_gelu"
                                : "internimage_convolution";
}

// An array that is never written as a whole: what is between two products.
struct Unwritten {
  std::vector<int64_t> shape;
  ffi::DataType dtype;

  Shape dimensions() const { return {shape.data(), shape.size()}; }
  ffi::DataType element_type() const { return dtype; }
  size_t element_count() const {
    size_t count = 1;
    for (int64_t size : shape) count *= static_cast<size_t>(size);
    return count;
  }
  void* untyped_data() const { return nullptr; }
};

// The call of the first set of parameters; there are `sets`, one after the other in all buffers.
template <class X, class Y>
ffi::Error describe(const char* name, const X& x, Operand kernel, Operand bias, const Y& y, int64_t version,
                    Form form, Call* call, int64_t* sets) {
  if (ffi::Error error = check_version(name, version); error.failure()) return error;
  const bool convolution = form == Form::kConvolution;
  const auto misfit = [name, convolution] {
    return invalid(name, convolution ? "expected x (..., H, W, C), kernel (3, 3, C, K) and bias (K,)"
                                     : "expected x (..., C), kernel (C, K) and bias (K,)");
  };
  const Shape xs = x.dimensions(), ks = kernel.dimensions(), bs = bias.dimensions();
  const size_t least = convolution ? 3 : 1;  // axes of x without those of sets
  if (bs.size() < 1 || xs.size() < bs.size() - 1 + least || ks.size() < bs.size()) return misfit();
  const size_t all_sets = bs.size() - 1;  // axes
  const Shape own{ks.begin() + all_sets, ks.size() - all_sets};
  Call& s = *call;
  const int64_t channels = xs.back();
  s.inputs = convolution ? 9 * channels : channels, s.outputs = bs.back(), s.gelu = form == Form::kGelu;
  if (channels < 1 || s.outputs < 1) return misfit();
  const auto is = [&own](std::initializer_list<int64_t> shape) {
    return std::equal(own.begin(), own.end(), shape.begin(), shape.end());
  };
  s.panels = is({(s.outputs + kPanelColumns - 1) / kPanelColumns, s.inputs, kPanelColumns});
  if (!s.panels && !(convolution ? is({3, 3, channels, s.outputs}) : is({channels, s.outputs}))) {
    return misfit();
  }
  int64_t rows = static_cast<int64_t>(x.element_count()) / channels;
  if (convolution) {
    s.map = {xs[xs.size() - 3], xs[xs.size() - 2], channels};
    const int64_t pixels = s.map.height * s.map.width;
    rows = pixels > 0 ? rows / pixels * s.map.rows() * s.map.columns() : 0;
  }
  *sets = sets_of(xs, bs, 1);
  if (*sets < 0 || sets_of(xs, ks, own.size()) < 0) {
    return invalid(name, "the leading axes of x, kernel and bias differ");
  }
  s.rows = *sets > 0 ? rows / *sets : 0;
  s.image_rows = 1;
  if (convolution) s.image_rows = s.map.rows() * s.map.columns();
  if (!convolution && xs.size() >= 4) s.image_rows = xs[xs.size() - 3] * xs[xs.size() - 2];
  if (!type_of(x.element_type(), &s.type) || s.type == Type::kFloat64) {
    return invalid(name, "expected float32, bfloat16 or float16");
  }
  if (!type_of(bias.element_type(), &s.bias_type) || kernel.element_type() != x.element_type() ||
      (s.type != s.bias_type && s.bias_type != Type::kFloat32)) {
    return invalid(name, "expected a kernel of the dtype of x, and a bias of that or float32");
  }
  if (static_cast<int64_t>(y.element_count()) != rows * s.outputs || y.element_type() != x.element_type()) {
    return invalid(name, "the result does not fit");
  }
  s.x = x.untyped_data(), s.kernel = kernel.untyped_data(), s.bias = bias.untyped_data();
  s.y = y.untyped_data();
  return ffi::Error::Success();
}

// The calls of two products with GELU between them.
inline ffi::Error describe_mlp(Operand x, Operand kernel1, Operand bias1, Operand kernel2, Operand bias2,
                               Result y, int64_t version, Call* first, Call* second, int64_t* sets) {
  const Shape xs = x.dimensions(), bs = bias1.dimensions();
  Unwritten hidden = {{xs.begin(), xs.end()}, x.element_type()};
  if (hidden.shape.empty() || bs.size() == 0) return invalid(kMlp, "expected x (..., C) and a bias (K,)");
  hidden.shape.back() = bs.back();
  ffi::Error error = describe(kMlp, x, kernel1, bias1, hidden, version, Form::kGelu, first, sets);
  if (error.failure()) return error;
  error = describe(kMlp, hidden, kernel2, bias2, *y, version, Form::kProduct, second, sets);
  if (!error.failure() && first->rows != second->rows) {
    return invalid(kMlp, "the leading axes of both kernels differ");
  }
  return error;
}

// The call that makes the gradient of the first set's kernel, (..., C, K) or a convolution's, from x and the
// gradient of y (..., K): the rows are the columns of what x's rows are otherwise, and dy is the kernel. It
// has no bias yet.
inline ffi::Error describe_backward(Operand x, Operand dy, Result dkernel, int64_t version, Form form,
                                    Call* call, int64_t* sets) {
  const char* const name = name_of(form);
  if (ffi::Error error = check_version(name, version); error.failure()) return error;
  const bool convolution = form == Form::kConvolution;
  const auto misfit = [name, convolution] {
    return invalid(name, convolution
                             ? "expected x (..., H, W, C), dy (..., H / 2, W / 2, K) and dkernel (3, 3, C, K)"
                             : "expected x (..., C), dy (..., K) and dkernel (C, K)");
  };
  const auto xs = x.dimensions(), ys = dy.dimensions(), ks = dkernel->dimensions();
  const size_t least = convolution ? 3 : 1;  // axes of x without those of the batch
  const size_t own = convolution ? 4 : 2;    // axes of a kernel
  if (xs.size() < least || ys.size() != xs.size() || ks.size() < own || ks.size() - own > xs.size() - least ||
      xs.back() < 1 || ys.back() < 1) {
    return misfit();
  }
  Call& s = *call;
  const int64_t channels = xs.back();
  s.outputs = ys.back(), s.rows = convolution ? 9 * channels : channels, s.transposed = true;
  if (convolution) s.map = {xs[xs.size() - 3], xs[xs.size() - 2], channels};
  const size_t batch = xs.size() - least, all_sets = ks.size() - own;  // axes
  *sets = s.inputs = 1;
  for (size_t i = 0; i < batch; ++i) {
    if (ys[i] != xs[i] || (i < all_sets && ks[i] != xs[i])) return misfit();
    (i < all_sets ? *sets : s.inputs) *= xs[i];
  }
  if (convolution) {
    if (ys[batch] != s.map.rows() || ys[batch + 1] != s.map.columns()) return misfit();
    if (ks[all_sets] != 3 || ks[all_sets + 1] != 3) return misfit();
    s.inputs *= s.map.rows() * s.map.columns();
  }
  if (ks[ks.size() - 2] != channels || ks.back() != s.outputs) return misfit();
  if (!type_of(x.element_type(), &s.type) || s.type == Type::kFloat64) {
    return invalid(name, "expected float32, bfloat16 or float16");
  }
  if (dy.element_type() != x.element_type() || dkernel->element_type() != x.element_type()) {
    return invalid(name, "expected dy and the kernel's gradient of the dtype of x");
  }
  s.bias_type = Type::kFloat32;
  s.x = x.untyped_data(), s.kernel = dy.untyped_data(), s.y = dkernel->untyped_data();
  return ffi::Error::Success();
}

// The call of another set of parameters, by its number.
inline Call of_set(Call s, int64_t set) {
  const auto bytes = [](Type type) { return type == Type::kFloat32 ? 4 : 2; };
  const auto after = [set](const void* p, int64_t size) {
    return p ? static_cast<const char*>(p) + set * size : nullptr;
  };
  s.x = after(s.x, s.numbers() * bytes(s.type));
  s.kernel = after(s.kernel, s.kernel_numbers() * bytes(s.type));
  s.bias = after(s.bias, s.outputs * bytes(s.bias_type));
  s.y = const_cast<char*>(after(s.y, s.rows * s.outputs * bytes(s.type)));
  return s;
}

template <class Binding>
auto bind_forward(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // kernel
      .template Arg<Operand>()  // bias
      .template Ret<Operand>()  // y
      .template Attr<int64_t>("version");
}

template <class Binding>
auto bind_backward(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // dy
      .template Ret<Operand>()  // dkernel
      .template Attr<int64_t>("version");
}

template <class Binding>
auto bind_mlp(Binding&& binding) {
  return std::move(binding)
      .template Arg<Operand>()  // x
      .template Arg<Operand>()  // kernel1
      .template Arg<Operand>()  // bias1
      .template Arg<Operand>()  // kernel2
      .template Arg<Operand>()  // bias2
      .template Ret<Operand>()  // y
      .template Attr<int64_t>("version");
}

}  // namespace linear
