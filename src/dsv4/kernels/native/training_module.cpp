// Training's part of the Python module: whole tensors by their addresses, rows in parallel.
#include "training_module.h"

#include "kernels.h"
#include "linear.h"
#include "pool.h"
#include "training.h"

namespace nb = nanobind;

namespace dsv4 {
namespace {

constexpr int64_t CHUNK = 32;  // rows of a task

char* at(uintptr_t address) { return reinterpret_cast<char*>(address); }
float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

template <class F>
void rows_in_parallel(int64_t rows, int threads, F each) {
  auto task = [&](int64_t t) {
    for (int64_t r = t * CHUNK; r < rows && r < (t + 1) * CHUNK; r++) each(r);
  };
  parallel(threads, (rows + CHUNK - 1) / CHUNK, task);
}

void collapse(uintptr_t streams, bool bf16, int64_t rows, int64_t d, uintptr_t pre, uintptr_t x,
              int threads) {
  const Training& t = *current()->training;
  const int64_t row = d * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    t.collapse(at(streams) + STREAMS * row * r, bf16, d, floats(pre) + STREAMS * r,
               at(x) + row * r);
  });
}

void dots(uintptr_t streams, uintptr_t dx, bool bf16, int64_t rows, int64_t d, uintptr_t dpre,
          int threads) {
  const Training& t = *current()->training;
  const int64_t row = d * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    t.dots(at(streams) + STREAMS * row * r, at(dx) + row * r, bf16, d, floats(dpre) + STREAMS * r);
  });
}

void collapse_back(uintptr_t streams, uintptr_t dx, bool bf16, int64_t rows, int64_t d,
                   uintptr_t pre, uintptr_t factor, uintptr_t dstreams, int threads) {
  const Training& t = *current()->training;
  const int64_t row = d * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    t.collapse_back(at(streams) + STREAMS * row * r, at(dx) + row * r, bf16, d,
                    floats(pre) + STREAMS * r, floats(factor)[r], at(dstreams) + STREAMS * row * r);
  });
}

void squares(uintptr_t streams, bool bf16, int64_t rows, int64_t d, uintptr_t out, int threads) {
  const Training& t = *current()->training;
  const int64_t row = d * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    floats(out)[r] = t.squares(at(streams) + STREAMS * row * r, bf16, d);
  });
}

void expand(uintptr_t out, uintptr_t streams, bool bf16, int64_t rows, int64_t d, uintptr_t post,
            uintptr_t comb, uintptr_t fresh, int threads) {
  const Training& t = *current()->training;
  const int64_t row = d * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    t.expand(at(out) + row * r, at(streams) + STREAMS * row * r, bf16, d,
             floats(post) + STREAMS * r, floats(comb) + STREAMS * STREAMS * r,
             at(fresh) + STREAMS * row * r);
  });
}

void expand_back(uintptr_t grad, uintptr_t out, uintptr_t streams, bool bf16, int64_t rows,
                 int64_t d, uintptr_t post, uintptr_t comb, uintptr_t dout, uintptr_t dstreams,
                 uintptr_t dpost, uintptr_t dcomb, int threads) {
  const Training& t = *current()->training;
  const int64_t row = d * (bf16 ? 2 : 4), all = STREAMS * row, square = STREAMS * STREAMS;
  rows_in_parallel(rows, threads, [&](int64_t r) {
    t.expand_back(at(grad) + all * r, at(out) + row * r, at(streams) + all * r, bf16, d,
                  floats(post) + STREAMS * r, floats(comb) + square * r, at(dout) + row * r,
                  at(dstreams) + all * r, floats(dpost) + STREAMS * r, floats(dcomb) + square * r);
  });
}

// kv, gate: `sequences` of `positions`; out: the entries of each.
struct Sequences {
  Pooling first;
  int64_t sequences, positions;

  template <class F>
  void each_entry(int threads, F f) const {
    const int64_t blocks = positions / first.ratio;
    const int64_t size = first.is_bf16 ? 2 : 4, wide = first.overlap ? 2 * first.dim : first.dim;
    auto task = [&](int64_t t) {
      const int64_t skip = t / blocks * positions * wide * size;
      Pooling p = first;
      p.kv = static_cast<const char*>(p.kv) + skip;
      p.gate = static_cast<const char*>(p.gate) + skip;
      f(p, t % blocks, skip, t * p.dim * size);
    };
    parallel(threads, sequences * blocks, task);
  }
};

Sequences sequences_of(uintptr_t kv, uintptr_t gate, uintptr_t bias, bool bf16, bool overlap,
                       int64_t ratio, int64_t dim, int64_t sequences, int64_t positions) {
  return {{at(kv), at(gate), floats(bias), bf16, overlap, ratio, dim}, sequences, positions};
}

void pool(uintptr_t kv, uintptr_t gate, uintptr_t bias, bool bf16, bool overlap, int64_t ratio,
          int64_t dim, int64_t sequences, int64_t positions, uintptr_t out, int threads) {
  const Training& t = *current()->training;
  sequences_of(kv, gate, bias, bf16, overlap, ratio, dim, sequences, positions)
      .each_entry(threads, [&](const Pooling& p, int64_t block, int64_t, int64_t entry) {
        t.pool(p, block, at(out) + entry);
      });
}

void pool_back(uintptr_t kv, uintptr_t gate, uintptr_t bias, bool bf16, bool overlap, int64_t ratio,
               int64_t dim, int64_t sequences, int64_t positions, uintptr_t grad, uintptr_t dkv,
               uintptr_t dgate, int threads) {
  const Training& t = *current()->training;
  sequences_of(kv, gate, bias, bf16, overlap, ratio, dim, sequences, positions)
      .each_entry(threads, [&](const Pooling& p, int64_t block, int64_t skip, int64_t entry) {
        t.pool_back(p, block, at(grad) + entry, at(dkv) + skip, at(dgate) + skip);
      });
}

}  // namespace

void add_training(nb::module_& m) {
  auto free = nb::call_guard<nb::gil_scoped_release>();
  m.def("hc_collapse", collapse, free);
  m.def("hc_dots", dots, free);
  m.def("hc_collapse_back", collapse_back, free);
  m.def("hc_squares", squares, free);
  m.def("hc_expand", expand, free);
  m.def("hc_expand_back", expand_back, free);
  m.def("pool", pool, free);
  m.def("pool_back", pool_back, free);
}

}  // namespace dsv4
