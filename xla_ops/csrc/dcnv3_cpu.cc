// DCNv3 on CPU: the kernels of dcnv3_cpu_kernel.h compiled for several instruction sets, and the
// choice among them at run time, so that a build from elsewhere runs on any processor of its kind.
#include "dcnv3_cpu.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#if defined(__x86_64__) && !defined(DCNV3_BASELINE)
#include <immintrin.h>
#endif

namespace dcnv3::cpu {
namespace {

// Storage of the half-precision dtypes; arithmetic on them is float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
To bit_cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

float to_float(Float16 half) {
  const uint32_t sign = uint32_t(half.bits & 0x8000u) << 16, rest = half.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // 2^112 is the difference of the exponents' biases; the product also normalises subnormals.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
}

Float16 to_float16(float value) {
  const uint32_t word = bit_cast<uint32_t>(value), rest = word & 0x7fffffffu;
  const uint16_t sign = uint16_t(word >> 16 & 0x8000u);
  if (rest > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to infinity from 65520
  if (rest < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded value in the low bits
    return {uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13)};
}

// The type in which sums run, and the integer of its width.
template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class R>
using Index = std::conditional_t<sizeof(R) == 8, int64_t, int32_t>;

using Forward = void (*)(const Call&, int64_t, int64_t);
using Backward = void (*)(const Call&, int64_t, int64_t, int64_t);
struct Kernels {
  const char* name;
  Forward forward;
  Backward backward;
};

namespace baseline {
#define DCNV3_TARGET
#define DCNV3_BYTES 16
#include "dcnv3_cpu_kernel.h"
}  // namespace baseline

#if defined(__x86_64__) && !defined(DCNV3_BASELINE)
namespace avx2 {
#define DCNV3_TARGET __attribute__((target("avx2,fma,f16c")))
#define DCNV3_BYTES 32
#include "dcnv3_cpu_kernel.h"
}  // namespace avx2

namespace avx512 {
#define DCNV3_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq")))
#define DCNV3_BYTES 64
#include "dcnv3_cpu_kernel.h"
}  // namespace avx512
#endif

Kernels choose() {
  const char* wanted = std::getenv("INTERNIMAGE_CPU_ISA");
  const auto allowed = [wanted](const char* name) { return !wanted || !std::strcmp(wanted, name); };
#if defined(__x86_64__) && !defined(DCNV3_BASELINE)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq");
  if (has_avx512 && allowed("avx512")) return {"avx512", avx512::forward, avx512::backward};
  if (has_avx2 && (allowed("avx2") || allowed("avx512"))) return {"avx2", avx2::forward, avx2::backward};
#endif
  (void)allowed;
  return {"baseline", baseline::forward, baseline::backward};
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

void forward(const Call& call, int64_t begin, int64_t end) {
  kernels().forward(call, begin, end);
}

void backward(const Call& call, int64_t image, int64_t begin, int64_t end) {
  kernels().backward(call, image, begin, end);
}

const char* instruction_set() {
  return kernels().name;
}

}  // namespace dcnv3::cpu
