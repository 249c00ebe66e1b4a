// What the sources compiled once per instruction set share with those compiled once.
#pragma once

#include <cstdint>

namespace dsv4 {

enum class Format : int { fp4, fp8, bf16, f32 };

// A matrix [rows, inputs] as stored. FP4: two codes a byte, scales [rows, inputs / 32]. FP8: scales
// [ceil(rows / 128), ceil(inputs / 128)]. A scale takes scale_bytes: 1 (E8M0), or 4 (a float32
// that is a power of two).
struct Weight {
  const uint8_t* data;
  const uint8_t* scale;
  int64_t rows, inputs;
  Format format;
  int scale_bytes;
};

// Activations [count, inputs], `stride` elements from row to row.
struct Rows {
  const void* data;
  int64_t count, stride;
  bool is_bf16;
};

// Rows of activations that are multiplied while a weight is read, as pairs and as float32.
constexpr int64_t FEW = 32, FEW_WIDE = 8;

// Arranged activations times rows `first` .. `first + count` of a weight.
// Row i of the result is written to out + i * out_stride, and is that of activation pick[i], or
// i where pick is null.
struct Product {
  const Weight* weight;
  int64_t first, count;
  const uint8_t* x;
  int64_t x_bytes;  // of one arranged row
  bool pairs;       // how x is arranged
  int64_t group;    // of how many rows x is packed; 0: not at all
  const int64_t* pick;
  int64_t rows;
  void* out;
  int64_t out_stride;
  bool out_bf16;
  bool x_is_bf16;  // what x holds, however it is arranged

  // Exact products may be scaled when they are summed.
  bool wide() const { return x_is_bf16 && !pairs && weight->format != Format::f32; }
  int64_t few() const { return wide() ? FEW_WIDE : FEW; }
};

constexpr int64_t TILE_COLUMNS = 128, TILE_ROWS = 512;  // at most of a Product of packed rows
constexpr int64_t PRODUCT_WORKSPACE = 512 << 10;        // bytes that Multiply needs

// One row of activations in the order in which weights of `format` are read, filled up with zeros
// to arranged_bytes(). As pairs of bfloat16, or as float32.
using Arrange = void(const void* from, bool is_bf16, int64_t inputs, Format format, bool pairs,
                     uint8_t* to);

// Up to 16 arranged rows side by side in the order in which tiles take them: from vector to vector
// sixteen times `group` pairs, of which the rows after the last one are zero.
using Pack = void(const uint8_t* const* rows, int64_t count, int64_t group, int64_t bytes,
                  uint8_t* to);

// A result depends on its two rows only: not on how many rows there are, or where they are.
using Multiply = void(const Product& job, uint8_t* workspace);

// out = weight * silu(min(gate, limit)) * clamp(up, -limit, limit), rounded to out's type and then,
// if asked, to FP8 per 128. The width is a multiple of 128; a limit of 0 is none.
using Swiglu = void(const void* gate, const void* up, bool is_bf16, int64_t width, float weight,
                    float limit, bool fp8, void* out, bool out_bf16);

// out [width] = the sum of rows, in their order. The width is a multiple of 16.
using Add = void(const void* const* rows, int64_t count, bool is_bf16, int64_t width, float* out);

// What follows is computed for rows begin .. end - 1 of what it describes. Numbers are bfloat16 or
// float32 (is_bf16), rows lie one after the other unless a stride is given, and widths are multiples
// of 16. Each struct is one kernel of reference.py, where its meaning is.
template <class Job>
using Rowwise = void(const Job& job, int64_t begin, int64_t end);

struct Norm {  // weight null: none, and every step rounds
  const void *x, *weight;
  void* out;
  int64_t width;
  float eps;
  bool is_bf16, weight_bf16;
};

struct Rope {  // rows are [positions, heads]; the last `turned` channels are rotated
  const void* x;
  const float* rotation;  // [positions, turned / 2, 2]
  void* out;
  int64_t width, turned, heads, positions;
  bool inverse, is_bf16;
};

struct Sum {  // a row of y for every `each` of x
  const void *x, *y;
  void* out;
  int64_t width, each;
  bool x_bf16, y_bf16, out_bf16;
};

struct RoundFp8 {  // all but the last `keep` channels, per `block`
  const void* x;
  void* out;
  int64_t width, block, keep;
  bool is_bf16;
};

struct RoundFp4 {  // Hadamard transform of 128 channels, then FP4 per 32
  const void* x;
  void* out;
  bool is_bf16;
};

struct HcRead {
  const void* streams;                 // [h, d]
  const float *logits, *scale, *base;  // logits and base: [mixes]
  void* out;                           // [d]
  float *post, *comb;                  // [h], [h, h]; null for the head, which has `pre` only
  int64_t h, d, mixes;
  float eps, norm_eps;
  bool is_bf16, out_bf16;
};

struct HcExpand {
  const void *x, *streams;
  const float *post, *comb;
  void* out;
  int64_t h, d;
  bool x_bf16, is_bf16;
};

struct Sinkhorn {
  const float* comb;
  float* out;
  int64_t h, iters;
  float eps;
};

struct Route {  // a row is a token
  const float *logits, *bias;  // [experts]; bias null: the experts are chosen already
  float *scores, *weights;     // [experts], [k]
  int64_t* chosen;             // [k]
  int64_t experts, k;
  float scale;
  bool normalize;
};

struct Pool {  // a row is a block; the first one starts at kv and gate
  const float *kv, *gate;
  float* out;
  int64_t stride, ratio, width;
  bool overlap;
};

constexpr int64_t HEADS = 8;  // of one query at once, without tiles

// Rows of `bytes` bytes, `each` of which lie one after the other from `offset` of a piece on.
struct Table {
  const char* const* pieces;  // null: no rows
  int64_t offset, each, bytes;

  const char* row(int64_t i) const {
    if (i < each) return pieces[0] + offset + i * bytes;
    const auto piece = (uint32_t)i / (uint32_t)each;  // 64 bits would take twice as long
    return pieces[piece] + offset + (i - piece * each) * bytes;
  }
};

// `earlier` entries of the window are older than the first query. chosen [queries, k] or null.
// Rows are numbers like the others or, with `kept`, packed: FP8, but for so many channels at the
// end that are bfloat16, and then an E8M0 scale for every 64 FP8 channels.
struct Attention {
  const void *q, *window;
  Table rows;
  int64_t kept;
  const int64_t* chosen;
  const float* sink;
  void* out;
  int64_t heads, width_of_head, earlier, width, start, ratio, k;
  float scale;
  bool is_bf16, pairs;  // pairs: bfloat16 is multiplied as such, and not as float32
};

constexpr int64_t TILE = 32;      // keys at once
constexpr int64_t TOGETHER = 4;  // queries at once at most

// The results of up to HEADS heads (with tiles, of any number) of queries that may be computed
// together; one always can. The space is attention_space() bytes, or tiled_attention_space().
using Attend = void(const Attention& job, int64_t query, int64_t queries, int64_t head,
                    int64_t heads, uint8_t* space);

// How many packed rows are unpacked at once, rows of the window counted too.
inline int64_t unpacked_rows(const Attention& job) {
  return job.chosen ? job.width + job.k + TILE : job.kept ? TILE : 0;
}

constexpr int64_t TILED_KEYS = 320;  // of a query at once with tiles

// What it takes to compute so many queries together with tiles.
inline int64_t tiled_attention_space(const Attention& job, int64_t queries, int64_t heads) {
  const int64_t columns = (queries * heads + 15) / 16 * 16, width = job.width_of_head;
  const int64_t keys = TILED_KEYS + (queries - 1) * job.width;  // each query has its own window
  return 8 * (job.k + 8) + (2 * width + 64) * keys + 2 * width * columns + 128 * TILED_KEYS +
         4 * columns * (TILED_KEYS + width + 2);
}

// The same without, for queries that see at most so many keys.
inline int64_t attention_space(const Attention& job, int64_t queries, int64_t heads, int64_t keys) {
  return 8 * (job.k + 8) + unpacked_rows(job) * (2 * job.width_of_head + 8) +
         4 * queries * heads * (job.width_of_head + keys + TILE) +
         4 * (HEADS + 4) * job.width_of_head;
}

constexpr int64_t MAX_INDEX_WIDTH = 256;  // of a key
constexpr int64_t INDEX_TILE = 64;        // keys at once at most

// Keys are numbers like the others or packed: FP4 pairs and then an E8M0 scale for every 32.
struct IndexTopk {
  const void *q, *weights;
  Table keys;
  int64_t heads, width, start, ratio, k;
  bool is_bf16, packed;

  int64_t seen(int64_t query) const { return (start + query + 1) / ratio; }
};

// Keys that may be among a query's k best, in their order; a later one that is not above `least`
// is not. Room for best_room(k).
struct Best {
  float* scores;
  int32_t* places;
  int64_t count;
  float least;
};

inline int64_t best_room(int64_t k) { return 3 * k + INDEX_TILE; }

// Bytes that IndexBest works with: queries as bytes, or as tiles with their weights, and, if `all`,
// what it takes to thin a list.
inline int64_t index_space(const IndexTopk& job, int64_t queries, bool all = true) {
  const int64_t rows = queries * ((job.heads + 15) / 16 * (16 * 260) + 64);
  return rows + (all ? 8 * job.k + 4 * best_room(job.k) : 0);
}

// Appends to best[i], for each of `queries` queries that sees more than k keys, those among keys
// begin .. end - 1 that may be its k best.
using IndexBest = void(const IndexTopk& job, int64_t first, int64_t queries, int64_t begin,
                       int64_t end, Best* best, uint8_t* space);

// The places of the k highest of `count` scores, ascending; of equal ones the first. -1 where there
// are fewer. `space` holds `count` numbers.
using Select = void(const float* scores, int64_t count, int64_t k, int64_t* out, int32_t* space);

constexpr int64_t MAX_STREAMS = 8;

// The kernels of one instruction set. All give the same bits, but for those that pack.
struct Isa {
  const char* name;
  bool has_pairs;   // multiplies bfloat16 in hardware: bfloat16 activations stay pairs
  bool slow_pairs;  // but is faster with float32: they become that
  Arrange* arrange;
  Pack* pack;  // null: pairs are multiplied as they are arranged
  Multiply* multiply;
  Swiglu* swiglu;
  Add* add;
  Rowwise<Norm>* norm;
  Rowwise<Rope>* rope;
  Rowwise<Sum>* sum;
  Rowwise<RoundFp8>* round_fp8;
  Rowwise<RoundFp4>* round_fp4;
  Rowwise<HcRead>* hc_read;
  Rowwise<HcExpand>* hc_expand;
  Rowwise<Sinkhorn>* sinkhorn;
  Rowwise<Pool>* pool;
  Rowwise<Route>* route;
  Attend* attend;
  IndexBest* index_best;
  Select* select;
  const struct Training* training;

  bool multiplies_pairs() const { return has_pairs && !slow_pairs; }
};

inline int64_t arranged_bytes(int64_t inputs, bool pairs) {
  return (inputs + 127) / 128 * 128 * (pairs ? 2 : 4);
}

}  // namespace dsv4
