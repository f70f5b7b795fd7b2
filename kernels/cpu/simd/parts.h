// Products of fp32 with AMX tiles, which multiply bf16: each number is split into parts that are bf16.
//
//     x = x0 + x1 + x2    x0 = x rounded to 8 bits of significand, x1 = (x - x0) rounded in the same way, x2 = the rest
//     x y ~ x0 y0 + (x0 y1 + x1 y0) + (x0 y2 + x1 y1 + x2 y0)
//
// Let 2^e <= |x| < 2^(e + 1). All three parts are multiples of 2^(e - 23), |x1| <= 2^(e - 8) and |x2| <= 2^(e - 17), so
// x2 has at most 8 bits too, and the split is exact. The three products that are left out are at most (2^-24 + 2^-34)
// |x y|, one rounding error u = 2^-24 of fp32. The other products have 16 bits and are exact. For each 32 elements of
// D, a tile sums up to 16 products in each of two chains, adds the two chains, and adds the result to the score. x0 y0
// is added last, after the sum of the other products, which is smaller by a factor of 2^-7. So, to first order in u,
//
//     |score - q . n| <= (min(ceil(D / 2), 16) + 1.2 + 1.1 ceil(D / 32)) u sum_d |q_d n_d|
//
// The factor for chains of fused multiply-adds is min(D, 256) + floor(D / 256), which is not smaller for D from 6 to
// 7,700. fp16 has 11 bits and so two parts; bf16 has one. Then the products that are left out are zero.
//
// A row or a query is split only if each element is 0 or has a magnitude from 2^-40 to 2^40. Then every part and
// product is a multiple of 2^-126, so nothing is lost to subnormals, which tiles treat as zero, and nothing can
// overflow. All scores of other rows or queries, for example with infinity or NaN, are chains of fused multiply-adds.
// So the method for a score depends only on its two vectors.
//
// The products of weights and rows (weighted_parts.cpp) are computed in the same way, for rows that are split. Weights
// have no lower limit: they are multiplied by 2^48, after which the smallest subnormal is a multiple of 2^-101. Values
// that the tiles then treat as zero are below 2^-174, which is far less than a rounding error of the smallest
// subnormal.
#pragma once
#include "kernels/cpu/simd/tiles.h"

#if defined(NEGMINE_TILES)
namespace negmine::cpu::NEGMINE_SIMD {

typedef uint32_t VU __attribute__((vector_size(kWidth * 4)));

static_assert(kWidth == kTile && kPanel == kLanes);

NEGMINE_INLINE VU every(uint32_t x) { return (VU)all(static_cast<int32_t>(x)); }
NEGMINE_INLINE VU min(VU a, VU b) { return (VU)_mm512_maskz_min_epu32(0xFFFF, (__m512i)a, (__m512i)b); }
NEGMINE_INLINE VU max(VU a, VU b) { return (VU)_mm512_maskz_max_epu32(0xFFFF, (__m512i)a, (__m512i)b); }

// The smallest nonzero magnitude and the largest magnitude so far, as bits without the sign. 1 is subtracted from the
// bits for the smallest, so that 0 wraps around and is ignored.
struct Range {
  VU least = every(0xFFFFFFFF), most = every(0);

  inline __attribute__((always_inline)) void see(V x) {
    const VU magnitude = (VU)x + (VU)x;
    least = min(least, magnitude - 1);
    most = max(most, magnitude);
  }

  // -1 for lanes in which all values are 0 or have a magnitude from `from` to `to`, else 0. NaN gives 0.
  inline __attribute__((always_inline)) VI within(float from, float to) const {
    return (least >= every(2 * bits_of(from) - 1)) & (most <= every(2 * bits_of(to)));
  }
};

constexpr float kLeast = 0x1p-40f, kMost = 0x1p40f;              // of what is split
constexpr float kWeightFactor = 0x1p48f, kMostWeight = 0x1p80f;  // after that factor

NEGMINE_INLINE bool everywhere(VI lanes) { return _mm512_movepi32_mask((__m512i)lanes) == 0xFFFF; }

// body(Count<parts>) for the parts of what is stored so.
template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

NEGMINE_INLINE int parts_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 3 : dtype == Dtype::kFloat16 ? 2 : 1; }

template <class Body>
NEGMINE_INLINE void for_parts(Dtype dtype, const Body& body) {
  const int parts = parts_of(dtype);
  parts == 3 ? body(Count<3>{}) : parts == 2 ? body(Count<2>{}) : body(Count<1>{});
}

// Rounds to 8 bits of significand, halves away from zero.
NEGMINE_INLINE V rounded(V x) { return (V)(((VU)x + 0x8000) & 0xFFFF0000); }

// Word i of part p to out + p * stride, p < kParts: part p of low_i in its lower half, of high_i in its upper one.
template <int kParts>
NEGMINE_INLINE void split(V low, V high, int64_t stride, float* out) {
  for (int p = 0; p < kParts; ++p) {
    const bool last = p + 1 == kParts;  // a bf16 as it is
    const V low_part = last ? low : rounded(low), high_part = last ? high : rounded(high);
    store(out + p * stride, (V)((VU)low_part >> 16 | ((VU)high_part & 0xFFFF0000)));
    low -= low_part;
    high -= high_part;
  }
}

// Elements [d, d + 16) of a row of D, zeros past its end.
NEGMINE_INLINE V load_part(const float* row, int64_t d, int64_t D) {
  if (d + kWidth <= D) return load(row + d);
  const int64_t left = D - d < 0 ? 0 : D - d;
  return (V)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), row + d);
}

// row (D) times the factor -> out (kParts, room_for_part(D)); what it held after the factor. A word pairs element i of
// a tile's 32 with element 16 + i, on both sides of a product: two vectors of neighbours need no shuffle.
template <int kParts>
NEGMINE_INLINE Range split_row(const float* row, int64_t D, float factor, float* out) {
  const int64_t words = room_for_part(D);
  Range range;
  for (int64_t t = 0; t < words; t += kTile) {
    const V low = load_part(row, 2 * t, D) * factor, high = load_part(row, 2 * t + kTile, D) * factor;
    range.see(low);
    range.see(high);
    split<kParts>(low, high, words, out + t);
  }
  return range;
}

// The same of kWidth columns: rows (D, kLanes) -> out (kParts, room_for_part(D), 32), in a panel.
template <int kParts>
NEGMINE_INLINE Range split_columns(const float* rows, int64_t D, float factor, float* out) {
  const int64_t words = room_for_part(D);
  Range range;
  for (int64_t t = 0; t < words; ++t) {
    const int64_t d = t / kTile * kTile + t;
    const V low = d < D ? load(rows + d * kLanes) * factor : all(0.0f);
    const V high = d + kTile < D ? load(rows + (d + kTile) * kLanes) * factor : all(0.0f);
    range.see(low);
    range.see(high);
    split<kParts>(low, high, words * kTilePanel, out + t * kTilePanel);
  }
  return range;
}

// Fills query_parts and lanes_in_parts from q_t.
void split_queries(const Block& block, const Workspace& w);

// Splits the rows of a chunk into parts, as left operand, and determines which of them may be multiplied in parts.
void split_keys(const Block& block, const Workspace& w, Chunk& chunk);

// score_rows() of score.h where words are not pairs.
void score_in_parts(const Block& block, const Workspace& w, const Chunk& chunk, int64_t first, int64_t count,
                    const Ahead& ahead);

// The chunk turned, in parts: w.turned (room_for_mean(D), parts, words).
void turn_parts(const Block& block, const Workspace& w, const Chunk& chunk);

// add_mean() of score.h of a chunk whose rows all split.
void add_mean_in_parts(const Block& block, const Workspace& w, const Chunk& chunk, const float* weights,
                       const float* correction, float* mean);

// panel (D / kPanel, lanes, kPanel) -> out (D / 32, parts, room_for_part(lanes), 32), the block's queries as right
// operand; false where one of them may not be split.
bool split_panel(const Block& block, const float* panel, float* out);

// Adds the product of the weights w.tile (count, kLanes) and such a panel to rows of out (K, D). Rows of weights that
// cannot be split are listed in rest (count) instead; returns their number.
int64_t add_rows_in_parts(const Block& block, const Workspace& w, int64_t count, const float* panel, float* out,
                          int64_t* rest);

}  // namespace negmine::cpu::NEGMINE_SIMD
#endif
