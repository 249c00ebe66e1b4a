// Stored weights, and how each format becomes vectors of pairs of bfloat16.
//
// A row is read 128 inputs at a time, as four vectors of 32 bfloat16. Which input is where in them
// is the format's choice: whatever unpacks fastest. Activations are arranged alike (`input_at`).
// All values are exact: four significant bits times a power of two fit in a bfloat16.
#pragma once

#include "kernels.h"
#include "tiles.h"
#include "vector.h"

namespace DSV4_ISA {
namespace {

using dsv4::Format;
using dsv4::Weight;

constexpr int STEP = 128;  // inputs read at once

struct Step {
  u32x16 v[4];
};

inline int64_t steps(int64_t inputs) { return (inputs + STEP - 1) / STEP; }

// Asks the memory for the line at an address. (Not inlined, GCC thinks that it does nothing.)
__attribute__((always_inline)) inline void prefetch(const uint8_t* at) {
  __builtin_prefetch(at, 0, 3);
}

inline int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// The input that is word w of vector v of a step.
constexpr int input_at(Format format, int v, int w) {
  switch (format) {
#if DSV4_TILES
    case Format::fp4: return w / 8 * 32 + v / 2 * 16 + w % 8 * 2 + v % 2;
#else
    case Format::fp4: return 4 * w + v;
#endif
    case Format::fp8: return 64 * (v / 2) + w / 8 * 16 + v % 2 * 8 + w % 8;
    default: return 32 * v + w;
  }
}

typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

// 128 bfloat16 as four vectors of pairs in the order of `input_at`.
inline Step in_pairs(const uint16_t* x, Format format) {
  Step out;
  auto* to = reinterpret_cast<uint8_t*>(&out);
  if (DSV4_TILES && format == Format::fp4) {  // of every sixteen words every second one
    for (int part = 0; part < 8; part++) {
      u32x8 both = load<u32x8>(x + 16 * part);
      for (int v = 0; v < 2; v++) {
        uint8_t* at = to + 64 * (part % 2 * 2 + v) + 16 * (part / 2);
        store(at, __builtin_convertvector(both >> 16 * v, u16x8));
      }
    }
  } else if (format == Format::fp4) {  // words 4 w + v of every w
    for (int part = 0; part < 4; part++) {
      u64x8 fours = load<u64x8>(x + 32 * part);
      for (int v = 0; v < 4; v++) {
        store(to + 64 * v + 16 * part, __builtin_convertvector(fours >> 16 * v, u16x8));
      }
    }
  } else if (format == Format::fp8) {  // eights of words change places
    for (int v = 0; v < 4; v++) {
      for (int eight = 0; eight < 4; eight++) {
        std::memcpy(to + 64 * v + 16 * eight, x + input_at(format, v, 8 * eight), 16);
      }
    }
  } else {
    std::memcpy(to, x, 2 * STEP);
  }
  return out;
}

// Adds `shift` to the exponents of bfloat16 values that are not zero.
inline u32x16 scaled(u32x16 pairs, u16x32 shift) {
  u16x32 words = (u16x32)pairs;
  return (u32x16)(words + (shift & (u16x32)((words & 0x7FFF) != 0)));
}

// Every row type has
//   start(weight, row)      begin to read a row
//   step(i)                 inputs 128 i .. 128 i + 127, with their scale
//   rest(i, inputs)         the same where only the first `inputs` of them exist; zeros follow
// and, with PAIRS,
//   half<Kind>(i, which, w) the first or the second half of step i, without their scale
//   scale(i)                which is multiplied with the sum of a step's products: the same as to
//                           multiply the weights by it, as long as nothing over- or underflows
// and with DSV4_TILES,
//   unpack(i, to, pitch)    step i to memory, `pitch` bytes from vector to vector
//   unpack4(i, to, pitch)   the same for steps i .. i + 3

// ---------------------------------------------------------------- FP4
//
// Two codes a byte, a scale for every 32 inputs, taken to be within 2^-125 .. 2^125.

#if DSV4_TILES
struct Fp4Tables {
  uint8_t large[64];       // low bytes of the values times 2^125, but for zero; then high ones
  uint16_t spread[4][32];  // byte 4 i + q to all words of quarter q, above
  constexpr Fp4Tables() : large(), spread() {
    constexpr int MAGNITUDES[8] = {0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0};
    for (int code = 0; code < 16; code++) {
      const int magnitude = MAGNITUDES[code % 8];
      const int bits = magnitude ? magnitude + (125 << 7) + (code / 8 << 15) : 0;
      large[code] = large[code + 32] = bits & 0xFF;
      large[code + 16] = large[code + 48] = (uint8_t)(bits >> 8);
    }
    for (int w = 0; w < 32; w++) {
      for (int i = 0; i < 4; i++) spread[i][w] = (uint16_t)((4 * i + w / 8) << 8 | 0x80);
    }
  }
};
alignas(64) constexpr Fp4Tables FP4_TABLES;
#endif

struct Fp4Row {
  static constexpr int BITS = 4;
  const uint8_t *codes, *scales;
  const uint8_t* last;  // step of the whole weight: nothing may be read behind it

  __attribute__((always_inline)) void fetch(int64_t at) const {
    prefetch(codes + at);
    if (at % 1024 == 0) prefetch(scales + at / 16);
  }

  void start(const Weight& w, int64_t row) {
    codes = w.data + row * (w.inputs / 2);
    scales = w.scale + row * (w.inputs / 32);
    last = w.data + w.rows * (w.inputs / 2) - STEP / 2;
  }

  Step step(int64_t i) const { return unpack(codes + 64 * i, scales + 4 * i); }

  Step rest(int64_t i, int64_t inputs) const {
    uint8_t padded[64] = {}, scale[4] = {};
    std::memcpy(padded, codes + 64 * i, inputs / 2);
    std::memcpy(scale, scales + 4 * i, inputs / 32);
    return unpack(padded, scale);
  }

  static Step unpack(const uint8_t* from, const uint8_t* scale) {
#if DSV4_TILES
    Step out;
    unpack_some(from, _mm_loadu_si32(scale), reinterpret_cast<uint8_t*>(&out), 64, 1);
    return out;
#else
    u16x32 shift;  // each scale for eight words
    for (int block = 0; block < 4; block++) {
      uint16_t one = (uint16_t)((clamp(scale[block], 2, 252) - 127) * 128);
      for (int w = 0; w < 8; w++) shift[8 * block + w] = one;
    }
    u16x32 four = load<u16x32>(from);
    Step out;
    for (int v = 0; v < 4; v++) out.v[v] = scaled(values(four >> 4 * v), shift);
    return out;
#endif
  }

  // The values of the codes in the lowest four bits of each word.
  static u32x16 values(u16x32 code) {
#if DSV4_PAIRS
    return (u32x16)_mm512_permutexvar_epi16((__m512i)code, table());
#else
    u16x32 magnitude = code & 7;
    u16x32 bits = (magnitude << 6) + 0x3F00 - ((u16x32)(magnitude == 1) & 0x40);
    return (u32x16)((bits & (u16x32)(magnitude != 0)) | (code & 8) << 12);
#endif
  }

#if DSV4_PAIRS
  // The sixteen values, twice: the lookup takes five bits.
  static __m512i table() {
    const __m256i once = _mm256_set_epi16(-0x3F40, -0x3F80, -0x3FC0, -0x4000, -0x4040, -0x4080,
                                          -0x4100, -0x8000, 0x40C0, 0x4080, 0x4040, 0x4000, 0x3FC0,
                                          0x3F80, 0x3F00, 0);
    return _mm512_broadcast_i64x4(once);
  }

  __attribute__((always_inline)) f32x16 scale(int64_t i) const {
    const __m512i spread = _mm512_set_epi8(
        3, -1, -1, -1, 3, -1, -1, -1, 3, -1, -1, -1, 3, -1, -1, -1, 2, -1, -1, -1, 2, -1, -1, -1, 2,
        -1, -1, -1, 2, -1, -1, -1, 1, -1, -1, -1, 1, -1, -1, -1, 1, -1, -1, -1, 1, -1, -1, -1, 0,
        -1, -1, -1, 0, -1, -1, -1, 0, -1, -1, -1, 0, -1, -1, -1);
    const __m512i bytes = _mm512_set1_epi32(load<int32_t>(scales + 4 * i));
    return (f32x16)_mm512_srli_epi32(_mm512_shuffle_epi8(bytes, spread), 1);
  }

  template <class Kind>
  __attribute__((always_inline)) void half(int64_t i, int which, u32x16* w) const {
    if constexpr (Kind::VECTORS == 8) {  // a code looks up a float32: one step; words take two
      const __m512 table = _mm512_setr_ps(0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0f, -0.5, -1, -1.5, -2, -3,
                                          -4, -6);
      const uint8_t* at = codes + 64 * i;
      uint8_t padded[STEP / 2 + 3];
      if (at == last) at = static_cast<uint8_t*>(std::memcpy(padded, at, STEP / 2));
      // What is above the four bits does not count, so to begin a byte later is to shift by eight.
      const u32x16 odd = load<u32x16>(at + 2 + which), even = load<u32x16>(at + which);
      for (int v = 0; v < 2; v++) {
        w[2 * v] = (u32x16)_mm512_permutexvar_ps((__m512i)(odd >> 4 * v), table);
        w[2 * v + 1] = (u32x16)_mm512_permutexvar_ps((__m512i)(even >> 4 * v), table);
      }
    } else {
      const u16x32 four = load<u16x32>(codes + 64 * i);
      for (int v = 0; v < 2; v++) w[v] = values(four >> (8 * which + 4 * v));
    }
  }
#endif

#if DSV4_TILES
  // Values are looked up 2^125 times too large. One subtraction from the exponent then brings in
  // the scale, and stops at zero, where zero stays.
  __attribute__((always_inline)) void unpack4(int64_t first, uint8_t* to, int64_t pitch) const {
    const __m128i scale = _mm_loadu_si128((const __m128i*)(scales + 4 * first));
    unpack_some(codes + 64 * first, scale, to, pitch, 4);
  }

  void unpack(int64_t first, uint8_t* to, int64_t pitch) const {
    unpack_some(codes + 64 * first, _mm_loadu_si32(scales + 4 * first), to, pitch, 1);
  }

  __attribute__((always_inline)) static void unpack_some(const uint8_t* from, __m128i scale,
                                                         uint8_t* to, int64_t pitch, int count) {
    const __m512i values = _mm512_load_si512(FP4_TABLES.large);
    scale = _mm_min_epu8(_mm_max_epu8(scale, _mm_set1_epi8(2)), _mm_set1_epi8((char)252));
    const __m512i less = _mm512_broadcast_i32x4(_mm_sub_epi8(_mm_set1_epi8((char)252), scale));
#pragma GCC unroll 4
    for (int i = 0; i < count; i++, to += 4 * pitch) {
      const __m512i spread = _mm512_load_si512(FP4_TABLES.spread[i]);
      const __m512i shift = _mm512_srli_epi16(_mm512_shuffle_epi8(less, spread), 1);
      const __m512i four = _mm512_loadu_si512(from + 64 * i);
      // every byte twice: one looks up the low half of a value, one the high half
      const __m512i low = _mm512_unpacklo_epi8(four, four);
      const __m512i high = _mm512_unpackhi_epi8(four, four);
      const __m512i code[4] = {low, _mm512_srli_epi16(low, 4), high, _mm512_srli_epi16(high, 4)};
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        const __m512i at = _mm512_ternarylogic_epi32(code[v], _mm512_set1_epi8(15),
                                                     _mm512_set1_epi16(0x1000), 0xEA);  // & |
        const __m512i value = _mm512_permutexvar_epi8(at, values);
        _mm512_store_si512(to + v * pitch, _mm512_subs_epu16(value, shift));
      }
    }
  }
#endif
};

// ---------------------------------------------------------------- FP8 E4M3
//
// One scale for 128 x 128, taken to be within 2^-117 .. 2^119.

constexpr uint16_t e4m3(int code) {  // code 0 .. 127 as bfloat16
  int e = code >> 3, m = code & 7;
  if (e > 0) return (uint16_t)((e + 120) << 7 | m << 4);
  return (uint16_t)(m >= 4 ? 120 << 7 | (m - 4) << 5 : m >= 2 ? 119 << 7 | (m - 2) << 6 : m * 118 << 7);
}

struct E4m3Table {  // values times 2^up, but for zero
  uint8_t low[128], high[128];
  constexpr explicit E4m3Table(int up) : low(), high() {
    for (int i = 0; i < 128; i++) {
      const int bits = e4m3(i) + (i > 0 ? up << 7 : 0);
      low[i] = bits & 0xFF, high[i] = (uint8_t)(bits >> 8);
    }
  }
};
alignas(64) constexpr E4m3Table E4M3(0);
alignas(64) constexpr E4m3Table LARGE(119);

struct Fp8Row {
  static constexpr int BITS = 8;

  __attribute__((always_inline)) void fetch(int64_t at) const {
    for (int line = 0; line < 2; line++) prefetch(codes + at + 64 * line);
  }

  const uint8_t *codes, *scales;
  int scale_bytes;

  void start(const Weight& w, int64_t row) {
    codes = w.data + row * w.inputs;
    scales = w.scale + row / 128 * ((w.inputs + 127) / 128) * w.scale_bytes;
    scale_bytes = w.scale_bytes;
  }

  Step step(int64_t i) const { return unpack(codes + 128 * i, exponent(i)); }

  Step rest(int64_t i, int64_t inputs) const {
    uint8_t padded[128] = {};
    std::memcpy(padded, codes + 128 * i, inputs);
    return unpack(padded, exponent(i));
  }

  // The biased exponent of the scale of step i: E8M0, or the same bits of a float32.
  int exponent(int64_t i) const {
    return scale_bytes == 1 ? scales[i] : (int)(load<uint32_t>(scales + 4 * i) >> 23 & 0xFF);
  }

  static Step unpack(const uint8_t* from, int exponent) {
    const uint16_t one = (uint16_t)((clamp(exponent, 10, 246) - 127) * 128);
    u16x32 shift = one - u16x32{};
    Step out = values(from);
    for (int v = 0; v < 4; v++) out.v[v] = scaled(out.v[v], shift);
    return out;
  }

  static Step values(const uint8_t* from) {
    Step out;
    for (int half = 0; half < 2; half++) values(from + 64 * half, out.v + 2 * half);
    return out;
  }

  // Of half a step.
  __attribute__((always_inline)) static void values(const uint8_t* from, u32x16* out) {
#if DSV4_PAIRS
    __m512i code = _mm512_loadu_si512(from);
    __m512i low = lookup(E4M3.low, code), high = lookup(E4M3.high, code);
    high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(-128), 0xF8);  // a | (b & c)
    out[0] = (u32x16)_mm512_unpacklo_epi8(low, high);
    out[1] = (u32x16)_mm512_unpackhi_epi8(low, high);
#else
    for (int part = 0; part < 2; part++) {
      uint8_t bytes[32];
      for (int b = 0; b < 4; b++) std::memcpy(bytes + 8 * b, from + 16 * b + 8 * part, 8);
      out[part] = (u32x16)words(__builtin_convertvector(load<u8x32>(bytes), u16x32));
    }
#endif
  }

#if DSV4_PAIRS
  static __m512i lookup(const uint8_t* table, __m512i code) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), code, _mm512_load_si512(table + 64));
  }

  __attribute__((always_inline)) f32x16 scale(int64_t i) const { return (f32x16)_mm512_set1_epi32(exponent(i) << 23); }

  template <class Kind>
  __attribute__((always_inline)) void half(int64_t i, int which, u32x16* w) const {
    u32x16 pairs[2];
    values(codes + 128 * i + 64 * which, pairs);
    Kind::spread_half(pairs, w);
  }
#endif

#if DSV4_TILES
  // As for FP4: values are looked up 2^119 times too large.
  __attribute__((always_inline)) void unpack(int64_t i, uint8_t* to, int64_t pitch) const {
    const uint32_t one = (uint32_t)(246 - clamp(exponent(i), 10, 246)) * 0x00800080;
    __m512i less;  // from memory: shuffles are what there is too little of
    asm("vpbroadcastd %1, %0" : "=v"(less) : "m"(one));
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const __m512i code = _mm512_loadu_si512(codes + 128 * i + 64 * half);
      const __m512i low = lookup(LARGE.low, code);
      // -0 loses its sign, and so stops at zero too
      const __m512i sign = _mm512_subs_epu8(code, _mm512_set1_epi8(1));
      const __m512i high = _mm512_ternarylogic_epi32(lookup(LARGE.high, code), sign,
                                                     _mm512_set1_epi8(-128), 0xF8);
      uint8_t* at = to + 2 * half * pitch;
      _mm512_store_si512(at, _mm512_subs_epu16(_mm512_unpacklo_epi8(low, high), less));
      _mm512_store_si512(at + pitch, _mm512_subs_epu16(_mm512_unpackhi_epi8(low, high), less));
    }
  }

  __attribute__((always_inline)) void unpack4(int64_t first, uint8_t* to, int64_t pitch) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) unpack(first + i, to + 4 * i * pitch, pitch);
  }
#endif

  static u16x32 words(u16x32 code) {
    u16x32 m = code & 7, normal = ((code & 0x7F) << 4) + (120 << 7);
    u16x32 small = ((u16x32)(m >= 4) & ((m << 5) + (119 << 7))) |
                   ((u16x32)(m < 4) & (u16x32)(m >= 2) & ((m << 6) + (118 << 7))) |
                   ((u16x32)(m == 1) & (118 << 7));
    u16x32 is_small = (u16x32)((code & 0x78) == 0);
    return (is_small & small) | (~is_small & normal) | (code & 0x80) << 8;
  }
};

// ---------------------------------------------------------------- bfloat16

struct Bf16Row {
  static constexpr int BITS = 16;

  __attribute__((always_inline)) void fetch(int64_t at) const {
    for (int line = 0; line < 4; line++) prefetch(values + at + 64 * line);
  }

  const uint8_t* values;

  void start(const Weight& w, int64_t row) { values = w.data + row * w.inputs * 2; }

  Step step(int64_t i) const { return load<Step>(values + 256 * i); }

  Step rest(int64_t i, int64_t inputs) const {
    Step out = {};
    std::memcpy(&out, values + 256 * i, inputs * 2);
    return out;
  }

#if DSV4_PAIRS
  __attribute__((always_inline)) f32x16 scale(int64_t) const { return splat(1.0f); }

  template <class Kind>
  __attribute__((always_inline)) void half(int64_t i, int which, u32x16* w) const {
    u32x16 pairs[2];
    std::memcpy(pairs, values + 256 * i + 128 * which, sizeof pairs);
    Kind::spread_half(pairs, w);
  }
#endif

#if DSV4_TILES
  void unpack(int64_t i, uint8_t* to, int64_t pitch) const {
    for (int v = 0; v < 4; v++) store(to + v * pitch, load<u32x16>(values + 256 * i + 64 * v));
  }

  __attribute__((always_inline)) void unpack4(int64_t first, uint8_t* to, int64_t pitch) const {
    for (int i = 0; i < 4; i++) unpack(first + i, to + 4 * i * pitch, pitch);
  }
#endif
};

// ---------------------------------------------------------------- float32

// Eight vectors of float32 a step, in order: the only row that is not made of pairs.
struct F32Row {
  static constexpr int BITS = 32;

  __attribute__((always_inline)) void fetch(int64_t at) const {
    for (int line = 0; line < 8; line++) prefetch(values + at + 64 * line);
  }

  const uint8_t* values;

  void start(const Weight& w, int64_t row) { values = w.data + row * w.inputs * 4; }
};

// ---------------------------------------------------------------- a step as vectors of one kind

// A step is VECTORS vectors; `add` adds the products of one to a sum. SCALED_LATE: exact products,
// so their sums may be scaled in place of the weights.
struct Pairs {  // bfloat16 activations, where the hardware multiplies them
  static constexpr int VECTORS = 4;
  static constexpr bool SCALED_LATE = true;
#if DSV4_PAIRS
  static f32x16 add(f32x16 sum, u32x16 x, u32x16 w) { return dot_pairs(sum, x, w); }
#endif
  static void spread(const Step& w, u32x16* out) {
    for (int v = 0; v < 4; v++) out[v] = w.v[v];
  }
  __attribute__((always_inline)) static void spread_half(const u32x16* pairs, u32x16* out) { out[0] = pairs[0], out[1] = pairs[1]; }
};

struct Singles {  // float32 activations, or bfloat16 ones widened; sums in the order of Pairs
  static constexpr int VECTORS = 8;
  static constexpr bool SCALED_LATE = false;
  static f32x16 add(f32x16 sum, u32x16 x, u32x16 w) { return fma((f32x16)x, (f32x16)w, sum); }
  static void spread(const Step& w, u32x16* out) {
    for (int half = 0; half < 2; half++) spread_half(w.v + 2 * half, out + 4 * half);
  }
  __attribute__((always_inline)) static void spread_half(const u32x16* pairs, u32x16* out) {
    for (int v = 0; v < 2; v++) {
      out[2 * v] = (u32x16)odd(pairs[v]), out[2 * v + 1] = (u32x16)even(pairs[v]);
    }
  }
};

struct Wide : Singles {  // bfloat16 activations as float32
  static constexpr bool SCALED_LATE = true;
};

template <class Kind, class Row>
inline void read_step(const Row& row, int64_t i, int64_t inputs, u32x16* out) {
  int64_t left = inputs - i * STEP;
  Kind::spread(left >= STEP ? row.step(i) : row.rest(i, left), out);
}

template <>
inline void read_step<Singles, F32Row>(const F32Row& row, int64_t i, int64_t inputs, u32x16* out) {
  const uint8_t* from = row.values + 4 * STEP * i;
  const int64_t left = inputs - i * STEP;
  if (left >= STEP) {
    for (int v = 0; v < 8; v++) out[v] = load<u32x16>(from + 64 * v);
  } else {
    std::memset(out, 0, 4 * STEP);
    std::memcpy(out, from, 4 * left);
  }
}

}  // namespace
}  // namespace DSV4_ISA
