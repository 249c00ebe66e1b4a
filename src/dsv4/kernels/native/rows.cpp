// What is computed row by row between the matrix products: norms, rotations, roundings, SwiGLU.
#include "functions.h"
#include "kernels.h"

namespace DSV4_ISA {

static constexpr int BLOCK = 128 / LANES;  // vectors of an FP8 block of activations

void swiglu(const void* gate, const void* up, bool is_bf16, int64_t width, float weight,
            float limit, bool fp8, void* out, bool out_bf16) {
  FlushSubnormals guard;
  f32x16 block[BLOCK];
  for (int64_t begin = 0; begin < width; begin += 128) {
    for (int v = 0; v < BLOCK; v++) {
      f32x16 g = get(gate, is_bf16, begin + LANES * v), u = get(up, is_bf16, begin + LANES * v);
      if (limit > 0) {
        g = where(g > splat(limit), splat(limit), g);
        u = where(u > splat(limit), splat(limit), u);
        u = where(u < splat(-limit), splat(-limit), u);
      }
      f32x16 act = g / (1.0f + exp(-g)) * u;
      block[v] = rounded(splat(weight) * act, out_bf16);
    }
    if (fp8) to_fp8(block, BLOCK);
    for (int v = 0; v < BLOCK; v++) put(out, out_bf16, begin + LANES * v, block[v]);
  }
}

void add(const void* const* rows, int64_t count, bool is_bf16, int64_t width, float* out) {
  FlushSubnormals guard;
  for (int64_t i = 0; i < width; i += LANES) {
    f32x16 total = {};
    for (int64_t r = 0; r < count; r++) total = total + get(rows[r], is_bf16, i);
    store(out + i, total);
  }
}

void sum_two(const dsv4::Sum& job, int64_t begin, int64_t end) {
  FlushSubnormals guard;
  for (int64_t row = begin; row < end; row++) {
    const int64_t x = row * job.width, y = row / job.each * job.width;
    for (int64_t c = 0; c < job.width; c += LANES) {
      const f32x16 sum = get(job.x, job.x_bf16, x + c) + get(job.y, job.y_bf16, y + c);
      put(job.out, job.out_bf16, x + c, sum);
    }
  }
}

// ---------------------------------------------------------------- norm, rope

void norm(const dsv4::Norm& job, int64_t begin, int64_t end) {
  FlushSubnormals guard;
  const int64_t width = job.width;
  for (int64_t row = begin; row < end; row++) {
    const char* x = static_cast<const char*>(job.x) + row * width * (job.is_bf16 ? 2 : 4);
    char* out = static_cast<char*>(job.out) + row * width * (job.is_bf16 ? 2 : 4);
    const bool steps_round = job.weight == nullptr && job.is_bf16;
    auto type = [&](float v) { return steps_round ? widen(narrow(v)) : v; };
    f32x16 squares = {};
    for (int64_t i = 0; i < width; i += LANES) {
      f32x16 v = get(x, job.is_bf16, i);
      squares = squares + rounded(v * v, steps_round);
    }
    const float mean = type(sum(squares) / (float)width);
    const f32x16 factor = splat(type(inverse_root(type(mean + job.eps))));
    for (int64_t i = 0; i < width; i += LANES) {
      f32x16 y = get(x, job.is_bf16, i) * factor;
      if (job.weight) y = y * get(job.weight, job.weight_bf16, i);
      put(out, job.is_bf16, i, y);
    }
  }
}

void rope(const dsv4::Rope& job, int64_t begin, int64_t end) {
  FlushSubnormals guard;
  const int64_t element = job.is_bf16 ? 2 : 4, plain = job.width - job.turned;
  for (int64_t row = begin; row < end; row++) {
    const char* x = static_cast<const char*>(job.x) + row * job.width * element;
    char* out = static_cast<char*>(job.out) + row * job.width * element;
    const float* rotation = job.rotation + row / job.heads % job.positions * job.turned;
    std::memcpy(out, x, plain * element);
    for (int64_t i = 0; i < job.turned; i += 2 * LANES) {
      Apart v = apart(get(x, job.is_bf16, plain + i), get(x, job.is_bf16, plain + i + LANES));
      Apart r = apart(load<f32x16>(rotation + i), load<f32x16>(rotation + i + LANES));
      f32x16 sine = job.inverse ? -r.odd : r.odd;
      f32x16 real = fma(v.even, r.even, -(v.odd * sine)), other = fma(v.even, sine, v.odd * r.even);
      put(out, job.is_bf16, plain + i, first_half(real, other));
      put(out, job.is_bf16, plain + i + LANES, second_half(real, other));
    }
  }
}

// ---------------------------------------------------------------- roundings

void round_fp8(const dsv4::RoundFp8& job, int64_t begin, int64_t end) {
  FlushSubnormals guard;
  const int64_t element = job.is_bf16 ? 2 : 4, last = job.width - job.keep;
  const int vectors = (int)job.block / LANES;
  for (int64_t row = begin; row < end; row++) {
    const char* x = static_cast<const char*>(job.x) + row * job.width * element;
    char* out = static_cast<char*>(job.out) + row * job.width * element;
    f32x16 block[BLOCK];
    for (int64_t i = 0; i < last; i += job.block) {
      for (int v = 0; v < vectors; v++) block[v] = get(x, job.is_bf16, i + LANES * v);
      to_fp8(block, vectors);
      for (int v = 0; v < vectors; v++) put(out, job.is_bf16, i + LANES * v, block[v]);
    }
    std::memcpy(out + last * element, x + last * element, job.keep * element);
  }
}

// Numbers as they are after FP4 with one scale: 32 of them.
static inline void to_fp4(f32x16* x) {
  float amax = largest(max(abs(x[0]), abs(x[1])));
  const float least = 6 * 0x1p-126f, scale = ceil_power((amax > least ? amax : least) / 6.0f);
  for (int v = 0; v < 2; v++) {
    f32x16 y = x[v] / scale;
    f32x16 step = where(abs(y) < splat(2), splat(0.5f), where(abs(y) < splat(4), splat(1), splat(2)));
    f32x16 magic = step * 12582912.0f;  // adding 1.5 * 2^23 steps rounds to whole ones
    f32x16 limited = min(max(y, splat(-6)), splat(6));
    x[v] = ((limited + magic) - magic) * scale;
  }
}

void round_fp4(const dsv4::RoundFp4& job, int64_t begin, int64_t end) {
  FlushSubnormals guard;
  constexpr int WIDTH = 128;
  const int64_t element = job.is_bf16 ? 2 : 4;
  for (int64_t row = begin; row < end; row++) {
    const char* x = static_cast<const char*>(job.x) + row * WIDTH * element;
    char* out = static_cast<char*>(job.out) + row * WIDTH * element;
    alignas(64) float h[WIDTH];
    for (int i = 0; i < WIDTH; i += LANES) store(h + i, get(x, job.is_bf16, i));
    for (int half = 1; half < WIDTH; half *= 2) {
      for (int i = 0; i < WIDTH; i += 2 * half) {
        for (int j = i; j < i + half; j++) {
          float a = h[j], b = h[j + half];
          h[j] = a + b, h[j + half] = a - b;
        }
      }
    }
    for (int i = 0; i < WIDTH; i += 2 * LANES) {
      f32x16 block[2];
      for (int v = 0; v < 2; v++) {
        block[v] = rounded(load<f32x16>(h + i + LANES * v) * 0.08838834764831845f, job.is_bf16);
      }
      to_fp4(block);
      for (int v = 0; v < 2; v++) put(out, job.is_bf16, i + LANES * v, block[v]);
    }
  }
}

// ---------------------------------------------------------------- router

void route(const dsv4::Route& job, int64_t begin, int64_t end) {
  FlushSubnormals guard;
  const int64_t experts = job.experts, k = job.k;
  for (int64_t row = begin; row < end; row++) {
    const float* logits = job.logits + row * experts;
    float *scores = job.scores + row * experts, *weights = job.weights + row * k;
    int64_t* chosen = job.chosen + row * k;
    for (int64_t e = 0; e < experts; e++) {  // the square root of softplus
      float x = logits[e];
      scores[e] = __builtin_sqrtf(x > 20 ? x : __builtin_log1pf(__builtin_expf(x)));
    }
    for (int64_t i = 0; job.bias && i < k; i++) {  // the highest not chosen yet, the first of equals
      int64_t best = -1;
      for (int64_t e = 0; e < experts; e++) {
        bool taken = false;
        for (int64_t j = 0; j < i; j++) taken = taken || chosen[j] == e;
        if (!taken && (best < 0 || scores[e] + job.bias[e] > scores[best] + job.bias[best])) {
          best = e;
        }
      }
      chosen[i] = best;
    }
    float total = 0;
    for (int64_t i = 0; i < k; i++) total = total + (weights[i] = scores[chosen[i]]);
    for (int64_t i = 0; i < k; i++) {
      weights[i] = (job.normalize ? weights[i] / total : weights[i]) * job.scale;
    }
  }
}

}  // namespace DSV4_ISA
