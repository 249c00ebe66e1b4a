#include "experts.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <utility>

#include "linear.h"
#include "pool.h"

namespace dsv4 {

void routed_experts(const std::vector<Expert>& experts, const Rows& x, const int64_t* ids,
                    const float* weights, int64_t k, float limit, bool fp8, float* out,
                    int threads) {
  const Isa* isa = current();
  const int64_t pairs = x.count * k;  // of a row and one of its experts
  const int64_t inputs = experts[0].gate.inputs, width = experts[0].gate.rows;
  const int64_t element = x.is_bf16 ? 2 : 4;

  // Pairs in the order of experts: first[e] .. first[e + 1] are those of expert e.
  std::vector<int64_t> first(experts.size() + 1), order(pairs), row_of(pairs), places(pairs);
  for (int64_t p = 0; p < pairs; p++) {
    if (ids[p] < 0 || ids[p] >= (int64_t)experts.size()) throw std::out_of_range("no such expert");
    first[ids[p] + 1]++;
  }
  for (size_t e = 0; e < experts.size(); e++) first[e + 1] += first[e];
  std::vector<int64_t> next(first.begin(), first.end() - 1), filled(x.count);
  for (int64_t p = 0; p < pairs; p++) order[next[ids[p]]++] = p;
  for (int64_t at = 0; at < pairs; at++) {
    row_of[at] = order[at] / k;
    places[row_of[at] * k + filled[row_of[at]]++] = at;  // a row's pairs, in the order of experts
  }

  // Products of each used expert's matrix with `count` rows from `first` on.
  auto multiply = [&](auto&& each_matrix) {
    std::vector<Product> products;
    products.reserve(2 * std::min<size_t>(pairs, experts.size()));
    for (size_t e = 0; e < experts.size(); e++) {
      if (first[e] < first[e + 1]) each_matrix(products, experts[e], first[e], first[e + 1]);
    }
    run(std::move(products), threads);
  };

  const Format format = experts[0].gate.format;
  const bool as_pair = as_pairs(x.is_bf16, format);
  const int64_t x_bytes = arranged_bytes(inputs, as_pair);
  auto xs = make_array<uint8_t>(x.count * x_bytes);
  arrange_rows(x, inputs, format, as_pair, xs.get(), threads);
  auto gate = make_array<char>(pairs * width * element);
  auto up = make_array<char>(pairs * width * element);
  multiply([&](std::vector<Product>& products, const Expert& expert, int64_t begin, int64_t end) {
    for (auto [weight, to] : {std::pair{&expert.gate, gate.get()}, {&expert.up, up.get()}}) {
      products.push_back({weight, 0, width, xs.get(), x_bytes, as_pair, 0, &row_of[begin],
                          end - begin, to + begin * width * element, width, x.is_bf16, x.is_bf16});
    }
  });

  const int64_t act_bytes = arranged_bytes(width, as_pair);
  auto acts = make_array<uint8_t>(pairs * act_bytes);
  auto activate = [&](int64_t at) {
    char* row = gate.get() + at * width * element;
    isa->swiglu(row, up.get() + at * width * element, x.is_bf16, width, weights[order[at]], limit,
                fp8, row, x.is_bf16);
    isa->arrange(row, x.is_bf16, width, format, as_pair, acts.get() + at * act_bytes);
  };
  parallel(pairs * width < 1 << 15 ? 1 : threads, pairs, activate);

  auto parts = make_array<char>(pairs * inputs * element);
  multiply([&](std::vector<Product>& products, const Expert& expert, int64_t begin, int64_t end) {
    products.push_back({&expert.down, 0, inputs, acts.get() + begin * act_bytes, act_bytes, as_pair,
                        0, nullptr, end - begin, parts.get() + begin * inputs * element, inputs,
                        x.is_bf16, x.is_bf16});
  });

  auto sum = [&](int64_t row) {
    std::vector<const void*> rows(k);
    for (int64_t i = 0; i < k; i++) rows[i] = parts.get() + places[row * k + i] * inputs * element;
    isa->add(rows.data(), k, x.is_bf16, inputs, out + row * inputs);
  };
  parallel(x.count * inputs < 1 << 15 ? 1 : threads, x.count, sum);
}

}  // namespace dsv4
