// Depthwise convolution, LayerNorm and GELU on CPU: the kernels of dwconv_cpu_kernel.h.
#include "dwconv_cpu.h"

#include <cmath>
#include <memory>

namespace dwconv::cpu {
namespace {

using namespace ::cpu;

#define CPU_KERNELS "dwconv_cpu_kernel.h"
#include "cpu_targets.h"

}  // namespace

void forward(const Call& call, int64_t begin, int64_t end) {
  CPU_CALL(forward, call, begin, end);
}

void backward(const Call& call, int64_t i) {
  CPU_CALL(backward, call, i);
}

}  // namespace dwconv::cpu
