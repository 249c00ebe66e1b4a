// Attention with a gradient, by tiles, for the samples of a packed row: see training.h.
//
// A block is up to 32 tokens of a sample; a column is one head of one of them. Scores are kept as
// [keys, columns], so that a softmax runs down the columns, sixteen at a time. Keys are taken as
// they lie and, where they are values, in pairs side by side; both copies end in zeros.
#include "training.h"

#if defined(DSV4_TILES) && DSV4_TILES
#include <algorithm>

#include "functions.h"
#include "pool.h"
#include "tiles.h"

namespace DSV4_ISA {
namespace {

using dsv4::make_array;
using dsv4::Sample;
using dsv4::SampledAttention;

constexpr int64_t KEYS = 32;     // taken together
constexpr int64_t TOKENS = 32;   // of a block, at most
constexpr int64_t COLUMNS = 128;  // likewise
constexpr int64_t CHUNK = 256;   // keys of a block that are weighed at once, for the gradient

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline u32x16 widened(const uint16_t* from) {
  return __builtin_convertvector(load<u16x16>(from), u32x16);
}

// Two rows of bfloat16 become one of pairs.
inline void put_pairs(const uint16_t* even, const uint16_t* odd, int64_t dim, uint16_t* to) {
  for (int64_t d = 0; d < dim; d += LANES) {
    const u32x16 first = even ? widened(even + d) : u32x16{};
    const u32x16 second = odd ? widened(odd + d) : u32x16{};
    store(to + 2 * d, first | second << 16);
  }
}

// The keys of a sample: its own entries, then the compressed ones, each filled up to KEYS.
struct Keys {
  int64_t own, rows, dim;
  dsv4::Array<uint16_t> plain, pairs;

  Keys(const SampledAttention& a, const Sample& s)
      : own(up(s.tokens, KEYS)), rows(up(s.count, KEYS)), dim(a.dim),
        plain(make_array<uint16_t>(all() * dim)), pairs(make_array<uint16_t>(all() * dim)) {
    copy(a.kv + s.start * dim, s.tokens, own, 0);
    copy(s.rows, s.count, rows, own);
  }
  int64_t all() const { return own + rows; }

 private:
  void copy(const uint16_t* from, int64_t count, int64_t places, int64_t first) {
    uint16_t* to = plain.get() + first * dim;
    if (count > 0) std::memcpy(to, from, count * dim * 2);
    std::memset(to + count * dim, 0, (places - count) * dim * 2);
    for (int64_t i = 0; i < places; i += 2) {
      put_pairs(to + i * dim, to + (i + 1) * dim, dim, pairs.get() + (first + i) * dim);
    }
  }
};

// Rows of a block, [columns, dim] with zeros after the last, as tiles to multiply keys with; and as
// pairs of columns.
void put_columns(const uint16_t* from, int64_t count, int64_t columns, int64_t dim, uint8_t* to) {
  for (int64_t c = 0; c < columns; c += 16) {
    for (int64_t d = 0; d < dim; d += 32, to += TILE_BYTES) {
      u32x16 v[16];
      for (int64_t i = 0; i < 16; i++) {
        v[i] = c + i < count ? load<u32x16>(from + (c + i) * dim + d) : u32x16{};
      }
      transpose(v);
      for (int64_t i = 0; i < 16; i++) store(to + 64 * i, v[i]);
    }
  }
}

void put_column_pairs(const uint16_t* from, int64_t count, int64_t columns, int64_t dim,
                      uint16_t* to) {
  for (int64_t c = 0; c < columns; c += 2) {
    put_pairs(c < count ? from + c * dim : nullptr, c + 1 < count ? from + (c + 1) * dim : nullptr,
              dim, to + c * dim);
  }
}

inline void store_four(float* to, int64_t stride) {
  store_tile<0>(to, 4 * stride);
  store_tile<1>(to + 16, 4 * stride);
  store_tile<2>(to + 16 * stride, 4 * stride);
  store_tile<3>(to + 16 * stride + 16, 4 * stride);
}

inline void load_four(const float* from, int64_t stride) {
  load_tile<0>(from, 4 * stride);
  load_tile<1>(from + 16, 4 * stride);
  load_tile<2>(from + 16 * stride, 4 * stride);
  load_tile<3>(from + 16 * stride + 16, 4 * stride);
}

inline void zero_four() { zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>(); }

// C [32, 32] += A [32, 32] B [32, 32]: two tiles of each.
inline void add_four(const void* a0, const void* a1, int64_t a_stride, const void* b0,
                     const void* b1, int64_t b_stride) {
  load_tile<4>(a0, a_stride);
  load_tile<6>(b0, b_stride);
  dot_tiles<0, 4, 6>();
  load_tile<7>(b1, b_stride);
  dot_tiles<1, 4, 7>();
  load_tile<5>(a1, a_stride);
  dot_tiles<2, 5, 6>();
  dot_tiles<3, 5, 7>();
}

// Some tokens of a sample, and the keys that they may see.
struct Block {
  const SampledAttention& a;
  const Sample& s;
  const Keys& keys;
  int64_t tokens, begin, end, columns, used;  // columns that belong to tokens begin .. end - 1
  int64_t first, near, far;  // own entries from `first`, so many; then so many compressed ones
  dsv4::Array<uint32_t> seen;  // of each key, the tokens that see it
  uint16_t lanes[256];          // of a vector, the columns of the tokens named by some bits

  Block(const SampledAttention& a, const Sample& s, const Keys& keys, int64_t number)
      : a(a), s(s), keys(keys), tokens(tokens_of(a)), begin(number * tokens),
        end(std::min(s.tokens, begin + tokens)), columns(tokens * a.heads),
        used((end - begin) * a.heads),
        first(std::max<int64_t>(0, begin - a.width + 1) / KEYS * KEYS), near(up(end, KEYS) - first),
        far(s.count > 0 ? up(std::min(s.count, end / s.ratio), KEYS) : 0),
        seen(make_array<uint32_t>(near + far)) {
    for (int64_t k = 0; k < near; k++) {
      const int64_t at = first + k;
      seen[k] = at < end ? between(at, at + a.width) : 0;
    }
    std::fill_n(seen.get() + near, far, 0);
    if (far > 0 && s.chosen == nullptr) {
      for (int64_t k = 0; k < std::min(far, s.count); k++) {
        seen[near + k] = between((k + 1) * s.ratio - 1, end);
      }
    } else if (far > 0) {
      for (int64_t t = begin; t < end; t++) {
        for (int64_t i = 0; i < s.k; i++) {
          const int64_t row = s.chosen[t * s.k + i];
          if (row >= 0) seen[near + row] |= 1u << (t - begin);
        }
      }
    }
    const int64_t bits = tokens_of_vector(), each = 16 / bits;
    for (int64_t set = 0; set < 1 << std::min<int64_t>(bits, 8); set++) {
      lanes[set] = 0;
      for (int64_t b = 0; b < bits; b++) {
        if (set >> b & 1) lanes[set] |= (uint16_t)(((1u << each) - 1) << (b * each));
      }
    }
  }

  static int64_t tokens_of(const SampledAttention& a) {
    return std::min(TOKENS, COLUMNS / a.heads);
  }
  int64_t tokens_of_vector() const { return std::max<int64_t>(1, 16 / a.heads); }
  int64_t count() const { return near + far; }

  // Where the keys k .. k + KEYS - 1 of the block are among all of the sample.
  int64_t place(int64_t k) const { return k < near ? first + k : keys.own + k - near; }

  // Columns 16 v .. of the tokens that see a key.
  __mmask16 mask(int64_t k, int64_t v) const {
    const uint32_t bits = seen[k] >> (a.heads > 16 ? v * 16 / a.heads : v * tokens_of_vector());
    if (a.heads == 1) return (__mmask16)bits;
    return lanes[bits & ((1u << tokens_of_vector()) - 1)];
  }

  f32x16 sinks(int64_t v) const {
    f32x16 x;
    for (int64_t i = 0; i < LANES; i++) x[i] = a.sink[(16 * v + i) % a.heads];
    return x;
  }

  // Products [count, columns] of keys from .. from + count - 1 of the block with columns.
  void products(const uint8_t* side, int64_t from, int64_t count, float* to) const {
    const int64_t steps = a.dim / 32;
    for (int64_t c = 0; c < columns; c += 32) {
      const uint8_t* b = side + c / 16 * steps * TILE_BYTES;
      for (int64_t k = 0; k < count; k += KEYS) {
        const uint16_t* x = keys.plain.get() + place(from + k) * a.dim;
        zero_four();
        for (int64_t i = 0; i < steps; i++) {
          add_four(x + 32 * i, x + 16 * a.dim + 32 * i, 2 * a.dim, b + i * TILE_BYTES,
                   b + (steps + i) * TILE_BYTES, 64);
        }
        store_four(to + k * columns + c, columns);
      }
    }
  }

  // sums [columns, dim] (+)= weights, tiles [columns / 16, many] of which `count` keys are used,
  // times the keys from .. as values.
  void values(const uint8_t* weights, int64_t many, int64_t from, int64_t count, bool add,
              float* sums) const {
    for (int64_t d = 0; d < a.dim; d += 32) {
      for (int64_t c = 0; c < columns; c += 32) {
        const uint8_t* w = weights + c / 16 * many * TILE_BYTES;
        float* to = sums + c * a.dim + d;
        if (add) {
          load_four(to, a.dim);
        } else {
          zero_four();
        }
        for (int64_t k = 0; k < count; k += KEYS) {
          const uint16_t* y = keys.pairs.get() + place(from + k) * a.dim + 2 * d;
          add_four(w + k / KEYS * TILE_BYTES, w + (many + k / KEYS) * TILE_BYTES, 64, y, y + 32,
                   4 * a.dim);
        }
        store_four(to, a.dim);
      }
    }
  }

  // Places of q, out and their gradients.
  int64_t row() const { return (s.start + begin) * a.heads; }

 private:
  uint32_t between(int64_t from, int64_t to) const {  // tokens of the block, as bits
    const int64_t low = std::max(from, begin) - begin, high = std::min(to, end) - begin;
    if (high <= low) return 0;
    return (uint32_t)((1ull << high) - (1ull << low));
  }
};

// Sixteen columns of 32 keys, in pairs, become one tile of weights: sixteen rows of 32 keys.
inline void put_weights(u32x16* pairs, uint8_t* to) {
  transpose(pairs);
  for (int i = 0; i < 16; i++) store(to + 64 * i, pairs[i]);
}

void attend(const SampledAttention& a, const Sample& s, const Keys& keys, int64_t number) {
  FlushSubnormals flush;
  const Block b(a, s, keys, number);
  const int64_t count = b.count(), many = count / KEYS;
  auto side = make_array<uint8_t>(b.columns * a.dim * 2);
  auto scores = make_array<float>(count * b.columns);
  auto weights = make_array<uint8_t>(count * b.columns * 2);
  auto sums = make_array<float>(b.columns * a.dim);
  alignas(64) float inverse[COLUMNS];
  Tiles tiles(16);
  put_columns(a.q + b.row() * a.dim, b.used, b.columns, a.dim, side.get());
  b.products(side.get(), 0, count, scores.get());
  const f32x16 scale = splat(a.scale);
  for (int64_t v = 0; v < b.columns / 16; v++) {
    const float* at = scores.get() + 16 * v;
    const f32x16 sink = b.sinks(v);
    f32x16 top = sink / scale;
    for (int64_t k = 0; k < count; k++) {
      const auto x = (__m512)load<f32x16>(at + k * b.columns);
      top = (f32x16)_mm512_mask_max_ps((__m512)top, b.mask(k, v), (__m512)top, x);
    }
    top = top * scale;
    f32x16 total = exp(sink - top);
    for (int64_t k = 0; k < count; k += KEYS) {
      u32x16 pairs[16];
      for (int64_t i = 0; i < KEYS; i += 2) {
        f32x16 e[2];
        for (int64_t j = 0; j < 2; j++) {
          const f32x16 x = fma(load<f32x16>(at + (k + i + j) * b.columns), scale, -top);
          e[j] = (f32x16)_mm512_maskz_mov_ps(b.mask(k + i + j, v), (__m512)exp(x));
          total = total + e[j];
        }
        pairs[i / 2] = narrow_pairs(e[0], e[1]);
      }
      put_weights(pairs, weights.get() + (v * many + k / KEYS) * TILE_BYTES);
    }
    store(inverse + 16 * v, 1.0f / total);
    for (int64_t i = 0; i < LANES && 16 * v + i < b.used; i++) {
      a.log_sum[b.row() + 16 * v + i] = top[i] + __builtin_logf(total[i]);
    }
  }
  b.values(weights.get(), many, 0, count, false, sums.get());
  for (int64_t c = 0; c < b.used; c++) {
    for (int64_t d = 0; d < a.dim; d += LANES) {
      const f32x16 x = load<f32x16>(sums.get() + c * a.dim + d) * splat(inverse[c]);
      store(a.out + (b.row() + c) * a.dim + d, _mm512_cvtneps_pbh((__m512)x));
    }
  }
}

// What the blocks of a part need, made once.
struct Workspace {
  dsv4::Array<uint8_t> q_side, g_side, to_values;
  dsv4::Array<uint16_t> q_pairs, g_pairs, p, ds;
  dsv4::Array<float> scores, more, sums;

  Workspace(int64_t columns, int64_t dim)
      : q_side(make_array<uint8_t>(columns * dim * 2)),
        g_side(make_array<uint8_t>(columns * dim * 2)),
        to_values(make_array<uint8_t>(CHUNK * columns * 2)),
        q_pairs(make_array<uint16_t>(columns * dim)), g_pairs(make_array<uint16_t>(columns * dim)),
        p(make_array<uint16_t>(CHUNK * columns)), ds(make_array<uint16_t>(CHUNK * columns)),
        scores(make_array<float>(CHUNK * columns)), more(make_array<float>(CHUNK * columns)),
        sums(make_array<float>(columns * dim)) {}
};

// dkeys [all keys of the sample, dim] += the block's share; dsinks [heads] += likewise.
void attend_back(const SampledAttention& a, const Sample& s, const Keys& keys, int64_t number,
                 Workspace& w, float* dkeys, float* dsinks) {
  const Block b(a, s, keys, number);
  const int64_t many = CHUNK / KEYS;
  const uint16_t *q = a.q + b.row() * a.dim, *g = a.grad + b.row() * a.dim;
  alignas(64) float dots[COLUMNS] = {}, log_sums[COLUMNS] = {};
  for (int64_t c = 0; c < b.used; c++) {
    f32x16 dot = {};
    for (int64_t d = 0; d < a.dim; d += LANES) {
      dot = fma(get(g, true, c * a.dim + d), get(a.out, true, (b.row() + c) * a.dim + d), dot);
    }
    dots[c] = sum(dot);
    log_sums[c] = a.log_sum[b.row() + c];
    dsinks[c % a.heads] -= __builtin_expf(a.sink[c % a.heads] - log_sums[c]) * dots[c];
  }
  Tiles tiles(16);
  put_columns(q, b.used, b.columns, a.dim, w.q_side.get());
  put_columns(g, b.used, b.columns, a.dim, w.g_side.get());
  put_column_pairs(q, b.used, b.columns, a.dim, w.q_pairs.get());
  put_column_pairs(g, b.used, b.columns, a.dim, w.g_pairs.get());
  const f32x16 scale = splat(a.scale);
  for (int64_t from = 0; from < b.count(); from += CHUNK) {
    const int64_t count = std::min(CHUNK, b.count() - from);
    b.products(w.q_side.get(), from, count, w.scores.get());
    b.products(w.g_side.get(), from, count, w.more.get());
    for (int64_t v = 0; v < b.columns / 16; v++) {
      const f32x16 log_sum = load<f32x16>(log_sums + 16 * v), dot = load<f32x16>(dots + 16 * v);
      for (int64_t k = 0; k < count; k += KEYS) {
        u32x16 pairs[16];
        for (int64_t i = 0; i < KEYS; i += 2) {
          f32x16 ds[2];
          for (int64_t j = 0; j < 2; j++) {
            const int64_t at = (k + i + j) * b.columns + 16 * v;
            f32x16 p = exp(fma(load<f32x16>(w.scores.get() + at), scale, -log_sum));
            p = (f32x16)_mm512_maskz_mov_ps(b.mask(from + k + i + j, v), (__m512)p);
            ds[j] = p * (load<f32x16>(w.more.get() + at) - dot) * scale;
            store(w.p.get() + at, _mm512_cvtneps_pbh((__m512)p));
            store(w.ds.get() + at, _mm512_cvtneps_pbh((__m512)ds[j]));
          }
          pairs[i / 2] = narrow_pairs(ds[0], ds[1]);
        }
        put_weights(pairs, w.to_values.get() + (v * many + k / KEYS) * TILE_BYTES);
      }
    }
    b.values(w.to_values.get(), many, from, count, from > 0, w.sums.get());
    for (int64_t d = 0; d < a.dim; d += 32) {
      for (int64_t k = 0; k < count; k += KEYS) {
        float* to = dkeys + b.place(from + k) * a.dim + d;
        load_four(to, a.dim);
        for (int64_t c = 0; c < b.columns; c += 32) {
          const int64_t at = k * b.columns + c, side = c * a.dim + 2 * d;
          const uint16_t *ds = w.ds.get() + at, *p = w.p.get() + at;
          const uint16_t *x = w.q_pairs.get() + side, *y = w.g_pairs.get() + side;
          add_four(ds, ds + 16 * b.columns, 2 * b.columns, x, x + 32, 4 * a.dim);
          add_four(p, p + 16 * b.columns, 2 * b.columns, y, y + 32, 4 * a.dim);
        }
        store_four(to, a.dim);
      }
    }
  }
  for (int64_t c = 0; c < b.used; c++) {
    for (int64_t d = 0; d < a.dim; d += LANES) {
      const auto x = (__m512)load<f32x16>(w.sums.get() + c * a.dim + d);
      store(a.dq + (b.row() + c) * a.dim + d, _mm512_cvtneps_pbh(x));
    }
  }
}

}  // namespace

int64_t blocks_of(const SampledAttention& a, const Sample& s) {
  const int64_t tokens = Block::tokens_of(a);
  return (s.tokens + tokens - 1) / tokens;
}

void attend_sample(const SampledAttention& a, const Sample& s, int threads) {
  const Keys keys(a, s);
  auto task = [&](int64_t number) { attend(a, s, keys, number); };
  dsv4::parallel(threads, blocks_of(a, s), task);
}

void attend_sample_back(const SampledAttention& a, const Sample& s, int threads, float* dsinks) {
  // Blocks are divided among as many sums of the keys' gradient as their number says, not the
  // threads', so that the gradient does not depend on these.
  const Keys keys(a, s);
  const int64_t blocks = blocks_of(a, s), parts = blocks < 8 ? 1 : 2, size = keys.all() * a.dim;
  auto dkeys = make_array<float>(parts * size);
  auto sinks = make_array<float>(parts * a.heads);
  std::fill_n(sinks.get(), parts * a.heads, 0.0f);
  auto task = [&](int64_t part) {
    FlushSubnormals flush;
    Workspace w(Block::tokens_of(a) * a.heads, a.dim);
    float* mine = dkeys.get() + part * size;
    std::memset(mine, 0, size * sizeof(float));
    for (int64_t number = part; number < blocks; number += parts) {
      attend_back(a, s, keys, number, w, mine, sinks.get() + part * a.heads);
    }
  };
  dsv4::parallel(threads, parts, task);
  auto write = [&](int64_t from, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < count * a.dim; i += LANES) {
      f32x16 x = load<f32x16>(dkeys.get() + from * a.dim + i);
      if (parts > 1) x = x + load<f32x16>(dkeys.get() + size + from * a.dim + i);
      store(to + i, _mm512_cvtneps_pbh((__m512)x));
    }
  };
  write(0, s.tokens, a.dkv + s.start * a.dim);
  write(keys.own, s.count, s.drows);
  for (int64_t h = 0; h < a.heads; h++) {
    dsinks[h] = sinks[h] + (parts > 1 ? sinks[a.heads + h] : 0);
  }
}

}  // namespace DSV4_ISA
#endif
