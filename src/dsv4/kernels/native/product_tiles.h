// Matrix products with tiles: sixteen rows of the weight times up to sixteen rows of activations.
//
// The weight is A, unpacked as it lies, with its scale, into the nearest cache; activations are B.
// Every result is the sum, tile by tile of 32 inputs, of what the instruction gives, whatever the
// number of rows. For few rows, what is unpacked next and what is multiplied now take turns; for
// many, a panel of the weight is unpacked once for all of them.
#pragma once

#include <algorithm>

#include "functions.h"
#include "kernels.h"
#include "tiles.h"
#include "weights.h"

#if DSV4_TILES
namespace DSV4_ISA {
namespace {

using dsv4::Product;

constexpr int VECTORS = STEP / 32;  // tiles of a step

// Writes steps begin .. end - 1 of a row of a weight, tile after tile, to its row of each.
template <class Row>
__attribute__((always_inline)) inline void unpack_row(const Weight& weight, int64_t at,
                                                      int64_t begin, int64_t end, uint8_t* to) {
  Row row;
  row.start(weight, at);
  int64_t i = begin;
  const int64_t whole = std::min(end, weight.inputs / STEP);
  for (; i + 4 <= whole; i += 4, to += 4 * VECTORS * TILE_BYTES) row.unpack4(i, to, TILE_BYTES);
  for (; i < whole; i++, to += VECTORS * TILE_BYTES) row.unpack(i, to, TILE_BYTES);
  if (i == end) return;
  Step last = row.rest(i, weight.inputs - i * STEP);
  for (int v = 0; v < VECTORS; v++) store(to + v * TILE_BYTES, last.v[v]);
}

// Writes what sixteen rows of the weight, those that exist, give for one of the activations.
inline void put_row(const Product& job, int64_t column, int64_t row, f32x16 sums) {
  const int64_t columns = std::min<int64_t>(16, job.count - column);
  const __mmask16 some = (__mmask16)((1u << columns) - 1);
  const int64_t at = row * job.out_stride + column;
  if (job.out_bf16) {
    const auto rounded = (__m256i)_mm512_cvtneps_pbh((__m512)sums);  // none is subnormal
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(job.out) + at, some, rounded);
  } else {
    _mm512_mask_storeu_ps(static_cast<float*>(job.out) + at, some, (__m512)sums);
  }
}

// The same for sums [16 rows of the weight, 16 activations].
inline void put_sums(const Product& job, int64_t column, int64_t row, const float* sums) {
  u32x16 v[16];
  for (int i = 0; i < 16; i++) v[i] = load<u32x16>(sums + 16 * i);
  transpose(v);
  for (int i = 0; i < 16 && row + i < job.rows; i++) put_row(job, column, row + i, (f32x16)v[i]);
}

// ---------------------------------------------------------------- few rows

constexpr int64_t PIECE = 4;  // steps that are unpacked at once for few rows: sixteen tiles

template <int G>
inline void zero_sums() {
  zero_tile<0>();
  if constexpr (G > 1) zero_tile<1>();
  if constexpr (G > 2) zero_tile<2>();
  if constexpr (G > 3) zero_tile<3>();
}

// C[g] += A times the tile of group g, for G groups.
template <int G>
inline void add_groups(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride,
                       int64_t to_next) {
  load_tile<4>(a, a_stride);
  load_tile<6>(b, b_stride);
  dot_tiles<0, 4, 6>();
  if constexpr (G > 1) load_tile<7>(b + to_next, b_stride), dot_tiles<1, 4, 7>();
  if constexpr (G > 2) load_tile<6>(b + 2 * to_next, b_stride), dot_tiles<2, 4, 6>();
  if constexpr (G > 3) load_tile<7>(b + 3 * to_next, b_stride), dot_tiles<3, 4, 7>();
}

template <int G>
inline void put_groups(const Product& job, int64_t column) {
  alignas(64) float sums[4][256];
  if (job.group == 1) {
    store_tile<0>(sums[0], 4);
    return put_row(job, column, 0, load<f32x16>(sums[0]));
  }
  if (job.group < 16) std::memset(sums[0], 0, sizeof sums[0]);
  store_tile<0>(sums[0], 64);
  if constexpr (G > 1) store_tile<1>(sums[1], 64);
  if constexpr (G > 2) store_tile<2>(sums[2], 64);
  if constexpr (G > 3) store_tile<3>(sums[3], 64);
  for (int g = 0; g < G; g++) put_sums(job, column, 16 * g, sums[g]);
}

// Sixteen rows of the weight, as far as they are unpacked at once: where its tiles are.
struct Piece {
  const uint8_t* a;
  int64_t a_stride, a_step;  // from row to row of a tile, and from tile to tile
  const uint8_t* b;
  int64_t count, column;
  bool last;  // of its rows
};

template <class Row, int G>
void few_groups(const Product& job, uint8_t* workspace) {
  const Weight& weight = *job.weight;
  const int64_t all = steps(weight.inputs), whole = weight.inputs / STEP;
  const int64_t row_bytes = weight.inputs * Row::BITS / 8;
  const int64_t step_bytes = STEP * Row::BITS / 8, piece_bytes = PIECE * step_bytes;
  const int64_t ahead = Row::BITS == 4 ? 2 * PIECE : PIECE;
  const int64_t b_step = 64 * job.group, to_next = 16 * job.x_bytes;
  Tiles tiles((int)job.group);
  zero_sums<G>();
  Piece before = {};
  int64_t begin = 0, column = 0;
  for (uint8_t* to = workspace; before.count > 0 || column < job.count;) {
    const int64_t end = std::min(all, begin + PIECE);
    const bool some = column < job.count;
    Piece now = {to,     64,        TILE_BYTES, job.x + begin * VECTORS * b_step,
                 some ? (end - begin) * VECTORS : 0, column, end == all};
    // What needs no unpacking is multiplied where it lies.
    const uint8_t* data = weight.data + (job.first + column) * row_bytes;
    const bool there = Row::BITS == 16 && column + 16 <= job.count && end <= whole;
    if (there) now.a = data + begin * STEP * 2, now.a_stride = row_bytes, now.a_step = 64;
    // The memory is asked for what comes 8 KB later, of bfloat16 16 KB.
    const int64_t later = begin + ahead < all ? begin + ahead : begin + ahead - all + 16 * all;
    for (int64_t r = 0; r < 16; r++) {
      if (some) {
        for (int64_t line = 0; line < piece_bytes; line += 64) {
          prefetch(data + r * row_bytes + later * step_bytes + line);
        }
        if (!there) {
          const int64_t at = job.first + std::min(column + r, job.count - 1);
          unpack_row<Row>(weight, at, begin, end, to + 64 * r);
        }
      }
      if (r < before.count) {
        add_groups<G>(before.a + r * before.a_step, before.a_stride, before.b + r * b_step,
                      4 * job.group, to_next);
      }
    }
    if (before.last) {
      put_groups<G>(job, before.column);
      zero_sums<G>();
    }
    before = now;
    begin = end;
    if (begin == all) begin = 0, column += 16;
    to = to == workspace ? workspace + PIECE * VECTORS * TILE_BYTES : workspace;
  }
}

// ---------------------------------------------------------------- many rows

constexpr int64_t PANEL = 32;       // rows of the weight that are unpacked at once for many rows
constexpr int64_t PANEL_STEPS = 16;  // steps of them
constexpr int64_t PANEL_BYTES = PANEL * PANEL_STEPS * STEP * 2;

// A part of the weight that is unpacked a little at a time, while the one before is multiplied.
template <class Row>
struct Panel {
  const Weight* weight;
  int64_t first, rows, begin, end;
  uint8_t* to;
  int64_t row = 0, step = 0;

  bool done() const { return step >= end - begin; }

  // Four steps of a row; sixteen rows one after the other, whose lines are side by side.
  void unpack_some() {
    uint8_t* at = to + (row / 16 * PANEL_STEPS + step) * VECTORS * TILE_BYTES + row % 16 * 64;
    unpack_row<Row>(*weight, first + row, begin + step, std::min(begin + step + 4, end), at);
    if (++row % 16 != 0 && row < rows) return;
    row = (row - 1) / 16 * 16, step += 4;
    if (done() && row + 16 < rows) row += 16, step = 0;
  }
};

// Sums [ACROSS sixteens of the weight's rows, DOWN of activations] += products of `count` tiles.
// Every so many tiles `next` goes on.
template <int ACROSS, int DOWN, class Row>
inline void block(const uint8_t* a, const uint8_t* b, int64_t to_next, int64_t count, bool first,
                  float* sums, Panel<Row>& next, int64_t every) {
  if (first) {
    zero_sums<4>();
  } else {
    load_tile<0>(sums, 64);
    if constexpr (DOWN > 1) load_tile<1>(sums + 256, 64);
    if constexpr (ACROSS > 1) load_tile<2>(sums + 512, 64);
    if constexpr (ACROSS > 1 && DOWN > 1) load_tile<3>(sums + 768, 64);
  }
  for (int64_t i = 0; i < count; i++, a += TILE_BYTES, b += TILE_BYTES) {
    load_tile<4>(a, 64);
    load_tile<6>(b, 64);
    dot_tiles<0, 4, 6>();
    if constexpr (DOWN > 1) load_tile<7>(b + to_next, 64), dot_tiles<1, 4, 7>();
    if constexpr (ACROSS > 1) {
      load_tile<5>(a + PANEL_STEPS * VECTORS * TILE_BYTES, 64);
      dot_tiles<2, 5, 6>();
      if constexpr (DOWN > 1) dot_tiles<3, 5, 7>();
    }
    if (i % every == 0 && !next.done()) next.unpack_some();
  }
  store_tile<0>(sums, 64);
  if constexpr (DOWN > 1) store_tile<1>(sums + 256, 64);
  if constexpr (ACROSS > 1) store_tile<2>(sums + 512, 64);
  if constexpr (ACROSS > 1 && DOWN > 1) store_tile<3>(sums + 768, 64);
}

template <class Row>
void many_groups(const Product& job, uint8_t* workspace) {
  const Weight& weight = *job.weight;
  const int64_t all = steps(weight.inputs), groups = (job.rows + 15) / 16;
  const int64_t to_next = 16 * job.x_bytes;
  auto* kept = reinterpret_cast<float*>(workspace + 2 * PANEL_BYTES);
  auto panel = [&](int64_t begin, int64_t column, uint8_t* to) {
    const bool some = begin < all;
    return Panel<Row>{&weight, job.first + column, some ? std::min(PANEL, job.count - column) : 0,
                      begin, some ? std::min(all, begin + PANEL_STEPS) : begin, to};
  };
  Tiles tiles(16);
  Panel<Row> now = panel(0, 0, workspace);
  float* sums = kept;
  for (int64_t begin = 0, column = 0; begin < all;) {
    while (!now.done()) now.unpack_some();
    const int64_t columns = now.rows, count = (now.end - begin) * VECTORS, here = column;
    const bool first = begin == 0, last = now.end == all;
    const uint8_t* b = job.x + begin * VECTORS * TILE_BYTES;
    if ((column += PANEL) >= job.count) column = 0, begin = now.end;
    uint8_t* other = now.to == workspace ? workspace + PANEL_BYTES : workspace;
    Panel<Row> next = panel(begin, column, other);
    const int64_t parts = std::max<int64_t>(1, next.rows * ((next.end - next.begin + 3) / 4));
    const int64_t every = std::max<int64_t>(1, (groups + 1) / 2 * count / parts);
    for (int64_t g = 0; g < groups; g += 2, b += 2 * to_next, sums += 1024) {
      const bool two = g + 1 < groups;
      auto add = columns > 16 ? (two ? block<2, 2, Row> : block<2, 1, Row>)
                              : (two ? block<1, 2, Row> : block<1, 1, Row>);
      add(now.to, b, to_next, count, first, sums, next, every);
      for (int64_t i = 0; last && i < (columns > 16 ? 4 : 2); i += two ? 1 : 2) {
        put_sums(job, here + i / 2 * 16, 16 * (g + i % 2), sums + 256 * i);
      }
    }
    if (column == 0) sums = kept;
    now = next;
  }
  static_assert(2 * PANEL_BYTES + dsv4::TILE_COLUMNS * dsv4::TILE_ROWS * 4 <=
                dsv4::PRODUCT_WORKSPACE, "");
}

template <class Row>
void multiply_with_tiles(const Product& job, uint8_t* workspace) {
  switch ((job.rows + 15) / 16) {
    case 1: return few_groups<Row, 1>(job, workspace);
    case 2: return few_groups<Row, 2>(job, workspace);
    case 3: return few_groups<Row, 3>(job, workspace);
    case 4: return few_groups<Row, 4>(job, workspace);
    default: return many_groups<Row>(job, workspace);
  }
}

}  // namespace
}  // namespace DSV4_ISA
#endif
