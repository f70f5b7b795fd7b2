// Counts the columns of the pool. Without bounds no score is computed, and the queue is not read.
#include "kernels/cpu/simd/score.h"

namespace negmine::cpu::NEGMINE_SIMD {

void count_range(const Block& block, const Workspace& w, int64_t* count) {
  const bool bounded = block.pool.bounded();
  const Tiles tiles;
  begin_block(block, w);
  for (int64_t lane = 0; lane < kLanes; ++lane) count[lane] = 0;
  for (int64_t k = block.k_begin; k < block.k_end;) {
    const Chunk chunk = load_chunk(block, w, &k, bounded);
    const int64_t columns = chunk.count;
    if (bounded) {
      score_chunk(block, w, chunk);
    } else {
      for (int64_t i = 0; i < columns * kLanes; ++i) w.tile[i] = 0.0f;
    }
    apply_masks(block, w, chunk, 0, columns);
    if (bounded) apply_bounds(block, w, columns);
    for (int v = 0; v < vectors_of(block); ++v) {
      VI total = all(0);
      for (int64_t j = 0; j < columns; ++j) total += is_excluded(load(w.tile + j * kLanes + v * kWidth)) + 1;
      add_to(count + v * kWidth, total);
    }
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
