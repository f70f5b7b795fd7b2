// Sums of log(1 + exp(scale s + offset)) of a block of queries over a range of the queue, and the rows weighted by the
// sigmoid (the gradient with respect to the query). The steps for each chunk: scores, pool, sigmoids, second product.
// No term is much larger than its logit, so no running maximum is needed.
#include "kernels/cpu/simd/score.h"

namespace negmine::cpu::NEGMINE_SIMD {

void softplus_sum_range(const Block& block, const Workspace& w, float scale, float offset, const SoftplusState& state) {
  const Tiles tiles;
  begin_block(block, w);
  float keep[kLanes];  // the earlier sums stay as they are
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    keep[lane] = 1.0f;
    state.total[lane] = state.sigmoid_sum[lane] = 0.0f;
    state.num_kept[lane] = 0;
  }
  if (state.sigmoid_keys != nullptr) {
    for (int64_t i = 0; i < room_for_mean(block.D) * kLanes; ++i) state.sigmoid_keys[i] = 0.0f;
  }
  const int vectors = vectors_of(block);
  float score_sums[kLanes] = {};  // sums of sigmoid times score
  for (int64_t k = block.k_begin; k < block.k_end;) {
    const Chunk chunk = load_chunk(block, w, &k, true);
    const int64_t count = chunk.count;
    score_chunk(block, w, chunk);
    float offsets[kChunk];
    const float* bias = bias_of(block, w, chunk, offsets);
    for (int64_t j = 0; j < count; ++j) offsets[j] = bias == nullptr ? offset : offset + bias[j];
    bool suspect = apply_masks(block, w, chunk, 0, count).suspect;
    if (block.pool.bounded()) suspect |= apply_bounds(block, w, count).suspect;
    for (int v = 0; v < vectors; ++v) {
      const int64_t lane = v * kWidth;
      V total = all(0.0f), sigmoid_sum = all(0.0f), score_sum = all(0.0f);
      VI num_kept = all(0);
      for (int64_t j = 0; j < count; ++j) {
        float* cell = w.tile + j * kLanes + lane;
        const V score = load(cell);
        const VI outside = is_excluded(score);
        const Logistic at = logistic(fma(score, all(scale), all(offsets[j])));
        const V sigmoid = outside ? all(0.0f) : at.sigmoid;
        store(cell, sigmoid);
        total += outside ? all(0.0f) : at.softplus;
        sigmoid_sum += sigmoid;
        score_sum = fma(sigmoid, outside ? all(0.0f) : score, score_sum);
        num_kept += outside + 1;
      }
      store(state.total + lane, load(state.total + lane) + total);
      store(state.sigmoid_sum + lane, load(state.sigmoid_sum + lane) + sigmoid_sum);
      store(score_sums + lane, load(score_sums + lane) + score_sum);
      add_to(state.num_kept + lane, num_kept);
    }
    if (state.sigmoid_keys == nullptr) continue;
    begin_mean(block, w, chunk);
    if (suspect) {
      drop_rows(block, w, chunk, 0, count);
      for (int64_t j = 0; j < count; ++j) {  // the sigmoid of infinity is a number
        float* cell = w.tile + j * kLanes;
        for (int64_t lane = 0; lane < block.lanes && w.mean_rows[j] == w.zeros; ++lane) {
          if (cell[lane] != 0.0f) cell[lane] = __builtin_nanf("");
        }
      }
    }
    add_mean(block, w, chunk, w.tile, keep, state.sigmoid_keys);
  }
  if (state.sigmoid_keys != nullptr) restore_score_sum(block, w, score_sums, state.sigmoid_keys);
}

}  // namespace negmine::cpu::NEGMINE_SIMD
