// Attention over window and compressed rows, and the indexer that chooses rows.
//
// A query's keys are listed first: the window's, then the compressed rows, both in the order of
// positions. Everything after that depends on the list only, so it does not matter in which pass
// the query is.
#include <algorithm>

#include "functions.h"
#include "kernels.h"
#include "weights.h"

namespace DSV4_ISA {
namespace {

using dsv4::Attention;
using dsv4::IndexTopk;

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

// out[4 h + i] = x[h] . keys[i] for four rows of `bytes` bytes and four keys.
template <bool BF16>
inline f32x16 dots(const char* const* x, const char* const* keys, int64_t bytes) {
  f32x16 acc[16] = {};
  for (int64_t at = 0; at < bytes; at += 64) {
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        acc[4 * h + i] = add_products<BF16>(acc[4 * h + i], load<u32x16>(x[h] + at),
                                            load<u32x16>(keys[i] + at));
      }
    }
  }
  return sums(acc);
}

// Four rows from `first` on; where there are fewer, the last one again.
struct FourRows {
  const char* x[4];
  FourRows(const char* first, int64_t bytes, int64_t count) {
    for (int64_t h = 0; h < 4; h++) x[h] = first + (h < count ? h : count - 1) * bytes;
  }
};

inline f32x4 quarter(f32x16 v, int i) {
  f32x4 out;
  std::memcpy(&out, reinterpret_cast<const char*>(&v) + 16 * i, 16);
  return out;
}

// ---------------------------------------------------------------- weights times values

// Sums of weights[i] * values[i][0 .. 31], where a weight is a pair: that of key 2 i and, above it,
// that of key 2 i + 1, whose product is added first.
struct Sums {
  f32x16 a, b;
};

template <bool BF16>
inline Sums add_values(Sums sum, const float* weights, const char* first, const char* second) {
#if DSV4_PAIRS
  if constexpr (BF16) {
    // Words of the two rows side by side. Their order is that of the instruction until the end.
    __m512i x = _mm512_loadu_si512(first), y = _mm512_loadu_si512(second);
    u32x16 w = (u32x16)_mm512_set1_epi32(load<int32_t>(weights));
    return {dot_pairs(sum.a, w, (u32x16)_mm512_unpacklo_epi16(x, y)),
            dot_pairs(sum.b, w, (u32x16)_mm512_unpackhi_epi16(x, y))};
  }
#endif
  auto value = [](const char* row, int i) { return get(row, BF16, LANES * i); };
  f32x16 w0 = splat(weights[0]), w1 = splat(weights[1]);
  return {fma(w0, value(first, 0), fma(w1, value(second, 0), sum.a)),
          fma(w0, value(first, 1), fma(w1, value(second, 1), sum.b))};
}

constexpr bool paired(bool bf16) { return bf16 && DSV4_PAIRS; }

// The sums in the order of channels.
template <bool BF16>
inline Sums in_order(Sums s) {
  if (!paired(BF16)) return s;
  return {__builtin_shufflevector(s.a, s.b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
          __builtin_shufflevector(s.a, s.b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30,
                                  31)};
}

// `weights` [heads, room] times the rows of `keys` (an even number): out [heads, width].
template <bool BF16, int HEADS>
inline void weigh(const float* weights, int64_t room, const char* const* keys, int64_t count,
                  const float* totals, char* out, int64_t width) {
  constexpr int64_t ELEMENT = BF16 ? 2 : 4, AHEAD = 2;  // blocks of 32 channels at once
  constexpr int64_t PER_KEY = paired(BF16) ? 1 : 2;      // weights of a pair are one number
  for (int64_t channel = 0; channel < width; channel += 32 * AHEAD) {
    const int64_t blocks = width - channel < 32 * AHEAD ? 1 : AHEAD;
    Sums acc[HEADS][AHEAD] = {};
    for (int64_t i = 0; i < count; i += 2) {
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t at = (channel + 32 * b) * ELEMENT;
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
          const float* w = weights + h * room + i / 2 * PER_KEY;
          acc[h][b] = add_values<BF16>(acc[h][b], w, keys[i] + at, keys[i + 1] + at);
        }
      }
    }
    for (int h = 0; h < HEADS; h++) {
      for (int64_t b = 0; b < blocks; b++) {
        Sums s = in_order<BF16>(acc[h][b]);
        const int64_t at = h * width + channel + 32 * b;
        put(out, BF16, at, s.a / totals[h]);
        put(out, BF16, at + LANES, s.b / totals[h]);
      }
    }
  }
}

template <bool BF16>
inline void weigh(int heads, const float* weights, int64_t room, const char* const* keys,
                  int64_t count, const float* totals, char* out, int64_t width) {
  switch (heads) {
    case 1: return weigh<BF16, 1>(weights, room, keys, count, totals, out, width);
    case 2: return weigh<BF16, 2>(weights, room, keys, count, totals, out, width);
    case 3: return weigh<BF16, 3>(weights, room, keys, count, totals, out, width);
    default: return weigh<BF16, 4>(weights, room, keys, count, totals, out, width);
  }
}

// ---------------------------------------------------------------- packed rows

// Adds the scale 2^(byte - 127) to values that are not zero.
inline u16x32 with_scale(u16x32 values, int byte) {
  const uint16_t shift = (uint16_t)((clamp(byte, 2, 252) - 127) * 128);
  return (u16x32)scaled((u32x16)values, shift - u16x32{});
}

// An entry of `width` channels as bfloat16; see Attention for `kept`.
inline void unpack_entry(const char* from, int64_t width, int64_t kept, uint16_t* to) {
  const int64_t plain = width - kept;
  const char* scales = from + plain + 2 * kept;
  for (int64_t i = 0; i < plain; i += 32) {
    u16x32 code = __builtin_convertvector(load<u8x32>(from + i), u16x32);
    store(to + i, with_scale(Fp8Row::words(code), (uint8_t)scales[i / 64]));
  }
  std::memcpy(to + plain, from + plain, 2 * kept);
}

// An indexer key of `width` channels (a multiple of 64) as bfloat16.
inline void unpack_key(const char* from, int64_t width, uint16_t* to) {
  for (int64_t i = 0; i < width; i += 64) {
    u8x32 pairs = load<u8x32>(from + i / 2), low = pairs & 15, high = pairs >> 4;
    u8x32 first = __builtin_shufflevector(low, high, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38,
                                          7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14,
                                          46, 15, 47);
    u8x32 second = __builtin_shufflevector(low, high, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
                                           22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60,
                                           29, 61, 30, 62, 31, 63);
    const uint8_t* scale = reinterpret_cast<const uint8_t*>(from) + width / 2 + i / 32;
    auto values = [](u8x32 code) {
      return (u16x32)Fp4Row::values(__builtin_convertvector(code, u16x32));
    };
    store(to + i, with_scale(values(first), scale[0]));
    store(to + i + 32, with_scale(values(second), scale[1]));
  }
}

// ---------------------------------------------------------------- attention

// The keys of a query; returns how many. Packed ones are unpacked to `room`.
inline int64_t list_keys(const Attention& job, int64_t query, const char** keys, uint16_t* room) {
  const int64_t bytes = job.width_of_head * (job.is_bf16 ? 2 : 4);
  const int64_t own = job.earlier + query, first = own - job.width + 1;
  int64_t n = 0;
  for (int64_t i = first > 0 ? first : 0; i <= own; i++) {
    keys[n++] = static_cast<const char*>(job.window) + i * bytes;
  }
  if (job.rows.pieces == nullptr) return n;
  const int64_t near = n;
  if (job.chosen == nullptr) {
    const int64_t seen = (job.start + query + 1) / job.ratio;
    for (int64_t i = 0; i < seen; i++) keys[n++] = job.rows.row(i);
  } else {
    const int64_t* chosen = job.chosen + query * job.k;
    for (int64_t i = 0; i < job.k; i++) {
      if (chosen[i] >= 0) keys[n++] = job.rows.row(chosen[i]);
    }
  }
  if (job.kept == 0) return n;
  for (int64_t i = near; i < n; i++) {
    unpack_entry(keys[i], job.width_of_head, job.kept, room);
    keys[i] = reinterpret_cast<const char*>(room);
    room += job.width_of_head;
  }
  return n;
}

// How many keys a query has.
inline int64_t count_keys(const Attention& job, int64_t query) {
  const int64_t own = job.earlier + query;
  int64_t n = own + 1 < job.width ? own + 1 : job.width;
  if (job.rows.pieces == nullptr) return n;
  if (job.chosen == nullptr) return n + (job.start + query + 1) / job.ratio;
  for (int64_t i = 0; i < job.k; i++) n += job.chosen[query * job.k + i] >= 0;
  return n;
}

template <bool BF16>
inline void attend_as(const Attention& job, int64_t query, int64_t head, int64_t heads,
                      uint8_t* space) {
  const int64_t width = job.width_of_head, bytes = width * (BF16 ? 2 : 4);
  const char** keys = reinterpret_cast<const char**>(space);
  const int64_t count = count_keys(job, query), room = (count + 15) / 16 * 16;
  list_keys(job, query, keys, reinterpret_cast<uint16_t*>(space + room * (8 + 4 * dsv4::HEADS)));
  for (int64_t i = count; i < room; i++) keys[i] = keys[count - 1];  // their weights are zero
  float* scores = reinterpret_cast<float*>(space + room * sizeof(char*));
  float totals[dsv4::HEADS];
  const int64_t first = (query * job.heads + head) * bytes;
  for (int64_t h = 0; h < heads; h += 4) {
    FourRows q(static_cast<const char*>(job.q) + first + h * bytes, bytes, heads - h);
    for (int64_t i = 0; i < room; i += 4) {
      f32x16 score = dots<BF16>(q.x, keys + i, bytes) * job.scale;
      for (int j = 0; j < 4 && h + j < heads; j++) {
        store(scores + (h + j) * room + i, quarter(score, j));
      }
    }
  }
  for (int64_t h = 0; h < heads; h++) {
    float* mine = scores + h * room;
    f32x16 most = splat(-__builtin_inff());
    for (int64_t i = 0; i < room; i += 16) most = max(load<f32x16>(mine + i), most);
    const float top = largest(most);
    for (int64_t i = count; i < room; i++) mine[i] = -__builtin_inff();
    f32x16 total = {};
    for (int64_t i = 0; i < room; i += 16) {
      f32x16 e = exp(load<f32x16>(mine + i) - top);
      total = total + e;
      if (paired(BF16)) {
        store(reinterpret_cast<uint16_t*>(mine) + i, narrow(e));
      } else {
        store(mine + i, rounded(e, BF16));
      }
    }
    totals[h] = sum(total) + exp(splat(job.sink[head + h] - top))[0];
  }
  for (int64_t h = 0; h < heads; h += 4) {
    weigh<BF16>((int)(heads - h < 4 ? heads - h : 4), scores + h * room, room, keys,
                (count + 1) / 2 * 2, totals + h, static_cast<char*>(job.out) + first + h * bytes,
                width);
  }
}

}  // namespace

void attend(const Attention& job, int64_t query, int64_t head, int64_t heads, uint8_t* space) {
  FlushSubnormals guard;
  if (job.is_bf16) return attend_as<true>(job, query, head, heads, space);
  attend_as<false>(job, query, head, heads, space);
}

// ---------------------------------------------------------------- indexer
//
// A lane is a key: sixteen keys are turned into columns of words, each column is multiplied by one
// word of a head's query, and no sum ever crosses lanes.

namespace {

#if DSV4_PAIRS || defined(__AVX512F__) || defined(__aarch64__)
constexpr int SIXTEENS = 4;  // groups of keys at once
#else
constexpr int SIXTEENS = 2;
#endif

// Numbers of the first eight vectors and of the last eight in turn.
inline void riffle(const u32x16* from, u32x16* to) {
  for (int i = 0; i < 8; i++) {
    to[2 * i] = __builtin_shufflevector(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5,
                                        21, 6, 22, 7, 23);
    to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12,
                                            28, 13, 29, 14, 30, 15, 31);
  }
}

// Rows become columns.
inline void transpose(u32x16* v) {
  u32x16 t[16];
  riffle(v, t), riffle(t, v), riffle(v, t), riffle(t, v);
}

// columns[word][group] of the keys begin, begin + 1, ...; from `end` on, the last one again.
inline void turn(const IndexTopk& job, int64_t bytes, int64_t begin, int64_t end,
                 u32x16* columns) {
  alignas(64) uint16_t unpacked[16][dsv4::MAX_INDEX_WIDTH];
  for (int group = 0; group < SIXTEENS; group++) {
    const int64_t first = std::min(begin + 16 * group, end - 1);
    const bool one_piece = job.keys.each % 16 == 0 && first % 16 == 0;
    const char* start = job.keys.row(first);
    const char* keys[16];
    for (int i = 0; i < 16; i++) {
      const int64_t key = std::min(first + i, end - 1);
      keys[i] = one_piece ? start + (key - first) * job.keys.bytes : job.keys.row(key);
      if (!job.packed) continue;
      unpack_key(keys[i], job.width, unpacked[i]);
      keys[i] = reinterpret_cast<const char*>(unpacked[i]);
    }
    for (int64_t at = 0; at < bytes; at += 64) {
      u32x16 v[16];
      for (int i = 0; i < 16; i++) v[i] = load<u32x16>(keys[i] + at);
      transpose(v);
      for (int i = 0; i < 16; i++) columns[(at / 4 + i) * SIXTEENS + group] = v[i];
    }
  }
}

// All lanes alike. (GCC 12 cannot compile `x + u32x16{}` in a loop for AVX2.)
inline u32x16 everywhere(uint32_t x) {
  return u32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

// acc[head][group] = a head's query times sixteen keys.
template <bool BF16>
inline void multiply_columns(const FourRows& q, const u32x16* columns, int64_t words,
                             f32x16 (*acc)[SIXTEENS]) {
  f32x16 sums_of[4][SIXTEENS] = {};
  for (int64_t w = 0; w < words; w++) {
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++) {
      const u32x16 word = everywhere(load<uint32_t>(q.x[h] + 4 * w));
#pragma GCC unroll 4
      for (int g = 0; g < SIXTEENS; g++) {
        sums_of[h][g] = add_products<BF16>(sums_of[h][g], word, columns[w * SIXTEENS + g]);
      }
    }
  }
  std::memcpy(acc, sums_of, sizeof sums_of);
}

template <bool BF16>
inline void score_as(const IndexTopk& job, int64_t query, int64_t begin, int64_t end, float* out) {
  const int64_t bytes = job.width * (BF16 ? 2 : 4), heads = job.heads;
  const char* q = static_cast<const char*>(job.q) + query * heads * bytes;
  u32x16 columns[dsv4::MAX_INDEX_WIDTH * SIXTEENS];
  for (int64_t i = begin; i < end; i += 16 * SIXTEENS) {
    turn(job, bytes, i, end, columns);
    f32x16 totals[SIXTEENS] = {};
    for (int64_t h = 0; h < heads; h += 4) {
      f32x16 acc[4][SIXTEENS];
      multiply_columns<BF16>(FourRows(q + h * bytes, bytes, heads - h), columns, bytes / 4, acc);
      for (int j = 0; j < 4 && h + j < heads; j++) {
        const int64_t at = query * heads + h + j;
        const float weight = BF16 ? widen(static_cast<const uint16_t*>(job.weights)[at])
                                  : static_cast<const float*>(job.weights)[at];
        for (int g = 0; g < SIXTEENS; g++) {
          f32x16 dot = result_rounded(acc[j][g], BF16);
          dot = where(dot < f32x16{}, f32x16{}, dot) * splat(weight);
          totals[g] = totals[g] + result_rounded(dot, BF16);
        }
      }
    }
    for (int g = 0; g < SIXTEENS; g++) {
      const f32x16 total = rounded(totals[g], BF16) + f32x16{};  // no negative zero
      const int64_t at = i + 16 * g, left = end - at;
      if (left > 0) std::memcpy(out + at, &total, 4 * (left < 16 ? left : 16));
    }
  }
}

// Bits that are in the order of the numbers.
inline uint32_t sortable(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

}  // namespace

void index_scores(const IndexTopk& job, int64_t query, int64_t begin, int64_t end, float* out) {
  FlushSubnormals guard;
  if (job.is_bf16) return score_as<true>(job, query, begin, end, out);
  score_as<false>(job, query, begin, end, out);
}

void select(const float* scores, int64_t count, int64_t k, int64_t* out, int32_t* space) {
  if (count <= k) {
    for (int64_t i = 0; i < k; i++) out[i] = i < count ? i : -1;
    return;
  }
  // The k-th best, eleven bits at a time. After the first ones few are left to be looked at: those
  // in `space`, in their order.
  int64_t bins[2048] = {}, n = 0, wanted = k;  // `wanted` of those that agree in the known bits
  for (int64_t i = 0; i < count; i++) bins[sortable(scores[i]) >> 21]++;
  uint32_t bin = 2047;
  while (bins[bin] < wanted) wanted -= bins[bin--];
  uint32_t least = bin << 21, known = 0xFFE00000u;
  for (int64_t i = 0; i < count; i++) {
    space[n] = (int32_t)i;
    n += sortable(scores[i]) >= least;
  }
  for (int shift = 10; shift >= 0; shift -= 10) {
    std::memset(bins, 0, sizeof bins);
    for (int64_t i = 0; i < n; i++) {
      const uint32_t bits = sortable(scores[space[i]]);
      if ((bits & known) == least) bins[bits >> shift & 2047]++;
    }
    bin = 2047;
    while (bins[bin] < wanted) wanted -= bins[bin--];
    least |= bin << shift, known |= 2047u << shift;
  }
  for (int64_t i = 0, chosen = 0; chosen < k; i++) {
    const uint32_t bits = sortable(scores[space[i]]);
    if (bits > least) {
      out[chosen++] = space[i];
    } else if (bits == least && wanted > 0) {
      out[chosen++] = space[i], wanted--;
    }
  }
}

}  // namespace DSV4_ISA
