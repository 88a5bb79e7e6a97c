// The Python module that hands over the CPU handlers of XLA's foreign function interface.
#include <pybind11/pybind11.h>

#include "cpu_types.h"
#include "ffi_types.h"

#define TARGETS(X)                         \
  X(internimage_dcnv3_forward)             \
  X(internimage_dcnv3_backward)            \
  X(internimage_dcnv3_fused_forward)       \
  X(internimage_dcnv3_fused_backward)      \
  X(internimage_dwconv_norm_gelu_forward)  \
  X(internimage_dwconv_norm_gelu_backward) \
  X(internimage_bias_gelu_forward)         \
  X(internimage_bias_gelu_backward)        \
  X(internimage_layer_norm_forward)        \
  X(internimage_layer_norm_backward)       \
  X(internimage_add_norm_forward)          \
  X(internimage_add_norm_backward)         \
  X(internimage_norm_add_forward)

#define PRODUCTS(X)                   \
  X(internimage_linear_forward)       \
  X(internimage_linear_backward)      \
  X(internimage_linear_gelu_forward)  \
  X(internimage_convolution_forward)  \
  X(internimage_convolution_backward) \
  X(internimage_mlp_forward)

#define DECLARE(target) XLA_FFI_DECLARE_HANDLER_SYMBOL(target);
TARGETS(DECLARE)
PRODUCTS(DECLARE)

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Handlers of the CPU custom calls, by target name.";
  m.def("targets", [] {
    pybind11::dict targets;
#define ADD(target) targets[#target] = pybind11::capsule(reinterpret_cast<void*>(target));
    TARGETS(ADD)
    // Without vector instructions for it XLA's own products are as good.
    if (::cpu::instruction_set() != ::cpu::InstructionSet::kBaseline) {
      PRODUCTS(ADD)
    }
    return targets;
  });
  m.def("instruction_set", &::cpu::instruction_set_name);
  m.attr("version") = xla_ops::kVersion;
}
