// The tiles of AMX: 16 rows of 64 bytes, and the sums of products of two of them.
//
// dot_tiles<C, A, B> adds to C [16, columns] the products of A [16 rows, 32 bfloat16] with B, whose
// row i has inputs 2 i and 2 i + 1 of each column side by side. An element of C depends on its row
// and its column only. The instruction sums the sixteen products of even inputs in order, from zero,
// each multiplied and added with one rounding; likewise those of odd inputs; adds the two, and
// adds that to C. Subnormal operands and results count as zero.
#pragma once

#include "vector.h"

#ifndef DSV4_TILES
#define DSV4_TILES 0
#endif

#if DSV4_TILES
namespace DSV4_ISA {
namespace {

constexpr int64_t TILE_BYTES = 1024;

// Tiles 0 .. 3 are C, 4 and 5 are A, 6 and 7 are B. While it lives, the thread has tiles;
// afterwards it has none, and a change of thread need not save them.
class Tiles {
 public:
  // A tile of B has so many columns, one of A so many rows.
  explicit Tiles(int columns, int rows = 16) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; t++) {
      shape.row_bytes[t] = (uint16_t)(t == 4 || t == 5 ? 64 : 4 * columns);
      shape.rows[t] = (uint8_t)(t >= 6 ? 16 : rows);
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease" : : : "memory"); }
  Tiles(const Tiles&) = delete;
};

template <int T>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}

template <int T>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}

template <int C, int A, int B>
inline void dot_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// Both rounded to bfloat16, side by side.
inline u32x16 narrow_pairs(f32x16 even, f32x16 odd) {
  const auto low = (__m256i)_mm512_cvtneps_pbh((__m512)even);
  const auto high = (__m256i)_mm512_cvtneps_pbh((__m512)odd);
  const __m512i words = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
  return (u32x16)_mm512_or_si512(words, _mm512_cvtepu16_epi32(low));
}

}  // namespace
}  // namespace DSV4_ISA
#endif
