// What the handlers of all operators and platforms share.
#pragma once

#include <cstdint>
#include <string>

#include "types.h"
#include "xla/ffi/api/ffi.h"

namespace xla_ops {

namespace ffi = xla::ffi;

using Operand = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;
using Shape = ffi::Span<const int64_t>;

constexpr int64_t kVersion = 4;  // of the attributes and layouts, as in xla_ops/_targets.py

inline ffi::Error invalid(const std::string& name, const std::string& why) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, name + ": " + why);
}

inline ffi::Error check_version(const char* name, int64_t version) {
  if (version == kVersion) return ffi::Error::Success();
  return invalid(name, "expected attributes of version " + std::to_string(kVersion));
}

inline bool type_of(ffi::DataType dtype, Type* type) {
  switch (dtype) {
    case ffi::F32:
      *type = Type::kFloat32;
      return true;
    case ffi::F64:
      *type = Type::kFloat64;
      return true;
    case ffi::BF16:
      *type = Type::kBFloat16;
      return true;
    case ffi::F16:
      *type = Type::kFloat16;
      return true;
    default:
      return false;
  }
}

// The dtypes of x and of its parameters, if they go together.
inline bool types_of(const Operand& x, const Operand& parameters, Type* type, Type* parameters_type) {
  return type_of(x.element_type(), type) && type_of(parameters.element_type(), parameters_type) &&
         (*parameters_type == *type || (*parameters_type == Type::kFloat32 && *type != Type::kFloat64));
}
constexpr char kTypes[] =
    "expected float32, float64, bfloat16 or float16, and parameters of the dtype of x, or float32";

// How many sets of parameters there are: what precedes their own axes, `own` of them, also precedes x's.
// It is -1 where it does not.
inline int64_t sets_of(Shape x, Shape parameters, size_t own) {
  int64_t sets = 1;
  for (size_t i = 0; i + own < parameters.size(); ++i) {
    if (i >= x.size() || parameters[i] != x[i]) return -1;
    sets *= parameters[i];
  }
  return sets;
}

inline bool holds(const Operand& a, int64_t count, ffi::DataType dtype) {
  return static_cast<int64_t>(a.element_count()) == count && a.element_type() == dtype;
}

inline bool same(const Operand& a, const Operand& b) {
  return a.element_count() == b.element_count() && a.element_type() == b.element_type();
}

}  // namespace xla_ops
