// The kernels of dwconv_cpu_kernel.h for several instruction sets, chosen among at run time.
#include "dwconv_cpu.h"

#include <cmath>
#include <memory>

namespace dwconv::cpu {
namespace {

using namespace ::cpu;

namespace baseline {
#define CPU_TARGET
#define CPU_BYTES 16
#include "dwconv_cpu_kernel.h"
}  // namespace baseline

#if CPU_X86
namespace avx2 {
#define CPU_TARGET __attribute__((target("avx2,fma,f16c")))
#define CPU_BYTES 32
#include "dwconv_cpu_kernel.h"
}  // namespace avx2

namespace avx512 {
#define CPU_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq")))
#define CPU_BYTES 64
#include "dwconv_cpu_kernel.h"
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

void backward(const Call& call, int64_t i) {
#if CPU_X86
  if (instruction_set() == InstructionSet::kAvx512) return avx512::backward(call, i);
  if (instruction_set() == InstructionSet::kAvx2) return avx2::backward(call, i);
#endif
  baseline::backward(call, i);
}

}  // namespace dwconv::cpu
