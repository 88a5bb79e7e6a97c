// The Python module that hands over the CUDA handlers of XLA's foreign function interface.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cuda_handlers.h"
#include "ffi_types.h"
#include "layer_cuda.h"
#include "linear_cuda.h"
#include "mlp_cuda.h"

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
  X(internimage_add_norm_forward)          \
  X(internimage_norm_add_forward)          \
  X(internimage_linear_forward)            \
  X(internimage_linear_gelu_forward)       \
  X(internimage_mlp_forward)               \
  X(internimage_layers_forward)

#define DECLARE(target) XLA_FFI_DECLARE_HANDLER_SYMBOL(target);
TARGETS(DECLARE)

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Handlers of the CUDA custom calls, by target name.";
  m.def("targets", [] {
    pybind11::dict targets;
#define ADD(target) targets[#target] = pybind11::capsule(reinterpret_cast<void*>(target));
    TARGETS(ADD)
    return targets;
  });
  // The targets that a GPU, by CUDA's number, has not the instructions for. It becomes the calling thread's
  // own.
  m.def("missing", [](int device) {
    pybind11::list names;
    bool tensor_cores = false, plain = false, mlp = false, layer = false;
    cudaError_t error = cudaSetDevice(device);
    if (!error) error = linear::cuda::serves(&tensor_cores);
    if (!error) error = linear::cuda::serves_plain(&plain);
    if (!error) error = linear::cuda::mlp_serves(&mlp);
    if (!error) error = layer::cuda::serves(&layer);
    if (error) throw std::runtime_error(xla_ops::cuda::explain(error));
    if (!tensor_cores) names.append("internimage_linear_gelu_forward");
    if (!plain) names.append("internimage_linear_forward");
    if (!mlp) names.append("internimage_mlp_forward");
    if (!layer) names.append("internimage_layers_forward");
    return names;
  });
  m.def("instruction_set", [] { return INTERNIMAGE_CUDA_ARCHS; });  // those it was built for
  m.attr("version") = xla_ops::kVersion;
}
