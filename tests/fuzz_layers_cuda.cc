// Runs the CUDA kernels of the layers besides DCNv3 on the host (cuda_on_host) over random shapes and
// dtypes (fuzz_pixels.h, fuzz_products.h), with blocks and threads in random order; each call runs twice, and
// a bit that differs is an error. Arguments: the number of shapes, the seed. tests/test_layers_cuda.py builds
// it.
#include "dwconv_cuda_backward.cu"
#include "dwconv_cuda_forward.cu"
#include "gelu_cuda.cu"
#include "layer_cuda_product.h"
#include "linear_cuda.cu"
#include "mlp_cuda.cu"
#include "norm_cuda.cu"

#include "fuzz_pixels.h"
#include "fuzz_products.h"

namespace xla_ops::cuda {
alignas(1024) unsigned char dynamic_shared_memory[cuda_on_host::kShared];
}

namespace {

using cuda_on_host::settings;

// Runs `launch` twice, in another order of blocks and threads, into `results`.
template <class Launch>
bool twice(std::vector<std::pair<void*, size_t>> results, Launch launch) {
  std::vector<std::vector<char>> first;
  for (int round = 0; round < 2; ++round) {
    settings.seed = unsigned(engine());
    for (auto [data, bytes] : results) std::memset(data, 0xa5, bytes);
    if (launch()) return std::printf("a launch failed\n"), false;
    for (size_t i = 0; i < results.size(); ++i) {
      const char* data = static_cast<const char*>(results[i].first);
      if (round == 0) first.emplace_back(data, data + results[i].second);
      if (std::memcmp(first[i].data(), data, results[i].second)) {
        return std::printf("result %zu depends on the order of blocks\n", i), false;
      }
    }
  }
  return true;
}

bool dwconv_call(dwconv::Call& s) {
  if (const char* why = dwconv::cuda::refusal(s)) return std::printf("refused: %s\n", why), false;
  const size_t count = s.batch * s.height * s.width * s.channels, real = s.type == Type::kFloat64 ? 8 : 4;
  const size_t parts = s.batch * s.chunks * (3 + s.size * s.size) * s.channels;
  std::vector<char> dv(count * real);
  settings.processors = integer(0, 1) ? 0 : 1 << 20;  // threads of four pixels of the forward, or of one
  const size_t bytes = count * size_of(s.type);
  const bool early = integer(0, 1);  // its parameters were there before
  if (early) cuda_on_host::of_kernel_before = {{s.x, bytes}, {s.y, bytes}};
  const bool good = twice({{s.y, bytes}, {s.dx, bytes}, {s.partial, parts * real}}, [&] {
    const cudaError_t error = dwconv::cuda::forward(nullptr, s, early);
    return error ? error : dwconv::cuda::backward(nullptr, s, dv.data());
  });
  cuda_on_host::of_kernel_before.clear();
  return good;
}

bool gelu_call(const gelu::Call& s) {
  if (const char* why = gelu::cuda::refusal(s)) return std::printf("refused: %s\n", why), false;
  return twice({{s.result, s.rows * s.channels * size_of(s.type)}},
               [&] { return gelu::cuda::compute(nullptr, s); });
}

bool norm_call(layer_norm::Call s) {
  if (const char* why = layer_norm::cuda::refusal(s)) return std::printf("refused: %s\n", why), false;
  const size_t each = size_of(s.type), bytes = s.rows * s.channels * each;
  std::vector<char> moved(each + bytes);
  const void*& operand = s.residual && integer(0, 1) ? s.residual : s.x;
  std::memcpy(moved.data() + each, operand, bytes);
  if (integer(0, 3) == 0) operand = moved.data() + each;  // at no multiple of 16 bytes
  settings.processors = integer(0, 1) ? 0 : INT32_MAX;    // for which all rows are many, or few
  std::vector<std::pair<void*, size_t>> results = {{s.y, bytes}};
  if (s.total) results.push_back({s.total, bytes});
  const bool early = integer(0, 1);
  if (early) cuda_on_host::of_kernel_before = {{s.x, bytes}, {s.y, bytes}};
  if (early && s.residual) cuda_on_host::of_kernel_before.push_back({s.residual, bytes});
  const bool good = twice(results, [&] { return layer_norm::cuda::forward(nullptr, s, early); });
  cuda_on_host::of_kernel_before.clear();
  settings.processors = 4;
  return good;
}

// Each form of tile, and the one that the number of tiles decides on.
template <class T>
cudaError_t launch_any(int form, const linear::Call& s) {
  using namespace linear::cuda;
  const xla_ops::cuda::Device device = {int(settings.shared_limit), settings.processors};
  const bool two = staying_bytes<T, 2>(s) <= settings.shared_limit;
  const bool four = staying_bytes<T, 4>(s) <= settings.shared_limit;
  if (!s.gelu) return forward(nullptr, s);
  if (form == 0) return launch_tiles<T, 128, 128, 4, 2, 2>(nullptr, device, s);
  if (form == 1) return launch_tiles<T, 64, 64, 2, 2, 4>(nullptr, device, s);
  if (form == 2) return launch_tiles<T, 32, 64, 2, 2, 5>(nullptr, device, s);
  if (form == 3) return launch_tiles<T, 32, 32, 2, 2, 9>(nullptr, device, s);
  if (form <= 5 && two) return launch_staying<T, 2>(nullptr, device, s);
  if (form <= 10) return launch_wide<T>(nullptr, device, s);
  if (form == 11) return launch_wide<T, 4, 2, false>(nullptr, device, s);
  if (form <= 12 && four) return launch_staying<T, 4>(nullptr, device, s);
  return forward(nullptr, s);
}

bool linear_gelu_call(const linear::Call& s) {
  if (const char* why = linear::cuda::refusal(s)) return std::printf("refused: %s\n", why), false;
  const int form = int(integer(0, 15));
  settings.processors = int(integer(1, 2));
  // At times a GPU without products of warpgroups: of a number that is not remembered.
  settings.device = s.gelu && !integer(0, 4) ? 64 : 0;
  settings.registers = settings.device ? 8 : 128;
  const bool good = twice({{s.y, s.rows * s.outputs * 2}}, [&] {
    return s.type == Type::kBFloat16 ? launch_any<xla_ops::cuda::BFloat16>(form, s)
                                     : launch_any<xla_ops::cuda::Float16>(form, s);
  });
  settings.device = 0, settings.registers = 128;
  return good;
}

bool mlp_call(const linear::Call& first, const linear::Call& second) {
  if (const char* why = linear::cuda::mlp_refusal(first, second))
    return std::printf("refused: %s\n", why), false;
  return twice({{second.y, second.rows * second.outputs * 2}},
               [&] { return linear::cuda::mlp(nullptr, first, second); });
}

// A product of a layer that is one call: with a norm before it, maybe to which a map is added, with GELU, or
// a map that is added to it. Before it has waited it may read its kernel and its vectors.
bool product_case() {
  using namespace layer::cuda;
  const int64_t inputs[] = {16, 32, 64, 80, 112, 128, 176, 256, 512}, m = integer(1, 70),
                n = 8 * integer(1, 20);
  const int64_t k = inputs[integer(0, 8)];
  const Type type = integer(0, 1) ? Type::kBFloat16 : Type::kFloat16;
  const Type vectors = integer(0, 1) ? Type::kFloat32 : type, others = integer(0, 1) ? Type::kFloat32 : type;
  const bool norm = integer(0, 1), adds = norm && integer(0, 1), writes = norm && integer(0, 1);
  const bool gelu = integer(0, 1), residual = !gelu && integer(0, 1);
  const Values x = normal(m * k, 1), scale = normal(k, 1), bias = normal(k), added = normal(m * k);
  const Values kernel = normal(k * n), offset = normal(n), base = normal(m * n);
  const auto bx = stored(type, x), bs = stored(vectors, scale), bb = stored(vectors, bias);
  const auto ba = stored(type, added), bk = stored(type, kernel), bo = stored(others, offset);
  const auto br = stored(type, base);
  std::vector<char> y(m * n * 2), taken(m * k * 2);
  Product p = {};
  p.rows = int(m), p.inputs = int(k), p.outputs = int(n), p.early = integer(0, 1), p.gelu = gelu;
  p.x = bx.data(), p.kernel = bk.data(), p.offset = {bo.data(), others}, p.y = y.data();
  if (norm)
    p.scale = {bs.data(), vectors}, p.bias = {bb.data(), vectors}, p.epsilon = 1e-3f, p.share = 1.f / k;
  if (adds) p.added = ba.data();
  if (writes) p.taken = taken.data();
  if (residual) p.residual = br.data();

  Values between = x, wanted = base;
  for (int64_t i = 0; i < m && norm; ++i) {
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < k; ++c) mean += x[i * k + c] / k;
    for (int64_t c = 0; c < k; ++c) variance += (x[i * k + c] - mean) * (x[i * k + c] - mean) / k;
    for (int64_t c = 0; c < k; ++c) {
      const double unit = (x[i * k + c] - mean) / std::sqrt(variance + 1e-3);
      between[i * k + c] = unit * scale[c] + bias[c] + (adds ? added[i * k + c] : 0);
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double z = offset[j];
      for (int64_t c = 0; c < k; ++c) z += between[i * k + c] * kernel[c * n + j];
      wanted[i * n + j] = (gelu ? z * phi(z) : z) + (residual ? base[i * n + j] : 0);
    }
  }

  cuda_on_host::of_kernel_before = {{bx.data(), bx.size()}, {ba.data(), ba.size()}, {br.data(), br.size()}};
  cuda_on_host::of_kernel_before.push_back({y.data(), y.size()});
  cuda_on_host::of_kernel_before.push_back({taken.data(), taken.size()});
  const xla_ops::cuda::Device device = {int(settings.shared_limit), settings.processors};
  Cut cut = {integer(0, 1) != 0, 1 << integer(0, 3)};
  while (!allows(p, cut)) cut.parts /= 2;
  const bool good = twice({{y.data(), y.size()}, {taken.data(), taken.size()}}, [&] {
    return type == Type::kBFloat16 ? launch_product<xla_ops::cuda::BFloat16>(nullptr, device, p, cut)
                                   : launch_product<xla_ops::cuda::Float16>(nullptr, device, p, cut);
  });
  cuda_on_host::of_kernel_before.clear();
  // What the norm gives is rounded before it is multiplied.
  return good && close("a product", type, y, wanted, norm ? 2 : 1) &&
         (!writes || close("a norm", type, taken, between));
}

// The most channels that a call may have, and one more.
bool limits() {
  dwconv::Call s = {};
  s.batch = s.height = s.width = s.shared = 1, s.size = 3;
  for (Type type : {Type::kFloat32, Type::kFloat64}) {
    for (bool backward : {false, true}) {
      s.type = s.parameters_type = type, s.dy = backward ? &s : nullptr;
      s.channels = (backward ? 4096 : 16384) / (type == Type::kFloat64 ? 2 : 1);
      if (dwconv::cuda::refusal(s)) return std::printf("%d channels are refused\n", int(s.channels)), false;
      ++s.channels;
      if (!dwconv::cuda::refusal(s)) return std::printf("%d channels are not\n", int(s.channels)), false;
    }
  }
  return true;
}

// A GPU whose code of a kernel is empty, or of instructions that it lacks, has no such kernel.
bool refusals() {
  using namespace linear::cuda;
  settings.device = 64;
  for (const bool whole : {false, true}) {
    bool plain = !whole, both = !whole, tensor_cores = !whole;
    settings.registers = whole ? 128 : 8, settings.ptx_version = whole ? 90 : 75;
    if (serves_plain(&plain) || mlp_serves(&both) || serves(&tensor_cores)) return false;
    if (plain != whole || both != whole || tensor_cores != whole)
      return std::printf("a GPU is mistaken\n"), false;
  }
  settings.device = 0;
  return true;
}

// What half precision gets for GELU and its derivative, against the C library's, relative to their two parts.
bool gelu_for_half() {
  using xla_ops::cuda::BFloat16;
  using xla_ops::cuda::Float16;
  for (int i = -1300; i <= 1300; ++i) {
    const double z = i / 100.0, tail = 0.5 * std::erfc(std::fabs(z) * std::sqrt(0.5));
    const double phi = z < 0 ? tail : 1 - tail, density = std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
    const double y = xla_ops::cuda::gelu_for<BFloat16, 1>(float(z));
    const double other = xla_ops::cuda::gelu_for<Float16, 1>(float(z));
    const double slope = xla_ops::cuda::gelu_slope_for<BFloat16, 1>(float(z));
    const bool far = z < -xla_ops::cuda::kFarthest;
    if (!(far ? std::fabs(y) < 1e-36 : std::fabs(y - z * phi) <= 1.4e-4 * std::fabs(z * phi)) ||
        !(std::fabs(other - z * phi) <= (z < -5.8 ? 2.5e-8 : 7e-6 * std::fabs(z * phi))) ||
        !(std::fabs(slope - (phi + z * density)) <= 2e-5 * (phi + std::fabs(z) * density))) {
      return std::printf("GELU of %g is %g, its derivative %g\n", z, y, slope), false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 100, seed = argc > 2 ? std::atoi(argv[2]) : 0;
  cuda_on_host::shared = xla_ops::cuda::dynamic_shared_memory;
  if (!limits() || !refusals() || !gelu_for_half()) return 1;
  return fuzz(count, seed, [] {
    return dwconv_case(true, dwconv_call) && gelu_case(gelu_call) && norm_case(norm_call) &&
           linear_case(true, linear_gelu_call) && (integer(0, 3) || mlp_case(true, mlp_call)) &&
           product_case();
  });
}
