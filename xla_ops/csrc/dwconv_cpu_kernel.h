// The kernels for one instruction set; included by cpu_targets.h.
//
// Rows of a map come into a ring of K padded rows: values widened to Real, r zero pixels on either
// side, channels filled up with zeros to whole vectors. So the loops have no edges and no dtypes.

#include "cpu_simd.h"
#include "cpu_gelu.h"

// Taken together: a weight is loaded once for so many, and none waits for the sums of a norm alone.
constexpr int kPixels = 4;

// Memory for a call's pieces, aligned, zero at first.
template <class Real>
struct Scratch {
  explicit Scratch(int64_t n) : storage(new Real[n + 64 / sizeof(Real)]()) {
    const uintptr_t past = reinterpret_cast<uintptr_t>(storage.get()) % 64;
    data = storage.get() + (64 - past) % 64 / sizeof(Real);
  }
  std::unique_ptr<Real[]> storage;
  Real* data;
};

// The sizes, and the parameters of the images at hand, widened and filled up.
template <class Real>
struct Layer {
  static constexpr int kLanes = kBytes / int(sizeof(Real));
  using V = Vec<Real, kLanes>;

  explicit Layer(const Call& c)
      : call(c),
        channels((c.channels + kLanes - 1) / kLanes * kLanes),
        row((c.width + c.size - 1 + kPixels) * channels),
        storage((c.size * c.size + 3) * channels),
        kernel(storage.data),
        bias(kernel + c.size * c.size * channels),
        scale(bias + channels),
        offset(scale + channels) {}

  const Call& call;
  const int64_t channels;  // with those that fill up the last vector
  const int64_t row;       // values of a padded row
  int64_t set = -1;        // which parameters are loaded
  Scratch<Real> storage;
  Real *kernel, *bias, *scale, *offset;
};

template <class P, class Real>
CPU_FN void load_parameters_of(Layer<Real>& a, int64_t set) {
  const Call& s = a.call;
  const int64_t taps = s.size * s.size;
  const auto part = [&](const void* data, int64_t rows, Real* to) CPU_TARGET {
    const P* from = static_cast<const P*>(data) + set * rows * s.channels;
    for (int64_t i = 0; i < rows; ++i) widen(from + i * s.channels, s.channels, to + i * a.channels);
  };
  part(s.kernel, taps, a.kernel);
  part(s.bias, 1, a.bias);
  part(s.scale, 1, a.scale);
  part(s.offset, 1, a.offset);
}

template <class Real>
CPU_TARGET void load_parameters(Layer<Real>& a, int64_t image) {
  const int64_t set = image / a.call.shared;
  if (set == a.set) return;
  a.set = set;
  with_type_in<Real>(a.call.parameters_type,
                     [&a, set](auto p) CPU_TARGET { load_parameters_of<decltype(p)>(a, set); });
}

// A ring of the padded rows i - r .. i + r of an image.
template <class Real>
struct Ring {
  explicit Ring(const Layer<Real>& a) : storage(a.call.size * a.row), size(a.call.size), row(a.row) {}
  CPU_ALWAYS Real* at(int64_t i) const { return storage.data + (i + size) % size * row; }
  Scratch<Real> storage;
  const int64_t size, row;
};

template <class Real>
CPU_FN void zero_row(const Layer<Real>& a, const Ring<Real>& ring, int64_t i) {
  std::memset(ring.at(i), 0, a.row * sizeof(Real));
}

// Puts row i of an image into the ring; zeros where there is none.
template <class T, class Real>
CPU_TARGET void load_row(const Layer<Real>& a, const Ring<Real>& ring, int64_t image, int64_t i) {
  const Call& s = a.call;
  if (i < 0 || i >= s.height) return zero_row(a, ring, i);
  const T* from = static_cast<const T*>(s.x) + (image * s.height + i) * s.width * s.channels;
  Real* to = ring.at(i) + s.size / 2 * a.channels;
  if (a.channels == s.channels) return widen(from, s.width * s.channels, to);
  for (int64_t j = 0; j < s.width; ++j) widen(from + j * s.channels, s.channels, to + j * a.channels);
}

// Convolves kPixels pixels from column j on, of the ring's rows around i; `to` is (kPixels, channels).
// With `flipped` the kernel is turned round, which is the convolution's transpose. K is the kernel's
// side, or 0 for any.
template <int K, bool flipped, class Real>
CPU_FN void convolve(const Layer<Real>& a, const Ring<Real>& ring, int64_t i, int64_t j, Real* to) {
  using V = typename Layer<Real>::V;
  constexpr int kLanes = Layer<Real>::kLanes;
  const int64_t size = K ? K : a.call.size, channels = a.channels;
  const auto row_at = [&](int64_t y) CPU_TARGET { return ring.at(i + y - size / 2) + j * channels; };
  const Real* rows[K ? K : 1];
  for (int y = 0; y < K; ++y) rows[y] = row_at(y);
  for (int64_t c = 0; c < channels; c += kLanes) {
    V sum[kPixels];
    for (int p = 0; p < kPixels; ++p) sum[p] = flipped ? V{} : load_raw<V>(a.bias + c);
    for (int64_t y = 0; y < size; ++y) {
      const Real* from = (K ? rows[y] : row_at(y)) + c;
      const Real* weights = a.kernel + y * size * channels + c;
      if (flipped) weights = a.kernel + ((size - 1 - y) * size + size - 1) * channels + c;
      for (int64_t x = 0; x < size; ++x) {
        const V weight = load_raw<V>(weights + (flipped ? -x : x) * channels);
        for (int p = 0; p < kPixels; ++p) sum[p] += weight * load_raw<V>(from + (x + p) * channels);
      }
    }
    for (int p = 0; p < kPixels; ++p) store_raw(to + p * channels + c, sum[p]);
  }
}

template <class Real, class V>
CPU_FN Real sum_of_lanes(V v) {
  return sums<Real, int(sizeof(V) / sizeof(Real))>(v, V{}, V{}, V{})[0];
}

// Takes the means over the channels off kPixels pixels, and returns 1 / sqrt(variance + epsilon) of each.
template <class Real>
CPU_FN Vec<Real, kPixels> center(const Layer<Real>& a, Real* pixels) {
  using V = typename Layer<Real>::V;
  constexpr int kLanes = Layer<Real>::kLanes;
  const Real count = Real(a.call.channels);
  V sum[kPixels] = {}, squares[kPixels] = {};
  for (int64_t c = 0; c < a.channels; c += kLanes) {
    for (int p = 0; p < kPixels; ++p) sum[p] += load_raw<V>(pixels + p * a.channels + c);
  }
  const Vec<Real, kPixels> mean = sums<Real, kLanes>(sum[0], sum[1], sum[2], sum[3]) / count;
  for (int p = 0; p < kPixels; ++p) {
    Real* const v = pixels + p * a.channels;
    for (int64_t c = 0; c < a.channels; c += kLanes) store_raw(v + c, load_raw<V>(v + c) - mean[p]);
    for (int64_t c = a.call.channels; c < a.channels; ++c) v[c] = 0;
  }
  for (int64_t c = 0; c < a.channels; c += kLanes) {
    for (int p = 0; p < kPixels; ++p) {
      const V v = load_raw<V>(pixels + p * a.channels + c);
      squares[p] += v * v;
    }
  }
  Vec<Real, kPixels> factor = sums<Real, kLanes>(squares[0], squares[1], squares[2], squares[3]) / count;
  for (int p = 0; p < kPixels; ++p) factor[p] = 1 / std::sqrt(factor[p] + Real(a.call.epsilon));
  return factor;
}

template <class T, int K>
CPU_TARGET void forward_of(const Call& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  using V = Vec<Real, Layer<Real>::kLanes>;
  constexpr int kLanes = Layer<Real>::kLanes;
  Layer<Real> a(call);
  const Ring<Real> ring(a);
  const Scratch<Real> pixels(kPixels * a.channels);
  const int64_t reach = call.size / 2;
  int64_t loaded = 0, image = -1;  // rows before `loaded` are in the ring
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row % call.height;
    if (row / call.height != image) {
      image = row / call.height;
      loaded = i - reach;
      load_parameters(a, image);
    }
    for (; loaded <= i + reach; ++loaded) load_row<T>(a, ring, image, loaded);
    T* y = static_cast<T*>(call.y) + row * call.width * call.channels;
    for (int64_t j = 0; j < call.width; j += kPixels) {
      convolve<K, false>(a, ring, i, j, pixels.data);
      const Vec<Real, kPixels> factors = center(a, pixels.data);
      for (int64_t p = 0; p < kPixels && j + p < call.width; ++p) {
        Real* v = pixels.data + p * a.channels;
        T* out = y + (j + p) * call.channels;
        const Real factor = factors[p];
        int64_t c = 0;
        for (; c + kLanes <= call.channels; c += kLanes) {
          const V z = load_raw<V>(v + c) * factor * load_raw<V>(a.scale + c) + load_raw<V>(a.offset + c);
          Memory<T, Real, kLanes>::store(out + c, gelu_for<T, kLanes>(z));
        }
        if (c == call.channels) continue;
        const V z = load_raw<V>(v + c) * factor * load_raw<V>(a.scale + c) + load_raw<V>(a.offset + c);
        store_raw(v + c, gelu_for<T, kLanes>(z));
        for (; c < call.channels; ++c) Memory<T, Real, 1>::store(out + c, v[c]);
      }
    }
  }
}

// A chunk's sums over its pixels: the gradients of the parameters, in the order of `partial`.
template <class Real>
struct Gradients {
  explicit Gradients(const Layer<Real>& a)
      : storage((3 + a.call.size * a.call.size) * a.channels),
        offset(storage.data),
        scale(offset + a.channels),
        bias(scale + a.channels),
        kernel(bias + a.channels) {}
  Scratch<Real> storage;
  Real *offset, *scale, *bias, *kernel;
};

// From v and dy of a pixel to the gradient by v, in place of v; sums those of the norm's parameters.
template <class T, class Real>
CPU_FN void differentiate(const Layer<Real>& a, const T* dy, Real factor, Real* v, Real* slope,
                          Gradients<Real>* sums) {
  using V = typename Layer<Real>::V;
  constexpr int kLanes = Layer<Real>::kLanes;
  const Real count = Real(a.call.channels);
  V mean = {}, dot = {};
  widen(dy, a.call.channels, slope);
  for (int64_t c = a.call.channels; c < a.channels; ++c) slope[c] = 0;
  for (int64_t c = 0; c < a.channels; c += kLanes) {
    const V u = load_raw<V>(v + c) * factor, scale = load_raw<V>(a.scale + c);
    const V dz = load_raw<V>(slope + c) * gelu_slope_for<T, kLanes>(u * scale + load_raw<V>(a.offset + c));
    if (sums) {
      store_raw(sums->scale + c, load_raw<V>(sums->scale + c) + dz * u);
      store_raw(sums->offset + c, load_raw<V>(sums->offset + c) + dz);
    }
    const V du = dz * scale;
    mean += du;
    dot += du * u;
    store_raw(v + c, u);
    store_raw(slope + c, du);
  }
  const Real m = sum_of_lanes<Real>(mean) / count, d = sum_of_lanes<Real>(dot) / count;
  for (int64_t c = 0; c < a.channels; c += kLanes) {
    store_raw(v + c, factor * (load_raw<V>(slope + c) - m - load_raw<V>(v + c) * d));
  }
  for (int64_t c = a.call.channels; c < a.channels; ++c) v[c] = 0;
}

// Adds row i's part of the gradients of kernel and bias; `dv` are its gradients by v, a padded row.
template <int K, class Real>
CPU_FN void correlate(const Layer<Real>& a, const Ring<Real>& x, int64_t i, const Real* dv,
                      Gradients<Real>& sums) {
  using V = typename Layer<Real>::V;
  constexpr int kLanes = Layer<Real>::kLanes;
  constexpr int kColumns = K ? K : 1, kRows = K == 3 ? 3 : 1;  // of the kernel at once, in registers
  const int64_t size = K ? K : a.call.size, channels = a.channels;
  const Real* g = dv + size / 2 * channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    V total = load_raw<V>(sums.bias + c);
    for (int64_t j = 0; j < a.call.width; ++j) total += load_raw<V>(g + j * channels + c);
    store_raw(sums.bias + c, total);
    for (int64_t y = 0; y < size; y += kRows) {
      for (int64_t column = 0; column < size; column += kColumns) {
        const Real* from[kRows];
        V sum[kRows][kColumns];
        Real* to = sums.kernel + (y * size + column) * channels + c;
        for (int k = 0; k < kRows; ++k) {
          from[k] = x.at(i + y + k - size / 2) + column * channels + c;
          for (int l = 0; l < kColumns; ++l) sum[k][l] = load_raw<V>(to + (k * size + l) * channels);
        }
        for (int64_t j = 0; j < a.call.width; ++j) {
          const V grad = load_raw<V>(g + j * channels + c);
          for (int k = 0; k < kRows; ++k) {
            for (int l = 0; l < kColumns; ++l) sum[k][l] += grad * load_raw<V>(from[k] + (j + l) * channels);
          }
        }
        for (int k = 0; k < kRows; ++k) {
          for (int l = 0; l < kColumns; ++l) store_raw(to + (k * size + l) * channels, sum[k][l]);
        }
      }
    }
  }
}

template <class T, int K>
CPU_TARGET void backward_of(const Call& call, int64_t piece) {
  using Real = RealOf<T>;
  constexpr int kLanes = Layer<Real>::kLanes;
  const int64_t image = piece / call.chunks, chunk = piece % call.chunks, reach = call.size / 2;
  const int64_t first = chunk * call.height / call.chunks, last = (chunk + 1) * call.height / call.chunks;
  Layer<Real> a(call);
  load_parameters(a, image);
  const Ring<Real> x(a), dv(a);
  Gradients<Real> sums(a);
  const Scratch<Real> pixels(kPixels * a.channels), slope(a.channels);

  // Rows around the chunk's are differentiated too: its dx needs them. Their sums are other chunks'.
  int64_t loaded = first - 2 * reach;
  for (int64_t i = first - reach; i < last + reach; ++i) {
    if (i < 0 || i >= call.height) {
      zero_row(a, dv, i);
    } else {
      for (; loaded <= i + reach; ++loaded) {
        if (loaded >= i - reach) load_row<T>(a, x, image, loaded);
      }
      const T* dy = static_cast<const T*>(call.dy) + (image * call.height + i) * call.width * call.channels;
      const bool own = i >= first && i < last;
      Real* row = dv.at(i) + reach * a.channels;
      for (int64_t j = 0; j < call.width; j += kPixels) {
        convolve<K, false>(a, x, i, j, pixels.data);
        const Vec<Real, kPixels> factors = center(a, pixels.data);
        for (int64_t p = 0; p < kPixels && j + p < call.width; ++p) {
          Real* v = pixels.data + p * a.channels;
          differentiate(a, dy + (j + p) * call.channels, factors[p], v, slope.data, own ? &sums : nullptr);
          std::memcpy(row + (j + p) * a.channels, v, a.channels * sizeof(Real));
        }
      }
      if (own) correlate<K>(a, x, i, dv.at(i), sums);
    }
    const int64_t done = i - reach;  // the row whose neighbours are all there
    if (done < first || done >= last) continue;
    T* dx = static_cast<T*>(call.dx) + (image * call.height + done) * call.width * call.channels;
    for (int64_t j = 0; j < call.width; j += kPixels) {
      convolve<K, true>(a, dv, done, j, pixels.data);
      for (int64_t p = 0; p < kPixels && j + p < call.width; ++p) {
        const Real* v = pixels.data + p * a.channels;
        T* out = dx + (j + p) * call.channels;
        int64_t c = 0;
        for (; c + kLanes <= call.channels; c += kLanes) {
          Memory<T, Real, kLanes>::store(out + c, Memory<Real, Real, kLanes>::load(v + c));
        }
        for (; c < call.channels; ++c) Memory<T, Real, 1>::store(out + c, v[c]);
      }
    }
  }

  const int64_t rows = 3 + call.size * call.size;
  Real* partial = static_cast<Real*>(call.partial) + piece * rows * call.channels;
  for (int64_t k = 0; k < rows; ++k) {
    std::memcpy(partial + k * call.channels, sums.storage.data + k * a.channels,
                call.channels * sizeof(Real));
  }
}

// Picks the form compiled for this kernel's side, or the one that takes any.
template <class T>
CPU_TARGET void forward_any(const Call& call, int64_t begin, int64_t end) {
  if (call.size == 3) return forward_of<T, 3>(call, begin, end);
  if (call.size == 5) return forward_of<T, 5>(call, begin, end);
  forward_of<T, 0>(call, begin, end);
}
template <class T>
CPU_TARGET void backward_any(const Call& call, int64_t piece) {
  if (call.size == 3) return backward_of<T, 3>(call, piece);
  if (call.size == 5) return backward_of<T, 5>(call, piece);
  backward_of<T, 0>(call, piece);
}

CPU_TARGET void forward(const Call& call, int64_t begin, int64_t end) {
  with_type(call.type, [&](auto t) CPU_TARGET { forward_any<decltype(t)>(call, begin, end); });
}
CPU_TARGET void backward(const Call& call, int64_t piece) {
  with_type(call.type, [&](auto t) CPU_TARGET { backward_any<decltype(t)>(call, piece); });
}
