// Attention with tiles: all heads of a query at once, or of a few queries.
//
// A column is a head of a query. For scores A is sixteen keys, as they lie, and B columns: a lane is
// a column, and softmax never crosses lanes. For values A is weights, turned into rows again, and B
// keys, pairs of them side by side. Sums are tile by tile: 32 channels of a score, 32 keys of a
// value, counted from the query's first key. No element of a tile depends on another column.
#pragma once

#include <algorithm>

#include "attention_keys.h"
#include "functions.h"
#include "kernels.h"
#include "tiles.h"

#if DSV4_TILES
namespace DSV4_ISA {
namespace {

// Keys begin .. end - 1 and the columns that see them.
struct Seen {
  const Keys& keys;
  int64_t begin, end, column, columns;

  int columns_of_tile() const { return (int)std::min<int64_t>(16, columns); }
};

struct TiledAttention {
  const Attention& job;
  const int64_t query, queries, head, heads;
  const int64_t width, columns, groups;  // of columns: sixteens
  int64_t room = 0;                      // keys, to a whole tile
  int64_t* chosen;
  uint16_t* rows;   // TILE keys that do not lie as a tile wants them
  uint8_t* q;       // tiles [groups, width / 32]
  float* totals;    // [columns]
  float* sums;      // tiles [groups, width / 16]; channels as `lay` has them
  uint8_t* values;  // tiles [width / 32, keys / 32, 2]
  float* scores;    // [groups, room, 16]; later weights, tiles [room / 32] of each group

  TiledAttention(const Attention& job, int64_t query, int64_t queries, int64_t head, int64_t heads,
                 uint8_t* space)
      : job(job), query(query), queries(queries), head(head), heads(heads),
        width(job.width_of_head), columns(queries * heads), groups((columns + 15) / 16) {
    auto take = [&](int64_t bytes) {
      uint8_t* here = space;
      space += bytes;
      return here;
    };
    chosen = reinterpret_cast<int64_t*>(take(8 * ((job.k + 7) / 8 * 8)));
    rows = reinterpret_cast<uint16_t*>(take(2 * TILE * width));
    q = take(2 * 16 * groups * width);
    totals = reinterpret_cast<float*>(take(4 * 16 * groups));
    sums = reinterpret_cast<float*>(take(4 * 16 * groups * width));
    scores = reinterpret_cast<float*>(space);
  }

  // Queries as columns: word after word of sixteen at a time.
  void turn_queries() {
    const int64_t bytes = 2 * width;
    const char* from = static_cast<const char*>(job.q);
    for (int64_t g = 0; g < groups; g++) {
      for (int64_t at = 0; at < bytes; at += 64) {
        u32x16 v[16] = {};
        for (int64_t i = 0; i < 16 && 16 * g + i < columns; i++) {
          const int64_t c = 16 * g + i;
          v[i] = load<u32x16>(from + ((query + c / heads) * job.heads + head + c % heads) * bytes + at);
        }
        transpose(v);
        uint8_t* to = q + (g * (width / 32) + at / 64) * TILE_BYTES;
        for (int i = 0; i < 16; i++) store(to + 64 * i, v[i]);
      }
    }
  }

  // TILE keys as two tiles of A for each 32 channels, from row to row `stride` bytes.
  struct Rows {
    const char* first[2];
    int64_t stride;
  };

  Rows find(const Keys& keys, int64_t i, const char** at) const {
    keys.get(i, rows, at);
    const int64_t bytes = 2 * width;
    int64_t in_line = 1;
    while (in_line < TILE && at[in_line] == at[0] + in_line * bytes) in_line++;
    if (in_line < TILE) {
      char* to = reinterpret_cast<char*>(rows);
      for (int64_t k = 0; k < TILE; k++, to += bytes) {
        if (at[k] != to) std::memcpy(to, at[k], bytes);
        at[k] = to;
      }
    }
    return {{at[0], at[16]}, bytes};
  }

  // Keys as values: of tile t of `tiles`.
  void lay(const char* const* at, int64_t t, int64_t tiles) {
    for (int64_t b = 0; b < width / 32; b++) {
      uint8_t* to = values + (b * tiles + t) * 2 * TILE_BYTES;
      for (int i = 0; i < 16; i++, to += 64) {
        const __m512i x = _mm512_loadu_si512(at[2 * i] + 64 * b);
        const __m512i y = _mm512_loadu_si512(at[2 * i + 1] + 64 * b);
        _mm512_store_si512(to, _mm512_unpacklo_epi16(x, y));
        _mm512_store_si512(to + TILE_BYTES, _mm512_unpackhi_epi16(x, y));
      }
    }
  }

  // Scores of keys i .. i + 31 for columns of one or two groups from `column` on.
  template <int GROUPS>
  void score(const Rows& a, int64_t i, int64_t column) {
    const uint8_t* b = q + column / 16 * (width / 32) * TILE_BYTES + column % 16 * 4;
    const int64_t to_next = width / 32 * TILE_BYTES;
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (int64_t at = 0; at < 2 * width; at += 64, b += TILE_BYTES) {
      load_tile<6>(b, 64);
      load_tile<4>(a.first[0] + at, a.stride);
      dot_tiles<0, 4, 6>();
      load_tile<5>(a.first[1] + at, a.stride);
      dot_tiles<1, 5, 6>();
      if constexpr (GROUPS > 1) {
        load_tile<7>(b + to_next, 64);
        dot_tiles<2, 4, 7>();
        dot_tiles<3, 5, 7>();
      }
    }
    float* to = scores + (column / 16 * room + i) * 16 + column % 16;
    store_tile<0>(to, 64);
    store_tile<1>(to + 256, 64);
    if constexpr (GROUPS > 1) store_tile<2>(to + 16 * room, 64), store_tile<3>(to + 16 * room + 256, 64);
  }

  void score(const Seen& seen, bool lays) {
    Tiles tiles(seen.columns_of_tile());
    const char* at[TILE];
    const bool fetches = job.chosen != nullptr;
    if (fetches) seen.keys.fetch(seen.begin), seen.keys.fetch(seen.begin + TILE);
    for (int64_t i = seen.begin; i < seen.end; i += TILE) {
      if (fetches) seen.keys.fetch(i + 2 * TILE);
      const Rows a = find(seen.keys, i, at);
      if (lays) lay(at, i / TILE, room / TILE);
      int64_t c = seen.column;
      const int64_t end = c + seen.columns;
      for (; c + 16 < end; c += 32) score<2>(a, i, c);
      if (c < end) score<1>(a, i, c);
    }
  }

  // Scores of sixteen columns become weights; `counts`: of the keys that each sees.
  void soften(int64_t group, i32x16 counts, int64_t least, f32x16 sinks) {
    float* mine = scores + group * room * 16;
    const f32x16 low = splat(-__builtin_inff()), scale = splat(job.scale);
    for (int64_t i = least; i < room; i++) {
      const i32x16 key = (i32x16)_mm512_set1_epi32((int32_t)i);
      store(mine + 16 * i, where(key < counts, load<f32x16>(mine + 16 * i), low));
    }
    f32x16 tops[2] = {low, low};
    for (int64_t i = 0; i < room; i += 2) {
      for (int j = 0; j < 2; j++) tops[j] = max(load<f32x16>(mine + 16 * (i + j)) * scale, tops[j]);
    }
    const f32x16 top = max(tops[0], tops[1]);
    f32x16 total = {};
    auto* to = reinterpret_cast<uint8_t*>(mine);
    for (int64_t i = 0; i < room; i += TILE, to += TILE_BYTES) {
      u32x16 pairs[16];
      f32x16 parts[2] = {};
      for (int64_t k = 0; k < 16; k++) {
        f32x16 e[2];
        for (int j = 0; j < 2; j++) {
          e[j] = exp(load<f32x16>(mine + 16 * (i + 2 * k + j)) * scale - top);
          parts[j] = parts[j] + e[j];
        }
        pairs[k] = narrow_pairs(e[0], e[1]);
      }
      total = total + (parts[0] + parts[1]);
      transpose(pairs);
      for (int k = 0; k < 16; k++) store(to + 64 * k, pairs[k]);
    }
    total = total + exp(sinks - top);
    store(totals + 16 * group, 1.0f / total);
  }

  // Both rounded to bfloat16, side by side.
  static u32x16 narrow_pairs(f32x16 even, f32x16 odd) {
    const auto low = (__m256i)_mm512_cvtneps_pbh((__m512)even);
    const auto high = (__m256i)_mm512_cvtneps_pbh((__m512)odd);
    const __m512i words = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
    return (u32x16)_mm512_or_si512(words, _mm512_cvtepu16_epi32(low));
  }

  // Sums of one or two groups of columns += weights times values of keys from `i` on.
  template <int GROUPS>
  void weigh(int64_t column, int64_t i, int64_t tiles) {
    const int64_t to_next = room * 64;  // bytes of weights
    const uint8_t* a_first = reinterpret_cast<uint8_t*>(scores) + column / 16 * to_next +
                             i / TILE * TILE_BYTES + column % 16 * 64;
    float* sum = sums + column / 16 * 16 * width + column % 16 * 16;
    const uint8_t* b = values;
    for (int64_t block = 0; block < width / 32; block++, sum += 512) {
      if (i == 0) {
        zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
      } else {
        load_tile<0>(sum, 64), load_tile<1>(sum + 256, 64);
        if constexpr (GROUPS > 1) {
          load_tile<2>(sum + 16 * width, 64), load_tile<3>(sum + 16 * width + 256, 64);
        }
      }
      const uint8_t* a = a_first;
      for (int64_t t = 0; t < tiles; t++, a += TILE_BYTES, b += 2 * TILE_BYTES) {
        load_tile<4>(a, 64);
        load_tile<6>(b, 64);
        dot_tiles<0, 4, 6>();
        load_tile<7>(b + TILE_BYTES, 64);
        dot_tiles<1, 4, 7>();
        if constexpr (GROUPS > 1) {
          load_tile<5>(a + to_next, 64);
          dot_tiles<2, 5, 6>();
          dot_tiles<3, 5, 7>();
        }
      }
      store_tile<0>(sum, 64), store_tile<1>(sum + 256, 64);
      if constexpr (GROUPS > 1) {
        store_tile<2>(sum + 16 * width, 64), store_tile<3>(sum + 16 * width + 256, 64);
      }
    }
  }

  void weigh(const Seen& seen, bool laid) {
    Tiles shape(16, seen.columns_of_tile());
    const char* at[TILE];
    for (int64_t i = seen.begin; i < seen.end; i += dsv4::TILED_KEYS) {
      const int64_t tiles = (std::min(seen.end - i, dsv4::TILED_KEYS) + TILE - 1) / TILE;
      for (int64_t t = 0; !laid && t < tiles; t++) {
        find(seen.keys, i + t * TILE, at);
        lay(at, t, tiles);
      }
      int64_t c = seen.column;
      const int64_t end = c + seen.columns;
      for (; c + 16 < end; c += 32) weigh<2>(c, i, tiles);
      if (c < end) weigh<1>(c, i, tiles);
    }
  }

  void put() const {
    for (int64_t c = 0; c < columns; c++) {
      const int64_t row = (query + c / heads) * job.heads + head + c % heads;
      auto* to = static_cast<uint16_t*>(job.out) + row * width;
      const float* sum = sums + c / 16 * 16 * width + c % 16 * 16;
      const f32x16 factor = splat(totals[c]);
      for (int64_t at = 0; at < width; at += 32, sum += 512) {
        const Sums x = in_order({load<f32x16>(sum), load<f32x16>(sum + 256)});
        store(to + at, (__m256i)_mm512_cvtneps_pbh((__m512)(x.a * factor)));
        store(to + at + 16, (__m256i)_mm512_cvtneps_pbh((__m512)(x.b * factor)));
      }
    }
  }

  void run() {
    const Keys last(job, query + queries - 1, chosen);
    room = (last.count + TILE - 1) / TILE * TILE;
    values = reinterpret_cast<uint8_t*>(scores + 16 * groups * room);
    auto count_of = [&](int64_t c) {  // what a column sees
      const int64_t q = c / heads;
      if (q >= queries - 1) return last.count;
      return last.near + (job.start + query + q + 1) / job.ratio;
    };
    // Keys in parts that the same columns see: all, or each query's window and then the rows.
    auto each_part = [&](auto&& each) {
      if (queries == 1) return each(Seen{last, 0, last.count, 0, columns});
      for (int64_t q = 0; q < queries; q++) {
        each(Seen{Keys(job, query + q, nullptr), 0, last.near, q * heads, heads});
      }
      each(Seen{last, last.near, last.count, 0, columns});
    };
    const bool lays = queries == 1 && room <= dsv4::TILED_KEYS;
    turn_queries();
    each_part([&](const Seen& seen) { score(seen, lays); });
    for (int64_t g = 0; g < groups; g++) {
      alignas(64) int32_t counts[16];
      alignas(64) float sinks[16];
      for (int64_t i = 0; i < 16; i++) {
        const int64_t c = std::min(16 * g + i, columns - 1);
        counts[i] = (int32_t)count_of(c), sinks[i] = job.sink[head + c % heads];
      }
      soften(g, load<i32x16>(counts), *std::min_element(counts, counts + 16), load<f32x16>(sinks));
    }
    each_part([&](const Seen& seen) { weigh(seen, lays); });
    put();
  }
};

inline void attend_with_tiles(const Attention& job, int64_t query, int64_t queries, int64_t head,
                              int64_t heads, uint8_t* space) {
  TiledAttention(job, query, queries, head, heads, space).run();
}

}  // namespace
}  // namespace DSV4_ISA
#endif
