// Functions of sixteen numbers: exponential, the FP8 grid, rows of either type.
#pragma once

#include "vector.h"

namespace DSV4_ISA {
namespace {

inline f32x16 where(i32x16 condition, f32x16 yes, f32x16 no) {
  return (f32x16)(((i32x16)yes & condition) | ((i32x16)no & ~condition));
}

// The larger one; a NaN in either gives `b`.
inline f32x16 max(f32x16 a, f32x16 b) { return where(a > b, a, b); }
inline f32x16 min(f32x16 a, f32x16 b) { return where(a < b, a, b); }
inline f32x16 abs(f32x16 x) { return (f32x16)((u32x16)x & 0x7FFFFFFFu); }

inline float largest(f32x16 v) {
  float most = v[0];
  for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
  return most;
}

// e^x to about one unit in the last place; 0 below -87.3, infinity above 88.7, NaN for NaN.
inline f32x16 exp(f32x16 x) {
  f32x16 bounded = min(max(x, splat(-87.4f)), splat(88.8f));
  const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  f32x16 shifted = fma(bounded, splat(1.44269504f), magic);
  f32x16 n = shifted - magic;
  f32x16 r = fma(n, splat(-0.693359375f), bounded);
  r = fma(n, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  f32x16 y = fma(p, r * r, r) + 1.0f;
  // 2^n in two factors, since n may be 128
  i32x16 whole = (i32x16)shifted - 0x4B400000;
  i32x16 half = whole >> 1;
  y = y * (f32x16)((half + 127) << 23) * (f32x16)((whole - half + 127) << 23);
  y = where(x < splat(-87.3f), f32x16{}, y);
  return where(x != x, x, y);
}

// Sixteen numbers of a row that is bfloat16 or float32, and back.
inline f32x16 get(const void* row, bool is_bf16, int64_t i) {
  if (is_bf16) return widen(load<u16x16>(static_cast<const uint16_t*>(row) + i));
  return load<f32x16>(static_cast<const float*>(row) + i);
}

inline void put(void* row, bool is_bf16, int64_t i, f32x16 x) {
  if (is_bf16) {
    store(static_cast<uint16_t*>(row) + i, narrow(x));
  } else {
    store(static_cast<float*>(row) + i, x);
  }
}

inline float inverse_root(float x) { return 1.0f / __builtin_sqrtf(x); }

// x as it is after rounding to `row`'s type.
inline f32x16 rounded(f32x16 x, bool to_bf16) { return to_bf16 ? widen(narrow(x)) : x; }

// The same for what was just computed, and so is not subnormal.
inline f32x16 result_rounded(f32x16 x, bool to_bf16) {
#if DSV4_PAIRS
  if (to_bf16) return widen((u16x16)_mm512_cvtneps_pbh((__m512)x));
#endif
  return rounded(x, to_bf16);
}

// Numbers 0, 2, 4, ... and 1, 3, 5, ... of the 32 in a and b, and how they lay.
struct Apart {
  f32x16 even, odd;
};

inline Apart apart(f32x16 a, f32x16 b) {
  return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}

inline f32x16 first_half(f32x16 even, f32x16 odd) {
  return __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

inline f32x16 second_half(f32x16 even, f32x16 odd) {
  return __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}

// The smallest power of two >= x, for positive x.
inline float ceil_power(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7FFFFF) & 0x7F800000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Numbers as they are after FP8 with one scale, in place: `vectors` vectors.
inline void to_fp8(f32x16* x, int vectors) {
  f32x16 most = abs(x[0]);
  for (int v = 1; v < vectors; v++) most = max(abs(x[v]), most);
  float amax = largest(most);
  float scale = ceil_power((amax > 1e-4f ? amax : 1e-4f) / 448.0f);
  for (int v = 0; v < vectors; v++) {
    // Adding and taking away 1.5 * 2^23 units in the last place rounds to it.
    f32x16 power = (f32x16)((u32x16)x[v] & 0x7F800000u);
    f32x16 magic = max(power, splat(scale * 0.015625f)) * 1572864.0f;
    x[v] = (x[v] + magic) - magic;
  }
}

}  // namespace
}  // namespace DSV4_ISA
