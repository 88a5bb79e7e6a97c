// Runs the CPU kernel over random geometries and holds it against the definition, then computes the last
// image of a huge batch. Arguments: the number of geometries, the seed. Exits with 1 and says what
// differed. tests/test_native.py builds it; without -DCPU_BASELINE it runs the instruction set
// that INTERNIMAGE_CPU_ISA names.
#include "dcnv3_cpu.h"
#include "fuzz_dcnv3.h"

using dcnv3::cpu::backward;
using dcnv3::cpu::forward;

namespace {

// In two parts, to find what depends on how the work is divided.
bool run(const Call& call) {
  const Problem& s = call.problem;
  const int64_t pairs = s.batch * s.positions() * s.group;
  const int64_t cut = integer(0, pairs), group = integer(0, s.group);
  forward(call, cut, pairs);
  forward(call, 0, cut);
  for (int64_t image = 0; image < s.batch; ++image) {
    backward(call, image, group, s.group);
    if (group > 0) backward(call, image, 0, group);
  }
  return true;
}

bool huge() {
  Huge both;
  if (!both.there()) return std::printf("no room to reserve; the huge batch was not tried\n"), true;
  const int64_t pairs = both.alone.problem.positions() * both.alone.problem.group;
  forward(both.alone, pairs - 100, pairs);
  backward(both.alone, 0, 7, 8);
  forward(both.whole, (Huge::kLast + 1) * pairs - 100, (Huge::kLast + 1) * pairs);
  backward(both.whole, Huge::kLast, 7, 8);
  if (!both.same()) std::printf("the last image of a huge batch differs\n");
  return both.same();
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 100, seed = argc > 2 ? std::atoi(argv[2]) : 0;
  for (int i = 0; i < count; ++i) {
    engine.seed(seed + i);
    if (one(run)) continue;
    std::printf("geometry of seed %d\n", seed + i);
    return 1;
  }
  if (!huge()) return 1;
  std::printf("%d geometries, %s\n", count, cpu::instruction_set_name());
  return 0;
}
