#include "linear.h"

#include <algorithm>
#include <utility>

#include "pool.h"

namespace dsv4 {
namespace {

constexpr int64_t MANY = 128;       // rows of activations in one task
constexpr int64_t GROUP = 16;       // rows that are packed side by side
constexpr int64_t TASK = 64 << 10;  // bytes of weight in a task of few rows, and where there are
constexpr int64_t LEAST = 8 << 10;  // not enough such tasks for all threads

// Columns of a task: enough to be worth telling a thread, a multiple of what a tile holds.
int64_t columns_of(const Product& product, int threads) {
  if (product.group && product.rows > 4 * GROUP) {
    return std::clamp<int64_t>(product.count / (4 * threads) / 32 * 32, 32, TILE_COLUMNS);
  }
  if (!product.group && product.rows > product.few()) return 32;
  static constexpr int64_t EIGHTHS[] = {4, 8, 16, 32};  // bits of an input
  const int64_t bytes =
      std::max<int64_t>(1, product.weight->inputs * EIGHTHS[(int)product.weight->format] / 8);
  const int64_t least = product.group ? GROUP : 4;
  const int64_t share = std::max(product.count / (2 * threads), LEAST / bytes);
  return std::clamp<int64_t>(std::min(TASK / bytes, share) / least * least, least, 1024);
}

int64_t rows_of(const Product& product) { return product.group ? TILE_ROWS : MANY; }

struct Task {
  const Product* product;
  int64_t column, columns, row;
};

Product part(const Task& task) {
  Product p = *task.product;
  int64_t columns = std::min(task.columns, p.count - task.column);
  int64_t rows = std::min(rows_of(p), p.rows - task.row);
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

// Packs the rows of all products, those that several share once; a row alone is packed as it is.
Array<uint8_t> packed_rows(const Isa* isa, std::vector<Product>& products, int threads) {
  struct Group {
    const Product* product;
    int64_t row, at;
  };
  std::vector<Group> groups;
  std::vector<int64_t> place(products.size(), -1);
  int64_t bytes = 0;
  for (size_t i = 0; i < products.size(); i++) {
    Product& p = products[i];
    if (!p.pairs) continue;
    p.group = std::min(p.rows, GROUP);
    if (p.rows == 1) {
      p.x += (p.pick ? *p.pick : 0) * p.x_bytes, p.pick = nullptr;
    } else if (i > 0 && p.x == products[i - 1].x && p.pick == products[i - 1].pick &&
               p.rows == products[i - 1].rows) {
      place[i] = place[i - 1];
    } else {
      place[i] = bytes;
      for (int64_t row = 0; row < p.rows; row += p.group, bytes += p.group * p.x_bytes) {
        groups.push_back({&p, row, bytes});
      }
    }
  }
  auto packed = make_array<uint8_t>(bytes);
  auto one = [&](int64_t task) {
    const auto& [p, row, at] = groups[task];
    const uint8_t* rows[GROUP];
    const int64_t count = std::min(p->group, p->rows - row);
    for (int64_t i = 0; i < count; i++) {
      rows[i] = p->x + (p->pick ? p->pick[row + i] : row + i) * p->x_bytes;
    }
    isa->pack(rows, count, p->group, p->x_bytes, packed.get() + at);
  };
  parallel(bytes < 1 << 18 ? 1 : threads, (int64_t)groups.size(), one);
  for (size_t i = 0; i < products.size(); i++) {
    if (place[i] >= 0) products[i].x = packed.get() + place[i], products[i].pick = nullptr;
  }
  return packed;
}

}  // namespace

bool as_pairs(bool x_is_bf16, Format format) {
  return x_is_bf16 && current()->multiplies_pairs() && format != Format::f32;
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

void run(std::vector<Product> products, int threads) {
  const Isa* isa = current();
  const Array<uint8_t> packed = isa->pack ? packed_rows(isa, products, threads) : nullptr;
  std::vector<Task> tasks;
  for (const Product& product : products) {
    const int64_t columns = columns_of(product, threads);
    for (int64_t row = 0; row < product.rows; row += rows_of(product)) {
      for (int64_t column = 0; column < product.count; column += columns) {
        tasks.push_back({&product, column, columns, row});
      }
    }
  }
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
  products.reserve(groups);
  for (int g = 0; g < groups; g++) {
    uint8_t* mine = arranged.get() + g * x.count * bytes;
    Rows part = x;
    part.data = static_cast<const char*>(x.data) + g * weight.inputs * (x.is_bf16 ? 2 : 4);
    arrange_rows(part, weight.inputs, weight.format, pairs, mine, threads);
    void* to = static_cast<char*>(out) + g * columns * (out_bf16 ? 2 : 4);
    products.push_back({&weight, g * columns, columns, mine, bytes, pairs, 0, nullptr, x.count,
                        to, weight.rows, out_bf16, x.is_bf16});
  }
  run(std::move(products), threads);
}

}  // namespace dsv4
