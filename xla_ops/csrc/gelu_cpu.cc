// Bias and GELU on CPU: the kernels of gelu_cpu_kernel.h.
#include "gelu_cpu.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace gelu::cpu {
namespace {

using namespace ::cpu;

#define CPU_KERNELS "gelu_cpu_kernel.h"
#include "cpu_targets.h"

}  // namespace

void compute(const Call& call, int64_t begin, int64_t end) {
  CPU_CALL(compute, call, begin, end);
}

}  // namespace gelu::cpu
