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

// mean (kD, kVec * kWidth) = correction * mean + sum over the chunk of n (count, kD) x p (count, kVec * kWidth)
template <int kD, int kVec>
NEGMINE_INLINE void mean_tile(const float* const* rows, int64_t d, const float* p, int64_t count,
                              const float* correction, float* mean) {
  V acc[kD][kVec];  // (kD, kVec * kWidth)
  for (int r = 0; r < kD; ++r) {
    for (int v = 0; v < kVec; ++v) acc[r][v] = all(0.0f);
  }
  for (int64_t j = 0; j < count; ++j) {
    const float* n = rows[j] + d;
    V weight[kVec];  // (kVec * kWidth)
    for (int v = 0; v < kVec; ++v) weight[v] = load(p + j * kLanes + v * kWidth);
    for (int r = 0; r < kD; ++r) {
      for (int v = 0; v < kVec; ++v) acc[r][v] = fma(all(n[r]), weight[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kD; ++r) {
    for (int v = 0; v < kVec; ++v) {
      float* cell = mean + (d + r) * kLanes + v * kWidth;
      store(cell, fma(load(cell), load(correction + v * kWidth), acc[r][v]));
    }
  }
}

template <int kVec>
void mean_panel(const Block& block, const float* const* rows, const float* p, int64_t count, const float* correction,
                float* mean) {
  int64_t d = 0;
  for (; d + kRows <= block.D; d += kRows) mean_tile<kRows, kVec>(rows, d, p, count, correction, mean);
  for (; d + 2 <= block.D; d += 2) mean_tile<2, kVec>(rows, d, p, count, correction, mean);
  for (; d < block.D; ++d) mean_tile<1, kVec>(rows, d, p, count, correction, mean);
}

}  // namespace

void add_mean(const Block& block, const Workspace& w, int64_t count, const float* correction, float* mean) {
  const int vectors = vectors_of(block);
  for (int v = 0; v < vectors; v += kVectors) {
    const int64_t lane = v * kWidth;
    switch (vectors - v) {
      case 1:
        mean_panel<1>(block, w.wide, w.tile + lane, count, correction + lane, mean + lane);
        break;
#if defined(__AVX512F__)
      case 2:
        mean_panel<2>(block, w.wide, w.tile + lane, count, correction + lane, mean + lane);
        break;
      case 3:
        mean_panel<3>(block, w.wide, w.tile + lane, count, correction + lane, mean + lane);
        break;
#endif
      default:
        mean_panel<kVectors>(block, w.wide, w.tile + lane, count, correction + lane, mean + lane);
    }
  }
}

namespace {

// Scores of the chunk become exp(scale s - max), 0 outside the pool; max, sum and kept move on; correction (kLanes) is
// what the sums before this chunk are to be multiplied with.
NEGMINE_INLINE void exponentials(const Block& block, const Workspace& w, int64_t count, float scale, float* correction,
                                 const LogsumexpState& state) {
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
    V total = all(0.0f);
    VI kept = all(0);
    for (int64_t j = 0; j < count; ++j) {
      float* cell = w.tile + j * kLanes + lane;
      const V score = load(cell);
      const VI outside = is_excluded(score);
      const V p = outside ? all(0.0f) : exp(fma(score, all(scale), -shift));
      store(cell, p);
      total += p;
      kept += outside + 1;
    }
    const V factor = exp(old_max - shift);
    store(correction + lane, factor);
    store(state.max + lane, new_max);
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
  const Want want = state.mean != nullptr ? Want::kScoresAndRows : Want::kScores;
  for (int64_t k = block.k_begin; k < block.k_end;) {
    const int64_t count = load_chunk(block, w, &k, want);
    score_chunk(block, w, count);
    apply_masks(block, w, count);
    if (pivot != nullptr) count_above(block, w, count, pivots, state.above);
    if (block.pool.bounded()) apply_bounds(block, w, count);
    exponentials(block, w, count, scale, correction, state);
    if (state.mean != nullptr) add_mean(block, w, count, correction, state.mean);
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
