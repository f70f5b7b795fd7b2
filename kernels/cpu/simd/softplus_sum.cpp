// Sums of log(1 + exp(scale s + bias)) of a block of queries over a range of the queue, and with them the rows weighted
// by the sigmoid (the gradient with respect to the query). Per chunk: scores, pool, sigmoids in place of the scores,
// second product. No term outgrows its score, so there is no running maximum.
#include "kernels/cpu/simd/score.h"

namespace negmine::cpu::NEGMINE_SIMD {

void softplus_sum_range(const Block& block, const Workspace& w, float scale, float bias, const SoftplusState& state) {
  const Tiles tiles;
  begin_block(block, w);
  float keep[kLanes];  // the earlier sums stay as they are
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    keep[lane] = 1.0f;
    state.total[lane] = state.mass[lane] = 0.0f;
    state.kept[lane] = 0;
  }
  if (state.pull != nullptr) {
    for (int64_t i = 0; i < room_for_mean(block.D) * kLanes; ++i) state.pull[i] = 0.0f;
  }
  const int vectors = vectors_of(block);
  float pulls[kLanes] = {};  // sums of sigmoid times score
  for (int64_t k = block.k_begin; k < block.k_end;) {
    const Chunk chunk = load_chunk(block, w, &k, true);
    const int64_t count = chunk.count;
    score_chunk(block, w, chunk);
    apply_masks(block, w, count);
    if (block.pool.bounded()) apply_bounds(block, w, count);
    for (int v = 0; v < vectors; ++v) {
      const int64_t lane = v * kWidth;
      V total = all(0.0f), mass = all(0.0f), pull = all(0.0f);
      VI kept = all(0);
      for (int64_t j = 0; j < count; ++j) {
        float* cell = w.tile + j * kLanes + lane;
        const V score = load(cell);
        const VI outside = is_excluded(score);
        const Logistic at = logistic(fma(score, all(scale), all(bias)));
        const V sigmoid = outside ? all(0.0f) : at.sigmoid;
        store(cell, sigmoid);
        total += outside ? all(0.0f) : at.softplus;
        mass += sigmoid;
        pull = fma(sigmoid, outside ? all(0.0f) : score, pull);
        kept += outside + 1;
      }
      store(state.total + lane, load(state.total + lane) + total);
      store(state.mass + lane, load(state.mass + lane) + mass);
      store(pulls + lane, load(pulls + lane) + pull);
      add_to(state.kept + lane, kept);
    }
    if (state.pull == nullptr) continue;
    begin_mean(block, w, chunk);
    add_mean(block, w, chunk, w.tile, keep, state.pull);
  }
  if (state.pull != nullptr) restore_pull(block, w, pulls, state.pull);
}

}  // namespace negmine::cpu::NEGMINE_SIMD
