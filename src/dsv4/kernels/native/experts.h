// The routed experts of a layer.
#pragma once

#include <vector>

#include "kernels.h"

namespace dsv4 {

struct Expert {
  Weight gate, up, down;
};

// out [x.count, inputs] (float32) = for each row, the sum over its k experts (in the order of their
// numbers) of down(act), where act is swiglu(gate(x), up(x)) times the row's weight for the expert.
// ids and weights are [x.count, k]. What lies between is of x's type; act is rounded to FP8 if
// asked. Each used expert is read once.
void routed_experts(const std::vector<Expert>& experts, const Rows& x, const int64_t* ids,
                    const float* weights, int64_t k, float limit, bool fp8, float* out,
                    int threads);

}  // namespace dsv4
