// A program without Python: runs every kernel of every instruction set on ugly shapes and prints
// what each gives as one number. It fails if two instruction sets differ, tiles apart. Its output
// is the same on every processor, and it is what runs under valgrind and under an emulated one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "experts.h"
#include "isas.h"
#include "linear.h"
#include "pool.h"

using namespace dsv4;

namespace {

struct Random {  // the same numbers everywhere
  uint64_t state;

  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
  }
  float unit() { return (float)((int)(bits() & 0xFFFF) - 32768) / 32768.0f; }
};

std::vector<float> floats(Random& random, int64_t count, float size = 1) {
  std::vector<float> x(count);
  for (float& v : x) v = size * random.unit();
  return x;
}

std::vector<uint16_t> halves(Random& random, int64_t count, float size = 1) {
  std::vector<uint16_t> x(count);
  for (uint16_t& v : x) {
    float f = size * random.unit();
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    v = (uint16_t)(bits >> 16);
  }
  return x;
}

std::vector<uint8_t> codes(Random& random, int64_t count, int mask, int add = 0) {
  std::vector<uint8_t> x(count);
  for (uint8_t& v : x) v = (uint8_t)((random.bits() & mask) + add);
  return x;
}

std::map<std::string, uint64_t> first;  // what the first instruction set gave
bool differ = false;

template <class T>
void say(const std::string& kernel, const std::vector<T>& out) {
  uint64_t hash = 14695981039346656037u;
  for (T value : out) {
    uint8_t bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    for (uint8_t byte : bytes) hash = (hash ^ byte) * 1099511628211u;
  }
  const bool tiles = current()->pack != nullptr;  // in an order of their own
  auto [at, fresh] = first.emplace(kernel + (tiles ? ", tiles" : ""), hash);
  if (fresh && !tiles) std::printf("%-28s %016llx\n", kernel.c_str(), (unsigned long long)hash);
  if (at->second != hash) {
    std::printf("%-28s %016llx %s differs\n", kernel.c_str(), (unsigned long long)hash,
                current()->name);
    differ = true;
  }
}

struct Stored {
  std::vector<uint8_t> data, scale;
  Weight weight;

  Stored(Random& random, Format format, int64_t rows, int64_t inputs) {
    int64_t scales = 0;
    if (format == Format::fp4) data = codes(random, rows * inputs / 2, 0xFF);
    if (format == Format::fp8) data = codes(random, rows * inputs, 0xF7);
    if (format == Format::fp4) scales = rows * ((inputs + 31) / 32);
    if (format == Format::fp8) scales = (rows + 127) / 128 * ((inputs + 127) / 128);
    scale = codes(random, scales, 3, 120);
    if (format == Format::bf16) {
      auto x = halves(random, rows * inputs);
      data.assign((uint8_t*)x.data(), (uint8_t*)(x.data() + x.size()));
    }
    if (format == Format::f32) {
      auto x = floats(random, rows * inputs);
      data.assign((uint8_t*)x.data(), (uint8_t*)(x.data() + x.size()));
    }
    weight = {data.data(), scale.data(), rows, inputs, format, 1};
  }
  Stored(const Stored&) = delete;
  Stored(Stored&& other) = default;  // vectors keep their data where it is
};

void products() {
  const char* names[] = {"FP4", "FP8", "BF16", "F32"};
  for (int format = 0; format < 4; format++) {
    Random random{(uint64_t)format + 1};
    Stored w(random, (Format)format, 259, 256);
    for (int64_t rows : {1, 3, 33, 130}) {
      auto x = halves(random, rows * 256);
      x[5] = 0x0001, x[7] = 0x8000;  // below 2^-126, and -0
      if (rows == 3) x[256 + 3] = 0x7FC0, x[512 + 9] = 0x7F80;  // NaN, infinity
      std::vector<uint16_t> out(rows * 259);
      linear({x.data(), rows, 256, true}, w.weight, 1, out.data(), true, 2);
      for (uint16_t& v : out) v = (v & 0x7FFF) > 0x7F80 ? 0x7FC0 : v;  // any NaN is a NaN
      say("linear " + std::string(names[format]) + ", " + std::to_string(rows), out);
    }
    auto x = floats(random, 5 * 256);
    std::vector<float> out(5 * 259);
    linear({x.data(), 5, 256, false}, w.weight, 1, out.data(), false, 1);
    say("linear " + std::string(names[format]) + ", float32", out);
  }
}

void experts() {
  Random random{7};
  std::vector<Stored> held;
  for (int i = 0; i < 15; i++) {
    bool down = i % 3 == 2;
    held.emplace_back(random, Format::fp4, down ? 256 : 128, down ? 128 : 256);
  }
  std::vector<Expert> all;
  for (int i = 0; i < 15; i += 3) {
    all.push_back({held[i].weight, held[i + 1].weight, held[i + 2].weight});
  }
  for (int64_t rows : {1, 37}) {
    auto x = halves(random, rows * 256);
    std::vector<int64_t> ids(rows * 2);
    for (int64_t i = 0; i < rows * 2; i++) ids[i] = i % 2 ? 3 : random.bits() % 2;  // 2, 4: none
    auto weights = floats(random, rows * 2);
    std::vector<float> out(rows * 256);
    routed_experts(all, {x.data(), rows, 256, true}, ids.data(), weights.data(), 2, 10.0f, true,
                   out.data(), 2);
    say("experts, " + std::to_string(rows), out);
  }
}

void rowwise() {
  const Isa* isa = current();
  Random random{11};
  auto x = halves(random, 7 * 512, 4), weight = halves(random, 512);
  auto angles = floats(random, 7 * 32 * 2);
  std::vector<uint16_t> out(7 * 512);
  isa->norm({x.data(), weight.data(), out.data(), 512, 1e-6f, true, true}, 0, 7);
  say("norm", out);
  isa->norm({x.data(), nullptr, out.data(), 512, 1e-6f, true, false}, 0, 7);
  say("norm without a weight", out);
  isa->rope({x.data(), angles.data(), out.data(), 512, 64, 1, 7, false, true}, 0, 7);
  say("rope", out);
  isa->round_fp8({x.data(), out.data(), 512, 64, 64, true}, 0, 7);
  say("FP8", out);
  isa->round_fp4({x.data(), out.data(), true}, 0, 28);
  say("Hadamard and FP4", out);

  auto logits = floats(random, 7 * 24), base = floats(random, 24);
  std::vector<float> scale{0.3f, 0.2f, 0.1f}, post(7 * 4), comb(7 * 16), even(7 * 16);
  std::vector<uint16_t> read(7 * 128), expanded(7 * 512);
  isa->hc_read({x.data(), logits.data(), scale.data(), base.data(), read.data(), post.data(),
                comb.data(), 4, 128, 24, 1e-6f, 1e-6f, true, true}, 0, 7);
  say("mHC read", read), say("mHC read, post", post), say("mHC read, comb", comb);
  isa->sinkhorn({comb.data(), even.data(), 4, 20, 1e-6f}, 0, 7);
  say("Sinkhorn", even);
  isa->hc_expand({read.data(), x.data(), post.data(), even.data(), expanded.data(), 4, 128, true,
                  true}, 0, 7);
  say("mHC expand", expanded);

  auto kv = floats(random, 3 * 4 * 256), gate = floats(random, 3 * 4 * 256);
  for (bool overlap : {false, true}) {
    const int64_t width = overlap ? 128 : 256, blocks = overlap ? 2 : 3;
    std::vector<float> pooled(blocks * width);
    isa->pool({kv.data(), gate.data(), pooled.data(), 256, 4, width, overlap}, 0, blocks);
    say(overlap ? "pool, overlapping" : "pool", pooled);
  }
  auto scores = floats(random, 7 * 48), bias = floats(random, 48);
  std::vector<float> given(7 * 48), weights(7 * 6);
  std::vector<int64_t> chosen(7 * 6);
  isa->route({scores.data(), bias.data(), given.data(), weights.data(), chosen.data(), 48, 6, 1.5f,
              true}, 0, 7);
  say("route", chosen), say("route, weights", weights);
}

void attention() {
  const Isa* isa = current();
  Random random{13};
  const int64_t heads = 5, dim = 512, queries = 3, rows = 75, kept = 64, k = 40;
  auto q = halves(random, queries * heads * dim), window = halves(random, (127 + queries) * dim);
  auto sink = floats(random, heads);
  auto plain = halves(random, rows * dim);
  const int64_t packed_bytes = dim - kept + 2 * kept + (dim - kept) / 64;
  std::vector<uint8_t> packed = codes(random, rows * packed_bytes, 0x77);
  for (int64_t i = 0; i < rows; i++) {
    auto tail = halves(random, kept);
    std::memcpy(&packed[i * packed_bytes + dim - kept], tail.data(), 2 * kept);
    std::memset(&packed[i * packed_bytes + dim + kept], 124, (dim - kept) / 64);
  }
  std::vector<int64_t> chosen(queries * k, -1);
  for (int64_t i = 0; i < queries; i++) {
    for (int64_t j = 0; j < k - 3 * i; j++) chosen[i * k + j] = j + i;
  }
  for (int packs = 0; packs < 2; packs++) {
    for (int chooses = 0; chooses < 2; chooses++) {
      const int64_t bytes = packs ? packed_bytes : 2 * dim;
      const char* base = packs ? (const char*)packed.data() : (const char*)plain.data();
      const char* pieces[] = {base, base + 40 * bytes};
      std::vector<uint16_t> out(queries * heads * dim);
      Attention job{q.data(), window.data(), {pieces, 0, 40, bytes}, packs ? kept : 0,
                    chooses ? chosen.data() : nullptr, sink.data(), out.data(), heads, dim, 127,
                    128, 4 * rows - queries, 4, chooses ? k : 0, 0.044f, true,
                    isa->multiplies_pairs()};
      auto space = make_array<uint8_t>(std::max(attention_space(job, 1, heads, 128 + rows),
                                                tiled_attention_space(job, 1, heads)));
      for (int64_t i = 0; i < queries; i++) isa->attend(job, i, 1, 0, heads, space.get());
      say(std::string("attention") + (packs ? ", packed" : "") + (chooses ? ", chosen" : ""), out);
    }
  }
}

void index() {
  const Isa* isa = current();
  Random random{17};
  const int64_t heads = 8, dim = 128, keys = 331, k = 50, key_bytes = dim / 2 + dim / 32;
  auto q = halves(random, 2 * heads * dim), weights = halves(random, 2 * heads);
  isa->round_fp4({q.data(), q.data(), true}, 0, 2 * heads);
  auto table = halves(random, keys * dim);
  isa->round_fp4({table.data(), table.data(), true}, 0, keys);
  auto packed = codes(random, keys * key_bytes, 0xFF);
  for (int64_t i = 0; i < keys; i++) std::memset(&packed[i * key_bytes + dim / 2], 126, dim / 32);
  for (int packs = 0; packs < 2; packs++) {
    const int64_t bytes = packs ? key_bytes : 2 * dim;
    const char* base = packs ? (const char*)packed.data() : (const char*)table.data();
    const char* pieces[] = {base, base + 200 * bytes};
    IndexTopk job{q.data(), weights.data(), {pieces, 0, 200, bytes}, heads, dim, 4 * keys - 2, 4, k,
                  true, packs != 0};
    std::vector<float> scores(2 * best_room(k));
    std::vector<int32_t> places(2 * best_room(k));
    Best best[2];
    for (int64_t i = 0; i < 2; i++) {
      best[i] = {&scores[i * best_room(k)], &places[i * best_room(k)], 0, -INFINITY};
    }
    auto space = make_array<uint8_t>(index_space(job, 2));
    isa->index_best(job, 0, 2, 0, job.seen(1), best, space.get());
    std::vector<int64_t> found(2 * k);
    for (int64_t i = 0; i < 2; i++) {
      auto room = make_array<int32_t>(best[i].count);
      isa->select(best[i].scores, best[i].count, k, &found[i * k], room.get());
      for (int64_t j = 0; j < k; j++) found[i * k + j] = best[i].places[found[i * k + j]];
    }
    say(packs ? "indexer, packed" : "indexer", found);
  }
}

}  // namespace

int main() {
  for (const std::string& name : usable()) {
    use(name);
    std::fprintf(stderr, "%s\n", name.c_str());
    products(), experts(), rowwise(), attention(), index();
  }
  return differ ? 1 : 0;
}
