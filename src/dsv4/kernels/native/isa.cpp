// The table of one instruction set.
#include "kernels.h"
#include "tiles.h"
#include "training.h"
#include "vector.h"

namespace DSV4_ISA {

dsv4::Arrange arrange;
#if DSV4_TILES
dsv4::Pack pack;
#else
constexpr dsv4::Pack* pack = nullptr;
#endif
dsv4::Multiply multiply;
dsv4::Swiglu swiglu;
dsv4::Add add;
dsv4::Rowwise<dsv4::Norm> norm;
dsv4::Rowwise<dsv4::Rope> rope;
dsv4::Rowwise<dsv4::Sum> sum_two;
dsv4::Rowwise<dsv4::RoundFp8> round_fp8;
dsv4::Rowwise<dsv4::RoundFp4> round_fp4;
dsv4::Rowwise<dsv4::HcRead> hc_read;
dsv4::Rowwise<dsv4::HcExpand> hc_expand;
dsv4::Rowwise<dsv4::Sinkhorn> sinkhorn;
dsv4::Rowwise<dsv4::Pool> pool;
dsv4::Rowwise<dsv4::Route> route;
dsv4::Attend attend;
dsv4::IndexBest index_best;
dsv4::Select select;

extern const dsv4::Training training;

constexpr dsv4::Isa named(const char* name, bool slow_pairs) {
  return {name,      DSV4_PAIRS != 0, slow_pairs, arrange,   pack,    multiply, swiglu, add,
          norm,      rope,            sum_two,    round_fp8, round_fp4, hc_read, hc_expand, sinkhorn,
          pool,      route,           attend,     index_best, select,   &training};
}

extern const dsv4::Isa isa;
constexpr dsv4::Isa isa = named(DSV4_ISA_NAME, false);
#if DSV4_PAIRS && !DSV4_TILES
extern const dsv4::Isa isa_fma;
constexpr dsv4::Isa isa_fma = named("avx512_fma", true);
#endif

}  // namespace DSV4_ISA
