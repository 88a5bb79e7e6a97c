// Vectors of a fixed number of lanes, loads and stores of the four dtypes. Included once for each
// instruction set, as part of an operator's kernels, with CPU_TARGET and CPU_BYTES defined by
// cpu_targets.h; no include guard for that reason.
//
// The vector types are GCC's and Clang's: the compiler lowers them to what the target has.

#define CPU_ALWAYS CPU_TARGET inline __attribute__((always_inline))
#define CPU_FN static CPU_ALWAYS

constexpr int kBytes = CPU_BYTES;

// Vec<R, W>: W lanes of R; a plain R where W is 1, so that one code serves the channels left over.
template <class R, int W>
struct VecOf {
  typedef R type __attribute__((vector_size(W * sizeof(R))));
};
template <class R>
struct VecOf<R, 1> {
  typedef R type;
};
template <class R, int W>
using Vec = typename VecOf<R, W>::type;

template <class V, class P>
CPU_FN V load_raw(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class P>
CPU_FN void store_raw(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class To, class From>
CPU_FN To bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Lanes of four of R taken from a and b. Older GCC has another name for it.
#if defined(__clang__) || __GNUC__ >= 12
#define CPU_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CPU_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Vec<Index<R>, 4>{__VA_ARGS__})
#endif

template <class T, class R, int W>
struct Memory;  // loads and stores W values of T as R

template <class R, int W>
struct Memory<R, R, W> {
  CPU_FN Vec<R, W> load(const R* p) { return load_raw<Vec<R, W>>(p); }
  CPU_FN void store(R* p, Vec<R, W> v) { store_raw(p, v); }
};

template <int W>
struct Memory<BFloat16, float, W> {
  using U = Vec<uint32_t, W>;
  using H = Vec<uint16_t, W>;
  CPU_FN Vec<float, W> load(const BFloat16* p) {
#if CPU_BYTES == 64
    if constexpr (W == 16) {  // to the upper halves in one step
      const __m512i place = _mm512_mullo_epi32(
          _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(1 << 16));
      const __m512i words = _mm512_castsi256_si512(load_raw<__m256i>(p));
      return bits<Vec<float, 16>>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, place, words));
    }
#endif
    if constexpr (W == 1) {
      return bits<float>(uint32_t(p->bits) << 16);
    } else {
      return bits<Vec<float, W>>(__builtin_convertvector(load_raw<H>(p), U) << 16);
    }
  }
  CPU_FN void store(BFloat16* p, Vec<float, W> v) {
#if CPU_BFLOAT16
    if constexpr (W == 16) return store_raw(p, _mm512_cvtneps_pbh(bits<__m512>(v)));
#endif
    U u = bits<U>(v);
    const U even = u + 0x7fffu + ((u >> 16) & 1u);                               // to nearest, ties to even
    const U rounded = (u & 0x7fffffffu) > 0x7f800000u ? (u | 0x400000u) : even;  // NaN stays NaN
    if constexpr (W == 1) {
      p->bits = uint16_t(rounded >> 16);
    } else {
      store_raw(p, __builtin_convertvector(rounded >> 16, H));
    }
  }
};

template <int W>
struct Memory<Float16, float, W> {
  CPU_FN Vec<float, W> load(const Float16* p) {
#if CPU_BYTES == 64
    if constexpr (W == 16) return bits<Vec<float, 16>>(_mm512_cvtph_ps(load_raw<__m256i>(p)));
#endif
#if CPU_BYTES >= 32
    if constexpr (W == 8) return bits<Vec<float, 8>>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#endif
    Vec<float, W> v;
    float lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = to_float(p[i]);
    __builtin_memcpy(&v, lanes, sizeof v);
    return v;
  }
  CPU_FN void store(Float16* p, Vec<float, W> v) {
#if CPU_BYTES == 64
    if constexpr (W == 16) return store_raw(p, _mm512_cvtps_ph(bits<__m512>(v), 0));
#endif
#if CPU_BYTES >= 32
    if constexpr (W == 8) return store_raw(p, _mm256_cvtps_ph(bits<__m256>(v), 0));
#endif
    float lanes[W];
    __builtin_memcpy(lanes, &v, sizeof v);
    for (int i = 0; i < W; ++i) p[i] = to_float16(lanes[i]);
  }
};

// Calls f with a value of the storage type.
template <class F>
CPU_FN void with_type(Type type, F f) {
  switch (type) {
    case Type::kFloat32:
      return f(float());
    case Type::kFloat64:
      return f(double());
    case Type::kBFloat16:
      return f(BFloat16());
    case Type::kFloat16:
      return f(Float16());
  }
}

// The same of a type whose sums run in Real.
template <class Real, class F>
CPU_FN void with_type_in(Type type, F f) {
  with_type(type, [=](auto value) CPU_TARGET {
    if constexpr (std::is_same_v<RealOf<decltype(value)>, Real>) f(value);
  });
}

// Likewise with one of the parameters' type too, which is that or float.
template <class F>
CPU_FN void with_types(Type type, Type parameters_type, F f) {
  with_type(type, [=](auto value) CPU_TARGET {
    using T = decltype(value);
    if (std::is_same_v<T, RealOf<T>> || type == parameters_type) return f(value, value);
    f(value, RealOf<T>());
  });
}

// Widens n values of T.
template <class T, class Real>
CPU_FN void widen(const T* from, int64_t n, Real* to) {
  constexpr int kLanes = kBytes / int(sizeof(Real));
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) store_raw(to + c, Memory<T, Real, kLanes>::load(from + c));
  for (; c < n; ++c) to[c] = Memory<T, Real, 1>::load(from + c);
}

// Sums the lanes of four vectors: {sum a, sum b, sum c, sum d}.
template <class R, int W>
CPU_FN Vec<R, 4> sums(Vec<R, W> a, Vec<R, W> b, Vec<R, W> c, Vec<R, W> d) {
  using V4 = Vec<R, 4>;
  if constexpr (W == 1) {
    return V4{a, b, c, d};
  } else if constexpr (W == 2) {
    return V4{a[0], b[0], c[0], d[0]} + V4{a[1], b[1], c[1], d[1]};
  } else if constexpr (W == 4) {
    const V4 ab = CPU_SHUFFLE(a, b, 0, 4, 1, 5) + CPU_SHUFFLE(a, b, 2, 6, 3, 7);
    const V4 cd = CPU_SHUFFLE(c, d, 0, 4, 1, 5) + CPU_SHUFFLE(c, d, 2, 6, 3, 7);
    return CPU_SHUFFLE(ab, cd, 0, 1, 4, 5) + CPU_SHUFFLE(ab, cd, 2, 3, 6, 7);
  } else {
    struct Halves {
      Vec<R, W / 2> low, high;
    };
    const Halves ha = bits<Halves>(a), hb = bits<Halves>(b), hc = bits<Halves>(c), hd = bits<Halves>(d);
    return sums<R, W / 2>(ha.low + ha.high, hb.low + hb.high, hc.low + hc.high, hd.low + hd.high);
  }
}

// Transposes four rows of four.
template <class R>
CPU_FN void transpose(Vec<R, 4>& a, Vec<R, 4>& b, Vec<R, 4>& c, Vec<R, 4>& d) {
  using V4 = Vec<R, 4>;
  const V4 ab_low = CPU_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = CPU_SHUFFLE(a, b, 2, 6, 3, 7);
  const V4 cd_low = CPU_SHUFFLE(c, d, 0, 4, 1, 5), cd_high = CPU_SHUFFLE(c, d, 2, 6, 3, 7);
  a = CPU_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
  b = CPU_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
  c = CPU_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
  d = CPU_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}
