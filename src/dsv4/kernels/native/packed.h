// Products of rows of numbers, and the scales of packed rows.
#pragma once

#include "functions.h"
#include "weights.h"

namespace DSV4_ISA {
namespace {

// Adds the products of two vectors of float32, or of pairs of bfloat16, to sixteen sums.
template <bool BF16>
inline f32x16 add_products(f32x16 sum, u32x16 a, u32x16 b) {
  if constexpr (BF16) {
#if DSV4_PAIRS
    return dot_pairs(sum, a, b);
#else
    return fma(even(a), even(b), fma(odd(a), odd(b), sum));
#endif
  }
  return fma((f32x16)a, (f32x16)b, sum);
}

// Four rows from `first` on; where there are fewer, the last one again.
struct FourRows {
  const char* x[4];
  FourRows(const char* first, int64_t bytes, int64_t count) {
    for (int64_t h = 0; h < 4; h++) x[h] = first + (h < count ? h : count - 1) * bytes;
  }
};

// Adds the scale 2^(byte - 127) to values that are not zero.
inline u16x32 with_scale(u16x32 values, int byte) {
  const uint16_t shift = (uint16_t)((clamp(byte, 2, 252) - 127) * 128);
  return (u16x32)scaled((u32x16)values, shift - u16x32{});
}

}  // namespace
}  // namespace DSV4_ISA
