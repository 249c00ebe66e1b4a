// Scores of the indexer with tiles, for bfloat16 heads of 128 channels.
//
// A is sixteen keys, B sixteen heads: a lane is a head. What the heads say of a key is added by
// groups of sixteen, lane by lane, and then across lanes. Channels are in the order in which packed
// keys are unpacked; keys that are numbers are brought into it, so packing changes no bit.
#pragma once

#include <algorithm>

#include "functions.h"
#include "kernels.h"
#include "tiles.h"
#include "weights.h"

#if DSV4_TILES
namespace DSV4_ISA {
namespace {

using dsv4::IndexTopk;

struct TiledIndex {
  static constexpr int64_t CHANNELS = 128, TILES = CHANNELS / 32, KEYS = 64;  // keys at once
  const IndexTopk& job;
  const int64_t groups;  // of heads: sixteens
  uint8_t* q;            // tiles [queries, groups, TILES]
  float* weights;        // [queries, groups, 16], 0 where there is no head
};

}  // namespace
}  // namespace DSV4_ISA
#endif
