// Vectors of float32 of the width the target has, on the vector extensions of GCC and Clang.
// Everything is static: the same names are compiled once per target.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;  // SSE2, NEON
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t Int __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Half __attribute__((vector_size(2 * kWidth)));

INLINE Vec splat(float value) { return value - Vec{}; }

INLINE Vec load(const float *p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(float *p, Vec v) { memcpy(p, &v, sizeof v); }

// The first `count` lanes, 0 < count < kWidth; the others are zero and their memory is not touched.
INLINE Vec load_first(const float *p, int64_t count) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
  Vec v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

INLINE void store_first(float *p, Vec v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// A product that no addition may absorb: a sum would depend on what it is added to.
INLINE Vec rounded(Vec v) {
  __asm__("" : "+m"(v));
  return v;
}

// Half precision in memory: bits in, bits out.

INLINE Vec from_bfloat16(Half h) { return (Vec)(__builtin_convertvector(h, Bits) << 16); }

INLINE Half to_bfloat16(Vec v) {
  Bits bits = (Bits)v;
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  Bits is_nan = (Bits)(v != v);
  return __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), Half);
}

INLINE Vec from_float16(Half h) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps((__m128i)h);
#else
  Bits bits = __builtin_convertvector(h, Bits);
  Bits magnitude = (bits & 0x7fff) << 13;
  Vec value = (Vec)magnitude * splat(0x1p112f);  // also right for subnormal numbers
  Bits special = (Bits)((bits & 0x7c00) == 0x7c00);
  Bits filled = magnitude | 0x7f800000;  // infinity and NaN
  return (Vec)((special & filled) | (~special & (Bits)value) | ((bits & 0x8000) << 16));
#endif
}

INLINE Half to_float16(Vec v) {
#if defined(__AVX512F__)
  return (Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  Bits bits = (Bits)v;
  Bits sign = (bits >> 16) & 0x8000;
  Bits magnitude = bits & 0x7fffffff;
  Bits normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Bits subnormal = (Bits)((Vec)magnitude + splat(0.5f)) - (Bits)splat(0.5f);  // the addition rounds
  Bits small = (Bits)(magnitude < 0x38800000);
  Bits large = (Bits)(magnitude >= 0x477ff000);
  Bits is_nan = (Bits)(magnitude > 0x7f800000);
  Bits result = (small & subnormal) | (~small & ~large & normal) | (large & ~is_nan & 0x7c00) | (is_nan & 0x7e00);
  return __builtin_convertvector(result | sign, Half);
#endif
}

INLINE Vec select(Int mask, Vec yes, Vec no) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Vec)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)mask);
#else
  return (Vec)((mask & (Int)yes) | (~mask & (Int)no));
#endif
}

// The larger one; `y` where either is NaN.
INLINE Vec max_of(Vec x, Vec y) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)x, (__m256)y);
#elif defined(__SSE2__)
  return (Vec)_mm_max_ps((__m128)x, (__m128)y);
#else
  return select(x > y, x, y);
#endif
}

// The functions below take several vectors at a time: their chains of dependent multiply-adds hide one another's latency.
constexpr int kGroup = kWidth == 16 ? 4 : 2;
typedef Vec Group[kGroup];
#define EACH for (int i = 0; i < kGroup; ++i)

constexpr double kLog2E = 1.4426950408889634;

// a log2(e) in two parts: rounded to one, it would bias exponentials of large exponents.
struct Rate {
  Vec high, low;
};

// Limits x, and the low part of a rate, where they make no difference but together could overflow.
constexpr float kNear = 1e6f;

INLINE Vec near_of(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_range_ps((__m512)x, _mm512_set1_ps(kNear), 2);  // the smaller magnitude, the sign of x
#else
  return x;
#endif
}

// to = exp(x a), given the rate of a and near = near_of(x). The exponent is cut into a multiple of a power of 2 and a
// rest f on either side of 0, where the result is exactly 1: many steps of nearly no decay would add up a bias. Without
// AVX-512, results below 2^-126 are 0.
INLINE void exp_of(const Vec *x, const Vec *near, const Rate *rate, Group to) {
  Group y, whole, f, p;
  EACH y[i] = x[i] * rate[i].high;
#if defined(__AVX512F__)
  const Vec table = {1.0f,          1.0442737f,  1.0905077f,  1.1387886f, 1.1892071f, 1.2418578f,
                     1.2968396f,    1.3542556f,  1.4142135f,  1.4768262f, 1.5422108f, 1.6104903f,
                     1.6817929f,    1.7562522f,  1.8340081f,  1.9152066f};  // 2^(i/16)
  EACH f[i] = (Vec)_mm512_reduce_ps((__m512)y[i], 4 << 4 | _MM_FROUND_NO_EXC);  // beyond sixteenths; 0 for infinity
  EACH whole[i] = y[i] - f[i];
  EACH f[i] = near[i] * rate[i].low + f[i];
  EACH p[i] = 5.5504e-2f * f[i] + 2.4022651e-1f;
  EACH p[i] = p[i] * f[i] + 6.9314718e-1f;
  EACH to[i] = (Vec)_mm512_permutexvar_ps((__m512i)(whole[i] + 786432.0f), (__m512)table);  // by the sum's low bits
  EACH p[i] = p[i] * (f[i] * to[i]) + to[i];
  EACH to[i] = (Vec)_mm512_scalef_ps((__m512)p[i], (__m512)whole[i]);  // p 2^floor(whole)
#else
  Group t;
  EACH t[i] = y[i] + 12582912.0f;  // rounds to an integer, which the low bits then hold
  EACH whole[i] = t[i] - 12582912.0f;
  EACH f[i] = near[i] * rate[i].low + (y[i] - whole[i]);
  EACH p[i] = 1.53264713e-4f * f[i] + 1.33908060e-3f;
  EACH p[i] = p[i] * f[i] + 9.61850584e-3f;
  EACH p[i] = p[i] * f[i] + 5.55036013e-2f;
  EACH p[i] = p[i] * f[i] + 2.40226477e-1f;
  EACH p[i] = p[i] * f[i] + 6.93147182e-1f;
  EACH p[i] = p[i] * f[i] + 1.0f;
  EACH p[i] = (Vec)(((Bits)p[i] + ((Bits)t[i] << 23)) & (Bits)(y[i] > -126.0f));
  EACH to[i] = select(y[i] < 128.0f, p[i], y[i] * 0x1p127f);  // infinity or NaN
#endif
}

INLINE void exp_of(const Vec *x, const Vec *near, Rate rate, Group to) {
  Rate rates[kGroup];
  EACH rates[i] = rate;
  exp_of(x, near, rates, to);
}

// t = exp(-|z|), from which softplus and its derivative follow.
INLINE void exp_minus_abs(const Group z, Group t) {
  EACH t[i] = (Vec)((Bits)z[i] & 0x7fffffff);
  exp_of(t, t, {splat(-(float)kLog2E), splat(0.0f)}, t);
}

// to = log(1 + exp(z)) = max(z, 0) + log(1 + t); the logarithm to about 1 ulp.
INLINE void softplus_from(const Group z, const Group t, Group to) {
  Group p;
  EACH p[i] = 5.3648184e-3f * t[i] - 3.0065768e-2f;
  EACH p[i] = p[i] * t[i] + 7.9204497e-2f;
  EACH p[i] = p[i] * t[i] - 1.3753799e-1f;
  EACH p[i] = p[i] * t[i] + 1.9153653e-1f;
  EACH p[i] = p[i] * t[i] - 2.4857163e-1f;
  EACH p[i] = p[i] * t[i] + 3.3321323e-1f;
  EACH p[i] = p[i] * t[i] - 4.9999648e-1f;
  EACH p[i] = p[i] * t[i] + 1.0f;
  EACH to[i] = p[i] * t[i] + max_of(splat(0.0f), z[i]);
}

INLINE void sigmoid_from(const Group z, const Group t, Group to) {
  EACH to[i] = select(z[i] < 0.0f, t[i], splat(1.0f)) / (1.0f + t[i]);
}

INLINE float sum_of(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
#endif
}

// Rows of memory of any of the three types. A row holds `count` values; in float32 buffers of this code it is padded
// with zeros to whole vectors.

struct Float32 {
  typedef float Element;
  INLINE Vec read(const float *p) { return load(p); }
  INLINE void put(float *p, Vec v) { store(p, v); }
  INLINE Vec read_first(const float *p, int64_t n) { return load_first(p, n); }
  INLINE void put_first(float *p, Vec v, int64_t n) { store_first(p, v, n); }
};

template <Vec (*From)(Half), Half (*To)(Vec)>
struct Half16 {
  typedef uint16_t Element;
  INLINE Vec read(const uint16_t *p) {
    Half h;
    memcpy(&h, p, sizeof h);
    return From(h);
  }
  INLINE void put(uint16_t *p, Vec v) {
    Half h = To(v);
    memcpy(p, &h, sizeof h);
  }
  INLINE Vec read_first(const uint16_t *p, int64_t n) {
    Half h = {};
    memcpy(&h, p, n * sizeof *p);
    return From(h);
  }
  INLINE void put_first(uint16_t *p, Vec v, int64_t n) {
    Half h = To(v);
    memcpy(p, &h, n * sizeof *p);
  }
};

typedef Half16<from_bfloat16, to_bfloat16> BFloat16;
typedef Half16<from_float16, to_float16> Float16;

template <class T>
INLINE void load_row_as(float *to, const void *from, int64_t offset, int64_t count) {
  const typename T::Element *p = (const typename T::Element *)from + offset;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, T::read(p + i));
  if (i < count) store(to + i, T::read_first(p + i, count - i));
}

template <class T>
INLINE void store_row_as(void *to, int64_t offset, const float *from, int64_t count) {
  typename T::Element *p = (typename T::Element *)to + offset;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) T::put(p + i, load(from + i));
  if (i < count) T::put_first(p + i, load(from + i), count - i);
}

// to[0..count) = from[offset..), converted; fills whole vectors.
INLINE void load_row(float *to, const void *from, int64_t offset, int64_t count, int64_t type) {
  if (type == 0) return load_row_as<Float32>(to, from, offset, count);
  if (type == 1) return load_row_as<BFloat16>(to, from, offset, count);
  load_row_as<Float16>(to, from, offset, count);
}

INLINE void store_row(void *to, int64_t offset, const float *from, int64_t count, int64_t type) {
  if (type == 0) return store_row_as<Float32>(to, offset, from, count);
  if (type == 1) return store_row_as<BFloat16>(to, offset, from, count);
  store_row_as<Float16>(to, offset, from, count);
}

// to[0..count) += from[0..count)
INLINE void add_row(float *to, const float *from, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(to + i) + load(from + i));
  if (i < count) store_first(to + i, load_first(to + i, count - i) + load(from + i), count - i);
}

}  // namespace
