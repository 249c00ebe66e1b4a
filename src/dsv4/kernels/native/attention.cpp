// Attention over window and compressed rows.
//
// A query's keys are the window's, then the compressed rows, both in the order of positions. All
// sums are in this order, so it does not matter in which pass the query is, or beside which others.
// Keys are taken in tiles twice, for scores and for values. Packed rows are unpacked once where
// they are chosen for a query, or else each time, into the nearest cache, for several queries.
// (attention_tiles.h has what only AMX does.)
#include <algorithm>

#include "attention_keys.h"
#include "attention_tiles.h"
#include "functions.h"
#include "kernels.h"
#include "packed.h"

namespace DSV4_ISA {
namespace {

// Numbers are float32, or pairs of bfloat16 where the hardware multiplies them. Other bfloat16 is
// made float32 a few rows at a time, of each sixteen pairs the odd ones and then the even ones.
inline void widen_row(const char* from, int64_t bytes, char* to) {
  for (int64_t at = 0; at < bytes; at += 64, to += 128) {
    const u32x16 pairs = load<u32x16>(from + at);
    store(to, odd(pairs));
    store(to + 64, even(pairs));
  }
}

// out[4 h + i] = x[h] . keys[i] for four rows of `bytes` bytes and four keys.
template <bool PAIRS>
inline f32x16 dots(const char* const* x, const char* const* keys, int64_t bytes) {
  f32x16 acc[16] = {};
  for (int64_t at = 0; at < bytes; at += 64) {
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        acc[4 * h + i] = add_products<PAIRS>(acc[4 * h + i], load<u32x16>(x[h] + at),
                                             load<u32x16>(keys[i] + at));
      }
    }
  }
  return sums(acc);
}

inline f32x4 quarter(f32x16 v, int i) {
  f32x4 out;
  std::memcpy(&out, reinterpret_cast<const char*>(&v) + 16 * i, 16);
  return out;
}

// ---------------------------------------------------------------- weights times values

// Sums of weights[i] * values[i][0 .. 31], where a weight is a pair: that of key 2 i and, above it,
// that of key 2 i + 1, whose product is added first.
template <bool BF16, bool PAIRS>
inline Sums add_values(Sums sum, const float* weights, const char* first, const char* second) {
#if DSV4_PAIRS
  if constexpr (PAIRS) {
    // Words of the two rows side by side. Their order is that of the instruction until the end.
    __m512i x = _mm512_loadu_si512(first), y = _mm512_loadu_si512(second);
    u32x16 w = (u32x16)_mm512_set1_epi32(load<int32_t>(weights));
    return {dot_pairs(sum.a, w, (u32x16)_mm512_unpacklo_epi16(x, y)),
            dot_pairs(sum.b, w, (u32x16)_mm512_unpackhi_epi16(x, y))};
  }
#endif
  auto values = [](const char* row) -> Sums {
    if (!BF16) return load<Sums>(row);
    const u32x16 pairs = load<u32x16>(row);
    return {even(pairs), odd(pairs)};
  };
  f32x16 w0 = splat(weights[0]), w1 = splat(weights[1]);
  const Sums x = values(first), y = values(second);
  return {fma(w0, x.a, fma(w1, y.a, sum.a)), fma(w0, x.b, fma(w1, y.b, sum.b))};
}

// The sums in the order of channels, which for bfloat16 is not that of the vectors.
template <bool BF16, bool PAIRS>
inline Sums ordered(Sums s) {
  if (PAIRS) return in_order(s);
  return BF16 ? Sums{first_half(s.a, s.b), second_half(s.a, s.b)} : s;
}

// sums [heads, width] += `weights` [heads, room] times the rows of `keys` (an even number), for
// BLOCKS blocks of 32 channels.
template <bool BF16, bool PAIRS, int HEADS, int BLOCKS>
inline void weigh(const float* weights, int64_t room, const char* const* keys, int64_t count,
                  int64_t channel, float* sums, int64_t width) {
  constexpr int64_t ELEMENT = BF16 ? 2 : 4;
  constexpr int64_t PER_KEY = PAIRS ? 1 : 2;  // weights of a pair are one number
  Sums acc[HEADS][BLOCKS];
  for (int h = 0; h < HEADS; h++) {
    for (int b = 0; b < BLOCKS; b++) acc[h][b] = load<Sums>(sums + h * width + channel + 32 * b);
  }
  for (int64_t i = 0; i < count; i += 2) {
#pragma GCC unroll 2
    for (int b = 0; b < BLOCKS; b++) {
      const int64_t at = (channel + 32 * b) * ELEMENT;
#pragma GCC unroll 4
      for (int h = 0; h < HEADS; h++) {
        const float* w = weights + h * room + i / 2 * PER_KEY;
        acc[h][b] = add_values<BF16, PAIRS>(acc[h][b], w, keys[i] + at, keys[i + 1] + at);
      }
    }
  }
  for (int h = 0; h < HEADS; h++) {
    for (int b = 0; b < BLOCKS; b++) store(sums + h * width + channel + 32 * b, acc[h][b]);
  }
}

template <bool BF16, bool PAIRS, int HEADS>
inline void weigh(const float* weights, int64_t room, const char* const* keys, int64_t count,
                  float* sums, int64_t width) {
  int64_t channel = 0;
  for (; channel + 64 <= width; channel += 64) {
    weigh<BF16, PAIRS, HEADS, 2>(weights, room, keys, count, channel, sums, width);
  }
  if (channel < width) {
    weigh<BF16, PAIRS, HEADS, 1>(weights, room, keys, count, channel, sums, width);
  }
}

template <bool BF16, bool PAIRS>
inline void weigh(int heads, const float* weights, int64_t room, const char* const* keys,
                  int64_t count, float* sums, int64_t width) {
  switch (heads) {
    case 1: return weigh<BF16, PAIRS, 1>(weights, room, keys, count, sums, width);
    case 2: return weigh<BF16, PAIRS, 2>(weights, room, keys, count, sums, width);
    case 3: return weigh<BF16, PAIRS, 3>(weights, room, keys, count, sums, width);
    default: return weigh<BF16, PAIRS, 4>(weights, room, keys, count, sums, width);
  }
}

// ---------------------------------------------------------------- attention

// Several queries see the same rows, and windows of the same length, which is a multiple of TILE; or
// there is one query.
template <bool BF16, bool PAIRS>
inline void attend_as(const Attention& job, int64_t query, int64_t queries, int64_t head,
                      int64_t heads, uint8_t* space) {
  const int64_t width = job.width_of_head, bytes = width * (BF16 ? 2 : 4);
  auto* chosen = reinterpret_cast<int64_t*>(space);
  auto* unpacked = reinterpret_cast<uint16_t*>(chosen + (job.k + 7) / 8 * 8);
  const bool all = job.chosen != nullptr;  // unpacked once and kept; they are few
  auto* listed = reinterpret_cast<const char**>(unpacked + unpacked_rows(job) * width);
  auto* sums_of = reinterpret_cast<float*>(listed + (all ? unpacked_rows(job) : 0));
  char* wide_q = reinterpret_cast<char*>(sums_of + queries * heads * width);
  char* wide_keys = wide_q + 4 * dsv4::HEADS * width;
  float* scores = reinterpret_cast<float*>(wide_keys + 4 * 4 * width);
  const Keys last(job, query + queries - 1, chosen);
  const int64_t count = last.count, near = last.near, room = (count + TILE - 1) / TILE * TILE;
  auto row_of = [&](int64_t q, int64_t h) { return scores + (q * heads + h) * room; };
  // each(q, first key, keys, how many of them) for all queries and keys in tiles
  auto in_tiles = [&](auto&& each) {
    const char* some[TILE];
    for (int64_t i = 0; i < count; i += TILE) {
      if (job.kept != 0 || all) last.fetch(i + AHEAD);
      const bool shared = queries == 1 || i >= near;
      const char** keys = all ? listed + i : some;
      if (shared) last.get(i, unpacked + (all ? i * width : 0), keys);
      for (int64_t q = 0; q < queries; q++) {
        if (!shared) Keys(job, query + q, nullptr).get(i, unpacked, keys);
        each(q, i, keys, std::min(count - i, TILE));
      }
    }
  };
  in_tiles([&](int64_t q, int64_t i, const char* const* keys, int64_t) {
    const char* first = static_cast<const char*>(job.q) + ((query + q) * job.heads + head) * bytes;
    constexpr bool WIDE = BF16 && !PAIRS;
    const int64_t as_bytes = WIDE ? 2 * bytes : bytes;
    for (int64_t h = 0; WIDE && h < heads; h++) {
      widen_row(first + h * bytes, bytes, wide_q + h * as_bytes);
    }
    if (WIDE) first = wide_q;
    for (int64_t k = 0; k < TILE; k += 4) {
      const char* four[4] = {keys[k], keys[k + 1], keys[k + 2], keys[k + 3]};
      for (int64_t j = 0; WIDE && j < 4; j++) {
        widen_row(four[j], bytes, wide_keys + j * as_bytes);
        four[j] = wide_keys + j * as_bytes;
      }
      for (int64_t h = 0; h < heads; h += 4) {
        FourRows x(first + h * as_bytes, as_bytes, heads - h);
        f32x16 score = dots<PAIRS>(x.x, four, as_bytes) * job.scale;
        for (int j = 0; j < 4 && h + j < heads; j++) {
          store(row_of(q, h + j) + i + k, quarter(score, j));
        }
      }
    }
  });
  float totals[dsv4::TOGETHER][dsv4::HEADS];
  for (int64_t q = 0; q < queries; q++) {
    for (int64_t h = 0; h < heads; h++) {
      float* mine = row_of(q, h);
      for (int64_t i = count; i < room; i++) mine[i] = -__builtin_inff();
      f32x16 most = splat(-__builtin_inff());
      for (int64_t i = 0; i < room; i += 16) most = max(load<f32x16>(mine + i), most);
      const float top = largest(most);
      f32x16 total = {};
      for (int64_t i = 0; i < room; i += 16) {
        f32x16 e = exp(load<f32x16>(mine + i) - top);
        total = total + e;
        if (PAIRS) {
          store(reinterpret_cast<uint16_t*>(mine) + i, narrow(e));
        } else {
          store(mine + i, rounded(e, BF16));
        }
      }
      totals[q][h] = sum(total) + exp(splat(job.sink[head + h] - top))[0];
    }
  }
  std::memset(sums_of, 0, queries * heads * width * sizeof(float));
  auto add = [&](int64_t q, int64_t i, const char* const* keys, int64_t some) {
    for (int64_t h = 0; h < heads; h += 4) {
      const float* weights = row_of(q, h) + (PAIRS ? i / 2 : i);
      weigh<BF16, PAIRS>((int)std::min<int64_t>(heads - h, 4), weights, room, keys,
                         (some + 1) / 2 * 2, sums_of + (q * heads + h) * width, width);
    }
  };
  if (all) {
    add(0, 0, listed, count);
  } else {
    in_tiles(add);
  }
  for (int64_t q = 0; q < queries; q++) {
    char* out = static_cast<char*>(job.out) + ((query + q) * job.heads + head) * bytes;
    for (int64_t h = 0; h < heads; h++) {
      for (int64_t channel = 0; channel < width; channel += 32) {
        const Sums s = ordered<BF16, PAIRS>(
            load<Sums>(sums_of + (q * heads + h) * width + channel));
        put(out, BF16, h * width + channel, s.a / totals[q][h]);
        put(out, BF16, h * width + channel + LANES, s.b / totals[q][h]);
      }
    }
  }
}

}  // namespace

void attend(const Attention& job, int64_t query, int64_t queries, int64_t head, int64_t heads,
            uint8_t* space) {
  // What a later query alone sees is not even multiplied by zero: it might not be a number.
  auto rows = [&](int64_t q) { return job.rows.pieces ? (job.start + q + 1) / job.ratio : 0; };
  if (queries > 1 && rows(query) != rows(query + queries - 1)) {
    for (int64_t i = 0; i < queries; i++) attend(job, query + i, 1, head, heads, space);
    return;
  }
  FlushSubnormals guard;
#if DSV4_TILES
  if (job.is_bf16) return TiledAttention(job, query, queries, head, heads, space).run();
#else
#if DSV4_PAIRS
  if (job.is_bf16 && job.pairs) {
    return attend_as<true, true>(job, query, queries, head, heads, space);
  }
#endif
  if (job.is_bf16) return attend_as<true, false>(job, query, queries, head, heads, space);
#endif
  attend_as<false, false>(job, query, queries, head, heads, space);
}

}  // namespace DSV4_ISA
