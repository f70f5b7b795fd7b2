// Scores as sums of products of bf16 parts. A word pairs element i of a tile's 32 with element 16 + i, on both sides:
// two vectors of neighbours are split at once and need no shuffle.
#include "kernels/cpu/simd/parts.h"

#if defined(NEGMINE_TILES)
namespace negmine::cpu::NEGMINE_SIMD {
namespace {

typedef uint32_t VU __attribute__((vector_size(kWidth * 4)));

static_assert(kWidth == kTile && kPanel == kLanes);

NEGMINE_INLINE VU every(uint32_t x) { return (VU)all(static_cast<int32_t>(x)); }
NEGMINE_INLINE VU min(VU a, VU b) { return (VU)_mm512_maskz_min_epu32(0xFFFF, (__m512i)a, (__m512i)b); }
NEGMINE_INLINE VU max(VU a, VU b) { return (VU)_mm512_maskz_max_epu32(0xFFFF, (__m512i)a, (__m512i)b); }

// The least magnitude seen that is not 0, and the largest: as bits without the sign, of the least less 1, where 0
// wraps.
struct Range {
  VU least = every(0xFFFFFFFF), most = every(0);

  inline __attribute__((always_inline)) void see(V x) {
    const VU magnitude = (VU)x + (VU)x;
    least = min(least, magnitude - 1);
    most = max(most, magnitude);
  }

  // -1 where all that a lane has seen may be split.
  inline __attribute__((always_inline)) VI fits() const {
    return (least >= every(2 * bits_of(0x1p-40f) - 1)) & (most <= every(2 * bits_of(0x1p40f)));
  }
};

int parts_of(const Matrix& m) { return m.dtype == Dtype::kFloat32 ? 3 : m.dtype == Dtype::kFloat16 ? 2 : 1; }

// Of 8 bits of significand, the nearest, halves away from zero.
NEGMINE_INLINE V rounded(V x) { return (V)(((VU)x + 0x8000) & 0xFFFF0000); }

// Word i of part p, for p < kParts: part p of low_i in its lower half, of high_i in its upper one.
template <int kParts>
NEGMINE_INLINE void split(V low, V high, V (&words)[kParts]) {
  for (int p = 0; p < kParts; ++p) {
    const bool last = p + 1 == kParts;  // a bf16 as it is
    const V low_part = last ? low : rounded(low), high_part = last ? high : rounded(high);
    words[p] = (V)((VU)low_part >> 16 | ((VU)high_part & 0xFFFF0000));
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

// The chunk's rows (count, D) into key_parts, side by side, and into in_parts.
template <int kParts>
void split_rows(const Block& block, const Workspace& w, int64_t count) {
  const int64_t D = block.D, words = room_for_part(D);
  for (int64_t j = 0; j < count; ++j) {
    float* out = w.key_parts + j * kParts * words;  // (kParts, words)
    Range range;
    for (int64_t t = 0; t < words; t += kTile) {
      const V low = load_part(w.rows[j], 2 * t, D), high = load_part(w.rows[j], 2 * t + kTile, D);
      range.see(low);
      range.see(high);
      V parts[kParts];
      split(low, high, parts);
      for (int p = 0; p < kParts; ++p) store(out + p * words + t, parts[p]);
    }
    w.in_parts[j] = -(_mm512_movepi32_mask((__m512i)range.fits()) == 0xFFFF);
  }
}

template <int kParts>
void split_columns(const Block& block, const Workspace& w) {
  const int64_t D = block.D, words = room_for_part(D);
  for (int v = 0; v < vectors_of(block); ++v) {
    const float* q = w.q_t + v * kWidth;      // (D, kLanes)
    float* out = w.query_parts + v * kWidth;  // (kParts, words, kLanes)
    Range range;
    for (int64_t t = 0; t < words; ++t) {
      const int64_t d = t / kTile * kTile + t;
      const V low = d < D ? load(q + d * kLanes) : all(0.0f);
      const V high = d + kTile < D ? load(q + (d + kTile) * kLanes) : all(0.0f);
      range.see(low);
      range.see(high);
      V parts[kParts];
      split(low, high, parts);
      for (int p = 0; p < kParts; ++p) store(out + (p * words + t) * kLanes, parts[p]);
    }
    store(w.in_parts + kChunk + v * kWidth, range.fits());
  }
}

}  // namespace

void split_queries(const Block& block, const Workspace& w) {
  const int parts = parts_of(block.query);
  parts == 3 ? split_columns<3>(block, w) : parts == 2 ? split_columns<2>(block, w) : split_columns<1>(block, w);
}

void score_in_parts(const Block& block, const Workspace& w, int64_t count, const Ahead& ahead) {
  const Parts parts{parts_of(block.negative_keys), parts_of(block.query)};
  parts.left == 3   ? split_rows<3>(block, w, count)
  : parts.left == 2 ? split_rows<2>(block, w, count)
                    : split_rows<1>(block, w, count);
  const int vectors = vectors_of(block);
  const int32_t* queries = w.in_parts + kChunk;  // (kLanes)
  int64_t rows = 0, lanes = 0;
  for (int64_t j = 0; j < count; ++j) rows -= w.in_parts[j];
  for (int64_t lane = 0; lane < vectors * kWidth; ++lane) lanes -= queries[lane];
  const bool some = rows > 0 && lanes > 0, whole = rows == count && lanes == vectors * kWidth;
  if (!whole) multiply(w.rows, count, w.q_t, block.D, vectors, false, some ? w.scores : w.tile, some ? Ahead{} : ahead);
  if (!some) return;
  const int64_t words = room_for_part(block.D);
  const float* row[kChunk];  // (count)
  for (int64_t j = 0; j < count; ++j) row[j] = w.key_parts + j * parts.left * words;
  multiply_in_tiles(row, count, w.query_parts, words, vectors, w.tile, ahead, parts);
  if (whole) return;
  for (int64_t j = 0; j < count; ++j) {
    for (int v = 0; v < vectors; ++v) {
      float* cell = w.tile + j * kLanes + v * kWidth;
      const VI split = load(queries + v * kWidth) & all(w.in_parts[j]);
      store(cell, split ? load(cell) : load(w.scores + j * kLanes + v * kWidth));
    }
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
#endif
