// The CUDA handlers of XLA's foreign function interface, and the Python module that hands them over.
//
// A handler checks the call and puts kernels on XLA's stream: it allocates nothing and waits for nothing,
// so XLA may record it into a command buffer. Scratch comes as a result that nobody reads.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "dcnv3_cuda.h"
#include "dcnv3_ffi.h"
#include "dwconv_cuda.h"
#include "dwconv_ffi.h"
#include "gelu_cuda.h"
#include "gelu_ffi.h"
#include "layer_cuda.h"
#include "layer_ffi.h"
#include "linear_cuda.h"
#include "linear_ffi.h"
#include "mlp_cuda.h"
#include "norm_cuda.h"
#include "norm_ffi.h"

namespace {

namespace ffi = xla::ffi;

// What CUDA says of this machine, with what helps where that is not plain.
std::string explain(cudaError_t error) {
  std::string text = std::string("CUDA: ") + cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    const auto release = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    text += " (the driver is for CUDA " + release(driver) + ", the kernels were built with " +
            release(CUDART_VERSION) + ": build them with an older nvcc, or install a newer driver)";
  }
  if (error == cudaErrorNoKernelImageForDevice) {
    text += " (built for " INTERNIMAGE_CUDA_ARCHS "; INTERNIMAGE_CUDA_ARCHS at the build names others)";
  }
  return text;
}

ffi::Error check(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, std::string(name) + ": " + explain(error));
}

auto bind() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>();
}

// In the handler itself: registered beside it, on CUDA, they do not count.
#define TRAITS {ffi::Traits::kCmdBufferCompatible}

}  // namespace

namespace dcnv3::cuda {
namespace {

ffi::Error start_forward(cudaStream_t stream, const Call& call) {
  if (const char* why = refusal(call)) return invalid(why);
  return check("internimage_dcnv3", forward(stream, call));
}

ffi::Error start_backward(cudaStream_t stream, const Call& call, Result scratch) {
  if (const char* why = refusal(call)) return invalid(why);
  const Problem& s = call.problem;
  const int64_t bytes = s.batch * (s.height * s.width + 1) * s.channels() * 8;
  if (!is_small(call) && static_cast<int64_t>(scratch->size_bytes()) != bytes) {
    return invalid("the scratch does not fit");
  }
  return check("internimage_dcnv3", backward(stream, call, scratch->untyped_data()));
}

ffi::Error forward_handler(cudaStream_t stream, Buffer x, Buffer offset, Buffer mask, Result y,
                           Geometry geometry, double offset_scale) {
  Call call = {};
  auto error = forward_call(x, offset, mask, y, geometry, offset_scale, &call);
  return error.failure() ? error : start_forward(stream, call);
}

ffi::Error backward_handler(cudaStream_t stream, Buffer x, Buffer offset, Buffer mask, Buffer dy, Result dx,
                            Result doffset, Result dmask, Result scratch, Geometry geometry,
                            double offset_scale) {
  Call call = {};
  auto error = backward_call(x, offset, mask, dy, dx, doffset, dmask, geometry, offset_scale, &call);
  return error.failure() ? error : start_backward(stream, call, scratch);
}

ffi::Error fused_forward_handler(cudaStream_t stream, Buffer x, Buffer record, Result y, Geometry geometry,
                                 double offset_scale, bool centre) {
  Call call = {};
  auto error = fused_forward_call(x, record, y, geometry, offset_scale, centre, &call);
  return error.failure() ? error : start_forward(stream, call);
}

ffi::Error fused_backward_handler(cudaStream_t stream, Buffer x, Buffer record, Buffer dy, Result dx,
                                  Result drecord, Result scratch, Geometry geometry, double offset_scale,
                                  bool centre) {
  Call call = {};
  auto error = fused_backward_call(x, record, dy, dx, drecord, geometry, offset_scale, centre, &call);
  return error.failure() ? error : start_backward(stream, call, scratch);
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // offset
                           .Arg<Buffer>()  // mask
                           .Ret<Buffer>()  // y
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kBackward, backward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // offset
                           .Arg<Buffer>()  // mask
                           .Arg<Buffer>()  // dy
                           .Ret<Buffer>()  // dx
                           .Ret<Buffer>()  // doffset
                           .Ret<Buffer>()  // dmask
                           .Ret<Buffer>()  // scratch
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kFusedForward, fused_forward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // record
                           .Ret<Buffer>()  // y
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale")
                           .Attr<bool>("center_feature_scale"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kFusedBackward, fused_backward_handler,
                       bind()
                           .Arg<Buffer>()  // x
                           .Arg<Buffer>()  // record
                           .Arg<Buffer>()  // dy
                           .Ret<Buffer>()  // dx
                           .Ret<Buffer>()  // drecord
                           .Ret<Buffer>()  // scratch
                           .Attr<Geometry>("geometry")
                           .Attr<double>("offset_scale")
                           .Attr<bool>("center_feature_scale"),
                       TRAITS);

}  // namespace
}  // namespace dcnv3::cuda

namespace dwconv::cuda {
namespace {

ffi::Error forward_handler(cudaStream_t stream, Operand x, Operand kernel, Operand bias, Operand scale,
                           Operand offset, Result y, double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = forward_call(x, kernel, bias, scale, offset, y, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(why);
  return check("internimage_dwconv_norm_gelu", forward(stream, call));
}

ffi::Error backward_handler(cudaStream_t stream, Operand x, Operand kernel, Operand bias, Operand scale,
                            Operand offset, Operand dy, Result dx, Result partial, Result scratch,
                            double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = backward_call(x, kernel, bias, scale, offset, dy, dx, partial, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(why);
  if (call.chunks != call.height) return invalid("expected a chunk for each row");
  if (scratch->element_count() != x.element_count() || scratch->element_type() != partial->element_type()) {
    return invalid("the scratch does not fit");
  }
  return check("internimage_dwconv_norm_gelu", backward(stream, call, scratch->untyped_data()));
}

auto bind_operands() {
  return bind()
      .Arg<Operand>()   // x
      .Arg<Operand>()   // kernel
      .Arg<Operand>()   // bias
      .Arg<Operand>()   // scale
      .Arg<Operand>();  // offset
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_handler,
                       bind_operands()
                           .Ret<Operand>()  // y
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kBackward, backward_handler,
                       bind_operands()
                           .Arg<Operand>()  // dy
                           .Ret<Operand>()  // dx
                           .Ret<Operand>()  // partial
                           .Ret<Operand>()  // scratch
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"),
                       TRAITS);

}  // namespace
}  // namespace dwconv::cuda

namespace gelu::cuda {
namespace {

ffi::Error start(cudaStream_t stream, Operand x, Operand bias, const Operand* dy, Result result,
                 int64_t version) {
  Call call = {};
  ffi::Error error = describe(x, bias, dy, result, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(why);
  return check("internimage_bias_gelu", compute(stream, call));
}
ffi::Error forward_handler(cudaStream_t stream, Operand x, Operand bias, Result y, int64_t version) {
  return start(stream, x, bias, nullptr, y, version);
}
ffi::Error backward_handler(cudaStream_t stream, Operand x, Operand bias, Operand dy, Result dx,
                            int64_t version) {
  return start(stream, x, bias, &dy, dx, version);
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_handler,
                       bind()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // bias
                           .Ret<Operand>()  // y
                           .Attr<int64_t>("version"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kBackward, backward_handler,
                       bind()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // bias
                           .Arg<Operand>()  // dy
                           .Ret<Operand>()  // dx
                           .Attr<int64_t>("version"),
                       TRAITS);

}  // namespace
}  // namespace gelu::cuda

namespace layer::cuda {
namespace {

ffi::Error forward_handler(cudaStream_t stream, Operand x, ffi::RemainingArgs parameters, Result y,
                           Result scratch, int64_t group, double offset_scale, double epsilon, bool post_norm,
                           bool early, int64_t version) {
  Call call = {};
  int64_t sets;
  const Settings settings = {group, offset_scale, epsilon, post_norm, early, version};
  ffi::Error error = describe(x, parameters, y, scratch, settings, &call, &sets);
  if (error.failure()) return error;
  bool serving = false;
  if (cudaError_t error = serves(&serving)) return check("internimage_layers", error);
  if (!serving) return invalid("this GPU has not the instructions for it, or no code is built for it");
  for (int64_t i = 0; i < sets; ++i) {
    const Call one = of_set(call, i);
    if (const char* why = refusal(one)) return invalid(why);
    if (cudaError_t error = forward(stream, one)) return check("internimage_layers", error);
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_handler,
                       bind()
                           .Arg<Operand>()  // x
                           .RemainingArgs()
                           .Ret<Operand>()  // y
                           .Ret<Operand>()  // scratch
                           .Attr<int64_t>("group")
                           .Attr<double>("offset_scale")
                           .Attr<double>("epsilon")
                           .Attr<bool>("post_norm")
                           .Attr<bool>("early")
                           .Attr<int64_t>("version"),
                       TRAITS);

}  // namespace
}  // namespace layer::cuda

namespace linear::cuda {
namespace {

template <Form form>
ffi::Error forward_handler(cudaStream_t stream, Operand x, Operand kernel, Operand bias, Result y,
                           int64_t version) {
  constexpr bool gelu = form == Form::kGelu;
  const char* const name = gelu ? "internimage_linear_gelu" : "internimage_linear";
  Call call = {};
  int64_t sets;
  ffi::Error error = describe(x, kernel, bias, *y, version, form, &call, &sets);
  if (error.failure()) return error;
  bool serving = false;
  if (cudaError_t error = gelu ? serves(&serving) : serves_plain(&serving)) return check(name, error);
  if (!serving) return invalid("this GPU has not the instructions for it, or no code is built for it");
  for (int64_t i = 0; i < sets; ++i) {
    const Call one = of_set(call, i);
    if (const char* why = refusal(one)) return invalid(why);
    if (cudaError_t error = forward(stream, one)) return check(name, error);
  }
  return ffi::Error::Success();
}

ffi::Error mlp_handler(cudaStream_t stream, Operand x, Operand kernel1, Operand bias1, Operand kernel2,
                       Operand bias2, Result y, int64_t version) {
  Call first = {}, second = {};
  int64_t sets;
  ffi::Error error = describe_mlp(x, kernel1, bias1, kernel2, bias2, y, version, &first, &second, &sets);
  if (error.failure()) return error;
  bool serving = false;
  if (cudaError_t error = mlp_serves(&serving)) return check("internimage_mlp", error);
  if (!serving) return invalid("this GPU is not of compute capability 9.0, or no code is built for it");
  for (int64_t i = 0; i < sets; ++i) {
    const Call one = of_set(first, i), other = of_set(second, i);
    if (const char* why = mlp_refusal(one, other)) return invalid(why);
    if (cudaError_t error = mlp(stream, one, other)) return check("internimage_mlp", error);
  }
  return ffi::Error::Success();
}

auto bind_product() {
  return bind()
      .Arg<Operand>()  // x
      .Arg<Operand>()  // kernel
      .Arg<Operand>()  // bias
      .Ret<Operand>()  // y
      .Attr<int64_t>("version");
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_handler<Form::kProduct>, bind_product(), TRAITS);
XLA_FFI_DEFINE_HANDLER(kGeluForward, forward_handler<Form::kGelu>, bind_product(), TRAITS);
XLA_FFI_DEFINE_HANDLER(kMlp, mlp_handler,
                       bind()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // kernel1
                           .Arg<Operand>()  // bias1
                           .Arg<Operand>()  // kernel2
                           .Arg<Operand>()  // bias2
                           .Ret<Operand>()  // y
                           .Attr<int64_t>("version"),
                       TRAITS);

}  // namespace
}  // namespace linear::cuda

namespace layer_norm::cuda {
namespace {

ffi::Error forward_handler(cudaStream_t stream, Operand x, Operand scale, Operand bias, Result y,
                           double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = describe(x, scale, bias, y, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(why);
  return check("internimage_layer_norm", forward(stream, call));
}

ffi::Error norm_add_handler(cudaStream_t stream, Operand x, Operand residual, Operand scale, Operand bias,
                            Result y, double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = describe(x, residual, scale, bias, y, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(why);
  return check("internimage_norm_add", forward(stream, call));
}

ffi::Error add_norm_handler(cudaStream_t stream, Operand x, Operand residual, Operand scale, Operand bias,
                            Result total, Result y, double epsilon, int64_t version) {
  Call call = {};
  ffi::Error error = describe(x, residual, scale, bias, total, y, epsilon, version, &call);
  if (error.failure()) return error;
  if (const char* why = refusal(call)) return invalid(why);
  return check("internimage_add_norm", forward(stream, call));
}

XLA_FFI_DEFINE_HANDLER(kForward, forward_handler,
                       bind()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // scale
                           .Arg<Operand>()  // bias
                           .Ret<Operand>()  // y
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kNormAdd, norm_add_handler,
                       bind()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // residual
                           .Arg<Operand>()  // scale
                           .Arg<Operand>()  // bias
                           .Ret<Operand>()  // y
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"),
                       TRAITS);
XLA_FFI_DEFINE_HANDLER(kAddNorm, add_norm_handler,
                       bind()
                           .Arg<Operand>()  // x
                           .Arg<Operand>()  // residual
                           .Arg<Operand>()  // scale
                           .Arg<Operand>()  // bias
                           .Ret<Operand>()  // total
                           .Ret<Operand>()  // y
                           .Attr<double>("epsilon")
                           .Attr<int64_t>("version"),
                       TRAITS);

}  // namespace
}  // namespace layer_norm::cuda

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Handlers of the CUDA custom calls, by target name.";
  m.def("targets", [] {
    pybind11::dict targets;
    const auto add = [&](const char* name, XLA_FFI_Handler* handler) {
      targets[name] = pybind11::capsule(reinterpret_cast<void*>(handler));
    };
    add("internimage_dcnv3_forward", dcnv3::cuda::kForward);
    add("internimage_dcnv3_backward", dcnv3::cuda::kBackward);
    add("internimage_dcnv3_fused_forward", dcnv3::cuda::kFusedForward);
    add("internimage_dcnv3_fused_backward", dcnv3::cuda::kFusedBackward);
    add("internimage_dwconv_norm_gelu_forward", dwconv::cuda::kForward);
    add("internimage_dwconv_norm_gelu_backward", dwconv::cuda::kBackward);
    add("internimage_bias_gelu_forward", gelu::cuda::kForward);
    add("internimage_bias_gelu_backward", gelu::cuda::kBackward);
    add("internimage_layer_norm_forward", layer_norm::cuda::kForward);
    add("internimage_add_norm_forward", layer_norm::cuda::kAddNorm);
    add("internimage_norm_add_forward", layer_norm::cuda::kNormAdd);
    add("internimage_linear_forward", linear::cuda::kForward);
    add("internimage_linear_gelu_forward", linear::cuda::kGeluForward);
    add("internimage_mlp_forward", linear::cuda::kMlp);
    add("internimage_layers_forward", layer::cuda::kForward);
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
    if (error) throw std::runtime_error(explain(error));
    if (!tensor_cores) names.append("internimage_linear_gelu_forward");
    if (!plain) names.append("internimage_linear_forward");
    if (!mlp) names.append("internimage_mlp_forward");
    if (!layer) names.append("internimage_layers_forward");
    return names;
  });
  m.def("instruction_set", [] { return INTERNIMAGE_CUDA_ARCHS; });  // those it was built for
  m.attr("version") = xla_ops::kVersion;
}
