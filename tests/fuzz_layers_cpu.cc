// Runs the CPU kernels of the layers' operators over random shapes and dtypes (fuzz_pixels.h,
// fuzz_products.h). Arguments: the number of shapes, the seed. tests/test_native.py builds it.
#include "fuzz_pixels.h"
#include "fuzz_products.h"

#include "dwconv_cpu.h"
#include "gelu_cpu.h"
#include "linear_cpu.h"
#include "norm_cpu.h"

namespace {

bool dwconv_call(const dwconv::Call& s) {
  const int64_t cut = integer(0, s.batch * s.height);
  dwconv::cpu::forward(s, cut, s.batch * s.height);
  dwconv::cpu::forward(s, 0, cut);
  for (int64_t i = s.batch * s.chunks; i-- > 0;) dwconv::cpu::backward(s, i);
  return true;
}

bool gelu_call(const gelu::Call& s) {
  gelu::cpu::compute(s, 0, s.rows);
  return true;
}

bool norm_call(const layer_norm::Call& s) {
  const int64_t cut = integer(0, s.rows);
  layer_norm::cpu::forward(s, cut, s.rows);
  layer_norm::cpu::forward(s, 0, cut);
  return true;
}

bool norm_backward_call(const layer_norm::BackwardCall& s) {
  for (int64_t i = s.parts; i-- > 0;) layer_norm::cpu::backward(s, i);
  return true;
}

bool linear_call(const linear::Call& s) {
  const linear::cpu::Tiles tiles = linear::cpu::tiles_of(s, integer(0, 12), integer(1, 5));
  for (int64_t i = tiles.down * tiles.across; i-- > 0;) {
    linear::cpu::forward(s, tiles, i / tiles.across, i % tiles.across);
  }
  return true;
}

bool mlp_call(const linear::Call& first, const linear::Call& second) {
  const int64_t tiles = linear::cpu::mlp_tiles(first, second, integer(1, 5));
  for (int64_t i = tiles; i-- > 0;) linear::cpu::mlp(first, second, tiles, i);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 100, seed = argc > 2 ? std::atoi(argv[2]) : 0;
  std::printf("by %s\n", cpu::instruction_set_name());
  return fuzz(count, seed, [] {
    return dwconv_case(false, dwconv_call) && gelu_case(gelu_call) && norm_case(norm_call) &&
           norm_backward_case(norm_backward_call) && linear_case(false, linear_call) &&
           mlp_case(false, mlp_call);
  });
}
