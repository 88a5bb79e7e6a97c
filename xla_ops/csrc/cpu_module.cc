// The Python module that hands over the CPU handlers of XLA's foreign function interface.
#include "cpu_module.h"

#include <pybind11/pybind11.h>

#include "cpu_types.h"
#include "ffi_types.h"

namespace {

pybind11::capsule capsule(XLA_FFI_Handler* handler) {
  return pybind11::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Handlers of the CPU custom calls, by target name.";
  m.def("targets", [] {
    pybind11::dict targets;
    targets["internimage_dcnv3_forward"] = capsule(dcnv3::cpu::forward_handler());
    targets["internimage_dcnv3_backward"] = capsule(dcnv3::cpu::backward_handler());
    targets["internimage_dcnv3_fused_forward"] = capsule(dcnv3::cpu::fused_forward_handler());
    targets["internimage_dcnv3_fused_backward"] = capsule(dcnv3::cpu::fused_backward_handler());
    targets["internimage_dwconv_norm_gelu_forward"] = capsule(dwconv::cpu::forward_handler());
    targets["internimage_dwconv_norm_gelu_backward"] = capsule(dwconv::cpu::backward_handler());
    targets["internimage_bias_gelu_forward"] = capsule(gelu::cpu::forward_handler());
    targets["internimage_bias_gelu_backward"] = capsule(gelu::cpu::backward_handler());
    targets["internimage_layer_norm_forward"] = capsule(layer_norm::cpu::forward_handler());
    targets["internimage_layer_norm_backward"] = capsule(layer_norm::cpu::backward_handler());
    targets["internimage_add_norm_forward"] = capsule(layer_norm::cpu::add_norm_handler());
    targets["internimage_add_norm_backward"] = capsule(layer_norm::cpu::add_norm_backward_handler());
    targets["internimage_norm_add_forward"] = capsule(layer_norm::cpu::norm_add_handler());
    // Without vector instructions for it XLA's own products are as good.
    if (::cpu::instruction_set() != ::cpu::InstructionSet::kBaseline) {
      targets["internimage_linear_forward"] = capsule(linear::cpu::forward_handler());
      targets["internimage_linear_backward"] = capsule(linear::cpu::backward_handler());
      targets["internimage_linear_gelu_forward"] = capsule(linear::cpu::gelu_forward_handler());
      targets["internimage_convolution_forward"] = capsule(linear::cpu::convolution_handler());
      targets["internimage_convolution_backward"] = capsule(linear::cpu::convolution_backward_handler());
      targets["internimage_mlp_forward"] = capsule(linear::cpu::mlp_handler());
    }
    return targets;
  });
  m.def("instruction_set", &::cpu::instruction_set_name);
  m.attr("version") = xla_ops::kVersion;
}
