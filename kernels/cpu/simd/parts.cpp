// Scores as sums of products of bf16 parts.
#include "kernels/cpu/simd/parts.h"

#if defined(NEGMINE_TILES)
namespace negmine::cpu::NEGMINE_SIMD {

void split_queries(const Block& block, const Workspace& w) {
  for_parts(block.query.dtype, [&](auto parts) {
    for (int v = 0; v < vectors_of(block); ++v) {
      const int64_t lane = v * kWidth;
      float* out = w.query_parts + panel_at(lane, parts.value * room_for_part(block.D));
      const Range range = split_columns<parts.value>(w.q_t + lane, block.D, 1.0f, out);
      store(w.lanes_in_parts + lane, range.within(kLeast, kMost));
    }
  });
}

void split_keys(const Block& block, const Workspace& w, Chunk& chunk) {
  const int64_t row = parts_of(block.negative_keys.dtype) * room_for_part(block.D);  // words
  for_parts(block.negative_keys.dtype, [&](auto parts) {
    for (int64_t j = 0; j < chunk.count; ++j) {
      const Range range = split_row<parts.value>(w.rows[j], block.D, 1.0f, w.key_parts + j * row);
      w.rows_in_parts[j] = -everywhere(range.within(kLeast, kMost));
      chunk.in_parts &= w.rows_in_parts[j] != 0;
    }
  });
  chunk.left = reinterpret_cast<const char*>(w.key_parts);
  chunk.stride = row * 4;
}

void score_in_parts(const Block& block, const Workspace& w, const Chunk& chunk, int64_t first, int64_t count,
                    const Ahead& ahead) {
  const int vectors = vectors_of(block);
  bool whole = chunk.in_parts;
  for (int64_t lane = 0; lane < block.lanes; ++lane) whole &= w.lanes_in_parts[lane] != 0;
  const Operand left{chunk.left + first * chunk.stride, chunk.stride};
  const Parts parts{parts_of(block.negative_keys.dtype), parts_of(block.query.dtype)};
  multiply_in_tiles(left, count, w.query_parts, room_for_part(block.D), vectors, w.tile, ahead, parts);
  if (whole) return;
  multiply(w.rows + first, count, w.q_t, block.D, vectors, false, w.scores, Ahead{});
  for (int64_t j = 0; j < count; ++j) {
    for (int v = 0; v < vectors; ++v) {
      float* cell = w.tile + j * kLanes + v * kWidth;
      const VI split = load(w.lanes_in_parts + v * kWidth) & all(w.rows_in_parts[first + j]);
      store(cell, split ? load(cell) : load(w.scores + j * kLanes + v * kWidth));
    }
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
#endif
