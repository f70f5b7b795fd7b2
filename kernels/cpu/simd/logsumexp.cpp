// Online log-sum-exp of a block of queries over a range of the queue, and with it the softmax mean of the rows (the
// gradient with respect to the query). Per chunk: scores, pool, new maximum, exponentials in place of the scores,
// second product.
//
// Sums over a chunk start from zero in registers and are then added to the running sums, so that no chain of additions
// is longer than a chunk. The maximum may change with any chunk; its correction rides on that addition.
#include <cstring>

#include "kernels/cpu/simd/score.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

// What exponents are taken from: an infinite maximum would make inf - inf of its own score, and nothing of all others.
NEGMINE_INLINE V finite_or_zero(V max) { return max - max == 0.0f ? max : all(0.0f); }

NEGMINE_INLINE void add_to(int64_t* totals, VI counts) {
  for (int i = 0; i < kWidth; ++i) totals[i] += counts[i];
}

// The chunk's scores become exp(scale s - max) in w.tile, 0 outside the pool; max, sum and kept move on; correction
// (kLanes) is what the sums before this chunk are to be multiplied with. pulls (kLanes), where kPull: the running sum
// of exp(..) s.
template <bool kPull>
NEGMINE_INLINE void exponentials(const Block& block, const Workspace& w, const float* scores, int64_t count,
                                 float scale, float* correction, float* pulls, const LogsumexpState& state) {
  const int vectors = vectors_of(block);
  for (int v = 0; v < vectors; ++v) {
    const int64_t lane = v * kWidth;
    const V old_max = load(state.max + lane);
    V new_max = old_max;
    for (int64_t j = 0; j < count; ++j) {
      const V score = load(scores + j * kLanes + lane);
      new_max = max(score * scale, new_max);  // excluded() is a NaN, which max passes over
    }
    const V shift = finite_or_zero(new_max);
    V total = all(0.0f), pull = all(0.0f);
    VI kept = all(0);
    for (int64_t j = 0; j < count; ++j) {
      const V score = load(scores + j * kLanes + lane);
      const VI outside = is_excluded(score);
      const V p = outside ? all(0.0f) : exp(fma(score, all(scale), -shift));
      store(w.tile + j * kLanes + lane, p);
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

void logsumexp_range(const Block& block, const Workspace& w, const float* scale, int64_t scales, const float* pivot,
                     const Selection* selection, const LogsumexpState* const* states) {
  begin_block(block, w);
  float pivots[kLanes], correction[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    pivots[lane] = pivot != nullptr && lane < block.lanes ? pivot[block.first_query + lane] : 0.0f;
  }
  for (int64_t i = 0; i < scales; ++i) {
    const LogsumexpState& state = *states[i];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      state.max[lane] = -__builtin_inff();
      state.sum[lane] = 0.0f;
      state.kept[lane] = state.above[lane] = 0;
    }
    for (int64_t at = 0; state.mean != nullptr && at < block.D * kLanes; ++at) state.mean[at] = 0.0f;
  }
  const bool wants_pull = in_pairs(block) && states[0]->mean != nullptr;
  float pulls[2][kLanes] = {};
  const float* rows[kChunk];  // add_mean spends the workspace's rows
  for (int64_t k = block.k_begin; k < block.k_end;) {
    const int64_t count = load_chunk(block, w, &k, true);
    score_chunk(block, w, count);
    apply_masks(block, w, count);
    if (pivot != nullptr) count_above(block, w, count, pivots, states[0]->above);
    if (block.pool.bounded()) apply_bounds(block, w, count);
    if (selection != nullptr) offer_chunk(block, w, count, *selection);
    if (scales == 2) {
      std::memcpy(w.scores, w.tile, count * kLanes * sizeof(float));
      std::memcpy(rows, w.rows, count * sizeof(rows[0]));
    }
    for (int64_t i = 0; i < scales; ++i) {
      const LogsumexpState& state = *states[i];
      const float* scores = i == 0 ? w.tile : w.scores;
      if (i == 1) std::memcpy(w.rows, rows, count * sizeof(rows[0]));
      if (wants_pull) {
        exponentials<true>(block, w, scores, count, scale[i], correction, pulls[i], state);
      } else {
        exponentials<false>(block, w, scores, count, scale[i], correction, nullptr, state);
      }
      if (state.mean != nullptr) add_mean(block, w, count, correction, state.mean);
    }
  }
  for (int64_t i = 0; wants_pull && i < scales; ++i) restore_pull(block, w, pulls[i], states[i]->mean);
}

}  // namespace negmine::cpu::NEGMINE_SIMD
