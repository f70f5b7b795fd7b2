// Products of fp32 in AMX tiles, which multiply bf16: a number is split into parts that a bf16 holds.
//
//     x = x0 + x1 + x2    x0 = x rounded to 8 bits of significand, x1 = x - x0 likewise, x2 what is left
//     x y ~ x0 y0 + (x0 y1 + x1 y0) + (x0 y2 + x1 y1 + x2 y0)
//
// Let 2^e <= |x| < 2^(e + 1). All three are multiples of 2^(e - 23), |x1| <= 2^(e - 8) and |x2| <= 2^(e - 17), so that
// 8 bits hold x2 too: the split is exact. The three products left out are at most (2^-24 + 2^-34) |x y|: one rounding
// of fp32, u = 2^-24. Those kept have 16 bits and are exact. A tile sums up to 16 of them in a chain, two chains to
// each other, and that to the score, for each 32 of D; x0 y0 comes last, when the sum of the others, 2^-7 of the size,
// has its roundings behind it. So, to first order in u,
//
//     |score - q . n| <= (min(ceil(D / 2), 16) + 1.2 + 1.1 ceil(D / 32)) u sum_d |q_d n_d|
//
// where chains of fused multiply-adds have min(D, 256) + floor(D / 256): no less from D = 6 to 7,700.
// fp16 has 11 bits, so two parts, and bf16 is its own: then the products left out are zero, and so are some kept.
//
// A row or a query is split where each element is 0 or in magnitude from 2^-40 to 2^40. Then every part and product is
// a multiple of 2^-126 or of more, so that no sum has anything to lose to the tiles' way with subnormals, and nothing
// can overflow. All scores of any other row or query, infinite ones and NaN among them, are chains of fused
// multiply-adds: the way of a score depends on its own two vectors alone.
#pragma once
#include "kernels/cpu/simd/tiles.h"

#if defined(NEGMINE_TILES)
namespace negmine::cpu::NEGMINE_SIMD {

// Fills query_parts, and in_parts of queries, from q_t.
void split_queries(const Block& block, const Workspace& w);

// score_chunk() of score.h where words are not pairs.
void score_in_parts(const Block& block, const Workspace& w, int64_t count, const Ahead& ahead);

}  // namespace negmine::cpu::NEGMINE_SIMD
#endif
