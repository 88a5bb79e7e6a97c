// Whole layers of a small map on CUDA, in half precision, from compute capability 9.0 on: seven kernels each,
// or eight with the norms after the branches. All but the first are put on their way while the one before
// them runs, which no step of a CUDA graph is that XLA makes of separate calls.
#include "layer_cuda.h"

#include <algorithm>

#include "dcnv3_cuda.h"
#include "dwconv_cuda.h"
#include "layer_cuda_product.h"
#include "norm_cuda.h"

namespace layer::cuda {
namespace {

// Of the images that go through the kernels at once: their numbers count up to 2^31.
constexpr int64_t kMostPixels = INT32_MAX / (4 * kMostInputs);

// The calls that a layer consists of, from x to y. What one writes the next ones read, in parts of the
// scratch memory that nothing else in the layer uses. y is written last, so x may be there.
struct Chain {
  Chain(const Call& call, const Parameters& parameters, const void* x, bool first)
      : call(call), parameters(parameters), x(x), first(first) {
    char* next = static_cast<char*>(call.scratch);
    const auto take = [&](int64_t width) {
      void* const own = next;
      next += call.pixels() * width * 2;
      return own;
    };
    const int64_t c = call.channels;
    normalised = take(c), value = take(c), features = take(c), sampled = take(c), branch = take(c);
    between = take(c), record = take(call.record), hidden = take(call.hidden);
  }

  Product product(const void* from, int64_t inputs, Parameter kernel, Parameter bias, int64_t outputs,
                  void* to) const {
    Product p = {};
    p.rows = int(call.pixels()), p.inputs = int(inputs), p.outputs = int(outputs), p.early = call.early;
    p.x = from, p.kernel = parameters[kernel].data, p.offset = parameters[bias], p.y = to;
    return p;
  }
  void set_norm(Parameter scale, Parameter bias, const void* added, void* taken, Product* p) const {
    p->scale = parameters[scale], p->bias = parameters[bias], p->epsilon = float(call.epsilon);
    p->share = 1 / float(p->inputs);
    p->added = added, p->taken = taken;
  }

  Product to_value() const {
    Product p = product(x, call.channels, kInputKernel, kInputBias, call.channels, value);
    if (!call.post_norm) set_norm(kNorm1Scale, kNorm1Bias, nullptr, normalised, &p);
    p.early = call.early && !first;  // the first kernel of all: who knows what came before
    return p;
  }
  dwconv::Call to_features() const {
    dwconv::Call d = {};
    d.batch = d.shared = call.batch, d.height = call.height, d.width = call.width, d.channels = call.channels;
    d.size = call.size, d.epsilon = call.epsilon, d.type = call.type;
    d.parameters_type = parameters[kDwKernel].type;
    d.x = call.post_norm ? x : normalised, d.y = features;
    d.kernel = parameters[kDwKernel].data, d.bias = parameters[kDwBias].data;
    d.scale = parameters[kDwScale].data, d.offset = parameters[kDwOffset].data;
    return d;
  }
  Product to_record() const {
    return product(features, call.channels, kRecordKernel, kRecordBias, call.record, record);
  }
  dcnv3::Call to_sampled() const {
    dcnv3::Call d = {};
    dcnv3::Problem& s = d.problem;
    s.batch = call.batch, s.height = s.out_height = call.height, s.width = s.out_width = call.width;
    s.group = call.group, s.depth = call.channels / call.group, s.points = 9,
    s.offset_scale = call.offset_scale;
    s.kernel_h = s.kernel_w = 3;
    s.stride_h = s.stride_w = s.pad_h = s.pad_w = s.dilation_h = s.dilation_w = 1;
    d.type = d.points_type = call.type, d.fused = true;
    d.x = value, d.offset = {record, call.record, 28}, d.y = sampled;
    return d;
  }
  Product to_branch() const {
    Product p = product(sampled, call.channels, kOutputKernel, kOutputBias, call.channels, branch);
    if (!call.post_norm) {
      p.y = between, p.residual = x;
    }
    return p;
  }
  Product to_hidden() const {
    const void* const from = call.post_norm ? branch : between;
    Product p = product(from, call.channels, kFc1Kernel, kFc1Bias, call.hidden, hidden);
    p.gelu = true;
    if (call.post_norm) {
      set_norm(kNorm1Scale, kNorm1Bias, x, between, &p);
    } else {
      set_norm(kNorm2Scale, kNorm2Bias, nullptr, nullptr, &p);
    }
    return p;
  }
  Product to_end() const {
    Product p = product(hidden, call.hidden, kFc2Kernel, kFc2Bias, call.channels, call.y);
    if (call.post_norm) {
      p.y = branch;
    } else {
      p.residual = between;
    }
    return p;
  }
  layer_norm::Call to_sum() const {  // with post_norm
    layer_norm::Call n = {};
    n.rows = n.shared = call.pixels(), n.channels = call.channels, n.epsilon = call.epsilon,
    n.type = call.type;
    n.parameters_type = parameters[kNorm2Scale].type;
    n.x = branch, n.residual = between, n.y = call.y;
    n.scale = parameters[kNorm2Scale].data, n.bias = parameters[kNorm2Bias].data;
    return n;
  }

  const Call& call;
  const Parameters& parameters;
  const void* const x;
  const bool first;
  void *normalised, *value, *features, *sampled, *branch, *between, *record, *hidden;
};

template <class T>
cudaError_t run(cudaStream_t stream, const Device& device, const Chain& chain) {
  const Call& call = chain.call;
  cudaError_t error = multiply<T>(stream, device, chain.to_value());
  if (!error) error = dwconv::cuda::forward(stream, chain.to_features(), call.early);
  if (!error) error = multiply<T>(stream, device, chain.to_record());
  if (!error) error = dcnv3::cuda::forward(stream, chain.to_sampled(), call.early);
  if (!error) error = multiply<T>(stream, device, chain.to_branch());
  if (!error) error = multiply<T>(stream, device, chain.to_hidden());
  if (!error) error = multiply<T>(stream, device, chain.to_end());
  if (!error && call.post_norm) error = layer_norm::cuda::forward(stream, chain.to_sum(), call.early);
  return error;
}

template <class T>
cudaError_t run_all(cudaStream_t stream, const Call& call) {
  Device device;
  if (cudaError_t error = find_device(&device)) return error;
  for (size_t i = 0; i < call.layers.size(); ++i) {
    const Chain chain(call, call.layers[i], i == 0 ? call.x : call.y, i == 0);
    if (cudaError_t error = run<T>(stream, device, chain)) return error;
  }
  return cudaSuccess;
}

}  // namespace

const char* refusal(const Call& call) {
  if (call.type != Type::kBFloat16 && call.type != Type::kFloat16) return "expected bfloat16 or float16";
  if (call.channels % 16 || call.hidden % 16) return "expected channels in sixteens";
  // Without a norm there are up to eight parts.
  if (call.channels > kMostInputs || call.hidden > 4 * kMostInputs) {
    return "more than 1024 channels, or 4096 in the MLP";
  }
  if (call.hidden > kMostInputs && call.hidden % 64)
    return "expected more than 1024 channels in the MLP in 64s";
  if (call.height * call.width > kMostPixels) return "an image of more than 2^19 pixels";
  const int64_t depth = call.channels / call.group;
  if (depth != 8 && depth != 16 && depth != 32 && depth != 64)
    return "expected 8, 16, 32 or 64 channels a group";
  for (const Parameters& layer : call.layers) {
    for (const Array& one : layer) {
      if (!aligned(one.data)) return "parameters that do not begin at 16 bytes";
    }
  }
  if (!aligned(call.x) || !aligned(call.y) || !aligned(call.scratch))
    return "maps that do not begin at 16 bytes";
  Call one = call;  // large batches go in parts
  one.batch = 1;
  const Chain chain(one, one.layers[0], one.x, true);
  if (const char* why = dwconv::cuda::refusal(chain.to_features())) return why;
  if (const char* why = dcnv3::cuda::refusal(chain.to_sampled())) return why;
  return call.post_norm ? layer_norm::cuda::refusal(chain.to_sum()) : nullptr;
}

cudaError_t serves(bool* answer) {
  Device device;
  if (cudaError_t error = find_device(&device)) return error;
  const cudaError_t error = has_clusters(product_kernel<BFloat16, 64>, answer);
  *answer = *answer && size_t(device.shared) >= most_bytes<BFloat16>();
  return error;
}

cudaError_t forward(cudaStream_t stream, const Call& call) {
  int driver = 0;  // from 12.3 on a CUDA graph can have kernels that begin early
  if (cudaError_t error = cudaDriverGetVersion(&driver)) return error;
  Call part = call;
  part.early = call.early && driver >= 12030 && CUDART_VERSION >= 12030;
  const int64_t most = std::max<int64_t>(kMostPixels / (call.height * call.width), 1);
  for (int64_t first = 0; first < call.batch; first += most) {
    part.batch = std::min(most, call.batch - first);
    const int64_t numbers = first * call.height * call.width * call.channels;
    part.x = static_cast<const uint16_t*>(call.x) + numbers;
    part.y = static_cast<uint16_t*>(call.y) + numbers;
    const cudaError_t error =
        call.type == Type::kBFloat16 ? run_all<BFloat16>(stream, part) : run_all<Float16>(stream, part);
    if (error) return error;
  }
  return cudaSuccess;
}

}  // namespace layer::cuda
