#include "linear.h"

#include <algorithm>

#include "pool.h"

namespace dsv4 {
namespace {

constexpr int64_t MANY = 128;       // rows of activations in one task
constexpr int64_t TASK = 64 << 10;  // bytes of weight in a task of few rows

// Columns of a task: enough to be worth telling a thread, a multiple of what a tile holds.
int64_t columns_of(const Product& product) {
  if (product.rows > FEW) return 32;
  static constexpr int64_t EIGHTHS[] = {4, 8, 16, 32};  // bits of an input
  int64_t bytes = product.weight->inputs * EIGHTHS[(int)product.weight->format] / 8;
  return std::clamp<int64_t>(TASK / std::max<int64_t>(bytes, 1) / 4 * 4, 4, 1024);
}

struct Task {
  const Product* product;
  int64_t column, row;
};

Product part(const Task& task) {
  Product p = *task.product;
  int64_t columns = std::min(columns_of(p), p.count - task.column);
  int64_t rows = std::min(MANY, p.rows - task.row);
  if (p.pick) {
    p.pick += task.row;
  } else {
    p.x += task.row * p.x_bytes;
  }
  int64_t at = task.row * p.out_stride + task.column;
  p.out = static_cast<char*>(p.out) + at * (p.out_bf16 ? 2 : 4);
  p.first += task.column, p.count = columns, p.rows = rows;
  return p;
}

}  // namespace

bool as_pairs(bool x_is_bf16, Format format) {
  return x_is_bf16 && current()->has_pairs && format != Format::f32;
}

void arrange_rows(const Rows& x, int64_t inputs, Format format, bool pairs, uint8_t* to,
                  int threads) {
  const Isa* isa = current();
  const int64_t bytes = arranged_bytes(inputs, pairs), at_once = 16;
  const int64_t element = x.is_bf16 ? 2 : 4;
  auto some = [&](int64_t task) {
    int64_t end = std::min(x.count, (task + 1) * at_once);
    for (int64_t i = task * at_once; i < end; i++) {
      const char* from = static_cast<const char*>(x.data) + i * x.stride * element;
      isa->arrange(from, x.is_bf16, inputs, format, pairs, to + i * bytes);
    }
  };
  parallel(x.count * inputs < 1 << 17 ? 1 : threads, (x.count + at_once - 1) / at_once, some);
}

void run(const std::vector<Product>& products, int threads) {
  std::vector<Task> tasks;
  for (const Product& product : products) {
    for (int64_t row = 0; row < product.rows; row += MANY) {
      for (int64_t column = 0; column < product.count; column += columns_of(product)) {
        tasks.push_back({&product, column, row});
      }
    }
  }
  const Isa* isa = current();
  auto one = [&](int64_t task) {
    static thread_local Array<uint8_t> space = make_array<uint8_t>(PRODUCT_WORKSPACE);
    isa->multiply(part(tasks[task]), space.get());
  };
  parallel(threads, (int64_t)tasks.size(), one);
}

void linear(const Rows& x, const Weight& weight, int groups, void* out, bool out_bf16,
            int threads) {
  const bool pairs = as_pairs(x.is_bf16, weight.format);
  const int64_t bytes = arranged_bytes(weight.inputs, pairs);
  const int64_t columns = weight.rows / groups;
  auto arranged = make_array<uint8_t>(groups * x.count * bytes);
  std::vector<Product> products;
  for (int g = 0; g < groups; g++) {
    uint8_t* mine = arranged.get() + g * x.count * bytes;
    Rows part = x;
    part.data = static_cast<const char*>(x.data) + g * weight.inputs * (x.is_bf16 ? 2 : 4);
    arrange_rows(part, weight.inputs, weight.format, pairs, mine, threads);
    void* to = static_cast<char*>(out) + g * columns * (out_bf16 ? 2 : 4);
    products.push_back({&weight, g * columns, columns, mine, bytes, pairs, nullptr, x.count, to,
                        weight.rows, out_bf16});
  }
  run(products, threads);
}

}  // namespace dsv4
