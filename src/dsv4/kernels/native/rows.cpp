// What is computed row by row between the matrix products.
#include "functions.h"
#include "kernels.h"

namespace DSV4_ISA {

static constexpr int BLOCK = 128 / LANES;  // vectors of an FP8 block of activations

void swiglu(const void* gate, const void* up, bool is_bf16, int64_t width, float weight,
            float limit, bool fp8, void* out) {
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
      block[v] = rounded(splat(weight) * act, is_bf16);
    }
    if (fp8) round_fp8(block, BLOCK);
    for (int v = 0; v < BLOCK; v++) put(out, is_bf16, begin + LANES * v, block[v]);
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

}  // namespace DSV4_ISA
