// DCNv3 on CPU: the kernels of dcnv3_cpu_kernel.h.
#include "dcnv3_cpu.h"

#include <memory>

namespace dcnv3::cpu {
namespace {

using namespace ::cpu;

#define CPU_KERNELS "dcnv3_cpu_kernel.h"
#include "cpu_targets.h"

}  // namespace

void forward(const Call& call, int64_t begin, int64_t end) {
  CPU_CALL(forward, call, begin, end);
}

void backward(const Call& call, int64_t image, int64_t begin, int64_t end) {
  CPU_CALL(backward, call, image, begin, end);
}

}  // namespace dcnv3::cpu
