// The best token of each document for each token of a block of queries: per chunk, scores, then running maxima.
#include "kernels/cpu/simd/score.h"

namespace negmine::cpu::NEGMINE_SIMD {

void maxsim_range(const Block& block, const Workspace& w, int64_t J, float* best, int32_t* token) {
  const Tiles tiles;
  begin_block(block, w);
  const int vectors = vectors_of(block);
  const int64_t first = block.k_begin / J;  // document
  for (int64_t i = 0; i < (block.k_end - block.k_begin) / J * kLanes; ++i) {
    best[i] = -__builtin_inff();
    token[i] = -1;
  }
  int64_t document = first;
  for (int64_t k = block.k_begin; k < block.k_end;) {
    const Chunk chunk = load_chunk(block, w, &k, true);
    score_chunk(block, w, chunk);
    for (int64_t from = 0, to = 0; from < chunk.count; from = to) {
      if (w.index[from] >= (document + 1) * J) document = w.index[from] / J;
      while (to < chunk.count && w.index[to] < (document + 1) * J) ++to;
      for (int v = 0; v < vectors; ++v) {
        const int64_t cell = (document - first) * kLanes + v * kWidth;
        V highest = load(best + cell);
        VI found = load(token + cell);
        for (int64_t j = from; j < to; ++j) {
          const V score = load(w.tile + j * kLanes + v * kWidth);
          const VI higher = (score > highest) | (score != score);  // a NaN stays, because no score is above it
          highest = higher ? score : highest;
          found = higher ? all(static_cast<int32_t>(w.index[j] - document * J)) : found;
        }
        store(best + cell, highest);
        store(token + cell, found);
      }
    }
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
