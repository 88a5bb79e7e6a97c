// What the handlers of all operators and platforms share.
#pragma once

#include <cstdint>

#include "types.h"
#include "xla/ffi/api/ffi.h"

namespace xla_ops {

constexpr int64_t kVersion = 4;  // of the attributes and layouts, as in xla_ops/_targets.py

inline bool type_of(xla::ffi::DataType dtype, Type* type) {
  switch (dtype) {
    case xla::ffi::F32:
      *type = Type::kFloat32;
      return true;
    case xla::ffi::F64:
      *type = Type::kFloat64;
      return true;
    case xla::ffi::BF16:
      *type = Type::kBFloat16;
      return true;
    case xla::ffi::F16:
      *type = Type::kFloat16;
      return true;
    default:
      return false;
  }
}

inline bool holds(const xla::ffi::AnyBuffer& a, int64_t count, xla::ffi::DataType dtype) {
  return static_cast<int64_t>(a.element_count()) == count && a.element_type() == dtype;
}

inline bool same(const xla::ffi::AnyBuffer& a, const xla::ffi::AnyBuffer& b) {
  return a.element_count() == b.element_count() && a.element_type() == b.element_type();
}

}  // namespace xla_ops
