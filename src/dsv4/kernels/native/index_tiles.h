// Scores of the indexer with tiles, for bfloat16 and 128 channels.
//
// A is sixteen keys, B sixteen heads: a lane is a head. What heads say of a key is added by groups
// of sixteen, lane by lane, and at last across lanes. Channels are in the order in which packed keys
// are unpacked; keys that are numbers are brought into it, so packing changes no bit.
#pragma once

#include <algorithm>

#include "functions.h"
#include "kernels.h"
#include "tiles.h"
#include "weights.h"

namespace DSV4_ISA {
namespace {

using dsv4::IndexTopk;

// (Of few heads most of a tile would be empty.)
inline bool with_tiles(const IndexTopk& job) {
  return DSV4_TILES && job.is_bf16 && job.width == STEP && job.heads >= 16;
}

#if DSV4_TILES
// result_rounded() in half the time. A NaN stays one if its lower half is zero.
inline f32x16 to_bf16(f32x16 x) {
  const u32x16 bits = (u32x16)x;
  return (f32x16)((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u);
}

class TiledIndex {
 public:
  TiledIndex(const IndexTopk& job, int64_t first, int64_t queries, uint8_t* space)
      : job(job), groups((job.heads + 15) / 16), shape(16), q(space),
        weights(reinterpret_cast<float*>(q + queries * groups * PARTS * TILE_BYTES)) {
    const auto* from = static_cast<const uint16_t*>(job.q) + first * job.heads * STEP;
    const auto* weight = static_cast<const uint16_t*>(job.weights) + first * job.heads;
    for (int64_t i = 0; i < queries * groups; i++) {
      const int64_t head = i / groups * job.heads + i % groups * 16, some = heads_of(i % groups);
      Step rows[16] = {};
      for (int64_t h = 0; h < 16; h++) {
        weights[16 * i + h] = h < some ? widen(weight[head + h]) : 0.0f;
        if (h < some) rows[h] = in_pairs(from + (head + h) * STEP, Format::fp4);
      }
      for (int64_t part = 0; part < PARTS; part++) {
        u32x16 v[16];
        for (int h = 0; h < 16; h++) v[h] = rows[h].v[part];
        transpose(v);
        for (int w = 0; w < 16; w++) store(q + (i * PARTS + part) * TILE_BYTES + 64 * w, v[w]);
      }
    }
  }

  // Keys 16 * group, ... of those that are scored next.
  void bring(const char* const* from, int64_t group) {
    uint8_t* to = keys + group * PARTS * TILE_BYTES;
    for (int64_t i = 0; i < 16; i++, to += 64) {
      const auto* key = reinterpret_cast<const uint8_t*>(from[i]);
      if (job.packed) {
        Fp4Row::unpack_some(key, _mm_loadu_si32(key + STEP / 2), to, TILE_BYTES, 1);
      } else {
        const Step step = in_pairs(reinterpret_cast<const uint16_t*>(key), Format::fp4);
        for (int part = 0; part < PARTS; part++) store(to + part * TILE_BYTES, step.v[part]);
      }
    }
  }

  // What a query's heads say of 64 keys. What is multiplied and what was before take turns.
  void score(int64_t query, f32x16* totals) {
    Rest rest = {};
    for (int64_t pair = 0; pair < 4; pair += 2) {
      for (int64_t g = 0; g < groups; g += 2) {
        if (g + 1 < groups) {
          multiply<2>(query, pair, g, rest);
        } else {
          multiply<1>(query, pair, g, rest);
        }
      }
    }
    for (int64_t tile = 0; tile < 4; tile++) add(rest, tile);
    for (int64_t group = 0; group < 4; group++) totals[group] = sums(said + 16 * group);
  }

 private:
  static constexpr int64_t PARTS = STEP / 32;  // tiles of sixteen keys

  // Products that are still to be added: of two sixteens of keys with one or two of heads.
  struct Rest {
    const float* dots;  // tiles [keys, heads]
    const float* weights;
    f32x16* said;
    int64_t group, groups;
  };

  int64_t heads_of(int64_t group) const { return std::min<int64_t>(16, job.heads - 16 * group); }

  template <int GROUPS>
  void multiply(int64_t query, int64_t pair, int64_t group, Rest& rest) {
    const uint8_t* a = keys + pair * PARTS * TILE_BYTES;
    const uint8_t* b = q + (query * groups + group) * PARTS * TILE_BYTES;
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (int64_t part = 0; part < PARTS; part++, a += TILE_BYTES, b += TILE_BYTES) {
      load_tile<4>(a, 64);
      load_tile<6>(b, 64);
      dot_tiles<0, 4, 6>();
      load_tile<5>(a + PARTS * TILE_BYTES, 64);
      dot_tiles<2, 5, 6>();
      if constexpr (GROUPS > 1) {
        load_tile<7>(b + PARTS * TILE_BYTES, 64);
        dot_tiles<1, 4, 7>();
        dot_tiles<3, 5, 7>();
      }
      add(rest, part);
    }
    float* to = rest.dots == dots ? dots + 1024 : dots;
    store_tile<0>(to, 64);
    store_tile<2>(to + 512, 64);
    if constexpr (GROUPS > 1) store_tile<1>(to + 256, 64), store_tile<3>(to + 768, 64);
    const float* weight = weights + (query * groups + group) * 16;
    rest = {to, weight, said + 16 * pair, group, GROUPS};
  }

  // Adds what the heads of a tile, the first or the second for each sixteen keys, say of them.
  __attribute__((always_inline)) void add(const Rest& rest, int64_t tile) const {
    if (tile % 2 >= rest.groups) return;
    const int64_t group = rest.group + tile % 2;
    const auto some = (__mmask16)((1u << heads_of(group)) - 1);
    const __m512 weight = _mm512_loadu_ps(rest.weights + tile % 2 * 16);
    f32x16* to = rest.said + tile / 2 * 16;
#pragma GCC unroll 4
    for (int i = 0; i < 16; i++) {
      const f32x16 dot = to_bf16(load<f32x16>(rest.dots + 256 * tile + 16 * i));
      const __m512 positive = _mm512_max_ps(_mm512_setzero_ps(), (__m512)dot);  // a NaN stays
      const auto one = (f32x16)_mm512_maskz_mul_ps(some, positive, weight);
      const f32x16 more = to_bf16(one);
      to[i] = group == 0 ? more : to[i] + more;
    }
  }

  const IndexTopk& job;
  const int64_t groups;  // of heads: sixteens
  const Tiles shape;
  uint8_t* q;      // tiles [queries, groups, PARTS]
  float* weights;  // [queries, groups, 16]
  alignas(64) uint8_t keys[4 * PARTS * TILE_BYTES];  // tiles [sixteens, PARTS]
  alignas(64) float dots[2 * 4 * 256];
  f32x16 said[64];  // of each key, by each of sixteen heads
};
#else
struct TiledIndex {
  TiledIndex(const IndexTopk&, int64_t, int64_t, uint8_t*) {}
  void bring(const char* const*, int64_t) {}
  void score(int64_t, f32x16*) {}
};
#endif

}  // namespace
}  // namespace DSV4_ISA
