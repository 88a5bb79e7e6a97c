// The dtypes of the CPU kernels, and the instruction set in use. Shared by all operators.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "types.h"

#if defined(__x86_64__) && !defined(CPU_BASELINE)
#define CPU_X86 1
#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace cpu {

using xla_ops::BFloat16;
using xla_ops::Float16;
using xla_ops::RealOf;
using xla_ops::Type;

template <class To, class From>
inline To bit_cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(Float16 half) {
  const uint32_t sign = uint32_t(half.bits & 0x8000u) << 16, rest = half.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Subnormals by their value: on XLA's threads a subnormal float32 counts as zero.
  if (rest < 0x400u) return bit_cast<float>(sign | bit_cast<uint32_t>(float(rest) * 0x1p-24f));
  return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));  // 112 is the difference of the biases
}

inline Float16 to_float16(float value) {
  const uint32_t word = bit_cast<uint32_t>(value), rest = word & 0x7fffffffu;
  const uint16_t sign = uint16_t(word >> 16 & 0x8000u);
  if (rest > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to infinity from 65520
  if (rest < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded value in the low bits
    return {uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13)};
}

// The integer of a real number's width.
template <class R>
using Index = std::conditional_t<sizeof(R) == 8, int64_t, int32_t>;

// Each has what those before it have.
enum class InstructionSet { kBaseline, kAvx2, kAvx512, kAvx512BFloat16, kAmx };
constexpr const char* kInstructionSets[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

// Those for bfloat16 want newer compilers than the rest.
#if CPU_X86 && !defined(CPU_NO_AVX512) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 11 : __GNUC__ >= 11)
#define CPU_AMX 1
#endif

// The best that this processor has and the system keeps the registers of. The processor is asked itself: what
// __builtin_cpu_supports reads is not filled by every compiler's library (Zig's).
inline InstructionSet best_instruction_set() {
#if CPU_X86
  const auto has = [](uint32_t word, std::initializer_list<int> bits) {
    return std::all_of(bits.begin(), bits.end(), [&](int bit) { return word >> bit & 1; });
  };
  uint32_t a, b, c, d, features, more_c, more_d;
  constexpr int kFma = 12, kXsave = 27, kAvx = 28, kF16c = 29;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, {kFma, kXsave, kAvx, kF16c}))
    return InstructionSet::kBaseline;
  uint32_t kept, kept_high;
  __asm__("xgetbv" : "=a"(kept), "=d"(kept_high) : "c"(0));
  constexpr int kXmm = 1, kYmm = 2, kMasks = 5, kZmm = 6, kHighZmm = 7;
  constexpr int kAvx2 = 5, kAvx512f = 16, kAvx512dq = 17, kAvx512bw = 30, kAvx512vl = 31;
  if (!has(kept, {kXmm, kYmm}) || !__get_cpuid_count(7, 0, &a, &features, &more_c, &more_d) ||
      !has(features, {kAvx2})) {
    return InstructionSet::kBaseline;
  }
  if (!has(kept, {kMasks, kZmm, kHighZmm}) || !has(features, {kAvx512f, kAvx512dq, kAvx512bw, kAvx512vl})) {
    return InstructionSet::kAvx2;
  }
#if CPU_AMX
  constexpr int kAvx512Bf16 = 5, kAmxBf16 = 22, kAmxTile = 24;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !has(a, {kAvx512Bf16})) return InstructionSet::kAvx512;
  return has(more_d, {kAmxBf16, kAmxTile}) ? InstructionSet::kAmx : InstructionSet::kAvx512BFloat16;
#endif
  return InstructionSet::kAvx512;
#endif
  return InstructionSet::kBaseline;
}

// Whether Linux lets this process use AMX, which it has to be asked for.
inline bool amx_is_permitted() {
#if CPU_AMX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// That one, or the lesser one that the environment variable INTERNIMAGE_CPU_ISA names. _ffi.py refuses other
// names than there are.
inline InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    int set = int(best_instruction_set());
    const char* const wanted = std::getenv("INTERNIMAGE_CPU_ISA");
    for (int i = 0; wanted && i < set; ++i) {
      if (!std::strcmp(wanted, kInstructionSets[i])) set = i;
    }
    if (set == int(InstructionSet::kAmx) && !amx_is_permitted()) return InstructionSet::kAvx512BFloat16;
    return InstructionSet(set);
  }();
  return chosen;
}

inline bool has_amx() {
  return instruction_set() == InstructionSet::kAmx;
}

inline const char* instruction_set_name() {
  const InstructionSet set = instruction_set();
  if (set == InstructionSet::kBaseline) return "baseline, without products";
  return has_amx() ? "avx512 and amx" : kInstructionSets[int(set)];
}

}  // namespace cpu
