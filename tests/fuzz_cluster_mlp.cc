// Runs benchmarks/cluster_mlp.h on the host (cuda_on_host) over random shapes, held against the definition in
// double; each call runs twice, in another order of blocks and threads, and a bit that differs is an error.
// Arguments: the number of shapes, the seed. tests/test_layers_cuda.py builds it.
#include "../benchmarks/cluster_mlp.h"

#include "fuzz_layers.h"

namespace xla_ops::cuda {
alignas(1024) unsigned char dynamic_shared_memory[cuda_on_host::kShared];
}

namespace {

// Rounded to T's digits, as what is stored is.
double rounded(Type type, double v) {
  const double digits = type == Type::kBFloat16 ? 256 : 2048;
  if (v == 0) return v;
  const double unit = std::exp2(std::floor(std::log2(std::fabs(v)))) / digits * 2;
  return std::nearbyint(v / unit) * unit;
}

bool cluster_case() {
  const int all_blocks[] = {1, 2, 4, 8}, sizes[] = {64, 80, 112, 128, 224, 256, 320, 512};
  trial::Call s = {};
  const Type type = integer(0, 1) ? Type::kBFloat16 : Type::kFloat16;
  int blocks = 0;
  while (trial::refusal(s, blocks, cuda_on_host::kShared)) {
    blocks = all_blocks[integer(0, 3)];
    s.rows = int(integer(1, 24)), s.channels = sizes[integer(0, 7)], s.two = integer(0, 3) != 0;
    s.hidden = s.two ? 8 * blocks * int(integer(1, 512 / blocks / 8)) : s.channels;
    s.add_norm = integer(0, 1), s.epsilon = 1e-3f;
  }
  const int n = s.rows, c = s.channels, between = s.hidden;
  Values x = normal(n * c), kernel1 = normal(c * between), kernel2 = normal(between * c),
         bias1 = normal(between);
  const Values bias2 = normal(c), residual = normal(n * c), scale = normal(c, 1), offset = normal(c);
  for (double& v : kernel1) v = std::round(v * 2) / 16;
  for (double& v : kernel2) v = std::round(v * 2) / 16;
  const auto bx = stored(type, x), bk1 = stored(type, kernel1), bk2 = stored(type, kernel2);
  const auto bb1 = stored(type, bias1), bb2 = stored(type, bias2), br = stored(type, residual);
  const auto bs = stored(type, scale), bo = stored(type, offset);
  s.x = bx.data(), s.kernel1 = bk1.data(), s.bias1 = bb1.data(), s.kernel2 = bk2.data(), s.bias2 = bb2.data();
  s.residual = br.data(), s.scale = bs.data(), s.offset = bo.data();
  if (!s.two) s.kernel1 = s.bias1 = nullptr;

  std::vector<char> total(bx.size()), y(bx.size()), before;
  s.total = s.add_norm ? total.data() : nullptr, s.y = y.data();
  for (int round = 0; round < 2; ++round) {
    cuda_on_host::settings.seed = unsigned(engine());
    std::fill(y.begin(), y.end(), char(0xa5));
    const cudaError_t error = type == Type::kBFloat16
                                  ? trial::launch<xla_ops::cuda::BFloat16>(nullptr, s, blocks)
                                  : trial::launch<xla_ops::cuda::Float16>(nullptr, s, blocks);
    if (error) return std::printf("a launch failed\n"), false;
    if (round && y != before) return std::printf("y depends on the order of blocks\n"), false;
    before = y;
  }

  Values sums(n * c), wanted(n * c), hidden(between);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < between; ++j) {
      double z = s.two ? bias1[j] : x[i * c + j];
      for (int k = 0; s.two && k < c; ++k) z += x[i * c + k] * kernel1[k * between + j];
      hidden[j] = s.two ? rounded(type, z * phi(z)) : z;
    }
    double mean = 0, variance = 0;
    for (int j = 0; j < c; ++j) {
      double z = bias2[j];
      for (int k = 0; k < between; ++k) z += hidden[k] * kernel2[k * c + j];
      if (s.add_norm) z = rounded(type, z + residual[i * c + j]);
      sums[i * c + j] = z, mean += z / c;
    }
    for (int j = 0; j < c; ++j) variance += (sums[i * c + j] - mean) * (sums[i * c + j] - mean) / c;
    for (int j = 0; j < c; ++j) {
      const double z =
          (sums[i * c + j] - mean) / std::sqrt(variance + double(s.epsilon)) * scale[j] + offset[j];
      wanted[i * c + j] = z + (s.add_norm ? 0 : residual[i * c + j]);
    }
  }
  return (!s.add_norm || close("the sum", type, total, sums, 2)) && close("the norm", type, y, wanted, 4);
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 100, seed = argc > 2 ? std::atoi(argv[2]) : 0;
  cuda_on_host::shared = xla_ops::cuda::dynamic_shared_memory;
  return fuzz(count, seed, cluster_case);
}
