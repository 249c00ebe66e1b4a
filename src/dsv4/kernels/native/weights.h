// Stored weights, and how each format becomes vectors of pairs of bfloat16.
//
// Every reader hands out 64 inputs of one row at a time as two vectors of 32 bfloat16. In which
// order is the format's choice: `arrange` puts activations in the same order, so sums are right.
// All values are exact: four significant bits times a power of two fit in a bfloat16.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace DSV4_ISA {
namespace {

using dsv4::Format;
using dsv4::Weight;

constexpr int STEP = 64;  // inputs in one step of a reader

struct Two {
  u32x16 a, b;
};

inline int64_t steps(int64_t inputs) { return (inputs + STEP - 1) / STEP; }

inline int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// ---------------------------------------------------------------- FP4
//
// Two codes a byte, a scale for every 32 inputs. The first vector has the even inputs of the 64,
// the second the odd ones. Scales outside 2^-125 .. 2^125 are taken as these.

struct Fp4Row {
  const uint8_t *codes, *scales;

  void start(const Weight& w, int64_t row) {
    codes = w.data + row * (w.inputs / 2);
    scales = w.scale + row * (w.inputs / 32);
  }

  Two step(int64_t i) const { return unpack(codes + 32 * i, scales[2 * i], scales[2 * i + 1]); }

  Two rest(int64_t i, int64_t inputs) const {  // inputs is 32
    uint8_t padded[32] = {};
    std::memcpy(padded, codes + 32 * i, inputs / 2);
    return unpack(padded, scales[2 * i], 127);
  }

  static Two unpack(const uint8_t* from, int scale0, int scale1) {
    uint16_t shift0 = (uint16_t)(clamp(scale0, 2, 252) - 127) << 7;
    uint16_t shift1 = (uint16_t)(clamp(scale1, 2, 252) - 127) << 7;
#if DSV4_PAIRS
    // Codes 0 to 15 in bfloat16, for the first 32 inputs and again for the others.
    const __m512i values = _mm512_set_epi16(
        -0x3F40, -0x3F80, -0x3FC0, -0x4000, -0x4040, -0x4080, -0x4100, -0x8000, 0x40C0, 0x4080, 0x4040,
        0x4000, 0x3FC0, 0x3F80, 0x3F00, 0, -0x3F40, -0x3F80, -0x3FC0, -0x4000, -0x4040, -0x4080,
        -0x4100, -0x8000, 0x40C0, 0x4080, 0x4040, 0x4000, 0x3FC0, 0x3F80, 0x3F00, 0);
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const __m512i nibble = _mm512_set1_epi16(15);
    __m512i shift = _mm512_mask_set1_epi16(_mm512_set1_epi16(shift0), 0xFFFF0000u, shift1);
    __m512i table = _mm512_mask_add_epi16(values, 0xFEFEFEFEu, values, shift);
    __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    __m512i low = _mm512_ternarylogic_epi32(bytes, nibble, upper, 0xEA);  // (a & b) | c
    __m512i high = _mm512_or_si512(_mm512_srli_epi16(bytes, 4), upper);
    return {(u32x16)_mm512_permutexvar_epi16(low, table),
            (u32x16)_mm512_permutexvar_epi16(high, table)};
#else
    u16x32 bytes = __builtin_convertvector(load<u8x32>(from), u16x32);
    u16x16 first = shift0 - u16x16{}, second = shift1 - u16x16{};
    u16x32 shift = __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                           13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26,
                                           27, 28, 29, 30, 31);
    return {(u32x16)values(bytes & 15, shift), (u32x16)values(bytes >> 4, shift)};
  }

  static u16x32 values(u16x32 code, u16x32 shift) {
    u16x32 magnitude = code & 7;
    u16x32 bits = (magnitude << 6) + 0x3F00 - (((u16x32)(magnitude == 1)) & 0x40) + shift;
    return (bits & (u16x32)(magnitude != 0)) | (code & 8) << 12;
#endif
  }
};

// ---------------------------------------------------------------- FP8 E4M3
//
// One scale for 128 x 128. Scales outside 2^-117 .. 2^119 are taken as these.

struct Fp8Row {
  const uint8_t *codes, *scales;
  int scale_bytes;

  void start(const Weight& w, int64_t row) {
    codes = w.data + row * w.inputs;
    scales = w.scale + row / 128 * ((w.inputs + 127) / 128) * w.scale_bytes;
    scale_bytes = w.scale_bytes;
  }

  Two step(int64_t i) const { return unpack(codes + 64 * i, scale(i)); }

  Two rest(int64_t i, int64_t inputs) const {
    uint8_t padded[64] = {};
    std::memcpy(padded, codes + 64 * i, inputs);
    return unpack(padded, scale(i));
  }

  // The biased exponent of the scale of step i: E8M0, or the same bits of a float32.
  int scale(int64_t i) const {
    if (scale_bytes == 1) return scales[i / 2];
    return load<uint32_t>(scales + 4 * (i / 2)) >> 23 & 0xFF;
  }

  static Two unpack(const uint8_t* from, int scale) {
    uint16_t shift = (uint16_t)(clamp(scale, 10, 246) - 7) << 7;
    return {values(from, shift), values(from + 32, shift)};
  }

  // `shift`: what to add to the exponent field of a code to get that of a bfloat16.
  static u32x16 values(const uint8_t* from, uint16_t shift) {
    u16x32 code = __builtin_convertvector(load<u8x32>(from), u16x32);
    u16x32 bits = ((code & 0x7F) << 4) + shift;
#if DSV4_PAIRS
    // Below 2^-6 the code's mantissa m stands for m * 2^-9.
    const __m128i small = _mm_set_epi16(0x0160, 0x0140, 0x0120, 0x0100, 0xC0, 0x80, 0, 0);
    __m512i table = _mm512_castsi128_si512(
        _mm_mask_add_epi16(_mm_setzero_si128(), 0xFE, small, _mm_set1_epi16((int16_t)(shift - 0x100))));
    __mmask32 is_small = _mm512_testn_epi16_mask((__m512i)code, _mm512_set1_epi16(0x78));
    bits = (u16x32)_mm512_mask_permutexvar_epi16((__m512i)bits, is_small,
                                                 (__m512i)(code & 7), table);
#else
    u16x32 m = code & 7, is_small = (u16x32)((code & 0x78) == 0);
    u16x32 four = (u16x32)(m >= 4), two = ~four & (u16x32)(m >= 2), one = (u16x32)(m == 1);
    u16x32 least = (uint16_t)(shift - 0x100) - u16x32{};
    u16x32 small =
        (four & ((m << 5) + least + 0x80)) | (two & ((m << 6) + least)) | (one & least);
    bits = (is_small & small) | (~is_small & bits);
#endif
    return (u32x16)(bits | (code & 0x80) << 8);
  }
};

// ---------------------------------------------------------------- bfloat16

struct Bf16Row {
  const uint8_t* values;

  void start(const Weight& w, int64_t row) { values = w.data + row * w.inputs * 2; }

  Two step(int64_t i) const {
    return {load<u32x16>(values + 128 * i), load<u32x16>(values + 128 * i + 64)};
  }

  Two rest(int64_t i, int64_t inputs) const {
    uint8_t padded[128] = {};
    std::memcpy(padded, values + 128 * i, inputs * 2);
    return {load<u32x16>(padded), load<u32x16>(padded + 64)};
  }
};

// ---------------------------------------------------------------- float32

// Four vectors of float32 a step, in order: the only row that is not made of pairs.
struct F32Row {
  const uint8_t* values;

  void start(const Weight& w, int64_t row) { values = w.data + row * w.inputs * 4; }
};

// ---------------------------------------------------------------- a step as vectors of one kind

// What sums are made of: VECTORS vectors of a step, each added to a sum by `add`.
struct Pairs {  // bfloat16 activations, where the hardware multiplies them
  static constexpr int VECTORS = 2;
#if DSV4_PAIRS
  static f32x16 add(f32x16 sum, u32x16 x, u32x16 w) { return dot_pairs(sum, x, w); }
#endif
  static void spread(Two w, u32x16* out) { out[0] = w.a, out[1] = w.b; }
};

struct Singles {  // float32 activations, or bfloat16 ones widened; the same order of sums as Pairs
  static constexpr int VECTORS = 4;
  static f32x16 add(f32x16 sum, u32x16 x, u32x16 w) { return fma((f32x16)x, (f32x16)w, sum); }
  static void spread(Two w, u32x16* out) {
    out[0] = (u32x16)odd(w.a), out[1] = (u32x16)even(w.a);
    out[2] = (u32x16)odd(w.b), out[3] = (u32x16)even(w.b);
  }
};

template <class Kind, class Row>
inline void read_step(const Row& row, int64_t i, int64_t inputs, u32x16* out) {
  int64_t left = inputs - i * STEP;
  Kind::spread(left >= STEP ? row.step(i) : row.rest(i, left), out);
}

template <>
inline void read_step<Singles, F32Row>(const F32Row& row, int64_t i, int64_t inputs, u32x16* out) {
  int64_t left = inputs - i * STEP;
  if (left < STEP) std::memset(out, 0, 256);
  std::memcpy(out, row.values + 256 * i, left < STEP ? 4 * left : 256);
}

}  // namespace
}  // namespace DSV4_ISA
