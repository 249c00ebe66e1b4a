// Matrix products with weights as stored.
//
// Each result is sixteen sums, one per lane, of the steps of 128 inputs in order, which are added by
// halves at the end. Few rows are multiplied while the weight is read; for many, a tile of the
// weight is unpacked into the cache first. The order of every sum is the same either way.
#include "functions.h"
#include "kernels.h"
#include "product_tiles.h"
#include "weights.h"

namespace DSV4_ISA {
namespace {

using dsv4::Product;

// ---------------------------------------------------------------- activations

// 128 float32 as eight vectors: of each pair the second one, then the first.
inline void in_singles(const float* x, Format format, float* out) {
  for (int v = 0; v < 4; v++) {
    for (int i = 0; i < LANES; i++) {
      out[32 * v + i] = x[input_at(format, v, 2 * i + 1)];
      out[32 * v + LANES + i] = x[input_at(format, v, 2 * i)];
    }
  }
}

}  // namespace

void arrange(const void* from, bool is_bf16, int64_t inputs, Format format, bool pairs,
             uint8_t* to) {
  const int64_t element = is_bf16 ? 2 : 4;
  for (int64_t begin = 0; begin < inputs; begin += STEP, to += STEP * (pairs ? 2 : 4)) {
    const uint8_t* x = static_cast<const uint8_t*>(from) + begin * element;
    alignas(64) uint8_t padded[4 * STEP];
    if (inputs - begin < STEP) {
      std::memset(padded, 0, sizeof padded);
      std::memcpy(padded, x, (inputs - begin) * element);
      x = padded;
    }
    float* singles = reinterpret_cast<float*>(to);
    if (pairs) {
      store(to, in_pairs(reinterpret_cast<const uint16_t*>(x), format));
    } else if (format == Format::f32) {
      for (int i = 0; i < STEP; i += LANES) store(singles + i, get(x, is_bf16, i));
    } else if (is_bf16) {
      Step step = in_pairs(reinterpret_cast<const uint16_t*>(x), format);
      for (int v = 0; v < 4; v++) {
        store(singles + 32 * v, odd(step.v[v]));
        store(singles + 32 * v + LANES, even(step.v[v]));
      }
    } else {
      in_singles(reinterpret_cast<const float*>(x), format, singles);
    }
  }
}

namespace {

// ---------------------------------------------------------------- results

struct Results {
  const Product& job;

  __attribute__((always_inline)) void put(int64_t row, int64_t column, float value) const {
    int64_t at = row * job.out_stride + column;
    if (job.out_bf16) {
      static_cast<uint16_t*>(job.out)[at] = narrow(value);
    } else {
      static_cast<float*>(job.out)[at] = value;
    }
  }
};

inline const uint8_t* activation(const Product& job, int64_t row) {
  return job.x + (job.pick ? job.pick[row] : row) * job.x_bytes;
}

// ---------------------------------------------------------------- few rows

constexpr int64_t AHEAD = 8192;  // bytes of weight that the memory is asked for in advance

// Where a row's read will be AHEAD bytes of all columns later: `at` counts from the row's start,
// and goes on into the same column of the next group.
struct Later {
  int64_t at, step, steps, step_bytes, to_next_group;

  Later(int64_t inputs, int64_t whole, int64_t step_bytes, int columns)
      : steps(whole), step_bytes(step_bytes) {
    const int64_t row = inputs * step_bytes / STEP, ahead = AHEAD / columns / step_bytes;
    to_next_group = columns * row - whole * step_bytes;
    step = whole ? ahead % whole : 0;
    at = (whole ? ahead / whole : 0) * columns * row + step * step_bytes;
  }

  void next() {
    at += step_bytes;
    if (++step == steps) step = 0, at += to_next_group;
  }
};

// acc[m] += the products of step i with x[m].
template <class Kind, int ROWS, class Row>
inline void add_step(const Row& row, int64_t i, int64_t inputs, const uint8_t* const* x,
                     f32x16* acc) {
  u32x16 w[Kind::VECTORS];
  read_step<Kind>(row, i, inputs, w);
  for (int m = 0; m < ROWS; m++) {
    f32x16 part = {};
    for (int v = 0; v < Kind::VECTORS; v++) {
      part = Kind::add(part, load<u32x16>(x[m] + (i * Kind::VECTORS + v) * 64), w[v]);
    }
    acc[m] = acc[m] + part;
  }
}

#if DSV4_PAIRS
// The same for all columns, whose sums take turns: each addition waits for the one before it. Of
// several rows or few columns a half is unpacked for each by itself, or they would not fit.
template <class Kind, class Row, int COLUMNS, int ROWS>
__attribute__((always_inline)) inline void add_steps(const Row* rows, int64_t i,
                                                     const uint8_t* const* x,
                                                     f32x16 (*acc)[ROWS]) {
  constexpr int HALF = Kind::VECTORS / 2, TURNS = ROWS == 1 ? COLUMNS : 1;
#pragma GCC unroll 4
  for (int first = 0; first < COLUMNS; first += TURNS) {
    f32x16 part[TURNS][ROWS] = {};
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      u32x16 w[TURNS][HALF];
#pragma GCC unroll 4
      for (int n = 0; n < TURNS; n++) rows[first + n].template half<Kind>(i, half, w[n]);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 4
        for (int v = 0; v < HALF; v++) {
          const u32x16 in = load<u32x16>(x[m] + (i * Kind::VECTORS + HALF * half + v) * 64);
#pragma GCC unroll 4
          for (int n = 0; n < TURNS; n++) part[n][m] = Kind::add(part[n][m], in, w[n][v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < TURNS; n++) {
      const f32x16 scale = rows[first + n].scale(i);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) acc[first + n][m] = fma(part[n][m], scale, acc[first + n][m]);
    }
  }
}
#endif

template <class Kind, class Row, int COLUMNS, int ROWS>
inline void few(const Product& job, int64_t column, int64_t row) {
  const int64_t inputs = job.weight->inputs, whole = inputs / STEP;
  const uint8_t* x[ROWS];
  for (int m = 0; m < ROWS; m++) x[m] = activation(job, row + m);
  f32x16 acc[COLUMNS][ROWS] = {};
  Row rows[COLUMNS];
  for (int n = 0; n < COLUMNS; n++) rows[n].start(*job.weight, column + n);
  Later later(inputs, whole, Row::BITS * STEP / 8, COLUMNS);
  for (int64_t i = 0; i < whole; i++, later.next()) {
#pragma GCC unroll 4
    for (int n = 0; n < COLUMNS; n++) rows[n].fetch(later.at);
#if DSV4_PAIRS
    if constexpr (Kind::SCALED_LATE) {
      add_steps<Kind, Row, COLUMNS, ROWS>(rows, i, x, acc);
      continue;
    }
#endif
#pragma GCC unroll 4
    for (int n = 0; n < COLUMNS; n++) add_step<Kind, ROWS>(rows[n], i, inputs, x, acc[n]);
  }
  for (int n = 0; n < COLUMNS; n++) {
    if (whole * STEP < inputs) add_step<Kind, ROWS>(rows[n], whole, inputs, x, acc[n]);
  }
  for (int m = 0; m < ROWS; m++) {
    f32x16 all[COLUMNS];
    for (int n = 0; n < COLUMNS; n++) all[n] = acc[n][m];
    if constexpr (COLUMNS == 4) {
      const f32x4 four = four_sums(all);
      for (int n = 0; n < 4; n++) Results{job}.put(row + m, column + n - job.first, four[n]);
    } else {
      for (int n = 0; n < COLUMNS; n++) {
        Results{job}.put(row + m, column + n - job.first, sum(all[n]));
      }
    }
  }
}

// Four rows at a time: the columns that the first ones brought into the cache serve the others.
template <class Kind, class Row, int COLUMNS>
inline void few_rows(const Product& job, int64_t column) {
  for (int64_t row = 0; row < job.rows; row += 4) {
    switch (job.rows - row) {
      case 1: few<Kind, Row, COLUMNS, 1>(job, column, row); break;
      case 2: few<Kind, Row, COLUMNS, 2>(job, column, row); break;
      case 3: few<Kind, Row, COLUMNS, 3>(job, column, row); break;
      default: few<Kind, Row, COLUMNS, 4>(job, column, row);
    }
  }
}

// ---------------------------------------------------------------- many rows

constexpr int TILE = 16;         // columns unpacked at once
constexpr int64_t DEPTH = 2048;  // bytes of a column's piece: with the activations it fits in L1
constexpr int64_t MANY = 128;    // rows whose sums are kept between pieces

#if DSV4_PAIRS || defined(__AVX512F__) || defined(__aarch64__)
constexpr int ACROSS = 4, DOWN = 4;  // sums kept in registers
#else
constexpr int ACROSS = 2, DOWN = 2;
#endif

// Adds the products of `count` steps to the sums [ROWS][TILE] of one group of rows.
template <class Kind, int ROWS>
inline void tile(const uint8_t* const* x, const uint8_t* w, int64_t count, f32x16* sums_of) {
  for (int n = 0; n < TILE; n += ACROSS) {
    const uint8_t* column = w + n * DEPTH;
    for (int64_t i = 0; i < count; i++) {
      const int64_t step = i * Kind::VECTORS * 64;
      f32x16 part[ROWS][ACROSS] = {};
#pragma GCC unroll 8
      for (int v = 0; v < Kind::VECTORS; v++) {
        u32x16 a[ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) a[m] = load<u32x16>(x[m] + step + v * 64);
#pragma GCC unroll 4
        for (int c = 0; c < ACROSS; c++) {
          u32x16 b = load<u32x16>(column + c * DEPTH + step + v * 64);
#pragma GCC unroll 4
          for (int m = 0; m < ROWS; m++) part[m][c] = Kind::add(part[m][c], a[m], b);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int c = 0; c < ACROSS; c++) {
          sums_of[m * TILE + n + c] = sums_of[m * TILE + n + c] + part[m][c];
        }
    }
  }
}

template <class Kind, class Row>
void many_rows(const Product& job, int64_t first_row, int64_t rows, uint8_t* workspace) {
  constexpr int64_t PIECE = DEPTH / 64 / Kind::VECTORS;  // steps of a piece
  uint8_t* unpacked = workspace;
  f32x16* kept = reinterpret_cast<f32x16*>(workspace + TILE * DEPTH);
  const int64_t inputs = job.weight->inputs, all = steps(inputs);
  for (int64_t column = 0; column < job.count; column += TILE) {
    const int columns = (int)(job.count - column < TILE ? job.count - column : TILE);
    std::memset(kept, 0, rows * TILE * sizeof(f32x16));
    for (int64_t begin = 0; begin < all; begin += PIECE) {
      const int64_t end = begin + PIECE < all ? begin + PIECE : all;
      for (int n = 0; n < columns; n++) {
        Row row;
        row.start(*job.weight, job.first + column + n);
        u32x16* to = reinterpret_cast<u32x16*>(unpacked + n * DEPTH);
        for (int64_t i = begin; i < end; i++, to += Kind::VECTORS) {
          read_step<Kind>(row, i, inputs, to);
        }
      }
      const int64_t offset = begin * Kind::VECTORS * 64;
      for (int64_t m = 0; m < rows; m += DOWN) {
        const uint8_t* x[DOWN];
        const int64_t here = rows - m < DOWN ? rows - m : DOWN;
        for (int64_t j = 0; j < here; j++) x[j] = activation(job, first_row + m + j) + offset;
        f32x16* sums_of = kept + m * TILE;
        switch (here) {
          case 1: tile<Kind, 1>(x, unpacked, end - begin, sums_of); break;
          case 2: tile<Kind, 2>(x, unpacked, end - begin, sums_of); break;
          case 3: tile<Kind, 3>(x, unpacked, end - begin, sums_of); break;
          default: tile<Kind, DOWN>(x, unpacked, end - begin, sums_of);
        }
      }
    }
    for (int64_t m = 0; m < rows; m++) {
      f32x16 row = sums(kept + m * TILE);
      for (int n = 0; n < columns; n++) Results{job}.put(first_row + m, column + n, row[n]);
    }
  }
}

// ---------------------------------------------------------------- which of them

template <class Kind, class Row>
void by_rows(const Product& job, uint8_t* workspace) {
  if (job.rows <= job.few()) {
    int64_t column = job.first, end = job.first + job.count;
    for (; column + 4 <= end; column += 4) few_rows<Kind, Row, 4>(job, column);
    for (; column < end; column++) few_rows<Kind, Row, 1>(job, column);
  } else {
    for (int64_t row = 0; row < job.rows; row += MANY) {
      many_rows<Kind, Row>(job, row, job.rows - row < MANY ? job.rows - row : MANY, workspace);
    }
  }
}

template <class Kind>
void by_format(const Product& job, uint8_t* workspace) {
  switch (job.weight->format) {
    case Format::fp4: return by_rows<Kind, Fp4Row>(job, workspace);
    case Format::fp8: return by_rows<Kind, Fp8Row>(job, workspace);
    default: return by_rows<Kind, Bf16Row>(job, workspace);
  }
}

}  // namespace

#if DSV4_TILES
void pack(const uint8_t* const* rows, int64_t count, int64_t group, int64_t bytes, uint8_t* to) {
  const __mmask16 some = (__mmask16)((1u << group) - 1);
  for (int64_t at = 0; at < bytes; at += 64) {
    u32x16 v[16] = {};
    for (int64_t i = 0; i < count; i++) v[i] = load<u32x16>(rows[i] + at);
    transpose(v);
    for (int i = 0; i < 16; i++, to += 4 * group) {
      _mm512_mask_storeu_epi32(to, some, (__m512i)v[i]);
    }
  }
}
#endif

void multiply(const Product& job, uint8_t* workspace) {
  FlushSubnormals guard;
#if DSV4_TILES
  if (job.pairs) {
    switch (job.weight->format) {
      case Format::fp4: return multiply_with_tiles<Fp4Row>(job, workspace);
      case Format::fp8: return multiply_with_tiles<Fp8Row>(job, workspace);
      default: return multiply_with_tiles<Bf16Row>(job, workspace);
    }
  }
#elif DSV4_PAIRS
  if (job.pairs) return by_format<Pairs>(job, workspace);
  if (job.wide()) return by_format<Wide>(job, workspace);
#endif
  if (job.weight->format == Format::f32) return by_rows<Singles, F32Row>(job, workspace);
  by_format<Singles>(job, workspace);
}

static_assert(TILE * DEPTH + MANY * TILE * 64 <= dsv4::PRODUCT_WORKSPACE, "");

}  // namespace DSV4_ISA
