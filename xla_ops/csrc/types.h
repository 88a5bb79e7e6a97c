// The dtypes of arrays, for all operators and platforms.
#pragma once

namespace xla_ops {

enum class Type { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace xla_ops
