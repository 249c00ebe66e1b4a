// The Python module: addresses and sizes in, nothing about tensors. kernels/native.py is its user.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "experts.h"
#include "isas.h"
#include "linear.h"
#include "pool.h"
#include "store.h"
#include "tape.h"
#include "training_module.h"

namespace nb = nanobind;
using namespace dsv4;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void linear_of(uintptr_t x, bool x_bf16, int64_t rows, uintptr_t weight, uintptr_t scale,
               int format, int scale_bytes, int64_t outputs, int64_t inputs, int groups,
               uintptr_t out, bool out_bf16, int threads) {
  Weight w{at<uint8_t>(weight), at<uint8_t>(scale), outputs, inputs, (Format)format, scale_bytes};
  linear({at<void>(x), rows, groups * inputs, x_bf16}, w, groups, at<void>(out), out_bf16, threads);
}

// Runs a kernel over `rows` rows, `each` numbers of work apiece, in parts worth a thread.
template <class Job>
void by_rows(Rowwise<Job>* kernel, const Job& job, int64_t rows, int64_t each, int threads) {
  constexpr int64_t PART = 1 << 14, GRAIN = 16;
  const int64_t part = std::max<int64_t>(1, PART / std::max<int64_t>(each, 1) / GRAIN) * GRAIN;
  auto some = [&](int64_t i) { kernel(job, i * part, std::min(rows, (i + 1) * part)); };
  parallel(threads, (rows + part - 1) / part, some);
}

void norm(uintptr_t x, bool is_bf16, int64_t rows, int64_t width, uintptr_t weight,
          bool weight_bf16, float eps, uintptr_t out, int threads) {
  Norm job{at<void>(x), at<void>(weight), at<void>(out), width, eps, is_bf16, weight_bf16};
  by_rows(current()->norm, job, rows, width, threads);
}

void rope(uintptr_t x, bool is_bf16, int64_t rows, int64_t width, uintptr_t rotation,
          int64_t turned, int64_t heads, int64_t positions, bool inverse, uintptr_t out,
          int threads) {
  Rope job{at<void>(x), at<float>(rotation), at<void>(out), width,  turned,
           heads,       positions,           inverse,       is_bf16};
  by_rows(current()->rope, job, rows, width, threads);
}

void fp8_round(uintptr_t x, bool is_bf16, int64_t rows, int64_t width, int64_t block, int64_t keep,
               uintptr_t out, int threads) {
  RoundFp8 job{at<void>(x), at<void>(out), width, block, keep, is_bf16};
  by_rows(current()->round_fp8, job, rows, width, threads);
}

void hadamard_fp4(uintptr_t x, bool is_bf16, int64_t rows, uintptr_t out, int threads) {
  by_rows(current()->round_fp4, RoundFp4{at<void>(x), at<void>(out), is_bf16}, rows, 512, threads);
}

void hc_read(uintptr_t streams, bool is_bf16, int64_t rows, int64_t h, int64_t d, uintptr_t fn,
             uintptr_t scale, uintptr_t base, float eps, float norm_eps, uintptr_t out,
             bool out_bf16, uintptr_t post, uintptr_t comb, int threads) {
  const int64_t mixes = comb ? (2 + h) * h : h;
  auto logits = make_array<float>(rows * mixes);
  Weight weight{at<uint8_t>(fn), nullptr, mixes, h * d, Format::f32, 0};
  linear({at<void>(streams), rows, h * d, is_bf16}, weight, 1, logits.get(), false, threads);
  HcRead job{at<void>(streams), logits.get(),    at<float>(scale), at<float>(base),
             at<void>(out),     at<float>(post), at<float>(comb),  h,
             d,                 mixes,           eps,              norm_eps,
             is_bf16,           out_bf16};
  by_rows(current()->hc_read, job, rows, h * d, threads);
}

void hc_expand(uintptr_t x, bool x_bf16, uintptr_t streams, bool is_bf16, int64_t rows, int64_t h,
               int64_t d, uintptr_t post, uintptr_t comb, uintptr_t out, int threads) {
  HcExpand job{at<void>(x),   at<void>(streams), at<float>(post), at<float>(comb),
               at<void>(out), h,                 d,               x_bf16,
               is_bf16};
  by_rows(current()->hc_expand, job, rows, h * d, threads);
}

void sinkhorn(uintptr_t comb, int64_t rows, int64_t h, int64_t iters, float eps, uintptr_t out,
              int threads) {
  Sinkhorn job{at<float>(comb), at<float>(out), h, iters, eps};
  by_rows(current()->sinkhorn, job, rows, iters * h * h, threads);
}

void raw_rows(uintptr_t to, int64_t count, int64_t start, uintptr_t kv, uintptr_t gate,
              int64_t width, uintptr_t bias, int64_t ratio, int threads) {
  auto some = [&](int64_t part) {
    for (int64_t i = part * 16; i < std::min(count, part * 16 + 16); i++) {
      float* row = at<float>(to) + i * 2 * width;
      const float* logits = at<float>(gate) + i * width;
      const float* added = at<float>(bias) + (start + i) % ratio * width;
      std::memcpy(row, at<float>(kv) + i * width, width * sizeof(float));
      for (int64_t c = 0; c < width; c++) row[width + c] = logits[c] + added[c];
    }
  };
  parallel(threads, (count + 15) / 16, some);
}

void store(uintptr_t rows, bool is_bf16, int64_t count, int64_t width, int packed, int64_t kept,
           int64_t bytes, uintptr_t addresses, int64_t offset, int64_t each, int64_t first,
           int threads) {
  StoredAs form{(StoredAs::Packed)packed, width, kept, bytes};
  auto some = [&](int64_t part) {
    for (int64_t i = part * 16; i < std::min(count, part * 16 + 16); i++) {
      const int64_t piece = (first + i) / each, inside = (first + i) % each;
      auto* to = at<uint8_t>(at<int64_t>(addresses)[piece] + offset) + inside * bytes;
      store_row(at<uint8_t>(rows) + i * width * (is_bf16 ? 2 : 4), is_bf16, form, to);
    }
  };
  parallel(threads, (count + 15) / 16, some);
}

void pool(uintptr_t kv, uintptr_t gate, int64_t blocks, int64_t stride, int64_t ratio,
          int64_t width, bool overlap, uintptr_t out, int threads) {
  Pool job{at<float>(kv), at<float>(gate), at<float>(out), stride, ratio, width, overlap};
  by_rows(current()->pool, job, blocks, ratio * width, threads);
}

void route(uintptr_t logits, int64_t rows, int64_t experts, uintptr_t bias, int64_t k,
           bool normalize, float scale, uintptr_t scores, uintptr_t chosen, uintptr_t weights,
           int threads) {
  Route job{at<float>(logits), at<float>(bias), at<float>(scores), at<float>(weights),
            at<int64_t>(chosen), experts, k, scale, normalize};
  for (int64_t i = 0; !bias && i < rows * k; i++) {
    if (job.chosen[i] < 0 || job.chosen[i] >= experts) throw std::out_of_range("no such expert");
  }
  by_rows(current()->route, job, rows, experts * (k + 16), threads);
}

void swiglu(uintptr_t gate, uintptr_t up, bool is_bf16, int64_t rows, int64_t width, float limit,
            uintptr_t out, bool out_bf16, int threads) {
  auto some = [&](int64_t i) {
    auto row = [&](uintptr_t data, bool bf16) { return at<char>(data) + i * width * (bf16 ? 2 : 4); };
    current()->swiglu(row(gate, is_bf16), row(up, is_bf16), is_bf16, width, 1.0f, limit, false,
                      row(out, out_bf16), out_bf16);
  };
  parallel(rows * width < 1 << 15 ? 1 : threads, rows, some);
}

// Addresses of pieces (0: no rows), then offset, each and bytes of Table.
using Pieces = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

Table table_of(const Pieces& p) {
  auto [pieces, offset, each, bytes] = p;
  return {at<const char*>(pieces), offset, each, bytes};
}

// Attention of jobs that differ only in what they see, each of so many queries.
void attend(const std::vector<Attention>& jobs, int64_t queries, int threads) {
  const Isa* isa = current();
  const Attention& any = jobs.front();
  const int64_t heads = any.heads;
  const bool tiles = isa->pack && any.is_bf16;
  // as many heads as there can be in a task, if there are tasks for all threads
  const int64_t fair = std::max<int64_t>(heads * queries * (int64_t)jobs.size() / threads, 1);
  const int64_t most = std::min(tiles ? (fair + 15) / 16 * 16 : fair, tiles ? heads : HEADS);
  const int64_t parts = (heads + most - 1) / most;
  const int64_t together = tiles ? std::clamp<int64_t>(16 / most, 1, TOGETHER) : TOGETHER;
  int64_t group = queries >= 16 ? together : 1, space = 0;
  for (const Attention& job : jobs) {
    const int64_t seen =
        !job.rows.pieces ? 0 : job.chosen ? job.k : (job.start + queries) / job.ratio;
    // packed rows that all see are unpacked for several at once
    const bool alike = job.kept && !job.chosen && seen > 0 && job.earlier + 1 >= job.width &&
                       job.width % TILE == 0;
    if (!alike) group = 1;
    space = std::max(space, tiles ? tiled_attention_space(job, group, most)
                                  : attention_space(job, group, most, job.width + seen));
  }
  const int64_t tasks = (queries + group - 1) / group * parts;  // of a job
  auto one = [&](int64_t number) {
    static thread_local Array<uint8_t> kept;
    static thread_local int64_t size = 0;
    if (size < space) kept = make_array<uint8_t>(space), size = space;
    const int64_t task = number % tasks;
    const int64_t head = task % parts * most, query = task / parts * group;
    isa->attend(jobs[number / tasks], query, std::min(group, queries - query), head,
                std::min(most, heads - head), kept.get());
  };
  parallel(threads, (int64_t)jobs.size() * tasks, one);
}

void attention(uintptr_t q, bool is_bf16, int64_t queries, int64_t heads, int64_t width_of_head,
               uintptr_t window, int64_t earlier, int64_t width, Pieces rows, int64_t kept,
               uintptr_t chosen, int64_t k, uintptr_t sink, int64_t start, int64_t ratio,
               float scale, uintptr_t out, int threads) {
  Attention job{at<void>(q),   at<void>(window), table_of(rows), kept,  at<int64_t>(chosen),
                at<float>(sink), at<void>(out),  heads,          width_of_head, earlier,
                width,         start,            ratio,          k,     scale,
                is_bf16,       current()->multiplies_pairs()};
  attend({job}, queries, threads);
}

void index_topk(uintptr_t q, bool is_bf16, int64_t queries, int64_t heads, int64_t width,
                Pieces keys, bool packed, uintptr_t weights, int64_t start, int64_t ratio, int64_t k,
                uintptr_t out, int threads) {
  constexpr int64_t ROWS = 256, LEAST = 2048;  // heads of all queries, and keys, of a task
  IndexTopk job{at<void>(q), at<void>(weights), table_of(keys), heads, width, start,
                ratio,       k,                 is_bf16,        packed};
  const Isa* isa = current();
  const int64_t most = job.seen(queries - 1), group = std::clamp<int64_t>(ROWS / heads, 1, queries);
  const int64_t groups = (queries + group - 1) / group;
  const int64_t wanted = threads == 1 ? 1 : std::max<int64_t>(1, 4 * threads / groups);
  const int64_t parts = std::clamp<int64_t>(most / LEAST, 1, wanted), room = best_room(k);
  const int64_t each = (most / parts + INDEX_TILE) / INDEX_TILE * INDEX_TILE;
  // a query's lists of all parts lie one after the other
  auto scores = make_array<float>(queries * parts * room);
  auto places = make_array<int32_t>(queries * parts * room);
  auto counts = make_array<int64_t>(queries * parts);
  auto score = [&](int64_t task) {
    const int64_t part = task % parts, first = task / parts * group;
    const int64_t here = std::min(group, queries - first);
    auto best = make_array<Best>(here);
    for (int64_t i = 0; i < here; i++) {
      const int64_t list = ((first + i) * parts + part) * room;
      best[i] = {scores.get() + list, places.get() + list, 0, -INFINITY};
    }
    auto space = make_array<uint8_t>(index_space(job, here));
    isa->index_best(job, first, here, part * each, std::min((part + 1) * each, most), best.get(),
                    space.get());
    for (int64_t i = 0; i < here; i++) counts[(first + i) * parts + part] = best[i].count;
  };
  parallel(threads, groups * parts, score);
  auto select = [&](int64_t query) {
    int64_t* chosen = at<int64_t>(out) + query * k;
    const int64_t seen = job.seen(query), list = query * parts * room;
    if (seen <= k) {
      for (int64_t i = 0; i < k; i++) chosen[i] = i < seen ? i : -1;
      return;
    }
    int64_t count = 0;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t more = counts[query * parts + part], from = list + part * room;
      std::memmove(scores.get() + list + count, scores.get() + from, 4 * more);
      std::memmove(places.get() + list + count, places.get() + from, 4 * more);
      count += more;
    }
    auto space = make_array<int32_t>(count);
    isa->select(scores.get() + list, count, k, chosen, space.get());
    for (int64_t i = 0; i < k; i++) chosen[i] = places[list + chosen[i]];
  };
  parallel(threads, queries, select);
}

// How raw compressor rows of a token become an entry of a table: its two projections [N, w] (w: the
// entry's width, twice that where blocks overlap) and the bias [ratio, w], the entry's width, whether
// blocks overlap; norm, whether it is bfloat16, its epsilon; the rotation of each token's block and
// how many channels it turns; how entries are stored (StoredAs) and where (offset and each of Table).
using Pooled = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, bool, uintptr_t, bool, float,
                          uintptr_t, int64_t, int, int64_t, int64_t, int64_t, int64_t>;

// The raw row of token i of a pass and, where its block is whole now, the entry.
void leave(const Pooled& pooled, bool is_bf16, int64_t i, int64_t position, int64_t ratio,
           uintptr_t raw, uintptr_t addresses) {
  auto [kv, gate, bias, width, overlap, weight, weight_bf16, eps, rotation, turned, packed, kept,
        bytes, offset, each] = pooled;
  const Isa* isa = current();
  const int64_t across = width * (1 + overlap), element = is_bf16 ? 2 : 4;
  raw_rows(raw, 1, position, kv + 4 * i * across, gate + 4 * i * across, across, bias, ratio, 1);
  if ((position + 1) % ratio != 0) return;
  const float* first = at<float>(raw) - (ratio * (1 + overlap) - 1) * 2 * across;
  auto entry = make_array<float>(width);
  auto a = make_array<char>(width * element), b = make_array<char>(width * element);
  isa->pool({first, first + across, entry.get(), 2 * across, ratio, width, overlap}, 0, 1);
  if (is_bf16) {
    for (int64_t c = 0; c < width; c++) reinterpret_cast<uint16_t*>(a.get())[c] = to_bf16(entry[c]);
  } else {
    std::memcpy(a.get(), entry.get(), width * element);
  }
  isa->norm({a.get(), at<void>(weight), b.get(), width, eps, is_bf16, weight_bf16}, 0, 1);
  const float* turn = at<float>(rotation) + i * turned;
  isa->rope({b.get(), turn, a.get(), width, turned, 1, 1, false, is_bf16}, 0, 1);
  const StoredAs form{(StoredAs::Packed)packed, width, kept, bytes};
  if (form.packed == StoredAs::entry) {
    isa->round_fp8({a.get(), b.get(), width, 64, kept, is_bf16}, 0, 1);
  } else if (form.packed == StoredAs::key) {
    isa->round_fp4({a.get(), b.get(), is_bf16}, 0, 1);
  }
  store((uintptr_t)(form.packed ? b : a).get(), is_bf16, 1, width, packed, kept, bytes, addresses,
        offset, each, position / ratio, 1);
}

// Queries of an indexer, how many heads and channels, the heads' weights, how many rows are chosen,
// and where they are left.
using Choice = std::tuple<uintptr_t, int64_t, int64_t, uintptr_t, int64_t, uintptr_t>;

// All of attention that is no product, for one new token of each of n timelines. `places` has
// `stride` numbers of each timeline: first its position, and from `column` on where the window
// begins, of how many entries it is with the new one, the addresses of the blocks, and where raw
// rows go, those of `pooled` in turn (attention's, the indexer's).
void look_each(uintptr_t q, bool is_bf16, int64_t n, int64_t heads, int64_t width_of_head,
               uintptr_t kv, uintptr_t places, int64_t stride, int64_t column,
               const std::vector<Pooled>& pooled, Choice choice, int64_t width, uintptr_t sink,
               int64_t ratio, float scale, uintptr_t out, int threads) {
  auto [index_q, index_heads, index_width, weights, k, chosen] = choice;
  const int64_t element = is_bf16 ? 2 : 4, entry = width_of_head * element;
  auto table = [&](size_t which, uintptr_t addresses) {
    const auto& form = pooled[which];
    return Pieces{addresses, std::get<13>(form), std::get<14>(form), std::get<12>(form)};
  };
  std::vector<Attention> jobs;
  for (int64_t i = 0; i < n; i++) {
    const int64_t* mine = at<int64_t>(places) + i * stride;
    const int64_t position = mine[0], *here = mine + column;
    const auto window = (uintptr_t)here[0], addresses = (uintptr_t)here[2];
    std::memcpy(at<char>(window) + (here[1] - 1) * entry, at<char>(kv) + i * entry, entry);
    for (size_t which = 0; which < pooled.size(); which++) {
      leave(pooled[which], is_bf16, i, position, ratio, (uintptr_t)here[3 + which], addresses);
    }
    const int64_t rows = pooled.empty() ? 0 : (position + 1) / ratio;
    const bool some = k > 0 && rows > k;
    if (some) {
      index_topk(index_q + i * index_heads * index_width * element, is_bf16, 1, index_heads,
                 index_width, table(1, addresses), std::get<10>(pooled[1]) != 0,
                 weights + i * index_heads * element, position, ratio, k, chosen + 8 * i * k,
                 threads);
    }
    jobs.push_back({at<char>(q) + i * heads * entry, at<void>(window),
                    table_of(rows ? table(0, addresses) : Pieces{0, 0, 1, 0}),
                    rows ? std::get<11>(pooled[0]) : 0, some ? at<int64_t>(chosen) + i * k : nullptr,
                    at<float>(sink), at<char>(out) + i * heads * entry, heads, width_of_head,
                    here[1] - 1, width, position, ratio, some ? k : 0, scale, is_bf16,
                    current()->multiplies_pairs()});
  }
  attend(jobs, 1, threads);
}

// The words of 32 bits, summed, and summed with weights: see reference.checksum. Sums of sums give
// each row of sixteen words the weight of the rows that are left.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
__attribute__((target_clones("default", "avx2", "avx512f")))
#endif
std::tuple<uint64_t, uint64_t> checksum(uintptr_t data, int64_t bytes) {
  constexpr int64_t ROW = 16;
  uint64_t sums[ROW] = {}, sums_of_sums[ROW] = {};
  const auto* from = at<uint8_t>(data);
  for (int64_t i = 0; i < bytes; i += 4 * ROW) {
    uint32_t words[ROW] = {};
    if (bytes - i >= 4 * ROW) {
      std::memcpy(words, from + i, 4 * ROW);
    } else {
      std::memcpy(words, from + i, bytes - i);
    }
    for (int64_t w = 0; w < ROW; w++) {
      sums[w] += words[w];
      sums_of_sums[w] += sums[w];
    }
  }
  uint64_t plain = 0, weighted = 0;
  for (int64_t w = 0; w < ROW; w++) {
    plain += sums[w];
    weighted += ROW * sums_of_sums[w] + w * sums[w];
  }
  return {plain, weighted};
}

void scaled(uintptr_t x, bool is_bf16, int64_t count, float factor, uintptr_t out, int) {
  for (int64_t i = 0; i < count; i++) {
    const float product = number(at<uint8_t>(x), is_bf16, i) * factor;
    if (is_bf16) {
      at<uint16_t>(out)[i] = to_bf16(product);
    } else {
      at<float>(out)[i] = product;
    }
  }
}

void add(uintptr_t x, bool x_bf16, uintptr_t y, bool y_bf16, int64_t rows, int64_t width,
         int64_t each, uintptr_t out, bool out_bf16, int threads) {
  Sum job{at<void>(x), at<void>(y), at<void>(out), width, each, x_bf16, y_bf16, out_bf16};
  by_rows(current()->sum, job, rows, width, threads);
}

// One expert's matrices: gate, up, down as (weight, scale, format, scale_bytes, outputs, inputs).
using Address = std::tuple<uintptr_t, uintptr_t, int, int, int64_t, int64_t>;

struct Experts {
  using All = std::shared_ptr<std::vector<Expert>>;  // a tape may outlive the table
  All all = std::make_shared<std::vector<Expert>>();

  void append(Address gate, Address up, Address down) {
    all->push_back({weight_of(gate), weight_of(up), weight_of(down)});
  }

  static Weight weight_of(const Address& a) {
    auto [weight, scale, format, scale_bytes, outputs, inputs] = a;
    return {at<uint8_t>(weight), at<uint8_t>(scale), outputs, inputs, (Format)format, scale_bytes};
  }

  void run(uintptr_t x, bool x_bf16, int64_t rows, uintptr_t ids, uintptr_t weights, int64_t k,
           float limit, bool fp8, uintptr_t out, int threads) const {
    Recorded<run_experts>::call(all, x, x_bf16, rows, ids, weights, k, limit, fp8, out, threads);
  }

  static void run_experts(All all, uintptr_t x, bool x_bf16, int64_t rows, uintptr_t ids,
                          uintptr_t weights, int64_t k, float limit, bool fp8, uintptr_t out,
                          int threads) {
    routed_experts(*all, {at<void>(x), rows, (*all)[0].gate.inputs, x_bf16}, at<int64_t>(ids),
                   at<float>(weights), k, limit, fp8, at<float>(out), threads);
  }
};

}  // namespace

NB_MODULE(_native, m) {
  use(usable().front());
  m.def("isas", usable, "Instruction sets of this machine that are compiled in, best first.");
  m.def("isa", [] { return current()->name; }, "The one in use.");
  m.def("use", use, "Use another, for all threads of the process.");
  m.def("stay_awake", stay_awake, "So many more passes are under way.");
  add_training(m);
  auto release = nb::call_guard<nb::gil_scoped_release>();
  auto not_recorded = nb::call_guard<NotRecorded, nb::gil_scoped_release>();
  m.def("linear", Recorded<linear_of>::call, release);
  m.def("norm", Recorded<norm>::call, release);
  m.def("rope", Recorded<rope>::call, release);
  m.def("fp8_round", Recorded<fp8_round>::call, release);
  m.def("hadamard_fp4", Recorded<hadamard_fp4>::call, release);
  m.def("hc_read", Recorded<hc_read>::call, release);
  m.def("hc_expand", Recorded<hc_expand>::call, release);
  m.def("sinkhorn", Recorded<sinkhorn>::call, release);
  m.def("raw_rows", raw_rows, not_recorded);
  m.def("store", store, not_recorded);
  m.def("pool", pool, not_recorded);
  m.def("add", Recorded<add>::call, release);
  m.def("scaled", Recorded<scaled>::call, release);
  m.def("route", Recorded<route>::call, release);
  m.def("swiglu", Recorded<swiglu>::call, release);
  m.def("attention", attention, not_recorded);
  m.def("look_each", Recorded<look_each>::call, release);
  m.def("index_topk", index_topk, not_recorded);
  m.def("checksum", checksum, not_recorded);
  nb::class_<Experts>(m, "Experts")
      .def(nb::init<>())
      .def("append", &Experts::append)
      .def("run", &Experts::run, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Tape>(m, "Tape")
      .def(nb::init<>())
      .def("input", &Tape::input)
      .def("record", [](Tape& tape) { Tape::recording() = &tape; })
      .def("stop", [](Tape&) { Tape::recording() = nullptr; })
      .def_prop_ro("steps", &Tape::steps)
      .def_prop_ro("whole", &Tape::whole)
      .def("run", &Tape::run, release);
}
