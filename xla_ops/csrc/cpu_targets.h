// Compiles CPU_KERNELS, an operator's kernels, for each instruction set, in a namespace of its own.
// CPU_CALL(f, ...) then calls f of the set in use, so that a build from elsewhere runs on any
// processor of its kind. Included once in an operator's .cc file. Tests that need not have all
// instruction sets define CPU_BASELINE or CPU_NO_AVX512. CPU_BYTES is the size of a vector, CPU_BFLOAT16 is
// whether bfloat16 has instructions of its own, for which denormal numbers are zero.

namespace baseline {
#define CPU_TARGET
#define CPU_BYTES 16
#define CPU_BFLOAT16 0
#include CPU_KERNELS
#undef CPU_TARGET
#undef CPU_BYTES
#undef CPU_BFLOAT16
}  // namespace baseline

#if CPU_X86
namespace avx2 {
#define CPU_TARGET __attribute__((target("avx2,fma,f16c")))
#define CPU_BYTES 32
#define CPU_BFLOAT16 0
#include CPU_KERNELS
#undef CPU_TARGET
#undef CPU_BYTES
#undef CPU_BFLOAT16
}  // namespace avx2

#ifdef CPU_NO_AVX512
namespace avx512 = avx2;
#else
namespace avx512 {
#define CPU_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq")))
#define CPU_BYTES 64
#define CPU_BFLOAT16 0
#include CPU_KERNELS
#undef CPU_TARGET
#undef CPU_BYTES
#undef CPU_BFLOAT16
}  // namespace avx512
#endif

#if CPU_AMX
namespace avx512bf16 {
#define CPU_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")))
#define CPU_BYTES 64
#define CPU_BFLOAT16 1
#include CPU_KERNELS
#undef CPU_TARGET
#undef CPU_BYTES
#undef CPU_BFLOAT16
}  // namespace avx512bf16
#else
namespace avx512bf16 = avx512;
#endif

#define CPU_CALL(f, ...)                                                                          \
  ::cpu::instruction_set() >= ::cpu::InstructionSet::kAvx512BFloat16 ? avx512bf16::f(__VA_ARGS__) \
  : ::cpu::instruction_set() == ::cpu::InstructionSet::kAvx512       ? avx512::f(__VA_ARGS__)     \
  : ::cpu::instruction_set() == ::cpu::InstructionSet::kAvx2         ? avx2::f(__VA_ARGS__)       \
                                                                     : baseline::f(__VA_ARGS__)
#else
#define CPU_CALL(f, ...) baseline::f(__VA_ARGS__)
#endif
