// Attention with tiles: all heads of a query at once, or of a few queries.
//
// A column is a head of a query. For scores A is sixteen keys, as they lie, and B columns: a lane
// is a column, and softmax never crosses lanes. For values A is weights, turned into rows again, and
// B keys, pairs of them side by side, a few channels at a time. Sums are tile by tile: 32 channels
// of a score, 32 keys of a value, counted from the query's first key. Every TILED_KEYS keys the
// largest score so far is looked for anew, and the sums before are scaled to it. No element of a
// tile sees another column, so it does not matter which columns are computed together.
#pragma once

#include <algorithm>

#include "attention_keys.h"
#include "functions.h"
#include "kernels.h"
#include "tiles.h"

#if DSV4_TILES
namespace DSV4_ISA {
namespace {

using dsv4::TILED_KEYS;

// 2^x for x <= 0, to about one unit in the last place; 0 below -126, NaN for NaN.
inline f32x16 exp2_of_negative(f32x16 x) {
  const __m512 t = _mm512_max_ps(_mm512_set1_ps(-150.0f), (__m512)x);  // a NaN is the second
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const f32x16 r = (f32x16)_mm512_sub_ps(t, n);
  f32x16 p = splat(1.3333558e-3f);
  p = fma(p, r, splat(9.6181291e-3f));
  p = fma(p, r, splat(5.5504109e-2f));
  p = fma(p, r, splat(2.4022651e-1f));
  p = fma(p, r, splat(6.9314718e-1f));
  p = fma(p, r, splat(1.0f));
  return (f32x16)_mm512_scalef_ps((__m512)p, n);
}

class TiledAttention {
 public:
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
    rows = reinterpret_cast<char*>(take((TILED_KEYS + (queries - 1) * job.width) * pitch()));
    q = take(2 * 16 * groups * width);
    tops = reinterpret_cast<float*>(take(4 * 16 * groups));
    totals = reinterpret_cast<float*>(take(4 * 16 * groups));
    sums = reinterpret_cast<float*>(take(4 * 16 * groups * width));
    scores = reinterpret_cast<float*>(take(4 * 16 * groups * TILED_KEYS));
    values = space;
  }

  void run() {
    const Keys last(job, query + queries - 1, chosen);
    turn_queries();
    for (int64_t begin = 0; begin < last.count; begin += TILED_KEYS) {
      const int64_t end = std::min(last.count, begin + TILED_KEYS);
      // All columns see the same keys, or those of each query its window and then the same rows.
      Part parts[dsv4::TOGETHER + 1];
      int count = 0;
      char* to = rows;
      auto add = [&](const Keys& keys, int64_t first, int64_t after, int64_t column, int64_t some) {
        if (first >= after) return;
        const int64_t tiles = (after - first + TILE - 1) / TILE;
        parts[count++] = {keys, first, tiles, first - begin, column, some, to, {}};
        to += tiles * TILE * pitch();
      };
      if (queries == 1) {
        add(last, begin, end, 0, columns);
      } else {
        for (int64_t i = 0; i < queries; i++) {
          add(Keys(job, query + i, nullptr), begin, std::min(end, last.near), i * heads, heads);
        }
        add(last, std::max(begin, last.near), end, 0, columns);
      }
      for (int i = 0; i < count; i++) score(parts[i]);
      for (int64_t g = 0; g < groups; g++) soften(g, end - begin, begin == 0, end == last.count);
      const bool in_parts = parts[count - 1].columns < columns;  // no rows after the windows
      for (int i = 0; i < count; i++) {
        const bool done = end == last.count && (in_parts || i == count - 1);
        weigh(parts[i], begin == 0 && parts[i].place == 0, done);
      }
    }
  }

 private:
  // TILE keys, from key to key `stride` bytes.
  struct Lines {
    const char* first;
    int64_t stride;
  };

  // Keys from `first` on, in tiles; the first one is `place` in this round. The columns that see
  // them; where they are copied to, and where they are then.
  struct Part {
    Keys keys;
    int64_t first, tiles, place, column, columns;
    char* room;
    Lines lines[TILED_KEYS / TILE];
  };

  // Queries as columns: word after word of sixteen at a time.
  void turn_queries() {
    const int64_t bytes = 2 * width;
    uint8_t* to = q;
    for (int64_t g = 0; g < groups; g++) {
      const char* from[16];
      const int64_t some = std::min<int64_t>(16, columns - 16 * g);
      for (int64_t i = 0; i < some; i++) {
        from[i] = static_cast<const char*>(job.q) + row(16 * g + i) * bytes;
      }
      for (int64_t at = 0; at < bytes; at += 64, to += TILE_BYTES) {
        u32x16 v[16] = {};
        for (int64_t i = 0; i < some; i++) v[i] = load<u32x16>(from[i] + at);
        transpose(v);
        for (int i = 0; i < 16; i++) store(to + 64 * i, v[i]);
      }
    }
  }

  int64_t pitch() const { return 2 * width + 64; }  // of `rows`

  // Of q and out, that of a column.
  int64_t row(int64_t column) const {
    return (query + column / heads) * job.heads + head + column % heads;
  }

  // A tile of keys on its way, one at a time: they are unpacked or copied, unless they lie in one
  // line.
  struct Coming {
    const TiledAttention* all;
    const char* at[TILE];
    int64_t plain, key = TILE;
    char* room;

    Coming(const TiledAttention& all, Part& part, int64_t t) : all(&all) {
      plain = part.keys.find(part.first + t * TILE, at);
      if (all.job.kept != 0 || part.keys.chosen != nullptr) {
        part.keys.fetch(part.first + t * TILE + AHEAD);
      }
      const int64_t stride = at[1] - at[0];
      bool in_line = plain == TILE;
      for (int64_t i = 1; i < TILE; i++) in_line &= at[i] == at[0] + i * stride;
      part.lines[t] = {at[0], stride};
      if (in_line) return;
      room = part.room + t * TILE * all.pitch(), key = 0;
      part.lines[t] = {room, all.pitch()};
    }

    bool done() const { return key == TILE; }

    void next() {
      if (key >= plain) {
        auto* to = reinterpret_cast<uint16_t*>(room);
        unpack_entry(at[key], all->width, all->job.kept, to);
      } else {
        for (int64_t byte = 0; byte < 2 * all->width; byte += 64) {
          store(room + byte, load<u32x16>(at[key] + byte));
        }
      }
      key++, room += all->pitch();
    }
  };

  // Scores of TILE keys for one or two groups of columns. Meanwhile `next` goes on.
  template <int GROUPS>
  void score(const Lines& keys, int64_t place, int64_t column, Coming& next, int64_t at_once) {
    const int64_t stride = keys.stride, to_next = width / 32 * TILE_BYTES;
    const char *first = keys.first, *second = first + 16 * stride;
    const uint8_t* b = q + column / 16 * to_next + column % 16 * 4;
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (int64_t i = 0; i < width / 32; i++, first += 64, second += 64, b += TILE_BYTES) {
      load_tile<6>(b, 64);
      load_tile<4>(first, stride);
      dot_tiles<0, 4, 6>();
      load_tile<5>(second, stride);
      dot_tiles<1, 5, 6>();
      if constexpr (GROUPS > 1) {
        load_tile<7>(b + to_next, 64);
        dot_tiles<2, 4, 7>();
        dot_tiles<3, 5, 7>();
      }
      for (int64_t j = 0; j < at_once && !next.done(); j++) next.next();
    }
    float* to = scores + (column / 16 * TILED_KEYS + place) * 16 + column % 16;
    store_tile<0>(to, 64);
    store_tile<1>(to + 256, 64);
    if constexpr (GROUPS > 1) {
      to += TILED_KEYS * 16;
      store_tile<2>(to, 64);
      store_tile<3>(to + 256, 64);
    }
  }

  void score(Part& part) {
    Tiles shape((int)std::min<int64_t>(16, part.columns));
    const int64_t end = part.column + part.columns, steps = (part.columns + 31) / 32 * (width / 32);
    const int64_t at_once = (TILE + steps - 1) / steps;
    Coming next(*this, part, 0);
    for (int64_t t = 0; t < part.tiles; t++) {
      while (!next.done()) next.next();
      if (t + 1 < part.tiles) next = Coming(*this, part, t + 1);
      const int64_t place = part.place + t * TILE;
      int64_t c = part.column;
      for (; c + 16 < end; c += 32) score<2>(part.lines[t], place, c, next, at_once);
      if (c < end) score<1>(part.lines[t], place, c, next, at_once);
    }
  }

  // Scores of sixteen columns for `count` keys become weights.
  void soften(int64_t group, int64_t count, bool first, bool last) {
    float* mine = scores + group * TILED_KEYS * 16;
    const int64_t end = (count + TILE - 1) / TILE * TILE;
    const f32x16 low = splat(-__builtin_inff());
    for (int64_t i = count; i < end; i++) store(mine + 16 * i, low);
    f32x16 most[4] = {low, low, low, low};
    for (int64_t i = 0; i < end; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        most[j] = (f32x16)_mm512_max_ps(load<__m512>(mine + 16 * (i + j)), (__m512)most[j]);
      }
    }
    const float LOG2E = 1.44269504f;
    f32x16 top = max(max(most[0], most[1]), max(most[2], most[3])) * splat(job.scale * LOG2E);
    f32x16 total = {};
    if (!first) {
      const f32x16 before = load<f32x16>(tops + 16 * group);
      top = max(before, top);
      const f32x16 factors = exp2_of_negative(before - top);
      total = load<f32x16>(totals + 16 * group) * factors;
      for (int64_t c = 0; c < 16; c++) {
        if (factors[c] == 1.0f) continue;
        float* sum = sums + group * 16 * width + 16 * c;
        for (int64_t i = 0; i < width / 16; i++, sum += 256) {
          store(sum, load<f32x16>(sum) * splat(factors[c]));
        }
      }
    }
    store(tops + 16 * group, top);
    auto* to = reinterpret_cast<uint8_t*>(mine);
    const f32x16 scale = splat(job.scale * LOG2E), less = -top;
    for (int64_t i = 0; i < end; i += TILE, to += TILE_BYTES) {
      u32x16 pairs[16];
      f32x16 parts[2] = {};
#pragma GCC unroll 16
      for (int64_t k = 0; k < 16; k++) {
        f32x16 e[2];
        for (int j = 0; j < 2; j++) {
          e[j] = exp2_of_negative(fma(load<f32x16>(mine + 16 * (i + 2 * k + j)), scale, less));
          parts[j] = parts[j] + e[j];
        }
        pairs[k] = narrow_pairs(e[0], e[1]);
      }
      total = total + (parts[0] + parts[1]);
      transpose(pairs);
      for (int k = 0; k < 16; k++) store(to + 64 * k, pairs[k]);
    }
    if (last) {
      f32x16 sinks = {};
      for (int64_t c = 0; c < 16 && 16 * group + c < columns; c++) {
        sinks[c] = job.sink[row(16 * group + c) % job.heads];
      }
      total = 1.0f / (total + exp(sinks - top * splat(0.693147181f)));
    }
    store(totals + 16 * group, total);
  }

  // Lays 32 channels of keys as values: pairs of keys side by side, `some` pairs from `pair` on.
  void lay(const Part& part, int64_t channel, int64_t pair, int64_t some, uint8_t* to) const {
    const Lines& keys = part.lines[pair / 16];
    const char* from = keys.first + pair % 16 * 2 * keys.stride + channel * 2;
    to += pair / 16 * 2 * TILE_BYTES + pair % 16 * 64;
    for (int64_t i = 0; i < some; i++, from += 2 * keys.stride, to += 64) {
      const __m512i x = _mm512_loadu_si512(from), y = _mm512_loadu_si512(from + keys.stride);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(x, y));
      _mm512_store_si512(to + TILE_BYTES, _mm512_unpackhi_epi16(x, y));
    }
  }

  // Results that are still to be put: 32 channels of some columns.
  struct Rest {
    int64_t column = 0, end = 0, channel = 0;
  };

  // Sums of 32 channels of one or two groups of columns += weights times `values`. Meanwhile the
  // next channels are laid, `some` pairs for every tile, and results put.
  template <int GROUPS>
  void weigh(const Part& part, int64_t channel, int64_t column, bool first, const uint8_t* b,
             int64_t next, int64_t pair, int64_t some, uint8_t* to, Rest& rest) {
    const int64_t to_next = TILED_KEYS * 64;  // bytes of weights
    const uint8_t* a = reinterpret_cast<uint8_t*>(scores) + column / 16 * to_next +
                       part.place / TILE * TILE_BYTES + column % 16 * 64;
    float* sum = sums + column / 16 * 16 * width + column % 16 * 16 + channel * 16;
    const int64_t put_at_once = (rest.end - rest.column + part.tiles - 1) / part.tiles;
    if (first) {
      zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    } else {
      load_tile<0>(sum, 64), load_tile<1>(sum + 256, 64);
      if constexpr (GROUPS > 1) {
        load_tile<2>(sum + 16 * width, 64), load_tile<3>(sum + 16 * width + 256, 64);
      }
    }
    for (int64_t t = 0; t < part.tiles; t++, a += TILE_BYTES, b += 2 * TILE_BYTES) {
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
      if (next < width) lay(part, next, 16 * t + pair, some, to);
      put(rest, put_at_once);
    }
    store_tile<0>(sum, 64), store_tile<1>(sum + 256, 64);
    if constexpr (GROUPS > 1) {
      store_tile<2>(sum + 16 * width, 64), store_tile<3>(sum + 16 * width + 256, 64);
    }
  }

  // Results of up to `most` more columns.
  void put(Rest& rest, int64_t most) const {
    const int64_t end = std::min(rest.end, rest.column + most);
    for (int64_t& c = rest.column; c < end; c++) {
      const float* sum = sums + c / 16 * 16 * width + c % 16 * 16 + rest.channel * 16;
      auto* to = static_cast<uint16_t*>(job.out) + row(c) * width + rest.channel;
      const Sums x = in_order({load<f32x16>(sum), load<f32x16>(sum + 256)});
      const f32x16 factor = splat(totals[c]);
      __builtin_prefetch(to + 64, 1);  // which is written soon
      store(to, (__m256i)_mm512_cvtneps_pbh((__m512)(x.a * factor)));
      store(to + 16, (__m256i)_mm512_cvtneps_pbh((__m512)(x.b * factor)));
    }
  }

  // `first`: nothing has been added yet; `last`: nothing will be.
  void weigh(const Part& part, bool first, bool last) {
    Tiles shape(16, (int)std::min<int64_t>(16, part.columns));
    const int64_t end = part.column + part.columns, rounds = (part.columns + 31) / 32;
    const int64_t some = (16 + rounds - 1) / rounds;
    uint8_t *now = values, *next = values + TILED_KEYS * 64;
    for (int64_t t = 0; t < part.tiles; t++) lay(part, 0, 16 * t, 16, now);
    Rest rest;
    for (int64_t channel = 0; channel < width; channel += 32) {
      int64_t pair = 0;
      for (int64_t c = part.column; c < end; c += 32, pair += some) {
        const int64_t left = std::min(some, 16 - pair);
        auto add = c + 16 < end ? &TiledAttention::weigh<2> : &TiledAttention::weigh<1>;
        (this->*add)(part, channel, c, first, now, channel + 32, pair, left, next, rest);
        if (last) rest = {c, std::min(end, c + 32), channel};
      }
      std::swap(now, next);
    }
    put(rest, 32);
  }

  const Attention& job;
  const int64_t query, queries, head, heads;
  const int64_t width, columns, groups;  // of columns: sixteens
  int64_t* chosen;
  char* rows;       // keys that do not lie one after the other
  uint8_t* q;       // tiles [groups, width / 32]
  float* tops;      // [columns] the largest scores so far, times log2(e)
  float* totals;    // [columns] of weights; at last one over them
  float* sums;      // tiles [groups, width / 16]; of 32 channels, not yet in_order()
  float* scores;    // [groups, TILED_KEYS, 16]; then weights, tiles [TILED_KEYS / 32] of each group
  uint8_t* values;  // 32 channels of TILED_KEYS keys, tiles [TILED_KEYS / 32, 2]; and the next ones
};

}  // namespace
}  // namespace DSV4_ISA
#endif
