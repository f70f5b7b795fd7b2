// The second product of the kernels that sum: rows of the queue weighted by the chunk's tile, lanes across the vector.
//
// If scores are computed from pairs of bf16, this product is too: weights are rounded to bf16, and two rows are
// interleaved. The component of the sum along the query, which is the gradient of the scale, is corrected at the end by
// restore_score_sum.
#include "kernels/cpu/simd/parts.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

// mean (kD, kVec * kWidth) = correction * mean + sum over the chunk of n (count, kD) x p (count, kVec * kWidth). If
// kPairs, words have two bf16.
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

// rows (count) weighted by weights (count, kLanes)
template <bool kPairs>
void add_weighted(const Block& block, const float* const* rows, int64_t count, const float* weights,
                  const float* correction, float* mean) {
  const int vectors = vectors_of(block);
  const int64_t D = block.D;
  for (int v = 0; v < vectors; v += kVectors) {
    const int64_t lane = v * kWidth;
    switch (vectors - v) {
      case 1:
        mean_panel<1, kPairs>(D, rows, weights + lane, count, correction + lane, mean + lane);
        break;
      case 2:
        mean_panel<2, kPairs>(D, rows, weights + lane, count, correction + lane, mean + lane);
        break;
      case 3:
        mean_panel<kThree, kPairs>(D, rows, weights + lane, count, correction + lane, mean + lane);
        break;
      default:
        mean_panel<kVectors, kPairs>(D, rows, weights + lane, count, correction + lane, mean + lane);
    }
  }
}

#if defined(NEGMINE_PAIRS) && !defined(NEGMINE_TILES)
// Converts weights (count, kLanes) to (pairs, kLanes), rounded to bf16. An odd last weight is paired with zero.
void pair_weights(const Block& block, int64_t count, float* weights) {
  for (int64_t j = 0; j < count; j += 2) {
    for (int v = 0; v < vectors_of(block); ++v) {
      const float* p = weights + j * kLanes + v * kWidth;
      const H second = to_bfloat16(j + 1 == count ? all(0.0f) : load(p + kLanes));
      store(weights + j / 2 * kLanes + v * kWidth, pair_up(to_bfloat16(load(p)), second));
    }
  }
}

// Interleaves pairs of rows of a chunk: w.widened (pairs, D) words. An odd last row is paired with zeros.
void pair_rows(const Block& block, const Workspace& w, int64_t count) {
  const int64_t D = block.D;
  for (int64_t j = 0; j < count; j += 2) {
    const uint16_t* a = reinterpret_cast<const uint16_t*>(w.rows[j]);
    const uint16_t* b = reinterpret_cast<const uint16_t*>(j + 1 == count ? w.zeros : w.rows[j + 1]);
    float* out = w.widened + j / 2 * D;
    int64_t d = 0;
    for (; d + kWidth <= D; d += kWidth) store(out + d, pair_up(load(a + d), load(b + d)));
    for (; d < D; ++d) out[d] = float_of(static_cast<uint32_t>(b[d]) << 16 | a[d]);
  }
}
#endif

bool is_finite(const Matrix& m, int64_t row, int64_t D) {
  uint32_t most = 0;  // of the bits of magnitudes
  if (m.dtype == Dtype::kFloat32) {
    const float* x = static_cast<const float*>(m.data) + row * m.row_stride;
    for (int64_t d = 0; d < D; ++d) {
      const uint32_t magnitude = bits_of(x[d]) & 0x7FFFFFFFu;
      most = magnitude > most ? magnitude : most;
    }
    return most < 0x7F800000u;
  }
  const uint16_t* x = static_cast<const uint16_t*>(m.data) + row * m.row_stride;
  for (int64_t d = 0; d < D; ++d) {
    const uint32_t magnitude = x[d] & 0x7FFFu;
    most = magnitude > most ? magnitude : most;
  }
  return most < (m.dtype == Dtype::kBFloat16 ? 0x7F80u : 0x7C00u);
}

}  // namespace

void begin_mean([[maybe_unused]] const Block& block, const Workspace& w, const Chunk& chunk) {
  for (int64_t j = 0; j < chunk.count; ++j) w.mean_rows[j] = in_pairs(block) ? nullptr : w.rows[j];
#if defined(NEGMINE_TILES)
  if (in_pairs(block)) return turn_pairs(block, w, chunk);
  if (chunk.in_parts) turn_parts(block, w, chunk);
#elif defined(NEGMINE_PAIRS)
  if (in_pairs(block)) pair_rows(block, w, chunk.count);
#endif
}

void add_mean(const Block& block, const Workspace& w, const Chunk& chunk, float* weights, const float* correction,
              float* mean) {
  const int64_t count = chunk.count;
#if defined(NEGMINE_TILES)
  if (in_pairs(block)) {
    pack_rows(block, weights, count, w.weights[0]);
    scale_mean(block, correction, mean);
    return add_packed(block, w, chunk, 0, room_for_part(chunk.count), w.weights[0], mean);
  }
  if (chunk.in_parts) return add_mean_in_parts(block, w, chunk, weights, correction, mean);
#elif defined(NEGMINE_PAIRS)
  if (in_pairs(block)) {
    const float* pairs[kChunk / 2];  // (pairs) words (D)
    for (int64_t j = 0; 2 * j < count; ++j) pairs[j] = w.widened + j * block.D;
    pair_weights(block, count, weights);
    return add_weighted<true>(block, pairs, (count + 1) / 2, weights, correction, mean);
  }
#endif
  add_weighted<false>(block, w.mean_rows, count, weights, correction, mean);
}

void drop_rows(const Block& block, const Workspace& w, [[maybe_unused]] const Chunk& chunk, int64_t first,
               int64_t count) {
  [[maybe_unused]] const auto clear = [](float* words, int64_t half) {
    const uint16_t zero = 0;
    std::memcpy(reinterpret_cast<char*>(words) + 2 * half, &zero, sizeof zero);
  };
  for (int64_t j = first; j < first + count; ++j) {
    if (is_finite(block.negative_keys, w.index[j], block.D)) continue;
    w.mean_rows[j] = w.zeros;
#if defined(NEGMINE_TILES)  // rows in parts are finite
    const int64_t words = room_for_part(chunk.count);
    for (int64_t d = 0; d < block.D && in_pairs(block); ++d) clear(w.turned + d * words, j);
#elif defined(NEGMINE_PAIRS)
    for (int64_t d = 0; d < block.D && in_pairs(block); ++d) clear(w.widened + j / 2 * block.D + d, j % 2);
#endif
  }
}

void restore_score_sum([[maybe_unused]] const Block& block, [[maybe_unused]] const Workspace& w,
                       [[maybe_unused]] const float* score_sums, [[maybe_unused]] float* mean) {
#if defined(NEGMINE_PAIRS)
  if (!in_pairs(block)) return;
  const int64_t D = block.D;
  for (int v = 0; v < vectors_of(block); ++v) {
    const auto query = [&](int64_t d) {
      const VI word = pair_words(block, w, v * kWidth, d / 2);
      return (V)(d % 2 == 0 ? word << 16 : word & all(static_cast<int32_t>(0xFFFF0000)));
    };
    float* column = mean + v * kWidth;
    V found = all(0.0f), square = all(0.0f);
    for (int64_t d = 0; d < D; ++d) {
      found = fma(query(d), load(column + d * kLanes), found);
      square = fma(query(d), query(d), square);
    }
    const V step = (load(score_sums + v * kWidth) - found) / square;
    const V finite = step - step == 0.0f ? step : all(0.0f);
    for (int64_t d = 0; d < D; ++d) store(column + d * kLanes, fma(finite, query(d), load(column + d * kLanes)));
  }
#endif
}

}  // namespace negmine::cpu::NEGMINE_SIMD
