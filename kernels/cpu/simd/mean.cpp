// The second product of the kernels that sum: rows of the queue weighted by the chunk's tile, lanes across the vector.
//
// Where scores come from pairs of bf16, so does this product: weights are rounded to bf16, and rows lie in pairs of
// rows. The part of the sum along the query, which is the gradient of a scale, is put right at the end by restore_pull.
#include "kernels/cpu/simd/parts.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

// mean (kD, kVec * kWidth) = correction * mean + sum over the chunk of n (count, kD) x p (count, kVec * kWidth); of
// words that hold two bf16, where kPairs
template <int kD, int kVec, bool kPairs>
NEGMINE_INLINE void mean_tile(const float* const* rows, int64_t d, const float* p, int64_t count,
                              const float* correction, float* mean) {
  V acc[kD][kVec];  // (kD, kVec * kWidth)
  for (int r = 0; r < kD; ++r) {
    for (int v = 0; v < kVec; ++v) acc[r][v] = all(0.0f);
  }
  for (int64_t j = 0; j < count; ++j) {
    V weight[kVec];  // (kVec * kWidth)
    for (int v = 0; v < kVec; ++v) weight[v] = load(p + j * kLanes + v * kWidth);
    for (int r = 0; r < kD; ++r) {
      for (int v = 0; v < kVec; ++v) acc[r][v] = step<kPairs>(all(rows[j][d + r]), weight[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kD; ++r) {
    for (int v = 0; v < kVec; ++v) {
      float* cell = mean + (d + r) * kLanes + v * kWidth;
      store(cell, fma(load(cell), load(correction + v * kWidth), acc[r][v]));
    }
  }
}

template <int kVec, bool kPairs>
void mean_panel(int64_t D, const float* const* rows, const float* p, int64_t count, const float* correction,
                float* mean) {
  int64_t d = 0;
  for (; d + kRows <= D; d += kRows) mean_tile<kRows, kVec, kPairs>(rows, d, p, count, correction, mean);
  for (; d + 2 <= D; d += 2) mean_tile<2, kVec, kPairs>(rows, d, p, count, correction, mean);
  for (; d < D; ++d) mean_tile<1, kVec, kPairs>(rows, d, p, count, correction, mean);
}

// The weights of a chunk are in w.tile (count, kLanes).
template <bool kPairs>
void add_weighted(const Block& block, const Workspace& w, int64_t count, const float* correction, float* mean) {
  const int vectors = vectors_of(block);
  const int64_t D = block.D;
  for (int v = 0; v < vectors; v += kVectors) {
    const int64_t lane = v * kWidth;
    switch (vectors - v) {
      case 1:
        mean_panel<1, kPairs>(D, w.rows, w.tile + lane, count, correction + lane, mean + lane);
        break;
#if defined(__AVX512F__)
      case 2:
        mean_panel<2, kPairs>(D, w.rows, w.tile + lane, count, correction + lane, mean + lane);
        break;
      case 3:
        mean_panel<3, kPairs>(D, w.rows, w.tile + lane, count, correction + lane, mean + lane);
        break;
#endif
      default:
        mean_panel<kVectors, kPairs>(D, w.rows, w.tile + lane, count, correction + lane, mean + lane);
    }
  }
}

#if defined(__AVX512BF16__) && !defined(NEGMINE_TILES)
// Of a chunk of pair rows and its probabilities, what a product over pairs of rows takes, the second of an odd last
// pair zero: w.tile (pairs, kLanes) probabilities rounded to bf16, w.rows (pairs) words (D). Returns the number of
// pairs.
int64_t pair_chunk(const Block& block, const Workspace& w, int64_t count) {
  const int64_t D = block.D;
  for (int64_t j = 0; j < count; j += 2) {
    const bool alone = j + 1 == count;
    for (int v = 0; v < vectors_of(block); ++v) {
      const float* p = w.tile + j * kLanes + v * kWidth;
      const H second = to_bfloat16(alone ? all(0.0f) : load(p + kLanes));
      store(w.tile + j / 2 * kLanes + v * kWidth, pair_up(to_bfloat16(load(p)), second));
    }
    const uint16_t* a = reinterpret_cast<const uint16_t*>(w.rows[j]);
    const uint16_t* b = reinterpret_cast<const uint16_t*>(alone ? w.zeros : w.rows[j + 1]);
    float* out = w.widened + j / 2 * D;
    int64_t d = 0;
    for (; d + kWidth <= D; d += kWidth) store(out + d, pair_up(load(a + d), load(b + d)));
    for (; d < D; ++d) out[d] = float_of(static_cast<uint32_t>(b[d]) << 16 | a[d]);
    w.rows[j / 2] = out;
  }
  return (count + 1) / 2;
}
#endif

}  // namespace

void add_mean(const Block& block, const Workspace& w, int64_t count, const float* correction, float* mean) {
#if defined(NEGMINE_TILES)
  if (in_pairs(block)) return add_mean_in_tiles(block, w, count, correction, mean);
  if (add_mean_in_parts(block, w, count, correction, mean)) return;
#elif defined(__AVX512BF16__)
  if (in_pairs(block)) return add_weighted<true>(block, w, pair_chunk(block, w, count), correction, mean);
#endif
  add_weighted<false>(block, w, count, correction, mean);
}

void restore_pull([[maybe_unused]] const Block& block, [[maybe_unused]] const Workspace& w,
                  [[maybe_unused]] const float* pulls, [[maybe_unused]] float* mean) {
#if defined(__AVX512BF16__)
  if (!in_pairs(block)) return;
  const int64_t D = block.D, T = (D + 1) / 2;
  for (int v = 0; v < vectors_of(block); ++v) {
    const float* words = w.q_t + v / kVectors * T * kPanel + v % kVectors * kWidth;
    const auto query = [&](int64_t d) {
      const VI word = (VI)load(words + d / 2 * kPanel);
      return (V)(d % 2 == 0 ? word << 16 : word & all(static_cast<int32_t>(0xFFFF0000)));
    };
    float* column = mean + v * kWidth;
    V found = all(0.0f), square = all(0.0f);
    for (int64_t d = 0; d < D; ++d) {
      found = fma(query(d), load(column + d * kLanes), found);
      square = fma(query(d), query(d), square);
    }
    const V step = (load(pulls + v * kWidth) - found) / square;
    const V finite = step - step == 0.0f ? step : all(0.0f);
    for (int64_t d = 0; d < D; ++d) store(column + d * kLanes, fma(finite, query(d), load(column + d * kLanes)));
  }
#endif
}

}  // namespace negmine::cpu::NEGMINE_SIMD
