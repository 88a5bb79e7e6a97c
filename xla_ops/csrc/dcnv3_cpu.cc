// DCNv3 on CPU: the kernels of dcnv3_cpu_kernel.h compiled for several instruction sets, and the
// choice among them at run time, so that a build from elsewhere runs on any processor of its kind.
#include "dcnv3_cpu.h"

#include <memory>

namespace dcnv3::cpu {
namespace {

using namespace ::cpu;

namespace baseline {
#define CPU_TARGET
#define CPU_BYTES 16
#include "dcnv3_cpu_kernel.h"
}  // namespace baseline

#if CPU_X86
namespace avx2 {
#define CPU_TARGET __attribute__((target("avx2,fma,f16c")))
#define CPU_BYTES 32
#include "dcnv3_cpu_kernel.h"
}  // namespace avx2

namespace avx512 {
#define CPU_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq")))
#define CPU_BYTES 64
#include "dcnv3_cpu_kernel.h"
}  // namespace avx512
#endif

}  // namespace

void forward(const Call& call, int64_t begin, int64_t end) {
#if CPU_X86
  if (instruction_set() == InstructionSet::kAvx512) return avx512::forward(call, begin, end);
  if (instruction_set() == InstructionSet::kAvx2) return avx2::forward(call, begin, end);
#endif
  baseline::forward(call, begin, end);
}

void backward(const Call& call, int64_t image, int64_t begin, int64_t end) {
#if CPU_X86
  if (instruction_set() == InstructionSet::kAvx512) return avx512::backward(call, image, begin, end);
  if (instruction_set() == InstructionSet::kAvx2) return avx2::backward(call, image, begin, end);
#endif
  baseline::backward(call, image, begin, end);
}

}  // namespace dcnv3::cpu
