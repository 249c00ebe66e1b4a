// Products of whole matrices, cut into tasks.
#pragma once

#include <vector>

#include "kernels.h"

namespace dsv4 {

// The instruction set in use.
const Isa* current();

// Arranges every row of x for weights of `format`; `to` holds x.count * arranged_bytes().
void arrange_rows(const Rows& x, int64_t inputs, Format format, bool pairs, uint8_t* to,
                  int threads);

// Whether activations of this kind stay pairs of bfloat16 when they meet such a weight.
bool as_pairs(bool x_is_bf16, Format format);

// Computes all products. They may be of any sizes; the work is cut evenly.
void run(std::vector<Product> products, int threads);

// x [count, groups * inputs] times each group's rows of the weight; out [count, weight.rows].
void linear(const Rows& x, const Weight& weight, int groups, void* out, bool out_bf16, int threads);

}  // namespace dsv4
