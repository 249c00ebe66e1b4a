// Hyper-connections (mHC) and the compressor's pooling.
#include "functions.h"
#include "kernels.h"

namespace DSV4_ISA {

using dsv4::MAX_STREAMS;

namespace {

inline const char* row_of(const void* data, int64_t row, int64_t width, bool is_bf16) {
  return static_cast<const char*>(data) + row * width * (is_bf16 ? 2 : 4);
}

inline char* row_of(void* data, int64_t row, int64_t width, bool is_bf16) {
  return static_cast<char*>(data) + row * width * (is_bf16 ? 2 : 4);
}

// out [d] = the sum of the streams [h, d], each times its weight.
inline void collapse(const char* streams, const float* pre, int64_t h, int64_t d, bool is_bf16,
                     char* out, bool out_bf16) {
  for (int64_t i = 0; i < d; i += LANES) {
    f32x16 total = {};
    for (int64_t j = 0; j < h; j++) {
      total = fma(splat(pre[j]), get(streams, is_bf16, j * d + i), total);
    }
    put(out, out_bf16, i, total);
  }
}

inline f32x16 sigmoid(f32x16 x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace

void hc_read(const dsv4::HcRead& job, int64_t begin, int64_t end) {
  FlushSubnormals guard;
  const int64_t h = job.h, d = job.d, mixes = job.mixes;
  for (int64_t row = begin; row < end; row++) {
    const char* streams = row_of(job.streams, row, h * d, job.is_bf16);
    f32x16 squares = {};
    for (int64_t i = 0; i < h * d; i += LANES) {
      f32x16 v = get(streams, job.is_bf16, i);
      squares = fma(v, v, squares);
    }
    const float factor = inverse_root(sum(squares) / (float)(h * d) + job.norm_eps);

    constexpr int64_t ROOM = (2 + MAX_STREAMS) * MAX_STREAMS;
    alignas(64) float mix[ROOM] = {}, gate[ROOM];
    for (int64_t m = 0; m < mixes; m++) {
      float scale = job.scale[m < h ? 0 : m < 2 * h ? 1 : 2];
      mix[m] = job.logits[row * mixes + m] * factor * scale + job.base[m];
    }
    for (int64_t i = 0; i < 2 * h; i += LANES) store(gate + i, sigmoid(load<f32x16>(mix + i)));
    for (int64_t j = 0; j < h; j++) gate[j] = gate[j] + job.eps;
    collapse(streams, gate, h, d, job.is_bf16, row_of(job.out, row, d, job.out_bf16),
             job.out_bf16);
    if (job.comb == nullptr) continue;
    for (int64_t j = 0; j < h; j++) job.post[row * h + j] = 2.0f * gate[h + j];

    float* comb = mix + 2 * h;  // [h, h]: a softmax in each row
    for (int64_t i = 0; i < h; i++) {
      float most = comb[i * h];
      for (int64_t j = 1; j < h; j++) most = comb[i * h + j] > most ? comb[i * h + j] : most;
      for (int64_t j = 0; j < h; j++) comb[i * h + j] = comb[i * h + j] - most;
    }
    for (int64_t i = 0; i < h * h; i += LANES) store(gate + i, exp(load<f32x16>(comb + i)));
    for (int64_t i = 0; i < h; i++) {
      float total = 0;
      for (int64_t j = 0; j < h; j++) total = total + gate[i * h + j];
      for (int64_t j = 0; j < h; j++) {
        job.comb[(row * h + i) * h + j] = gate[i * h + j] / total + job.eps;
      }
    }
  }
}

void hc_expand(const dsv4::HcExpand& job, int64_t begin, int64_t end) {
  FlushSubnormals guard;
  const int64_t h = job.h, d = job.d;
  for (int64_t row = begin; row < end; row++) {
    const char* x = row_of(job.x, row, d, job.x_bf16);
    const char* old = row_of(job.streams, row, h * d, job.is_bf16);
    char* out = row_of(job.out, row, h * d, job.is_bf16);
    const float *post = job.post + row * h, *comb = job.comb + row * h * h;
    for (int64_t i = 0; i < d; i += LANES) {
      f32x16 in = get(x, job.x_bf16, i), was[MAX_STREAMS];
      for (int64_t j = 0; j < h; j++) was[j] = get(old, job.is_bf16, j * d + i);
      for (int64_t j = 0; j < h; j++) {
        f32x16 total = splat(post[j]) * in;
        for (int64_t k = 0; k < h; k++) total = fma(splat(comb[k * h + j]), was[k], total);
        put(out, job.is_bf16, j * d + i, total);
      }
    }
  }
}

// Sixteen matrices at a time, one in each lane.
void sinkhorn(const dsv4::Sinkhorn& job, int64_t begin, int64_t end) {
  FlushSubnormals guard;
  const int64_t h = job.h;
  for (int64_t row = begin; row < end; row += LANES) {
    const int64_t here = end - row < LANES ? end - row : LANES;
    f32x16 m[MAX_STREAMS][MAX_STREAMS];
    for (int64_t i = 0; i < h * h; i++) {
      m[i / h][i % h] = splat(1);
      for (int64_t r = 0; r < here; r++) m[i / h][i % h][r] = job.comb[(row + r) * h * h + i];
    }
    auto columns = [&] {
      for (int64_t j = 0; j < h; j++) {
        f32x16 total = m[0][j];
        for (int64_t i = 1; i < h; i++) total = total + m[i][j];
        total = total + job.eps;
        for (int64_t i = 0; i < h; i++) m[i][j] = m[i][j] / total;
      }
    };
    columns();
    for (int64_t iter = 1; iter < job.iters; iter++) {
      for (int64_t i = 0; i < h; i++) {
        f32x16 total = m[i][0];
        for (int64_t j = 1; j < h; j++) total = total + m[i][j];
        total = total + job.eps;
        for (int64_t j = 0; j < h; j++) m[i][j] = m[i][j] / total;
      }
      columns();
    }
    for (int64_t i = 0; i < h * h; i++) {
      for (int64_t r = 0; r < here; r++) job.out[(row + r) * h * h + i] = m[i / h][i % h][r];
    }
  }
}

void pool(const dsv4::Pool& job, int64_t begin, int64_t end) {
  FlushSubnormals guard;
  const int64_t ratio = job.ratio, stride = job.stride, width = job.width;
  for (int64_t block = begin; block < end; block++) {
    // With overlap, the first channels of the block before join the second ones of the block.
    const int64_t rows = job.overlap ? 2 * ratio : ratio, first = block * ratio * stride;
    for (int64_t i = 0; i < width; i += LANES) {
      auto at = [&](int64_t r) {
        return first + r * stride + i + (job.overlap && r >= ratio ? width : 0);
      };
      f32x16 most = load<f32x16>(job.gate + at(0));
      for (int64_t r = 1; r < rows; r++) most = max(load<f32x16>(job.gate + at(r)), most);
      f32x16 total = {}, value = {};
      for (int64_t r = 0; r < rows; r++) {
        f32x16 e = exp(load<f32x16>(job.gate + at(r)) - most);
        total = total + e;
        value = fma(e, load<f32x16>(job.kv + at(r)), value);
      }
      store(job.out + block * width + i, value / total);
    }
  }
}

}  // namespace DSV4_ISA
