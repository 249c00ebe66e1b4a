// How rows of a cache are stored: as they are, or packed (kernels/rows.py says how).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dsv4 {

struct StoredAs {
  enum Packed : int { plain, entry, key };
  Packed packed;
  int64_t width, kept, bytes;  // kept: channels at the end of an entry that stay bfloat16
};

inline float number(const uint8_t* row, bool is_bf16, int64_t i) {
  uint32_t bits = 0;
  if (is_bf16) {
    uint16_t half;
    std::memcpy(&half, row + 2 * i, 2);
    bits = (uint32_t)half << 16;
  } else {
    std::memcpy(&bits, row + 4 * i, 4);
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// The byte of the least power of two that brings `count` numbers to `largest` and below, and that
// power's inverse; 255 and NaN if not all are finite.
inline uint8_t scale_for(const float* x, int count, float least, float largest, float* inverse) {
  float most = least;
  bool finite = true;
  for (int i = 0; i < count; i++) {
    finite = finite && std::isfinite(x[i]);
    most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
  }
  *inverse = NAN;
  if (!finite) return 255;
  const float ratio = most / largest;
  uint32_t bits;
  std::memcpy(&bits, &ratio, 4);
  const uint32_t exponent = (bits + 0x007FFFFF) >> 23;
  *inverse = std::ldexp(1.0f, 127 - (int)exponent);
  return (uint8_t)exponent;
}

// To the nearest code of E4M3, the even one of two; |x| <= 448 or NaN.
inline uint8_t e4m3_code(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint8_t sign = (uint8_t)(bits >> 24 & 0x80);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return sign | 0x7F;
  if (bits < 0x3C800000) {  // below 2^-6, where codes are steps of 2^-9
    float size;
    std::memcpy(&size, &bits, 4);
    return sign | (uint8_t)std::nearbyint(size * 512.0f);
  }
  bits += 0x7FFFF + (bits >> 20 & 1);
  return sign | (uint8_t)((bits >> 20) - (120 << 3));
}

// To the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with its sign, the even code of two; |x| <= 6.
inline uint8_t e2m1_code(float x) {
  const float size = std::fabs(x);
  const int code = size <= 2.0f ? (int)std::nearbyint(size * 2) :
                   size <= 4.0f ? 2 + (int)std::nearbyint(size) :
                                  4 + (int)std::nearbyint(size / 2);
  return (uint8_t)(code + (std::signbit(x) ? 8 : 0));
}

// One row of numbers as `form` says; what is left of its bytes is 0.
inline void store_row(const uint8_t* row, bool is_bf16, const StoredAs& form, uint8_t* to) {
  float x[64], inverse;
  if (form.packed == StoredAs::plain) {
    std::memcpy(to, row, form.bytes);
  } else if (form.packed == StoredAs::key) {
    uint8_t* scales = to + form.width / 2;
    for (int64_t at = 0; at < form.width; at += 32) {
      for (int i = 0; i < 32; i++) x[i] = number(row, is_bf16, at + i);
      scales[at / 32] = scale_for(x, 32, std::ldexp(6.0f, -126), 6.0f, &inverse);
      for (int i = 0; i < 32; i += 2) {
        const bool there = !std::isnan(inverse);
        const int low = there ? e2m1_code(x[i] * inverse) : 0;
        const int high = there ? e2m1_code(x[i + 1] * inverse) : 0;
        to[(at + i) / 2] = (uint8_t)(low | high << 4);
      }
    }
  } else {
    const int64_t plain = form.width - form.kept;
    uint8_t* scales = to + plain + 2 * form.kept;
    std::memset(scales, 0, to + form.bytes - scales);
    for (int64_t at = 0; at < plain; at += 64) {
      for (int i = 0; i < 64; i++) x[i] = number(row, is_bf16, at + i);
      scales[at / 64] = scale_for(x, 64, 1e-4f, 448.0f, &inverse);
      for (int i = 0; i < 64; i++) to[at + i] = e4m3_code(x[i] * inverse);
    }
    std::memcpy(to + plain, row + plain * 2, 2 * form.kept);
  }
}

}  // namespace dsv4
