// The keys of attention: where a query's entries are, and packed ones as numbers.
#pragma once

#include <algorithm>

#include "packed.h"

namespace DSV4_ISA {
namespace {

using dsv4::Attention;
using dsv4::TILE;

constexpr int64_t AHEAD = 2 * TILE;  // keys that the memory is asked for in advance

// Sums of 32 channels.
struct Sums {
  f32x16 a, b;
};

// The sums in the order of channels, where words of two rows were put side by side as UNPCKLWD and
// UNPCKHWD do it.
inline Sums in_order(Sums s) {
  return {__builtin_shufflevector(s.a, s.b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
          __builtin_shufflevector(s.a, s.b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30,
                                  31)};
}

// ---------------------------------------------------------------- packed rows

// An entry of `width` channels as bfloat16; see Attention for `kept`.
inline void unpack_entry(const char* from, int64_t width, int64_t kept, uint16_t* to) {
  const int64_t plain = width - kept;
  const char* scales = from + plain + 2 * kept;
#if DSV4_PAIRS
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // what unpacking undoes
  for (int64_t i = 0; i < plain; i += 64) {
    __m512i code = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from + i));
    __m512i low = Fp8Row::lookup(E4M3.low, code), high = Fp8Row::lookup(E4M3.high, code);
    high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(-128), 0xF8);  // a | (b & c)
    store(to + i, with_scale((u16x32)_mm512_unpacklo_epi8(low, high), (uint8_t)scales[i / 64]));
    store(to + i + 32, with_scale((u16x32)_mm512_unpackhi_epi8(low, high), (uint8_t)scales[i / 64]));
  }
#else
  for (int64_t i = 0; i < plain; i += 32) {
    u16x32 code = __builtin_convertvector(load<u8x32>(from + i), u16x32);
    store(to + i, with_scale(Fp8Row::words(code), (uint8_t)scales[i / 64]));
  }
#endif
  std::memcpy(to + plain, from + plain, 2 * kept);
}

// ---------------------------------------------------------------- keys

// The keys of a query: `near` of the window, then rows.
struct Keys {
  const Attention* job = nullptr;
  int64_t query = 0, near = 0, count = 0;
  const int64_t* chosen = nullptr;  // which rows; null: all up to the query

  Keys() = default;

  // `space`: for k numbers.
  Keys(const Attention& job, int64_t query, int64_t* space)
      : job(&job), query(query), chosen(job.chosen == nullptr ? nullptr : space) {
    near = count = std::min(job.earlier + query + 1, job.width);
    if (job.rows.pieces == nullptr) return;
    if (chosen == nullptr) count += (job.start + query + 1) / job.ratio;
    for (int64_t i = 0; chosen != nullptr && i < job.k; i++) {
      const int64_t row = job.chosen[query * job.k + i];
      if (row >= 0) space[count++ - near] = row;
    }
  }

  const char* row(int64_t i) const {
    return job->rows.row(chosen == nullptr ? i - near : chosen[i - near]);
  }

  // Where keys first .. first + TILE - 1 lie; after the last one, it again. Says how many are not
  // packed: they come first.
  int64_t find(int64_t first, const char** at) const {
    const int64_t bytes = job->width_of_head * (job->is_bf16 ? 2 : 4);
    const char* window = static_cast<const char*>(job->window);
    for (int64_t i = first; i < first + TILE; i++, at++) {
      if (i >= count) {
        *at = at[-1];
      } else {
        *at = i < near ? window + (job->earlier + query + 1 - near + i) * bytes : row(i);
      }
    }
    if (job->kept == 0 || near >= std::min(count, first + TILE)) return TILE;
    return std::max(near - first, int64_t{0});
  }

  // The same as numbers: those that are packed are unpacked to `room`.
  void get(int64_t first, uint16_t* room, const char** keys) const {
    auto* to = reinterpret_cast<char*>(room);
    unpack(first, find(first, keys), to, 2 * job->width_of_head, keys);
  }

  void unpack(int64_t first, int64_t plain, char* room, int64_t pitch, const char** keys) const {
    for (int64_t i = plain; i < TILE; i++) {
      auto* to = reinterpret_cast<uint16_t*>(room + i * pitch);
      if (first + i < count) unpack_entry(keys[i], job->width_of_head, job->kept, to);
      keys[i] = first + i < count ? room + i * pitch : keys[i - 1];
    }
  }

  // Asks the memory for rows, which lie anywhere. (Not inlined, GCC thinks that it does nothing.)
  __attribute__((always_inline)) void fetch(int64_t first) const {
    for (int64_t i = std::max(first, near); i < std::min(first + TILE, count); i++) {
      const auto* at = reinterpret_cast<const uint8_t*>(row(i));
      for (int64_t byte = 0; byte < job->rows.bytes; byte += 64) prefetch(at + byte);
    }
  }
};

}  // namespace
}  // namespace DSV4_ISA
