// Vectors as wide as those of the instruction set that this is included for: ECANET_ISA is its name, ECANET_BYTES
// the width.
//
// Only GCC's and Clang's vector extensions, so the same lines become SSE2, AVX2, AVX-512 or NEON.

#define ECANET_INLINE static inline __attribute__((always_inline))

namespace ecanet {
namespace ECANET_ISA {

template <class A>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(ECANET_BYTES)));
  typedef int32_t I __attribute__((vector_size(ECANET_BYTES)));
  typedef uint32_t U __attribute__((vector_size(ECANET_BYTES)));
  typedef uint16_t H __attribute__((vector_size(ECANET_BYTES / 2)));
  static constexpr int64_t width = ECANET_BYTES / 4;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(ECANET_BYTES)));
  typedef int64_t I __attribute__((vector_size(ECANET_BYTES)));
  static constexpr int64_t width = ECANET_BYTES / 8;
};

template <class A>
using Vec = typename Simd<A>::V;
template <class A>
using Int = typename Simd<A>::I;

template <class To, class From>
ECANET_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A>
ECANET_INLINE Vec<A> splat(A value) {
  Vec<A> v;
  for (int64_t i = 0; i < Simd<A>::width; ++i) v[i] = value;  // Vec{} + value would lose the sign of -0
  return v;
}

// The sum of the lanes, by halves.
template <class A, int64_t bytes = ECANET_BYTES>
struct Lanes {
  typedef A V __attribute__((vector_size(bytes)));
  typedef A Half __attribute__((vector_size(bytes / 2)));
  static inline __attribute__((always_inline)) A sum(V v) {
    Half low, high;
    memcpy(&low, &v, sizeof(low));
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    if constexpr (bytes / 2 == sizeof(A))
      return v[0] + v[1];
    else
      return Lanes<A, bytes / 2>::sum(low + high);
  }
};

template <class A>
ECANET_INLINE A sum(Vec<A> v) {
  return Lanes<A>::sum(v);
}

// a0 b0 a1 b1 ... of the lower halves of a and b plus the same of the upper halves.
template <class A, size_t... i>
ECANET_INLINE Vec<A> add_halves(Vec<A> a, Vec<A> b, std::index_sequence<i...>) {
  constexpr size_t W = sizeof...(i);
  return __builtin_shufflevector(a, b, (i % 2 * W + i / 2)...) +
         __builtin_shufflevector(a, b, (i % 2 * W + i / 2 + W / 2)...);
}

// Lane i is sum(v[i]), added up in the same order; v is overwritten.
template <class A>
ECANET_INLINE Vec<A> sums(Vec<A>* v) {
  constexpr int64_t W = Simd<A>::width;
#pragma GCC unroll 8
  for (int64_t half = W / 2; half >= 1; half /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) v[i] = add_halves<A>(v[i], v[i + half], std::make_index_sequence<W>());
  return v[0];
}

// The last `count` lanes of v; 0 in the others.
template <class A>
ECANET_INLINE Vec<A> keep_last(Vec<A> v, int64_t count) {
  Int<A> lane;
  for (int64_t i = 0; i < Simd<A>::width; ++i) lane[i] = i;
  using Index = std::remove_reference_t<decltype(lane[0])>;
  return lane >= Index(Simd<A>::width - count) ? v : Vec<A>{};
}

// The first `count` lanes of v; 0 in the others.
template <class A>
ECANET_INLINE Vec<A> keep_first(Vec<A> v, int64_t count) {
  Int<A> lane;
  for (int64_t i = 0; i < Simd<A>::width; ++i) lane[i] = i;
  using Index = std::remove_reference_t<decltype(lane[0])>;
  return lane < Index(count) ? v : Vec<A>{};
}

// Load one vector of any type, compute in Acc; store rounds to nearest even.
template <class A, class = std::enable_if_t<std::is_floating_point_v<A>>>
ECANET_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

template <class A, class = std::enable_if_t<std::is_floating_point_v<A>>>
ECANET_INLINE void store(A* p, Vec<A> v) {
  memcpy(p, &v, sizeof(v));
}

ECANET_INLINE Int<float> load_bits(const void* p) {
  Simd<float>::H h;
  memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, Int<float>);
}

ECANET_INLINE void store_bits(void* p, Int<float> bits) {
  const Simd<float>::H h = __builtin_convertvector(bits, Simd<float>::H);
  memcpy(p, &h, sizeof(h));
}

ECANET_INLINE Vec<float> load(const bfloat16* p) { return bits_as<Vec<float>>(load_bits(p) << 16); }

ECANET_INLINE void store(bfloat16* p, Vec<float> v) {
  const auto u = bits_as<Simd<float>::U>(v);
  const auto high = u >> 16;
  const auto rounded = (u + 0x7fff + (high & 1)) >> 16;
  store_bits(p, bits_as<Int<float>>((u & 0x7fffffff) > 0x7f800000 ? (high | 0x40) : rounded));  // a NaN stays one
}

ECANET_INLINE Vec<float> load(const float16* p) {
  const Int<float> h = load_bits(p);
  const Int<float> magnitude = h & 0x7fff;
  const Vec<float> finite = bits_as<Vec<float>>(magnitude << 13) * 0x1p112f;  // exponent bias 15 to 127
  const Int<float> infinite = (magnitude << 13) | 0x7f800000;
  const Int<float> bits = magnitude >= 0x7c00 ? infinite : bits_as<Int<float>>(finite);
  return bits_as<Vec<float>>(bits | ((h & 0x8000) << 16));
}

ECANET_INLINE void store(float16* p, Vec<float> v) {
  const Int<float> u = bits_as<Int<float>>(v);
  const Int<float> magnitude = u & 0x7fffffff;
  const Int<float> normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 1/2 moves the bits of a subnormal half to the end of the fraction, rounded.
  const Int<float> subnormal = bits_as<Int<float>>(bits_as<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
  const Int<float> infinite = magnitude > 0x7f800000 ? Int<float>{} + 0x7e00 : Int<float>{} + 0x7c00;
  Int<float> h = magnitude < 0x38800000 ? subnormal : normal;
  h = magnitude >= 0x47800000 ? infinite : h;
  store_bits(p, h | ((u >> 16) & 0x8000));
}

// Whether lines of `line_size` elements from p on can be streamed: whole, aligned vectors of a type without rounding.
template <class T>
ECANET_INLINE bool can_stream([[maybe_unused]] const T* p, [[maybe_unused]] int64_t line_size) {
#ifdef ECANET_X86
  return std::is_floating_point_v<T> && reinterpret_cast<uintptr_t>(p) % ECANET_BYTES == 0 &&
         line_size % Simd<Acc<T>>::width == 0;
#else
  return false;
#endif
}

// A store past the caches, without reading what is overwritten.
template <bool streams, class T>
ECANET_INLINE void write(T* p, Vec<Acc<T>> v) {
#ifdef ECANET_X86
  if constexpr (streams && std::is_floating_point_v<T>) {
#if ECANET_BYTES == 64
    _mm512_stream_ps(reinterpret_cast<float*>(p), bits_as<__m512>(v));
#elif ECANET_BYTES == 32
    _mm256_stream_ps(reinterpret_cast<float*>(p), bits_as<__m256>(v));
#else
    _mm_stream_ps(reinterpret_cast<float*>(p), bits_as<__m128>(v));
#endif
    return;
  }
#endif
  store(p, v);
}

template <bool streams>
ECANET_INLINE void end_of_writes() {
#ifdef ECANET_X86
  if constexpr (streams) _mm_sfence();
#endif
}

// The first `count` elements of a vector; the others are 0.
template <class T>
ECANET_INLINE Vec<Acc<T>> load_some(const T* p, int64_t count) {
  T buffer[Simd<Acc<T>>::width] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
ECANET_INLINE void store_some(T* p, Vec<Acc<T>> v, int64_t count) {
  T buffer[Simd<Acc<T>>::width];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

// e^x within 2 units in the last place, overflowing to infinity and underflowing to 0; NaN stays NaN.
ECANET_INLINE Vec<float> exp(Vec<float> x) {
  x = x > 89.0f ? splat(89.0f) : x;
  x = x < -104.0f ? splat(-104.0f) : x;
  const Vec<float> k = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // x / ln 2, rounded by 1.5 * 2^23
  const Vec<float> r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  Vec<float> e = splat(1.9875691500e-4f);
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * r * r + r + 1.0f;
  const Int<float> power = bits_as<Int<float>>(k + 12582912.0f) - 0x4b400000;
  const Int<float> half = power >> 1;  // two factors, because 2^128 is not a float
  return e * bits_as<Vec<float>>((half + 127) << 23) * bits_as<Vec<float>>((power - half + 127) << 23);
}

ECANET_INLINE Vec<double> exp(Vec<double> x) {
  x = x > 710.0 ? splat(710.0) : x;
  x = x < -746.0 ? splat(-746.0) : x;
  const Vec<double> k = (x * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0;
  const Vec<double> r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
  Vec<double> e = splat(1.0 / 6227020800.0);  // Taylor up to r^13 / 13!, |r| < 0.35
  e = e * r + 1.0 / 479001600.0;
  e = e * r + 1.0 / 39916800.0;
  e = e * r + 1.0 / 3628800.0;
  e = e * r + 1.0 / 362880.0;
  e = e * r + 1.0 / 40320.0;
  e = e * r + 1.0 / 5040.0;
  e = e * r + 1.0 / 720.0;
  e = e * r + 1.0 / 120.0;
  e = e * r + 1.0 / 24.0;
  e = e * r + 1.0 / 6.0;
  e = e * r + 0.5;
  e = e * r * r + r + 1.0;
  const Int<double> power = bits_as<Int<double>>(k + 6755399441055744.0) - 0x4338000000000000;
  const Int<double> half = power >> 1;
  return e * bits_as<Vec<double>>((half + 1023) << 52) * bits_as<Vec<double>>((power - half + 1023) << 52);
}

template <class A>
ECANET_INLINE Vec<A> sigmoid(Vec<A> x) {
  return A(1) / (A(1) + exp(-x));
}

// Comparisons are written so that a NaN comes out as a NaN, as in torch.
template <Act act, class A>
ECANET_INLINE Vec<A> activate(Vec<A> x) {
  const Vec<A> zero = {};
  if constexpr (act == Act::relu) return x < zero ? zero : x;
  if constexpr (act == Act::relu6) {
    x = x < zero ? zero : x;
    return x > A(6) ? splat(A(6)) : x;
  }
  if constexpr (act == Act::silu) return x / (A(1) + exp(-x));
  if constexpr (act == Act::hardswish) {
    Vec<A> gate = x + A(3);
    gate = gate < zero ? zero : gate;
    gate = gate > A(6) ? splat(A(6)) : gate;
    return x * gate / A(6);
  }
  return x;
}

// grad * act'(...); `from` is the output for ReLU and ReLU6, the input for SiLU and Hardswish.
template <Act act, class A>
ECANET_INLINE Vec<A> activate_backward(Vec<A> grad, Vec<A> from) {
  const Vec<A> zero = {};
  if constexpr (act == Act::relu) return from <= zero ? zero : grad;
  if constexpr (act == Act::relu6) {
    grad = from <= zero ? zero : grad;
    return from >= A(6) ? zero : grad;
  }
  if constexpr (act == Act::silu) {
    const Vec<A> gate = sigmoid<A>(from);
    return grad * gate * (A(1) + from * (A(1) - gate));
  }
  if constexpr (act == Act::hardswish) {
    const Vec<A> inside = grad * (from / A(3) + A(0.5));
    grad = from <= A(-3) ? zero : grad;
    return (from < A(3)) & (from > A(-3)) ? inside : grad;
  }
  return grad;
}

}  // namespace ECANET_ISA
}  // namespace ecanet
