// What the CUDA kernels of all operators share: storage types, reads and writes of several values at
// once, shared memory, the launch. Arithmetic on half precision is float32. Offsets into buffers are 64-bit,
// within an image some are of 32 bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

namespace xla_ops::cuda {

using xla_ops::BFloat16;
using xla_ops::Float16;
using xla_ops::RealOf;

// 2^x by one instruction; a normal number to 2^-22 relative.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// 1 / x by one instruction; of a normal number up to 2^126, to 2^-23 relative.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

__device__ __forceinline__ float to_real(float v) {
  return v;
}
__device__ __forceinline__ double to_real(double v) {
  return v;
}
__device__ __forceinline__ float to_real(BFloat16 v) {
  return __uint_as_float(uint32_t(v.bits) << 16);
}
__device__ __forceinline__ float to_real(Float16 v) {
  return __half2float(__ushort_as_half(v.bits));
}
__device__ __forceinline__ void to_storage(float v, float* to) {
  *to = v;
}
__device__ __forceinline__ void to_storage(double v, double* to) {
  *to = v;
}
__device__ __forceinline__ void to_storage(float v, BFloat16* to) {
  to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
__device__ __forceinline__ void to_storage(float v, Float16* to) {
  to->bits = __half_as_ushort(__float2half_rn(v));
}

// The widest word that C values of T can be cut into.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
template <class T, int C>
using Word = typename WordOf<(C * sizeof(T) < 16 ? C * sizeof(T) : 16)>::type;

template <class T>
constexpr int kPiece = 16 / sizeof(T);  // values in 16 bytes

// The two values in 32 bits of half precision.
__device__ __forceinline__ void unpack(uint32_t word, BFloat16, float* v) {
  v[0] = __uint_as_float(word << 16);
  v[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack(uint32_t word, Float16, float* v) {
  v[0] = to_real(Float16{uint16_t(word)});
  v[1] = to_real(Float16{uint16_t(word >> 16)});
}

// The values of T in a word. By value: a reference to memory would be read byte by byte.
template <class T, class W, class Real>
__device__ __forceinline__ void unpack_word(W word, Real* v) {
  constexpr int kEach = sizeof(W) / sizeof(T);
  if constexpr (sizeof(T) == 2 && kEach > 1) {
    uint32_t pairs[kEach / 2];
    memcpy(pairs, &word, sizeof word);
#pragma unroll
    for (int j = 0; j < kEach / 2; ++j) unpack(pairs[j], T(), v + 2 * j);
  } else {
    T value[kEach];
    memcpy(value, &word, sizeof word);
#pragma unroll
    for (int j = 0; j < kEach; ++j) v[j] = to_real(value[j]);
  }
}

// Reads and writes C neighbouring values. `p` is a multiple of C values, from a base of 16 bytes.
template <int C, class T, class Real>
__device__ __forceinline__ void load(const T* p, Real* v) {
  using W = Word<T, C>;
  constexpr int kEach = sizeof(W) / sizeof(T);
#pragma unroll
  for (int i = 0; i < C; i += kEach) unpack_word<T>(*reinterpret_cast<const W*>(p + i), v + i);
}
template <int C, class T, class Real>
__device__ __forceinline__ void store(const Real* v, T* p) {
  using W = Word<T, C>;
  constexpr int kEach = sizeof(W) / sizeof(T);
#pragma unroll
  for (int i = 0; i < C; i += kEach) {
    T value[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) to_storage(v[i + j], &value[j]);
    W word;
    memcpy(&word, value, sizeof word);
    *reinterpret_cast<W*>(p + i) = word;
  }
}

// Reads C neighbouring parameters from element `first` on: of x's dtype T or, where that is of half
// precision, maybe of float32.
template <int C, class T, class Real>
__device__ __forceinline__ void load_parameters(const void* data, Type type, int64_t first, Real* v) {
  if constexpr (sizeof(T) == 2) {
    if (type == Type::kFloat32) return load<C>(static_cast<const float*>(data) + first, v);
  }
  load<C>(static_cast<const T*>(data) + first, v);
}

// a / b of numbers that are not negative; 64-bit division takes a GPU several times as long.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return uint32_t(a) / uint32_t(b);
  return a / b;
}

constexpr int64_t kPlainShared = 48 << 10;  // bytes of shared memory that any block may have

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
template <class R>
__device__ __forceinline__ R* shared_memory() {
  return reinterpret_cast<R*>(dynamic_shared_memory);
}

// Calls f with a null pointer to the storage type.
template <class F>
cudaError_t with_type(Type type, F f) {
  switch (type) {
    case Type::kFloat32:
      return f(static_cast<float*>(nullptr));
    case Type::kFloat64:
      return f(static_cast<double*>(nullptr));
    case Type::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case Type::kFloat16:
      return f(static_cast<Float16*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

inline bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// The GPU at hand: shared memory that a block may ask for, in bytes, and multiprocessors.
struct Device {
  int shared = 0, processors = 0;
};
inline cudaError_t find_device(Device* to) {
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&to->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!error) error = cudaDeviceGetAttribute(&to->processors, cudaDevAttrMultiProcessorCount, device);
  return error;
}

// How a kernel is launched. `early`: while the one before it on the stream may still run, which it waits for
// by itself; a GPU of compute capability 9.0 or later is wanted for that (cuda_chain.h), and for clusters of
// so many neighbouring blocks.
struct Manner {
  bool early = false;
  int cluster = 1;
};

// Puts one kernel on the stream; says so if it cannot.
template <class... Parameters, class... Arguments>
cudaError_t launch(Manner manner, cudaStream_t stream, int64_t blocks, int threads, size_t shared,
                   void (*kernel)(Parameters...), Arguments... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  if (manner.early) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (manner.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = static_cast<unsigned>(manner.cluster);
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}
template <class... Parameters, class... Arguments>
cudaError_t launch(cudaStream_t stream, int64_t blocks, int threads, size_t shared,
                   void (*kernel)(Parameters...), Arguments... arguments) {
  return launch(Manner(), stream, blocks, threads, shared, kernel, arguments...);
}

// Likewise with more shared memory than any block may have, if so many bytes are asked for.
template <class... Parameters, class... Arguments>
cudaError_t launch_with(Manner manner, cudaStream_t stream, const Device& device, int64_t blocks, int threads,
                        size_t shared, void (*kernel)(Parameters...), Arguments... arguments) {
  if (shared > kPlainShared) {  // the same for all calls: others may be launching this kernel
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared);
    if (error) return error;
  }
  return launch(manner, stream, blocks, threads, shared, kernel, arguments...);
}
template <class... Parameters, class... Arguments>
cudaError_t launch_with(cudaStream_t stream, const Device& device, int64_t blocks, int threads, size_t shared,
                        void (*kernel)(Parameters...), Arguments... arguments) {
  return launch_with(Manner(), stream, device, blocks, threads, shared, kernel, arguments...);
}

}  // namespace xla_ops::cuda
