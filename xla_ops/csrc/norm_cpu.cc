// LayerNorm on CPU: the kernels of norm_cpu_kernel.h.
#include "norm_cpu.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace layer_norm::cpu {
namespace {

using namespace ::cpu;

#define CPU_KERNELS "norm_cpu_kernel.h"
#include "cpu_targets.h"

}  // namespace

void forward(const Call& call, int64_t begin, int64_t end) {
  CPU_CALL(forward, call, begin, end);
}

void backward(const BackwardCall& call, int64_t part) {
  CPU_CALL(backward, call, part);
}

}  // namespace layer_norm::cpu
