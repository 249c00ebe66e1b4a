// One row, or one pooled entry, of training.h.
#include "training.h"

#include "functions.h"

namespace DSV4_ISA {
namespace {

constexpr int H = dsv4::STREAMS;
using dsv4::Pooling;

void collapse(const void* streams, bool is_bf16, int64_t d, const float* pre, void* x) {
  for (int64_t v = 0; v < d; v += LANES) {
    f32x16 total = {};
    for (int i = 0; i < H; i++) total = fma(splat(pre[i]), get(streams, is_bf16, i * d + v), total);
    put(x, is_bf16, v, total);
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
  for (int64_t v = 0; v < d; v += LANES) {
    f32x16 g = get(dx, is_bf16, v);
    for (int i = 0; i < H; i++) {
      f32x16 more = get(dstreams, is_bf16, i * d + v);
      more = fma(splat(factor), get(streams, is_bf16, i * d + v), more);
      put(dstreams, is_bf16, i * d + v, fma(splat(pre[i]), g, more));
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
  for (int64_t v = 0; v < d; v += LANES) {
    f32x16 o = get(out, is_bf16, v), s[H];
    for (int i = 0; i < H; i++) s[i] = get(streams, is_bf16, i * d + v);
    for (int j = 0; j < H; j++) {
      f32x16 x = splat(post[j]) * o;
      for (int i = 0; i < H; i++) x = fma(splat(comb[H * i + j]), s[i], x);
      put(fresh, is_bf16, j * d + v, x);
    }
  }
}

void expand_back(const void* grad, const void* out, const void* streams, bool is_bf16, int64_t d,
                 const float* post, const float* comb, void* dout, void* dstreams, float* dpost,
                 float* dcomb) {
  f32x16 to_post[H] = {}, to_comb[H][H] = {};
  for (int64_t v = 0; v < d; v += LANES) {
    f32x16 o = get(out, is_bf16, v), g[H], x = {};
    for (int j = 0; j < H; j++) {
      g[j] = get(grad, is_bf16, j * d + v);
      x = fma(splat(post[j]), g[j], x);
      to_post[j] = fma(g[j], o, to_post[j]);
    }
    put(dout, is_bf16, v, x);
    for (int i = 0; i < H; i++) {
      f32x16 s = get(streams, is_bf16, i * d + v), ds = {};
      for (int j = 0; j < H; j++) {
        ds = fma(splat(comb[H * i + j]), g[j], ds);
        to_comb[i][j] = fma(s, g[j], to_comb[i][j]);
      }
      put(dstreams, is_bf16, i * d + v, ds);
    }
  }
  for (int i = 0; i < H; i++) {
    dpost[i] = sum(to_post[i]);
    for (int j = 0; j < H; j++) dcomb[H * i + j] = sum(to_comb[i][j]);
  }
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
  for (int64_t v = 0; v < p.dim; v += LANES) put(out, p.is_bf16, v, Softmax(p, block, v).value);
}

void pool_back(const Pooling& p, int64_t block, const void* grad, void* dkv, void* dgate) {
  for (int64_t v = 0; v < p.dim; v += LANES) {
    Softmax s(p, block, v);
    f32x16 g = get(grad, p.is_bf16, v) / s.total;
    each_row(p, block, [&](int64_t at, int64_t bias) {
      f32x16 share = g * s.weight(at, bias);
      put(dkv, p.is_bf16, at + v, share);
      put(dgate, p.is_bf16, at + v, share * (get(p.kv, p.is_bf16, at + v) - s.value));
    });
  }
}

}  // namespace

extern const dsv4::Training training;
const dsv4::Training training = {collapse, dots,        collapse_back, squares,
                                 expand,   expand_back, pool,          pool_back};

}  // namespace DSV4_ISA
