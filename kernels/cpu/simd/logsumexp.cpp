// Online log-sum-exp of a block of queries over a range of the queue, and with it the softmax mean of the rows (the
// gradient with respect to the query). Per chunk: scores, pool, new maximum, exponentials in place of the scores,
// second product.
//
// Sums over a chunk start from zero in registers and are then added to the running sums, so that no chain of additions
// is longer than a chunk. The maximum may change with any chunk; its correction rides on that addition.
#include "kernels/cpu/simd/score.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

NEGMINE_INLINE V finite_or_zero(V max) { return max == -__builtin_inff() ? all(0.0f) : max; }

NEGMINE_INLINE void add_to(int64_t* totals, VI counts) {
  for (int i = 0; i < kWidth; ++i) totals[i] += counts[i];
}

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

// The probabilities of a chunk are in w.tile (count, kLanes).
template <bool kPairs>
void add_mean(const Block& block, const Workspace& w, int64_t count, const float* correction, float* mean) {
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

// Scores of the chunk become exp(scale s - max), 0 outside the pool; max, sum and kept move on; correction (kLanes) is
// what the sums before this chunk are to be multiplied with. pulls (kLanes), where kPull: the running sum of exp(..) s.
template <bool kPull>
NEGMINE_INLINE void exponentials(const Block& block, const Workspace& w, int64_t count, float scale, float* correction,
                                 float* pulls, const LogsumexpState& state) {
  const int vectors = vectors_of(block);
  for (int v = 0; v < vectors; ++v) {
    const int64_t lane = v * kWidth;
    const V old_max = load(state.max + lane);
    V new_max = old_max;
    for (int64_t j = 0; j < count; ++j) {
      const V score = load(w.tile + j * kLanes + lane);
      new_max = max(score * scale, new_max);  // excluded() is a NaN, which max passes over
    }
    const V shift = finite_or_zero(new_max);
    V total = all(0.0f), pull = all(0.0f);
    VI kept = all(0);
    for (int64_t j = 0; j < count; ++j) {
      float* cell = w.tile + j * kLanes + lane;
      const V score = load(cell);
      const VI outside = is_excluded(score);
      const V p = outside ? all(0.0f) : exp(fma(score, all(scale), -shift));
      store(cell, p);
      total += p;
      if constexpr (kPull) pull = fma(p, outside ? all(0.0f) : score, pull);
      kept += outside + 1;
    }
    const V factor = exp(old_max - shift);
    store(correction + lane, factor);
    store(state.max + lane, new_max);
    if constexpr (kPull) store(pulls + lane, fma(load(pulls + lane), factor, pull));
    store(state.sum + lane, fma(load(state.sum + lane), factor, total));
    add_to(state.kept + lane, kept);
  }
}

void count_above(const Block& block, const Workspace& w, int64_t count, const float* pivot, int64_t* above) {
  const int vectors = vectors_of(block);
  for (int v = 0; v < vectors; ++v) {
    const V threshold = load(pivot + v * kWidth);
    VI total = all(0);
    for (int64_t j = 0; j < count; ++j) total -= load(w.tile + j * kLanes + v * kWidth) > threshold;
    add_to(above + v * kWidth, total);
  }
}

#if defined(__AVX512BF16__)
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

// Moves the mean along the query to where query . mean is pulls (kLanes), which saw no rounding: the gradient of scale
// is as exact as from fp32. A query of zeros, or a row that is not finite, stays.
void restore_pull(const Block& block, const Workspace& w, const float* pulls, float* mean) {
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
}
#endif

}  // namespace

void logsumexp_range(const Block& block, const Workspace& w, float scale, const float* pivot,
                     const LogsumexpState& state) {
  begin_block(block, w);
  float pivots[kLanes], correction[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    pivots[lane] = pivot != nullptr && lane < block.lanes ? pivot[block.first_query + lane] : 0.0f;
    state.max[lane] = -__builtin_inff();
    state.sum[lane] = 0.0f;
    state.kept[lane] = state.above[lane] = 0;
  }
  if (state.mean != nullptr) {
    for (int64_t i = 0; i < block.D * kLanes; ++i) state.mean[i] = 0.0f;
  }
#if defined(__AVX512BF16__)
  const bool pairs = in_pairs(block) && state.mean != nullptr;
  float pulls[kLanes] = {};
#endif
  for (int64_t k = block.k_begin; k < block.k_end;) {
    const int64_t count = load_chunk(block, w, &k, true);
    score_chunk(block, w, count);
    apply_masks(block, w, count);
    if (pivot != nullptr) count_above(block, w, count, pivots, state.above);
    if (block.pool.bounded()) apply_bounds(block, w, count);
#if defined(__AVX512BF16__)
    if (pairs) {
      exponentials<true>(block, w, count, scale, correction, pulls, state);
      add_mean<true>(block, w, pair_chunk(block, w, count), correction, state.mean);
      continue;
    }
#endif
    exponentials<false>(block, w, count, scale, correction, nullptr, state);
    if (state.mean != nullptr) add_mean<false>(block, w, count, correction, state.mean);
  }
#if defined(__AVX512BF16__)
  if (pairs) restore_pull(block, w, pulls, state.mean);
#endif
}

}  // namespace negmine::cpu::NEGMINE_SIMD
