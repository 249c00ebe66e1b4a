// What training computes between the matrix products, with gradients. Tensors are bfloat16 or
// float32 (is_bf16); gates and their gradients are float32. Nothing here promises the same bits on
// every instruction set, only the same for any number of threads.
#pragma once

#include <cstdint>

namespace dsv4 {

constexpr int STREAMS = 4;

// Rows of ratio (or, with overlap, 2 * ratio) positions pooled to one entry of `dim` channels.
// kv, gate: [positions, wide], bias: [ratio, wide]; wide is dim, or 2 * dim with overlap: an entry
// takes the first half of the channels from the block before and the second from its own.
struct Pooling {
  const void *kv, *gate;
  const float* bias;
  bool is_bf16, overlap;
  int64_t ratio, dim;
};

// Attention of the samples of a packed row, each alone, in bfloat16: q and out [N, heads, dim],
// kv [N, dim]. `heads` is a power of two up to 128 and `dim` a multiple of 32.
struct SampledAttention {
  const uint16_t *q, *kv;
  const float* sink;
  int64_t heads, dim, width;  // width: of the window
  float scale;
  uint16_t* out;
  float* log_sum;  // [N, heads]: of the exponentials of the scores, the sink's too
  const uint16_t* grad;  // for the gradient: that of out, and where those of q and kv go
  uint16_t *dq, *dkv;
};

// Tokens start .. of the row, its `count` compressed entries, and those that each token attends to
// ([tokens, k], -1: none); if chosen is null, all that are whole by then.
struct Sample {
  int64_t start, tokens, count, ratio, k;
  const uint16_t* rows;
  uint16_t* drows;
  const int64_t* chosen;
};

struct Training {
  // x [d] = sum_i pre[i] * streams[i]; streams [STREAMS, d]
  void (*collapse)(const void* streams, bool is_bf16, int64_t d, const float* pre, void* x);
  // dpre[i] = dx . streams[i]
  void (*dots)(const void* streams, const void* dx, bool is_bf16, int64_t d, float* dpre);
  // dstreams[i] += pre[i] * dx + factor * streams[i]
  void (*collapse_back)(const void* streams, const void* dx, bool is_bf16, int64_t d,
                        const float* pre, float factor, void* dstreams);
  // the sum of the squares of all streams
  float (*squares)(const void* streams, bool is_bf16, int64_t d);
  // fresh[j] = post[j] * out + sum_i comb[i, j] * streams[i]
  void (*expand)(const void* out, const void* streams, bool is_bf16, int64_t d, const float* post,
                 const float* comb, void* fresh);
  void (*expand_back)(const void* grad, const void* out, const void* streams, bool is_bf16,
                      int64_t d, const float* post, const float* comb, void* dout, void* dstreams,
                      float* dpost, float* dcomb);
  // `count` <= 16 matrices [STREAMS, STREAMS], each: columns normalised, then iters - 1 times
  // rows and columns. `back` turns the gradient of the result into that of the matrices.
  void (*sinkhorn)(const float* matrices, int64_t count, int iters, float eps, float* out);
  void (*sinkhorn_back)(const float* matrices, const float* grad, int64_t count, int iters,
                        float eps, float* dmatrices);
  // A head [d]: divided by its root mean square if `norm`, then the last 2 * width channels turned,
  // pair by pair, by cosines and sines [width, 2] (backwards if `inverse`).
  void (*norm_rope)(const void* x, bool is_bf16, int64_t d, const float* turn, int64_t width,
                    bool norm, bool inverse, float eps, void* out);
  void (*norm_rope_back)(const void* x, const void* grad, bool is_bf16, int64_t d,
                         const float* turn, int64_t width, float eps, void* dx);
  // y = x * weight / root mean square of x. `back` adds the weight's gradient to dweight.
  void (*norm)(const void* x, bool is_bf16, int64_t d, const float* weight, float eps, void* y);
  void (*norm_back)(const void* x, const void* grad, bool is_bf16, int64_t d, const float* weight,
                    float eps, void* dx, float* dweight);
  float (*dot)(const void* a, const void* b, bool is_bf16, int64_t d);
  // Scores [keys] of one head for one query become weights, in place: key 0 stands for the sink,
  // whose score is given; a key with hidden[key] gets 0 (hidden null: none does).
  void (*weigh)(void* scores, bool is_bf16, int64_t keys, const uint8_t* hidden, float sink);
  // In place, the gradient of the weights p becomes that of the products that `scale` made the
  // scores of; dot: of the gradient and the weights. Returns the sink's gradient.
  float (*weigh_back)(void* grad, const void* p, bool is_bf16, int64_t keys, float dot,
                      float scale);
  // Of logits: the logarithm of the sum of their exponentials; and, in place, `scale` times the
  // gradient of log_sum - x[target].
  float (*log_sum)(const void* x, bool is_bf16, int64_t count);
  void (*shares)(void* x, bool is_bf16, int64_t count, float log_sum, int64_t target, float scale);
  // act = weight * silu(min(gate, limit)) * clamp(up, -limit, limit); a limit of 0 is none.
  void (*swiglu)(const void* gate, const void* up, bool is_bf16, int64_t width, float weight,
                 float limit, void* act);
  float (*swiglu_back)(const void* gate, const void* up, const void* grad, bool is_bf16,
                       int64_t width, float weight, float limit, void* dgate, void* dup);
  // Entry `block` of a sequence that starts at p.kv.
  void (*pool)(const Pooling& p, int64_t block, void* out);
  void (*pool_back)(const Pooling& p, int64_t block, const void* grad, void* dkv, void* dgate);
  // Null where there are no tiles. `back` writes all gradients; dsinks: [heads].
  void (*attend)(const SampledAttention& a, const Sample& s, int threads);
  void (*attend_back)(const SampledAttention& a, const Sample& s, int threads, float* dsinks);
};

}  // namespace dsv4
