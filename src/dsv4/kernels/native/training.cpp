// One row, or one pooled entry, of training.h.
#include "training.h"

#include <vector>

#include "functions.h"
#include "tiles.h"

namespace DSV4_ISA {
namespace {

constexpr int H = dsv4::STREAMS;
using dsv4::Pooling;

inline void write(void* row, bool is_bf16, int64_t i, f32x16 x) {
#if DSV4_PAIRS  // rounds like narrow, but for subnormals, which become zero
  if (is_bf16) {
    const __m256bh y = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(static_cast<uint16_t*>(row) + i, &y, sizeof y);
    return;
  }
#endif
  put(row, is_bf16, i, x);
}

void collapse(const void* streams, bool is_bf16, int64_t d, const float* pre, void* x) {
  FlushSubnormals flush;
  for (int64_t v = 0; v < d; v += LANES) {
    f32x16 total = {};
    for (int i = 0; i < H; i++) total = fma(splat(pre[i]), get(streams, is_bf16, i * d + v), total);
    write(x, is_bf16, v, total);
  }
}

void dots(const void* streams, const void* dx, bool is_bf16, int64_t d, float* dpre) {
  f32x16 totals[H] = {};
  for (int64_t v = 0; v < d; v += LANES) {
    f32x16 g = get(dx, is_bf16, v);
    for (int i = 0; i < H; i++) totals[i] = fma(g, get(streams, is_bf16, i * d + v), totals[i]);
  }
  for (int i = 0; i < H; i++) dpre[i] = sum(totals[i]);
}

void collapse_back(const void* streams, const void* dx, bool is_bf16, int64_t d, const float* pre,
                   float factor, void* dstreams) {
  FlushSubnormals flush;
  for (int64_t v = 0; v < d; v += LANES) {
    f32x16 g = get(dx, is_bf16, v);
    for (int i = 0; i < H; i++) {
      f32x16 more = get(dstreams, is_bf16, i * d + v);
      more = fma(splat(factor), get(streams, is_bf16, i * d + v), more);
      write(dstreams, is_bf16, i * d + v, fma(splat(pre[i]), g, more));
    }
  }
}

float squares(const void* streams, bool is_bf16, int64_t d) {
  f32x16 total = {};
  for (int64_t v = 0; v < H * d; v += LANES) {
    f32x16 x = get(streams, is_bf16, v);
    total = fma(x, x, total);
  }
  return sum(total);
}

void expand(const void* out, const void* streams, bool is_bf16, int64_t d, const float* post,
            const float* comb, void* fresh) {
  FlushSubnormals flush;
  for (int64_t v = 0; v < d; v += LANES) {
    f32x16 o = get(out, is_bf16, v), s[H];
    for (int i = 0; i < H; i++) s[i] = get(streams, is_bf16, i * d + v);
    for (int j = 0; j < H; j++) {
      f32x16 x = splat(post[j]) * o;
      for (int i = 0; i < H; i++) x = fma(splat(comb[H * i + j]), s[i], x);
      write(fresh, is_bf16, j * d + v, x);
    }
  }
}

void expand_back(const void* grad, const void* out, const void* streams, bool is_bf16, int64_t d,
                 const float* post, const float* comb, void* dout, void* dstreams, float* dpost,
                 float* dcomb) {
  FlushSubnormals flush;
  f32x16 to_post[H] = {}, to_comb[H][H] = {};
  for (int64_t v = 0; v < d; v += LANES) {
    f32x16 o = get(out, is_bf16, v), g[H], x = {};
    for (int j = 0; j < H; j++) {
      g[j] = get(grad, is_bf16, j * d + v);
      x = fma(splat(post[j]), g[j], x);
      to_post[j] = fma(g[j], o, to_post[j]);
    }
    write(dout, is_bf16, v, x);
    for (int i = 0; i < H; i++) {
      f32x16 s = get(streams, is_bf16, i * d + v), ds = {};
      for (int j = 0; j < H; j++) {
        ds = fma(splat(comb[H * i + j]), g[j], ds);
        to_comb[i][j] = fma(s, g[j], to_comb[i][j]);
      }
      write(dstreams, is_bf16, i * d + v, ds);
    }
  }
  for (int i = 0; i < H; i++) {
    dpost[i] = sum(to_post[i]);
    for (int j = 0; j < H; j++) dcomb[H * i + j] = sum(to_comb[i][j]);
  }
}

// Up to sixteen matrices, one in each lane: entry e of all of them is one vector.
constexpr int SQUARE = H * H;

void transpose_in(const float* from, int64_t count, f32x16* m) {
  for (int e = 0; e < SQUARE; e++) {
    m[e] = splat(1.0f);
    for (int64_t l = 0; l < count; l++) m[e][l] = from[SQUARE * l + e];
  }
}

void transpose_out(const f32x16* m, int64_t count, float* to) {
  for (int e = 0; e < SQUARE; e++) {
    for (int64_t l = 0; l < count; l++) to[SQUARE * l + e] = m[e][l];
  }
}

// Entry k of line i: of a column in the first step and every second one after it, else of a row.
inline int entry(int step, int i, int k) { return step % 2 == 0 ? H * k + i : H * i + k; }

void normalise(f32x16* m, int step, float eps, f32x16* totals) {
  for (int i = 0; i < H; i++) {
    f32x16 total = splat(eps);
    for (int k = 0; k < H; k++) total = total + m[entry(step, i, k)];
    for (int k = 0; k < H; k++) m[entry(step, i, k)] = m[entry(step, i, k)] / total;
    totals[i] = total;
  }
}

void sinkhorn(const float* matrices, int64_t count, int iters, float eps, float* out) {
  f32x16 m[SQUARE], totals[H];
  transpose_in(matrices, count, m);
  for (int step = 0; step < 2 * iters - 1; step++) normalise(m, step, eps, totals);
  transpose_out(m, count, out);
}

void sinkhorn_back(const float* matrices, const float* grad, int64_t count, int iters, float eps,
                   float* dmatrices) {
  constexpr int MOST = 64;  // steps kept; the caller checks
  f32x16 kept[MOST][SQUARE], totals[MOST][H], m[SQUARE], g[SQUARE];
  transpose_in(matrices, count, m);
  transpose_in(grad, count, g);
  for (int step = 0; step < 2 * iters - 1; step++) {
    normalise(m, step, eps, totals[step]);
    std::memcpy(kept[step], m, sizeof m);
  }
  // y = x / (s + eps) has dx = (dy - sum(dy * y)) / (s + eps)
  for (int step = 2 * iters - 2; step >= 0; step--) {
    for (int i = 0; i < H; i++) {
      f32x16 dot = {};
      for (int k = 0; k < H; k++) {
        dot = fma(g[entry(step, i, k)], kept[step][entry(step, i, k)], dot);
      }
      for (int k = 0; k < H; k++) {
        g[entry(step, i, k)] = (g[entry(step, i, k)] - dot) / totals[step][i];
      }
    }
  }
  transpose_out(g, count, dmatrices);
}

// The pairs of a vector turned by (cosine, sine) pairs.
inline f32x16 turned(f32x16 x, f32x16 turn, bool inverse) {
  f32x16 cosines = __builtin_shufflevector(turn, turn, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12,
                                           14, 14);
  f32x16 sines = __builtin_shufflevector(turn, turn, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13,
                                         15, 15);
  f32x16 other = __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  const f32x16 sign = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
  return fma(x, cosines, other * sines * (inverse ? -sign : sign));
}

inline float root_of(const void* x, bool is_bf16, int64_t d, float eps) {
  f32x16 total = {};
  for (int64_t v = 0; v < d; v += LANES) {
    f32x16 a = get(x, is_bf16, v);
    total = fma(a, a, total);
  }
  return 1.0f / __builtin_sqrtf(sum(total) / (float)d + eps);
}

void norm_rope(const void* x, bool is_bf16, int64_t d, const float* turn, int64_t width, bool norm,
               bool inverse, float eps, void* out) {
  const float root = norm ? root_of(x, is_bf16, d, eps) : 1.0f;
  for (int64_t v = 0; v < d; v += LANES) {
    f32x16 y = get(x, is_bf16, v) * root;
    const int64_t place = v - (d - 2 * width);
    write(out, is_bf16, v, place < 0 ? y : turned(y, load<f32x16>(turn + place), inverse));
  }
}

void norm_rope_back(const void* x, const void* grad, bool is_bf16, int64_t d, const float* turn,
                    int64_t width, float eps, void* dx) {
  FlushSubnormals flush;
  const float root = root_of(x, is_bf16, d, eps);
  auto back = [&](int64_t v) {
    f32x16 g = get(grad, is_bf16, v);
    const int64_t place = v - (d - 2 * width);
    return place < 0 ? g : turned(g, load<f32x16>(turn + place), true);
  };
  f32x16 dot = {};
  for (int64_t v = 0; v < d; v += LANES) dot = fma(back(v), get(x, is_bf16, v), dot);
  const f32x16 share = splat(-sum(dot) * root * root / (float)d);
  for (int64_t v = 0; v < d; v += LANES) {
    write(dx, is_bf16, v, fma(share, get(x, is_bf16, v), back(v)) * root);
  }
}

void norm(const void* x, bool is_bf16, int64_t d, const float* weight, float eps, void* y) {
  FlushSubnormals flush;
  const float root = root_of(x, is_bf16, d, eps);
  for (int64_t v = 0; v < d; v += LANES) {
    write(y, is_bf16, v, get(x, is_bf16, v) * root * load<f32x16>(weight + v));
  }
}

void norm_back(const void* x, const void* grad, bool is_bf16, int64_t d, const float* weight,
               float eps, void* dx, float* dweight) {
  FlushSubnormals flush;
  const float root = root_of(x, is_bf16, d, eps);
  f32x16 dot = {};
  for (int64_t v = 0; v < d; v += LANES) {
    const f32x16 g = get(grad, is_bf16, v), a = get(x, is_bf16, v);
    dot = fma(g * load<f32x16>(weight + v), a, dot);
    store(dweight + v, fma(g, a * root, load<f32x16>(dweight + v)));
  }
  const f32x16 share = splat(-sum(dot) * root * root / (float)d);
  for (int64_t v = 0; v < d; v += LANES) {
    const f32x16 g = get(grad, is_bf16, v) * load<f32x16>(weight + v);
    write(dx, is_bf16, v, fma(share, get(x, is_bf16, v), g) * root);
  }
}

float dot(const void* a, const void* b, bool is_bf16, int64_t d) {
  f32x16 total = {};
  for (int64_t v = 0; v < d; v += LANES) total = fma(get(a, is_bf16, v), get(b, is_bf16, v), total);
  return sum(total);
}

// Numbers of any count: what is left of the last vector is zero, and not written.
struct Ragged {
  const int64_t count;

  template <class F>
  void each(F f) const {
    for (int64_t v = 0; v < count; v += LANES) f(v, count - v < LANES ? count - v : LANES);
  }
  static f32x16 read(const void* x, bool is_bf16, int64_t v, int64_t n) {
    if (n == LANES) return get(x, is_bf16, v);
    f32x16 some = {};
    for (int64_t i = 0; i < n; i++) {
      some[i] = is_bf16 ? widen(static_cast<const uint16_t*>(x)[v + i])
                        : static_cast<const float*>(x)[v + i];
    }
    return some;
  }
  static void set(void* x, bool is_bf16, int64_t v, int64_t n, f32x16 y) {
    if (n == LANES) return write(x, is_bf16, v, y);
    for (int64_t i = 0; i < n; i++) {
      if (is_bf16) {
        static_cast<uint16_t*>(x)[v + i] = narrow(y[i]);
      } else {
        static_cast<float*>(x)[v + i] = y[i];
      }
    }
  }
};

void weigh(void* scores, bool is_bf16, int64_t keys, const uint8_t* hidden, float sink) {
  FlushSubnormals flush;
  constexpr float LOWEST = -3e38f;
  static thread_local std::vector<float> kept;
  kept.resize(keys + LANES);
  float* e = kept.data();
  const Ragged all{keys};
  f32x16 top = splat(sink);
  all.each([&](int64_t v, int64_t n) {
    f32x16 x = Ragged::read(scores, is_bf16, v, n);
    if (v == 0) x[0] = sink;
    for (int64_t i = n; i < LANES; i++) x[i] = LOWEST;
    if (hidden) {
      typedef uint8_t u8x16 __attribute__((vector_size(16)));
      u8x16 some = {};
      if (n == LANES) {
        some = load<u8x16>(hidden + v);
      } else {
        std::memcpy(&some, hidden + v, n);
      }
      x = where(__builtin_convertvector(some, i32x16) != 0, splat(LOWEST), x);
    }
    top = max(top, x);
    store(e + v, x);
  });
  const f32x16 most = splat(largest(top));
  f32x16 total = {};
  all.each([&](int64_t v, int64_t) {
    const f32x16 x = exp(load<f32x16>(e + v) - most);
    total = total + x;
    store(e + v, x);
  });
  const f32x16 share = splat(1.0f / sum(total));
  all.each([&](int64_t v, int64_t n) {
    Ragged::set(scores, is_bf16, v, n, load<f32x16>(e + v) * share);
  });
}

float weigh_back(void* grad, const void* p, bool is_bf16, int64_t keys, float dot, float scale) {
  FlushSubnormals flush;
  float dsink = 0;
  Ragged{keys}.each([&](int64_t v, int64_t n) {
    const f32x16 g = Ragged::read(grad, is_bf16, v, n) - splat(dot);
    const f32x16 d = g * Ragged::read(p, is_bf16, v, n);
    if (v == 0) dsink = d[0];
    Ragged::set(grad, is_bf16, v, n, d * splat(scale));
  });
  return dsink;
}

float log_sum(const void* x, bool is_bf16, int64_t count) {
  FlushSubnormals flush;
  const Ragged all{count};
  f32x16 top = splat(-3e38f), total = {};
  all.each([&](int64_t v, int64_t n) {
    f32x16 a = Ragged::read(x, is_bf16, v, n);
    for (int64_t i = n; i < LANES; i++) a[i] = -3e38f;
    top = max(top, a);
  });
  const float most = largest(top);
  all.each([&](int64_t v, int64_t n) {
    f32x16 a = exp(Ragged::read(x, is_bf16, v, n) - splat(most));
    for (int64_t i = n; i < LANES; i++) a[i] = 0;
    total = total + a;
  });
  return most + __builtin_logf(sum(total));
}

void shares(void* x, bool is_bf16, int64_t count, float log_sum, int64_t target, float scale) {
  FlushSubnormals flush;
  Ragged{count}.each([&](int64_t v, int64_t n) {
    f32x16 a = exp(Ragged::read(x, is_bf16, v, n) - splat(log_sum)) * splat(scale);
    if (target >= v && target < v + n) a[target - v] -= scale;
    Ragged::set(x, is_bf16, v, n, a);
  });
}

struct Gated {
  f32x16 s, silu, up, dgate, dup;  // the last two: 1 where a gradient passes the clamp, else 0

  Gated(const void* gate, const void* up_row, bool is_bf16, int64_t v, float limit) {
    f32x16 g = get(gate, is_bf16, v);
    up = get(up_row, is_bf16, v);
    dgate = dup = splat(1.0f);
    if (limit > 0) {
      dgate = where(g > splat(limit), f32x16{}, dgate);
      dup = where(abs(up) > splat(limit), f32x16{}, dup);
      g = where(g > splat(limit), splat(limit), g);
      up = where(up > splat(limit), splat(limit), where(up < splat(-limit), splat(-limit), up));
    }
    s = 1.0f / (1.0f + exp(-g));
    silu = g * s;
    dgate = dgate * s * (1.0f + g * (1.0f - s));
  }
};

void swiglu(const void* gate, const void* up, bool is_bf16, int64_t width, float weight,
            float limit, void* act) {
  FlushSubnormals flush;
  for (int64_t v = 0; v < width; v += LANES) {
    Gated at(gate, up, is_bf16, v, limit);
    write(act, is_bf16, v, splat(weight) * at.silu * at.up);
  }
}

float swiglu_back(const void* gate, const void* up, const void* grad, bool is_bf16, int64_t width,
                  float weight, float limit, void* dgate, void* dup) {
  FlushSubnormals flush;
  f32x16 dweight = {};
  for (int64_t v = 0; v < width; v += LANES) {
    Gated at(gate, up, is_bf16, v, limit);
    f32x16 g = get(grad, is_bf16, v);
    dweight = fma(g, at.silu * at.up, dweight);
    g = g * weight;
    write(dup, is_bf16, v, g * at.silu * at.dup);
    write(dgate, is_bf16, v, g * at.up * at.dgate);
  }
  return sum(dweight);
}

// f(where a row of this entry begins in kv and gate, where in bias), for all its rows.
template <class F>
inline void each_row(const Pooling& p, int64_t block, F f) {
  const int64_t wide = p.overlap ? 2 * p.dim : p.dim;
  if (p.overlap && block > 0) {
    for (int64_t r = 0; r < p.ratio; r++) f(((block - 1) * p.ratio + r) * wide, r * wide);
  }
  const int64_t column = p.overlap ? p.dim : 0;
  for (int64_t r = 0; r < p.ratio; r++) f((block * p.ratio + r) * wide + column, r * wide + column);
}

// Sixteen channels of an entry: how much each row weighs, before division by `total`.
struct Softmax {
  const Pooling& p;
  int64_t v;
  f32x16 top, total = {}, value = {};

  Softmax(const Pooling& p, int64_t block, int64_t v) : p(p), v(v), top(splat(-3e38f)) {
    each_row(p, block, [&](int64_t at, int64_t bias) { top = max(logit(at, bias), top); });
    each_row(p, block, [&](int64_t at, int64_t bias) {
      f32x16 e = weight(at, bias);
      total = total + e;
      value = fma(e, get(p.kv, p.is_bf16, at + v), value);
    });
    value = value / total;
  }
  f32x16 logit(int64_t at, int64_t bias) const {
    return get(p.gate, p.is_bf16, at + v) + load<f32x16>(p.bias + bias + v);
  }
  f32x16 weight(int64_t at, int64_t bias) const { return exp(logit(at, bias) - top); }
};

void pool(const Pooling& p, int64_t block, void* out) {
  for (int64_t v = 0; v < p.dim; v += LANES) write(out, p.is_bf16, v, Softmax(p, block, v).value);
}

void pool_back(const Pooling& p, int64_t block, const void* grad, void* dkv, void* dgate) {
  FlushSubnormals flush;
  for (int64_t v = 0; v < p.dim; v += LANES) {
    Softmax s(p, block, v);
    f32x16 g = get(grad, p.is_bf16, v) / s.total;
    each_row(p, block, [&](int64_t at, int64_t bias) {
      f32x16 share = g * s.weight(at, bias);
      write(dkv, p.is_bf16, at + v, share);
      write(dgate, p.is_bf16, at + v, share * (get(p.kv, p.is_bf16, at + v) - s.value));
    });
  }
}

}  // namespace

#if DSV4_TILES
void attend_sample(const dsv4::SampledAttention& a, const dsv4::Sample& s, int threads);
void attend_sample_back(const dsv4::SampledAttention& a, const dsv4::Sample& s, int threads,
                        float* dsinks);
#else
constexpr decltype(dsv4::Training::attend) attend_sample = nullptr;
constexpr decltype(dsv4::Training::attend_back) attend_sample_back = nullptr;
#endif

extern const dsv4::Training training;
const dsv4::Training training = {collapse,       dots,      collapse_back,  squares,
                                 expand,         expand_back, sinkhorn,     sinkhorn_back,
                                 norm_rope,  norm_rope_back, norm,         norm_back,
                                 dot,        weigh,     weigh_back,     log_sum,
                                 shares,     swiglu,    swiglu_back,    pool,
                                 pool_back,  attend_sample, attend_sample_back};

}  // namespace DSV4_ISA
