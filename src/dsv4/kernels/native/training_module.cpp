// Training's part of the Python module: whole tensors by their addresses, rows in parallel.
#include "training_module.h"

#include <algorithm>

#include "kernels.h"
#include "linear.h"
#include "pool.h"
#include "tape.h"
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

void sinkhorn(uintptr_t matrices, int64_t count, int iters, float eps, uintptr_t out,
              int threads) {
  const Training& t = *current()->training;
  auto task = [&](int64_t i) {
    const int64_t skip = 16 * STREAMS * STREAMS * i;
    t.sinkhorn(floats(matrices) + skip, std::min<int64_t>(16, count - 16 * i), iters, eps,
               floats(out) + skip);
  };
  parallel(threads, (count + 15) / 16, task);
}

void sinkhorn_back(uintptr_t matrices, uintptr_t grad, int64_t count, int iters, float eps,
                   uintptr_t dmatrices, int threads) {
  if (iters > 32) throw nb::value_error("more than 32 rounds");
  const Training& t = *current()->training;
  auto task = [&](int64_t i) {
    const int64_t skip = 16 * STREAMS * STREAMS * i;
    t.sinkhorn_back(floats(matrices) + skip, floats(grad) + skip,
                    std::min<int64_t>(16, count - 16 * i), iters, eps, floats(dmatrices) + skip);
  };
  parallel(threads, (count + 15) / 16, task);
}

// x: rows of `heads` heads each; turn: [positions, width, 2], row r is at r % positions.
void norm_rope(uintptr_t x, bool bf16, int64_t rows, int64_t heads, int64_t d, uintptr_t turn,
               int64_t positions, int64_t width, bool norm, bool inverse, float eps, uintptr_t out,
               int threads) {
  const Training& t = *current()->training;
  const int64_t head = d * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    for (int64_t h = r * heads; h < (r + 1) * heads; h++) {
      t.norm_rope(at(x) + head * h, bf16, d, floats(turn) + r % positions * 2 * width, width, norm,
                  inverse, eps, at(out) + head * h);
    }
  });
}

void norm_rope_back(uintptr_t x, uintptr_t grad, bool bf16, int64_t rows, int64_t heads, int64_t d,
                    uintptr_t turn, int64_t positions, int64_t width, float eps, uintptr_t dx,
                    int threads) {
  const Training& t = *current()->training;
  const int64_t head = d * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    for (int64_t h = r * heads; h < (r + 1) * heads; h++) {
      t.norm_rope_back(at(x) + head * h, at(grad) + head * h, bf16, d,
                       floats(turn) + r % positions * 2 * width, width, eps, at(dx) + head * h);
    }
  });
}

void norm(uintptr_t x, bool bf16, int64_t rows, int64_t d, uintptr_t weight, float eps, uintptr_t y,
          int threads) {
  const Training& t = *current()->training;
  const int64_t row = d * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    t.norm(at(x) + row * r, bf16, d, floats(weight), eps, at(y) + row * r);
  });
}

// dweights: for every CHUNK rows, [d], zeros at first.
void norm_back(uintptr_t x, uintptr_t grad, bool bf16, int64_t rows, int64_t d, uintptr_t weight,
               float eps, uintptr_t dx, uintptr_t dweights, int threads) {
  const Training& t = *current()->training;
  const int64_t row = d * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    t.norm_back(at(x) + row * r, at(grad) + row * r, bf16, d, floats(weight), eps, at(dx) + row * r,
                floats(dweights) + r / CHUNK * d);
  });
}

// b's batches are `stride` numbers apart, a's and the sums lie one after another.
void row_dots(uintptr_t a, uintptr_t b, bool bf16, int64_t batches, int64_t rows, int64_t stride_a,
              int64_t stride_b, int64_t d, uintptr_t out, int threads) {
  const Training& t = *current()->training;
  const int64_t size = bf16 ? 2 : 4;
  rows_in_parallel(batches * rows, threads, [&](int64_t r) {
    const int64_t batch = r / rows, place = r % rows * d;
    floats(out)[r] = t.dot(at(a) + size * (batch * stride_a + place),
                           at(b) + size * (batch * stride_b + place), bf16, d);
  });
}

// scores: [batches, queries, heads, keys]; hidden: [queries, keys] bytes, the same for all batches
// if hidden_step is 0, or none at all.
void weigh(uintptr_t scores, bool bf16, int64_t batches, int64_t queries, int64_t heads,
           int64_t keys, uintptr_t hidden, int64_t hidden_step, uintptr_t sink, int threads) {
  const Training& t = *current()->training;
  const int64_t row = keys * (bf16 ? 2 : 4);
  rows_in_parallel(batches * queries, threads, [&](int64_t r) {
    const uint8_t* mask = reinterpret_cast<const uint8_t*>(hidden);
    if (mask) mask += r / queries * hidden_step + r % queries * keys;
    for (int64_t h = 0; h < heads; h++) {
      t.weigh(at(scores) + (r * heads + h) * row, bf16, keys, mask, floats(sink)[h]);
    }
  });
}

// dsinks: for each row.
void weigh_back(uintptr_t grad, uintptr_t p, bool bf16, int64_t rows, int64_t keys, uintptr_t dots,
                float scale, uintptr_t dsinks, int threads) {
  const Training& t = *current()->training;
  const int64_t row = keys * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    floats(dsinks)[r] =
        t.weigh_back(at(grad) + row * r, at(p) + row * r, bf16, keys, floats(dots)[r], scale);
  });
}

void log_sums(uintptr_t x, bool bf16, int64_t rows, int64_t count, uintptr_t out, int threads) {
  const Training& t = *current()->training;
  const int64_t row = count * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads,
                   [&](int64_t r) { floats(out)[r] = t.log_sum(at(x) + row * r, bf16, count); });
}

void all_shares(uintptr_t x, bool bf16, int64_t rows, int64_t count, uintptr_t sums,
                uintptr_t targets, uintptr_t scales, int threads) {
  const Training& t = *current()->training;
  const int64_t row = count * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    t.shares(at(x) + row * r, bf16, count, floats(sums)[r],
             reinterpret_cast<const int64_t*>(targets)[r], floats(scales)[r]);
  });
}

void swiglu(uintptr_t gate, uintptr_t up, bool bf16, int64_t rows, int64_t width, uintptr_t weights,
            float limit, uintptr_t act, int threads) {
  const Training& t = *current()->training;
  const int64_t row = width * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    t.swiglu(at(gate) + row * r, at(up) + row * r, bf16, width, floats(weights)[r], limit,
             at(act) + row * r);
  });
}

void swiglu_back(uintptr_t gate, uintptr_t up, uintptr_t grad, bool bf16, int64_t rows,
                 int64_t width, uintptr_t weights, float limit, uintptr_t dgate, uintptr_t dup,
                 uintptr_t dweights, int threads) {
  const Training& t = *current()->training;
  const int64_t row = width * (bf16 ? 2 : 4);
  rows_in_parallel(rows, threads, [&](int64_t r) {
    floats(dweights)[r] =
        t.swiglu_back(at(gate) + row * r, at(up) + row * r, at(grad) + row * r, bf16, width,
                      floats(weights)[r], limit, at(dgate) + row * r, at(dup) + row * r);
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

bool attends() { return current()->training->attend != nullptr; }

// samples: seven numbers of each, the members of Sample but for ratio, addresses as they are.
struct Samples {
  SampledAttention a;
  const int64_t* of;
  int64_t count, ratio;

  Sample at(int64_t i) const {
    const int64_t* n = of + 7 * i;
    return {n[0], n[1], n[2], ratio, n[3], reinterpret_cast<const uint16_t*>(n[4]),
            reinterpret_cast<uint16_t*>(n[5]), reinterpret_cast<const int64_t*>(n[6])};
  }
};

Samples samples_of(uintptr_t q, uintptr_t kv, uintptr_t sink, int64_t heads, int64_t dim,
                   int64_t width, float scale, uintptr_t out, uintptr_t log_sum, uintptr_t samples,
                   int64_t count, int64_t ratio) {
  auto words = [](uintptr_t address) { return reinterpret_cast<uint16_t*>(address); };
  return {{words(q), words(kv), floats(sink), heads, dim, width, scale, words(out),
           floats(log_sum), nullptr, nullptr, nullptr},
          reinterpret_cast<const int64_t*>(samples), count, ratio};
}

// As many samples at once as there are threads for, or the blocks of each.
template <class F>
void each_sample(int64_t count, int threads, F f) {
  if (count < 2 * threads) {
    for (int64_t i = 0; i < count; i++) f(i, threads);
    return;
  }
  auto task = [&](int64_t i) { f(i, 1); };
  parallel(threads, count, task);
}

void attend(uintptr_t q, uintptr_t kv, uintptr_t sink, int64_t heads, int64_t dim, int64_t width,
            float scale, uintptr_t out, uintptr_t log_sum, uintptr_t samples, int64_t count,
            int64_t ratio, int threads) {
  const Samples all = samples_of(q, kv, sink, heads, dim, width, scale, out, log_sum, samples,
                                 count, ratio);
  each_sample(count, threads, [&](int64_t i, int some) {
    current()->training->attend(all.a, all.at(i), some);
  });
}

// dsinks: [samples, heads].
void attend_back(uintptr_t q, uintptr_t kv, uintptr_t sink, int64_t heads, int64_t dim,
                 int64_t width, float scale, uintptr_t out, uintptr_t log_sum, uintptr_t samples,
                 int64_t count, int64_t ratio, uintptr_t grad, uintptr_t dq, uintptr_t dkv,
                 uintptr_t dsinks, int threads) {
  Samples all = samples_of(q, kv, sink, heads, dim, width, scale, out, log_sum, samples, count,
                           ratio);
  all.a.grad = reinterpret_cast<const uint16_t*>(grad);
  all.a.dq = reinterpret_cast<uint16_t*>(dq);
  all.a.dkv = reinterpret_cast<uint16_t*>(dkv);
  each_sample(count, threads, [&](int64_t i, int some) {
    current()->training->attend_back(all.a, all.at(i), some, floats(dsinks) + heads * i);
  });
}

}  // namespace

void add_training(nb::module_& m) {
  auto free = nb::call_guard<NotRecorded, nb::gil_scoped_release>();
  m.def("train_hc_collapse", collapse, free);
  m.def("train_hc_dots", dots, free);
  m.def("train_hc_collapse_back", collapse_back, free);
  m.def("train_hc_squares", squares, free);
  m.def("train_hc_expand", expand, free);
  m.def("train_hc_expand_back", expand_back, free);
  m.def("train_sinkhorn", sinkhorn, free);
  m.def("train_sinkhorn_back", sinkhorn_back, free);
  m.def("train_norm_rope", norm_rope, free);
  m.def("train_norm_rope_back", norm_rope_back, free);
  m.def("train_norm", norm, free);
  m.def("train_norm_back", norm_back, free);
  m.def("train_row_dots", row_dots, free);
  m.def("train_weigh", weigh, free);
  m.def("train_weigh_back", weigh_back, free);
  m.def("train_log_sums", log_sums, free);
  m.def("train_shares", all_shares, free);
  m.def("train_swiglu", swiglu, free);
  m.def("train_swiglu_back", swiglu_back, free);
  m.def("train_pool", pool, free);
  m.def("train_pool_back", pool_back, free);
  m.def("train_attends", attends);
  m.def("train_attend", attend, free);
  m.def("train_attend_back", attend_back, free);
}

}  // namespace dsv4
