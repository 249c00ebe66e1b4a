// The indexer: scores of keys, and the best of them.
//
// A lane is a key: sixteen keys are turned into columns of words, each column is multiplied by one
// word of a head's query, and no sum ever crosses lanes. Every 32 channels are summed by themselves
// and then added to the key's sum.
//
// FP4 numbers are small whole numbers times a power of two, and so are queries that were rounded
// alike. Then the sum over 32 channels is exact, and is computed with bytes: the same bits as with
// bfloat16, several times as fast. (index_tiles.h has what only AMX does.)
#include <algorithm>

#include "index_tiles.h"
#include "kernels.h"
#include "packed.h"

namespace DSV4_ISA {
namespace {

using dsv4::Best;
using dsv4::IndexTopk;

#if DSV4_PAIRS || defined(__AVX512F__) || defined(__aarch64__)
constexpr int SIXTEENS = 4;  // groups of keys at once
#else
constexpr int SIXTEENS = 2;
#endif
constexpr int TILE = 16 * SIXTEENS;
constexpr int AHEAD = 4 * TILE;  // keys that the memory is asked for in advance
static_assert(TILE <= dsv4::INDEX_TILE, "a tile's keys fit into what a Best has to spare");
constexpr int BLOCK = 32;        // channels that are summed by themselves: those of an FP4 scale
constexpr int64_t WIDTH = 128;   // of keys that are multiplied as bytes
constexpr int WORDS = WIDTH / 8; // of such a packed key, without its scales

// ---------------------------------------------------------------- columns

// Where the keys first .. first + 15 are; from `end` on, the last one again.
inline void find_keys(const IndexTopk& job, int64_t first, int64_t end, const char** keys) {
  first = std::min(first, end - 1);
  const bool one_piece = job.keys.each % 16 == 0 && first % 16 == 0;
  const char* start = job.keys.row(first);
  for (int i = 0; i < 16; i++) {
    const int64_t key = std::min(first + i, end - 1);
    keys[i] = one_piece ? start + (key - first) * job.keys.bytes : job.keys.row(key);
  }
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

// Asks the memory for the keys first, first + 1, ... of a tile, where they lie one after the other.
// (Not inlined, GCC thinks that it does nothing.)
__attribute__((always_inline)) inline void fetch(const IndexTopk& job, int64_t first, int64_t end) {
  if (job.keys.each % 16 != 0 || first % 16 != 0) return;
  for (; first + 16 <= end && first % TILE + 16 <= TILE; first += 16) {
    const auto* start = reinterpret_cast<const uint8_t*>(job.keys.row(first));
    for (int64_t byte = 0; byte < 16 * job.keys.bytes; byte += 64) prefetch(start + byte);
    if (first % TILE + 16 == TILE) return;
  }
}

// columns[word][group] of the keys begin, begin + 1, ... as numbers.
inline void turn(const IndexTopk& job, int64_t bytes, int64_t begin, int64_t end,
                 u32x16* columns) {
  alignas(64) uint16_t unpacked[16][dsv4::MAX_INDEX_WIDTH];
  for (int group = 0; group < SIXTEENS; group++) {
    const char* keys[16];
    find_keys(job, begin + 16 * group, end, keys);
    for (int i = 0; job.packed && i < 16; i++) {
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

// ---------------------------------------------------------------- keys as bytes

constexpr int ZERO = 12;  // what is added to twice an FP4 number to make it a byte without a sign
alignas(16) constexpr uint8_t TWICE[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                           12, 11, 10, 9,  8,  6,  4,  0};

// TWICE of each byte, which is a code.
inline u32x16 twice(u32x16 codes) {
#if defined(__AVX512BW__)
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)TWICE));
  return (u32x16)_mm512_shuffle_epi8(table, (__m512i)codes);
#elif defined(__AVX2__)
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)TWICE));
  for (int i = 0; i < 2; i++) {
    __m256i half = load<__m256i>((const char*)&codes + 32 * i);
    store((char*)&codes + 32 * i, _mm256_shuffle_epi8(table, half));
  }
  return codes;
#elif defined(__aarch64__)
  const uint8x16_t table = vld1q_u8(TWICE);
  for (int i = 0; i < 4; i++) {
    uint8_t* part = (uint8_t*)&codes + 16 * i;
    vst1q_u8(part, vqtbl1q_u8(table, vld1q_u8(part)));
  }
  return codes;
#else
  uint8_t* bytes = (uint8_t*)&codes;
  for (int i = 0; i < 64; i++) bytes[i] = TWICE[bytes[i]];
  return codes;
#endif
}

// sum + the products of four bytes with four that have a sign, in each lane.
inline i32x16 add_bytes(i32x16 sum, u32x16 bytes, u32x16 with_sign) {
#if defined(__AVX512VNNI__)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)with_sign);
#elif defined(__AVX512BW__)
  __m512i two = _mm512_maddubs_epi16((__m512i)bytes, (__m512i)with_sign);  // below 2^13
  return sum + (i32x16)_mm512_madd_epi16(two, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; i++) {
    __m256i a = load<__m256i>((const char*)&bytes + 32 * i);
    __m256i b = load<__m256i>((const char*)&with_sign + 32 * i);
    __m256i four = _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
    char* part = (char*)&sum + 32 * i;
    store(part, _mm256_add_epi32(load<__m256i>(part), four));
  }
  return sum;
#else
  for (int shift = 0; shift < 32; shift += 8) {
    i32x16 one = (i32x16)(with_sign << (24 - shift)) >> 24;
    sum = sum + (i32x16)(bytes >> shift & 255) * one;
  }
  return sum;
#endif
}

// All lanes alike. (GCC 12 cannot compile `x + u32x16{}` in a loop for AVX2.)
inline u32x16 everywhere(uint32_t x) {
  return u32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

// Keys of a tile: words of the channels 0, 2, 4, 6 and 1, 3, 5, 7 of every eight, and scales.
struct Bytes {
  u32x16 columns[WORDS][2][SIXTEENS];
  f32x16 scales[WIDTH / BLOCK][SIXTEENS];
};

inline void turn_packed(const IndexTopk& job, int64_t begin, int64_t end, Bytes& to) {
  for (int group = 0; group < SIXTEENS; group++) {
    const char* keys[16];
    find_keys(job, begin + 16 * group, end, keys);
    u32x16 v[16];
    uint32_t scales[16];
    for (int i = 0; i < 16; i++) {
      v[i] = load<u32x16>(keys[i]);
      scales[i] = load<uint32_t>(keys[i] + WIDTH / 2);
    }
    const u32x16 four = load<u32x16>(scales);
    transpose(v);
    for (int w = 0; w < WORDS; w++) {
      to.columns[w][0][group] = twice(v[w] & 0x0F0F0F0Fu);
      to.columns[w][1][group] = twice(v[w] >> 4 & 0x0F0F0F0Fu);
    }
    for (int block = 0; block < WIDTH / BLOCK; block++) {
      i32x16 scale = (i32x16)(four >> 8 * block & 255);
      scale = scale < 2 ? i32x16{} + 2 : scale > 252 ? i32x16{} + 252 : scale;
      to.scales[block][group] = (f32x16)(scale << 23);
    }
  }
}

// A head's query as bytes, in the order of `Bytes`.
struct ByteQuery {
  uint32_t words[WORDS][2];
  int32_t start[WIDTH / BLOCK];  // minus what ZERO adds
  float scale[WIDTH / BLOCK];    // of byte times TWICE
};

// False when it is not made of small whole numbers times a power of two.
inline bool to_bytes(const uint16_t* from, ByteQuery& to) {
  int8_t bytes[WIDTH];
  for (int block = 0; block < WIDTH / BLOCK; block++) {
    const uint16_t* x = from + BLOCK * block;
    uint16_t most = 0;
    for (int i = 0; i < BLOCK; i++) most = std::max<uint16_t>(most, x[i] & 0x7FFF);
    const int exponent = most >> 7;  // the largest one becomes 64 .. 127
    if (most != 0 && (exponent < 40 || exponent > 200)) return false;
    const float up = widen((uint16_t)((254 + 6 - exponent) << 7));
    int32_t sum = 0;
    for (int i = 0; i < BLOCK; i++) {
      const float scaled = most == 0 ? 0.0f : widen(x[i]) * up;
      const int32_t whole = (int32_t)scaled;
      if ((float)whole != scaled) return false;
      bytes[BLOCK * block + i] = (int8_t)whole;
      sum += whole;
    }
    to.start[block] = -ZERO * sum;
    to.scale[block] = most == 0 ? 0.0f : 0.5f / up;
  }
  for (int w = 0; w < WORDS; w++) {
    for (int odd = 0; odd < 2; odd++) {
      int8_t four[4];
      for (int i = 0; i < 4; i++) four[i] = bytes[8 * w + 2 * i + odd];
      std::memcpy(&to.words[w][odd], four, 4);
    }
  }
  return true;
}

// acc[head][group] = the products of two heads with sixteen keys.
inline void multiply_bytes(const ByteQuery* const* q, const Bytes& keys,
                           f32x16 (*acc)[SIXTEENS]) {
  f32x16 dots[2][SIXTEENS] = {};
  for (int block = 0; block < WIDTH / BLOCK; block++) {
    i32x16 sums_of[2][SIXTEENS];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
#pragma GCC unroll 4
      for (int g = 0; g < SIXTEENS; g++) {
        sums_of[h][g] = (i32x16)everywhere((uint32_t)q[h]->start[block]);
      }
    }
#pragma GCC unroll 4
    for (int w = WORDS / 4 * block; w < WORDS / 4 * (block + 1); w++) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; odd++) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
          const u32x16 word = everywhere(q[h]->words[w][odd]);
#pragma GCC unroll 4
          for (int g = 0; g < SIXTEENS; g++) {
            sums_of[h][g] = add_bytes(sums_of[h][g], keys.columns[w][odd][g], word);
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const f32x16 scale = splat(q[h]->scale[block]);
#pragma GCC unroll 4
      for (int g = 0; g < SIXTEENS; g++) {
        f32x16 sum = __builtin_convertvector(sums_of[h][g], f32x16) * keys.scales[block][g];
        dots[h][g] = fma(sum, scale, dots[h][g]);
      }
    }
  }
  std::memcpy(acc, dots, sizeof dots);
}

// ---------------------------------------------------------------- keys as numbers

// acc[head][group] = the products of two heads with sixteen keys.
template <bool BF16>
inline void multiply_columns(const char* const* q, const u32x16* columns, int64_t words,
                             f32x16 (*acc)[SIXTEENS]) {
  constexpr int64_t EACH = BLOCK * (BF16 ? 2 : 4) / 4;  // words of a block
  f32x16 dots[2][SIXTEENS] = {};
  for (int64_t first = 0; first < words; first += EACH) {
    f32x16 sums_of[2][SIXTEENS] = {};
    for (int64_t w = first; w < first + EACH; w++) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const u32x16 word = everywhere(load<uint32_t>(q[h] + 4 * w));
#pragma GCC unroll 4
        for (int g = 0; g < SIXTEENS; g++) {
          sums_of[h][g] = add_products<BF16>(sums_of[h][g], word, columns[w * SIXTEENS + g]);
        }
      }
    }
    for (int h = 0; h < 2; h++) {
      for (int g = 0; g < SIXTEENS; g++) dots[h][g] = dots[h][g] + sums_of[h][g];
    }
  }
  std::memcpy(acc, dots, sizeof dots);
}

// ---------------------------------------------------------------- scores

// totals[group] += what two heads (or one) say of sixteen keys.
template <bool BF16>
inline void add_heads(const IndexTopk& job, int64_t at, int64_t heads,
                      const f32x16 (*acc)[SIXTEENS], f32x16* totals) {
  for (int64_t j = 0; j < heads; j++) {
    const float weight = BF16 ? widen(static_cast<const uint16_t*>(job.weights)[at + j])
                              : static_cast<const float*>(job.weights)[at + j];
    for (int g = 0; g < SIXTEENS; g++) {
      f32x16 dot = result_rounded(acc[j][g], BF16);
      dot = where(dot < f32x16{}, f32x16{}, dot) * splat(weight);
      totals[g] = totals[g] + result_rounded(dot, BF16);
    }
  }
}

// Numbers of a row of queries, by bytes where they can be.
struct Queries {
  const IndexTopk& job;
  ByteQuery* bytes;  // [queries, heads]
  bool* exact;       // [queries]

  Queries(const IndexTopk& job, int64_t first, int64_t queries, uint8_t* space)
      : job(job), bytes(reinterpret_cast<ByteQuery*>(space)) {
    exact = reinterpret_cast<bool*>(bytes + queries * job.heads);
    const bool fit = job.packed && job.is_bf16 && job.width == WIDTH && !with_tiles(job);
    for (int64_t i = 0; i < queries; i++) {
      const uint16_t* q = static_cast<const uint16_t*>(job.q) + (first + i) * job.heads * WIDTH;
      exact[i] = fit;
      for (int64_t h = 0; h < job.heads && exact[i]; h++) {
        exact[i] = to_bytes(q + h * WIDTH, bytes[i * job.heads + h]);
      }
    }
  }
};

inline void score_bytes(const IndexTopk& job, int64_t query, const ByteQuery* q, const Bytes& keys,
                        f32x16* totals) {
  for (int64_t h = 0; h < job.heads; h += 2) {
    f32x16 acc[2][SIXTEENS];
    const int64_t heads = std::min<int64_t>(2, job.heads - h);
    const ByteQuery* both[2] = {q + h, q + h + heads - 1};
    multiply_bytes(both, keys, acc);
    add_heads<true>(job, query * job.heads + h, heads, acc, totals);
  }
}

template <bool BF16>
inline void score_columns(const IndexTopk& job, int64_t query, const u32x16* columns,
                          f32x16* totals) {
  const int64_t bytes = job.width * (BF16 ? 2 : 4);
  const char* q = static_cast<const char*>(job.q) + query * job.heads * bytes;
  for (int64_t h = 0; h < job.heads; h += 2) {
    f32x16 acc[2][SIXTEENS];
    const int64_t heads = std::min<int64_t>(2, job.heads - h);
    const char* both[2] = {q + h * bytes, q + (h + heads - 1) * bytes};
    multiply_columns<BF16>(both, columns, bytes / 4, acc);
    add_heads<BF16>(job, query * job.heads + h, heads, acc, totals);
  }
}

// ---------------------------------------------------------------- the best

// Bits that are in the order of the numbers.
inline uint32_t sortable(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

}  // namespace

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

namespace {

// Lanes that are not known to be at most `least`.
inline uint32_t above(f32x16 x, float least) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_NLE_UQ);
#elif defined(__AVX2__)
  uint32_t mask = 0;
  for (int i = 0; i < 2; i++) {
    __m256 half = load<__m256>((const char*)&x + 32 * i);
    mask |= _mm256_movemask_ps(_mm256_cmp_ps(half, _mm256_set1_ps(least), _CMP_NLE_UQ)) << 8 * i;
  }
  return mask;
#else
  uint32_t mask = 0;
  for (int i = 0; i < LANES; i++) mask |= (uint32_t)!(x[i] <= least) << i;
  return mask;
#endif
}

// Keeps the k best of a list.
inline void thin(Best& best, int64_t k, int64_t* chosen, int32_t* space) {
  select(best.scores, best.count, k, chosen, space);
  uint32_t lowest = 0xFFFFFFFFu;
  for (int64_t i = 0; i < k; i++) {
    const float score = best.scores[chosen[i]];
    best.scores[i] = score, best.places[i] = best.places[chosen[i]];
    if (sortable(score) <= lowest) lowest = sortable(score), best.least = score;
  }
  best.count = k;
}

}  // namespace

void index_best(const IndexTopk& job, int64_t first, int64_t queries, int64_t begin, int64_t end,
                Best* best, uint8_t* space) {
  FlushSubnormals guard;
  const Queries rows(job, first, queries, space);
  const int64_t room = dsv4::best_room(job.k);
  auto* chosen = reinterpret_cast<int64_t*>(space + dsv4::index_space(job, queries, false));
  auto* places = reinterpret_cast<int32_t*>(chosen + job.k);
  const bool some_exact = std::any_of(rows.exact, rows.exact + queries, [](bool x) { return x; });
  const bool all_exact = std::all_of(rows.exact, rows.exact + queries, [](bool x) { return x; });
  Bytes keys;
  u32x16 columns[dsv4::MAX_INDEX_WIDTH * SIXTEENS];
  const int64_t bytes = job.width * (job.is_bf16 ? 2 : 4);
  const bool tiles = with_tiles(job);
  TiledIndex tiled(job, first, tiles ? queries : 0, space);
  for (int64_t i = begin; i < end; i += TILE) {
    fetch(job, i + AHEAD, end);
    for (int group = 0; tiles && group < SIXTEENS; group++) {
      const char* sixteen[16];
      find_keys(job, i + 16 * group, end, sixteen);
      tiled.bring(sixteen, group);
    }
    if (some_exact) turn_packed(job, i, end, keys);
    if (!all_exact && !tiles) turn(job, bytes, i, end, columns);
    for (int64_t q = 0; q < queries; q++) {
      const int64_t seen = job.seen(first + q), here = std::min<int64_t>(std::min(end, seen) - i, TILE);
      if (here <= 0 || seen <= job.k) continue;
      f32x16 totals[SIXTEENS] = {};
      if (tiles) {
        tiled.score(q, totals);
      } else if (rows.exact[q]) {
        score_bytes(job, first + q, rows.bytes + q * job.heads, keys, totals);
      } else if (job.is_bf16) {
        score_columns<true>(job, first + q, columns, totals);
      } else {
        score_columns<false>(job, first + q, columns, totals);
      }
      Best& list = best[q];
      for (int g = 0; 16 * g < here; g++) {
        const f32x16 scores = rounded(totals[g], job.is_bf16) + f32x16{};  // no negative zero
        uint32_t mask = above(scores, list.least);
        if (here - 16 * g < 16) mask &= (1u << (here - 16 * g)) - 1;
        for (; mask != 0; mask &= mask - 1) {
          const int lane = __builtin_ctz(mask);
          list.scores[list.count] = scores[lane];
          list.places[list.count++] = (int32_t)(i + 16 * g + lane);
        }
      }
      if (list.count > room - dsv4::INDEX_TILE) thin(list, job.k, chosen, places);
    }
  }
}

}  // namespace DSV4_ISA
