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
  const bool wants_pull = in_pairs(block) && state.mean != nullptr;
  float pulls[kLanes] = {};
  for (int64_t k = block.k_begin; k < block.k_end;) {
    const int64_t count = load_chunk(block, w, &k, true);
    score_chunk(block, w, count);
    apply_masks(block, w, count);
    if (pivot != nullptr) count_above(block, w, count, pivots, state.above);
    if (block.pool.bounded()) apply_bounds(block, w, count);
    if (wants_pull) {
      exponentials<true>(block, w, count, scale, correction, pulls, state);
    } else {
      exponentials<false>(block, w, count, scale, correction, nullptr, state);
    }
    if (state.mean != nullptr) add_mean(block, w, count, correction, state.mean);
  }
  if (wants_pull) restore_pull(block, w, pulls, state.mean);
}

}  // namespace negmine::cpu::NEGMINE_SIMD
