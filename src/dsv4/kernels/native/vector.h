// The vector layer: sixteen lanes of float32 on every processor, and the same bits on all of them.
// (tiles.h has what only AMX has.)
//
// Sources are compiled once for each instruction set (see CMakeLists.txt); DSV4_ISA names the
// namespace. Vectors are those of GCC and Clang, so a processor without 512-bit registers, or one
// that is not named below, gets correct code from the same lines. Only what the compiler cannot
// find by itself is written with intrinsics.
//
// Numbers: a fused multiply-add rounds once and is the only way to multiply and add; results and
// operands below 2^-126 count as zero (FlushSubnormals), which is what VDPBF16PS does anyway.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define DSV4_PAIRS 1  // products of pairs of bfloat16 in hardware
#else
#define DSV4_PAIRS 0
#endif

namespace DSV4_ISA {
namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x32 __attribute__((vector_size(32)));

constexpr int LANES = 16;

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

inline f32x16 splat(float x) { return x - f32x16{}; }

// a * b + c, rounded once.
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
  f32x16 out;
  for (int i = 0; i < 2; i++) {
    __m256 x = _mm256_loadu_ps((const float*)&a + 8 * i);
    __m256 y = _mm256_loadu_ps((const float*)&b + 8 * i);
    __m256 z = _mm256_loadu_ps((const float*)&c + 8 * i);
    _mm256_storeu_ps((float*)&out + 8 * i, _mm256_fmadd_ps(x, y, z));
  }
  return out;
#elif defined(__aarch64__)
  f32x16 out;
  for (int i = 0; i < 4; i++) {
    float32x4_t x = vld1q_f32((const float*)&a + 4 * i);
    float32x4_t y = vld1q_f32((const float*)&b + 4 * i);
    float32x4_t z = vld1q_f32((const float*)&c + 4 * i);
    vst1q_f32((float*)&out + 4 * i, vfmaq_f32(z, x, y));
  }
  return out;
#else
  for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

// The odd and the even bfloat16 of each pair, as float32.
inline f32x16 odd(u32x16 pairs) { return (f32x16)(pairs & 0xFFFF0000u); }
inline f32x16 even(u32x16 pairs) { return (f32x16)(pairs << 16); }

#if DSV4_PAIRS
// sum + x_odd * w_odd, then + x_even * w_even: the order of the hardware.
inline f32x16 dot_pairs(f32x16 sum, u32x16 x, u32x16 w) {
  return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
}
#endif

// The sum of all lanes: halves are added until one is left.
inline float sum(f32x16 v) {
  f32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  f32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

// The sums of four vectors, each exactly as `sum` gives it.
__attribute__((always_inline)) inline f32x4 four_sums(const f32x16* v) {
  f32x16 a[2];
  for (int i = 0; i < 2; i++) {
    a[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19,
                                   20, 21, 22, 23) +
           __builtin_shufflevector(v[2 * i], v[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26,
                                   27, 28, 29, 30, 31);
  }
  f32x16 b = __builtin_shufflevector(a[0], a[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25,
                                     26, 27) +
             __builtin_shufflevector(a[0], a[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29,
                                     30, 31);
  b = b + __builtin_shufflevector(b, b, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  b = b + __builtin_shufflevector(b, b, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return f32x4{b[0], b[4], b[8], b[12]};
}

// The sums of sixteen vectors, each exactly as `sum` gives it.
inline f32x16 sums(const f32x16* v) {
  f32x16 a[8], b[4], c[2];
  for (int i = 0; i < 8; i++) {
    a[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19,
                                   20, 21, 22, 23) +
           __builtin_shufflevector(v[2 * i], v[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26,
                                   27, 28, 29, 30, 31);
  }
  for (int i = 0; i < 4; i++) {
    b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19,
                                   24, 25, 26, 27) +
           __builtin_shufflevector(a[2 * i], a[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22,
                                   23, 28, 29, 30, 31);
  }
  for (int i = 0; i < 2; i++) {
    c[i] = __builtin_shufflevector(b[2 * i], b[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21,
                                   24, 25, 28, 29) +
           __builtin_shufflevector(b[2 * i], b[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22,
                                   23, 26, 27, 30, 31);
  }
  return __builtin_shufflevector(c[0], c[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28,
                                 30) +
         __builtin_shufflevector(c[0], c[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29,
                                 31);
}

// Numbers of the first eight vectors and of the last eight in turn.
inline void riffle(const u32x16* from, u32x16* to) {
  for (int i = 0; i < 8; i++) {
    to[2 * i] = __builtin_shufflevector(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5,
                                        21, 6, 22, 7, 23);
    to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12,
                                            28, 13, 29, 14, 30, 15, 31);
  }
}

// Rows become columns.
inline void transpose(u32x16* v) {
  u32x16 t[16];
  riffle(v, t), riffle(t, v), riffle(v, t), riffle(t, v);
}

// ---------------------------------------------------------------- bfloat16

inline float widen(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline f32x16 widen(u16x16 x) { return (f32x16)(__builtin_convertvector(x, u32x16) << 16); }

// Nearest, ties to even; a NaN stays one.
inline uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline u16x16 narrow(f32x16 x) {
  u32x16 bits = (u32x16)x;
  u32x16 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  u32x16 is_nan = (u32x16)((bits & 0x7FFFFFFFu) > 0x7F800000u);
  return __builtin_convertvector((is_nan & (bits >> 16 | 0x40)) | (~is_nan & rounded), u16x16);
}

// ---------------------------------------------------------------- floating-point environment

// Subnormal operands and results count as zero while it lives. Afterwards as before.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (1ull << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

}  // namespace
}  // namespace DSV4_ISA
