// Times the CUDA kernels alone, without JAX: in seconds, where a program of JAX takes minutes to say as much.
//
//     nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -Ixla_ops/csrc -o kernels \
//         benchmarks/kernels.cu xla_ops/csrc/*.cu
//     ./kernels            # a line of JSON for each kernel and shape
//     ./kernels dcnv3      # kernels whose name has this part
//     compute-sanitizer --tool racecheck ./kernels --small   # each once, at small shapes
//
// bfloat16, shapes of T's levels at batch 64 and 1 and some of others. A CUDA graph of twelve calls, at large
// shapes of two sets of buffers in turn; microseconds of one call, the median of eleven runs, their range.
#include <cuda_bf16.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "dcnv3_cuda.h"
#include "dwconv_cuda.h"
#include "gelu_cuda.h"
#include "layer_cuda.h"
#include "linear_cuda.h"
#include "mlp_cuda.h"
#include "norm_cuda.h"

namespace {

using xla_ops::Type;
using Launch = std::function<cudaError_t(cudaStream_t)>;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

struct Shape {
  const char* name;
  int64_t batch, side, channels, group;

  int64_t pixels() const { return batch * side * side; }
  int64_t record() const { return (group * 28 + 7) / 8 * 8; }
};

// Buffers of bfloat16, each an allocation of its own, so that a sanitizer sees its ends.
struct Memory {
  ~Memory() {
    for (void* p : taken) cudaFree(p);
  }
  void* take(int64_t count, float scale = 1) {
    static std::vector<float> normal;
    if (normal.empty()) {
      std::mt19937 random(0);
      std::normal_distribution<float> draw;
      normal.resize(1 << 20);
      for (float& v : normal) v = draw(random);
    }
    std::vector<__nv_bfloat16> values(std::min<int64_t>(count, normal.size()));
    for (size_t i = 0; i < values.size(); ++i) values[i] = __float2bfloat16(scale * normal[i]);
    void* p;
    check(cudaMalloc(&p, count * 2));
    for (int64_t i = 0; i < count; i += values.size()) {
      const int64_t left = std::min<int64_t>(count - i, values.size());
      check(cudaMemcpy(static_cast<char*>(p) + 2 * i, values.data(), 2 * left, cudaMemcpyHostToDevice));
    }
    taken.push_back(p);
    return p;
  }
  std::vector<void*> taken;
};

// The kernels on buffers of their own.
std::vector<std::pair<std::string, Launch>> launches(const Shape& s, Memory& memory) {
  const int64_t pixels = s.pixels(), c = s.channels, hidden = 4 * c;
  const Type type = Type::kBFloat16;
  void *x = memory.take(pixels * c), *y = memory.take(pixels * c), *dy = memory.take(pixels * c);
  void *record = memory.take(pixels * s.record()), *drecord = memory.take(pixels * s.record());
  void *dx = memory.take(pixels * c), *vector = memory.take(hidden), *z = memory.take(pixels * hidden);
  void *weights = memory.take(std::max(hidden, int64_t{9}) * c, 0.1f), *other = memory.take(pixels * hidden);
  void* scratch = memory.take((pixels + s.batch) * c * 4);

  dcnv3::Call d = {};
  auto& p = d.problem;
  p.batch = s.batch, p.height = p.width = p.out_height = p.out_width = s.side;
  p.group = s.group, p.depth = c / s.group, p.points = 9, p.kernel_h = p.kernel_w = 3;
  p.stride_h = p.stride_w = p.pad_h = p.pad_w = p.dilation_h = p.dilation_w = 1, p.offset_scale = 1;
  d.type = d.points_type = type, d.fused = true, d.x = x, d.offset = {record, s.record(), 28}, d.y = y;
  dcnv3::Call back = d;
  back.dy = dy, back.dx = dx, back.doffset = drecord;

  dwconv::Call conv = {};
  conv.batch = conv.shared = s.batch, conv.height = conv.width = s.side, conv.channels = c, conv.size = 3;
  conv.chunks = 1, conv.epsilon = 1e-6, conv.type = conv.parameters_type = type, conv.x = x;
  conv.kernel = weights, conv.bias = conv.scale = conv.offset = vector, conv.y = y;

  linear::Call product = {};
  product.rows = pixels, product.inputs = c, product.outputs = hidden, product.gelu = true;
  product.type = product.bias_type = type, product.x = x, product.kernel = weights, product.bias = vector;
  product.y = z;

  linear::Call simple = product, second = product;
  simple.gelu = second.gelu = false, simple.outputs = s.record() / 8 * 8, simple.y = record;
  second.inputs = hidden, second.outputs = c, second.x = z, second.y = y;

  gelu::Call after = {};
  after.rows = after.shared = pixels, after.channels = hidden, after.type = after.bias_type = type;
  after.x = z, after.bias = vector, after.result = other;

  layer_norm::Call norm = {};
  norm.rows = norm.shared = pixels, norm.channels = c, norm.epsilon = 1e-6;
  norm.type = norm.parameters_type = type, norm.x = x, norm.scale = norm.bias = vector, norm.y = y;
  layer_norm::Call add_norm = norm, norm_add = norm;
  add_norm.residual = norm_add.residual = dy, add_norm.total = dx;

  layer::Call whole = {};
  whole.batch = s.batch, whole.height = whole.width = s.side, whole.channels = c, whole.group = s.group;
  whole.size = 3, whole.record = s.record(), whole.hidden = hidden, whole.offset_scale = 1;
  whole.epsilon = 1e-6, whole.type = type, whole.x = x, whole.y = y, whole.layers.resize(1);

  std::vector<std::pair<std::string, Launch>> all = {
      {"dcnv3", [=](cudaStream_t stream) { return dcnv3::cuda::forward(stream, d); }},
      {"dcnv3 backward", [=](cudaStream_t stream) { return dcnv3::cuda::backward(stream, back, scratch); }},
      {"dwconv_norm_gelu", [=](cudaStream_t stream) { return dwconv::cuda::forward(stream, conv); }},
      {"linear with GELU", [=](cudaStream_t stream) { return linear::cuda::forward(stream, product); }},
      {"bias_gelu", [=](cudaStream_t stream) { return gelu::cuda::compute(stream, after); }},
      {"layer_norm", [=](cudaStream_t stream) { return layer_norm::cuda::forward(stream, norm); }},
      {"add_norm", [=](cudaStream_t stream) { return layer_norm::cuda::forward(stream, add_norm); }},
      {"norm_add", [=](cudaStream_t stream) { return layer_norm::cuda::forward(stream, norm_add); }}};
  bool serves = false;  // what wants compute capability 9.0
  check(linear::cuda::serves_plain(&serves));
  if (serves && !linear::cuda::refusal(simple)) {  // the one that makes records
    all.push_back({"linear", [=](cudaStream_t stream) { return linear::cuda::forward(stream, simple); }});
  }
  if (serves && !linear::cuda::mlp_refusal(product, second)) {
    all.push_back({"mlp", [=](cudaStream_t stream) { return linear::cuda::mlp(stream, product, second); }});
  }
  check(layer::cuda::serves(&serves));
  if (serves && s.batch <= 3) {  // layers as one call, of small maps
    const auto parameter = [&](layer::Parameter i, int64_t count, float scale) {
      whole.layers[0][i] = {memory.take(count, scale), type};
    };
    for (int i = 0; i < layer::kParameters; ++i) parameter(layer::Parameter(i), c, 1);
    parameter(layer::kDwKernel, 9 * c, 0.3f);
    parameter(layer::kInputKernel, c * c, 0.1f);
    parameter(layer::kRecordKernel, c * s.record(), 0.1f);
    parameter(layer::kRecordBias, s.record(), 1);
    parameter(layer::kOutputKernel, c * c, 0.1f);
    parameter(layer::kFc1Kernel, c * hidden, 0.1f);
    parameter(layer::kFc1Bias, hidden, 1);
    parameter(layer::kFc2Kernel, c * hidden, 0.1f);
    whole.scratch = memory.take(pixels * whole.scratch_width());
    whole.layers.resize(4, whole.layers[0]);
    for (const bool early : {true, false}) {
      for (const bool after : {false, true}) {
        layer::Call one = whole;
        one.early = early, one.post_norm = after;
        if (layer::cuda::refusal(one)) continue;
        all.push_back(
            {std::string("four layers") + (after ? ", norms after" : "") + (early ? "" : ", in order"),
             [=](cudaStream_t stream) { return layer::cuda::forward(stream, one); }});
      }
    }
  }
  return all;
}

void time(const char* name, const Shape& s, const std::vector<Launch>& turns, cudaStream_t stream) {
  constexpr int kCalls = 12, kRuns = 11;
  for (const Launch& launch : turns) check(launch(stream));
  check(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t program;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kCalls; ++i) check(turns[i % turns.size()](stream));
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&program, graph, 0));
  cudaEvent_t first, last;
  check(cudaEventCreate(&first));
  check(cudaEventCreate(&last));
  std::vector<float> us;
  for (int i = 0; i < kRuns; ++i) {
    check(cudaEventRecord(first, stream));
    check(cudaGraphLaunch(program, stream));
    check(cudaEventRecord(last, stream));
    check(cudaEventSynchronize(last));
    float ms;
    check(cudaEventElapsedTime(&ms, first, last));
    us.push_back(1000 * ms / kCalls);
  }
  std::sort(us.begin(), us.end());
  std::printf(
      "{\"benchmark\": \"kernels\", \"kernel\": \"%s\", \"shape\": \"%s\", \"batch\": %d, \"side\": %d, "
      "\"channels\": %d, \"us\": %.2f, \"range\": [%.2f, %.2f]}\n",
      name, s.name, int(s.batch), int(s.side), int(s.channels), us[kRuns / 2], us[0], us[kRuns - 1]);
  std::fflush(stdout);
  cudaEventDestroy(first);
  cudaEventDestroy(last);
  cudaGraphExecDestroy(program);
  cudaGraphDestroy(graph);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string part = argc > 1 ? argv[1] : "";
  const bool small = part == "--small";
  const std::vector<Shape> few = {{"a", 2, 9, 32, 2},   {"b", 1, 14, 64, 4}, {"c", 3, 7, 112, 7},
                                  {"d", 40, 28, 64, 4}, {"e", 50, 9, 96, 3}, {"f", 1, 13, 80, 5},
                                  {"g", 1, 9, 320, 20}};
  const std::vector<Shape> all = {
      {"T1", 64, 56, 64, 4},   {"T2", 64, 28, 128, 8},  {"T3", 64, 14, 256, 16},
      {"T4", 64, 7, 512, 32},  {"T1", 1, 56, 64, 4},    {"T2", 1, 28, 128, 8},
      {"T3", 1, 14, 256, 16},  {"T4", 1, 7, 512, 32},   {"T1", 16, 56, 64, 4},
      {"T1", 8, 56, 64, 4},    {"B1", 64, 56, 112, 7},  {"published", 64, 56, 128, 4},
      {"L1", 16, 96, 160, 10}, {"L3", 16, 24, 640, 40}, {"H3", 4, 40, 1280, 40},
      {"S1", 64, 56, 80, 5},   {"S2", 64, 28, 160, 10}, {"S3", 64, 14, 320, 20},
      {"B3", 64, 14, 448, 28}};
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  for (const Shape& s : small ? few : all) {
    Memory memory;
    const int sets = !small && s.pixels() * s.channels * 4 > 30 << 20 ? 2 : 1;
    std::vector<std::vector<std::pair<std::string, Launch>>> made;
    for (int i = 0; i < sets; ++i) made.push_back(launches(s, memory));
    for (size_t k = 0; k < made[0].size(); ++k) {
      if (!small && made[0][k].first.find(part) == std::string::npos) continue;
      std::vector<Launch> turns;
      for (const auto& set : made) turns.push_back(set[k].second);
      if (small) {
        check(turns[0](stream));
        check(cudaStreamSynchronize(stream));
      } else {
        time(made[0][k].first.c_str(), s, turns, stream);
      }
    }
  }
}
