// Scores as sums of products of bf16 parts.
#include "kernels/cpu/simd/parts.h"

#if defined(NEGMINE_TILES)
namespace negmine::cpu::NEGMINE_SIMD {

void split_queries(const Block& block, const Workspace& w) {
  for_parts(block.query.dtype, [&](auto parts) {
    for (int v = 0; v < vectors_of(block); ++v) {
      const int64_t lane = v * kWidth;
      const Range range = split_columns<parts.value>(w.q_t + lane, block.D, 1.0f, w.query_parts + lane);
      store(w.in_parts + kChunk + lane, range.within(kLeast, kMost));
    }
  });
}

void score_in_parts(const Block& block, const Workspace& w, int64_t count, const Ahead& ahead) {
  const Parts parts{parts_of(block.negative_keys.dtype), parts_of(block.query.dtype)};
  const int64_t D = block.D, words = room_for_part(D);
  const float* row[kChunk];  // (count)
  int64_t rows = 0, lanes = 0;
  for_parts(block.negative_keys.dtype, [&](auto left) {
    for (int64_t j = 0; j < count; ++j) {
      float* out = w.key_parts + j * left.value * words;
      const bool splits = everywhere(split_row<left.value>(w.rows[j], D, 1.0f, out).within(kLeast, kMost));
      row[j] = out;
      w.in_parts[j] = -splits;
      rows += splits;
    }
  });
  const int vectors = vectors_of(block);
  const int32_t* queries = w.in_parts + kChunk;  // (kLanes)
  for (int64_t lane = 0; lane < block.lanes; ++lane) lanes -= queries[lane];
  const bool some = rows > 0 && lanes > 0, whole = rows == count && lanes == block.lanes;
  if (!whole) multiply(w.rows, count, w.q_t, D, vectors, false, some ? w.scores : w.tile, some ? Ahead{} : ahead);
  if (!some) return;
  multiply_in_tiles(row, count, w.query_parts, words, vectors, w.tile, ahead, parts);
  if (whole) return;
  for (int64_t j = 0; j < count; ++j) {
    for (int v = 0; v < vectors; ++v) {
      float* cell = w.tile + j * kLanes + v * kWidth;
      const VI split = load(queries + v * kWidth) & all(w.in_parts[j]);
      store(cell, split ? load(cell) : load(w.scores + j * kLanes + v * kWidth));
    }
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
#endif
