// Products of weights and rows in bf16 parts, for the mean and for the gradient of the keys.
#include "kernels/cpu/simd/parts.h"

#if defined(NEGMINE_TILES)
namespace negmine::cpu::NEGMINE_SIMD {

void turn_parts(const Block& block, const Workspace& w, const Chunk& chunk) {
  const int64_t words = room_for_part(chunk.count), count = chunk.count;
  for_parts(block.negative_keys.dtype, [&](auto parts) {
    for (int64_t d = 0; d < block.D; d += kTile) {
      for (int64_t t = 0; t < words; t += kTile) {
        V low[kTile], high[kTile];  // (16 rows, 16 of D)
        for (int64_t i = 0; i < kTile; ++i) {
          const int64_t j = 2 * t + i;
          low[i] = j < count ? load_part(w.rows[j], d, block.D) : all(0.0f);
          high[i] = j + kTile < count ? load_part(w.rows[j + kTile], d, block.D) : all(0.0f);
        }
        transpose(low);
        transpose(high);
        for (int64_t i = 0; i < kTile; ++i) {
          split<parts.value>(low[i], high[i], words, w.turned + (d + i) * parts.value * words + t);
        }
      }
    }
  });
}

void add_mean_in_parts(const Block& block, const Workspace& w, const Chunk& chunk, const float* weights,
                       const float* correction, float* mean) {
  const int64_t words = room_for_part(chunk.count);
  for (int v = 0; v < vectors_of(block); ++v) {
    float* out = w.weight_parts + panel_at(v * kWidth, 3 * words);
    split_columns<3>(weights + v * kWidth, chunk.count, kWeightFactor, out);
  }
  const Parts parts{parts_of(block.negative_keys.dtype), 3};
  add_turned(block, w.turned, words, w.weight_parts, parts, 1.0f / kWeightFactor, correction, mean);
}

bool split_panel(const Block& block, const float* panel, float* out) {
  bool fits = true;
  for_parts(block.query.dtype, [&](auto parts) {
    const int64_t words = parts.value * room_for_part(block.lanes);
    for (int64_t d0 = 0; d0 < block.D; d0 += kPanel, out += words * kPanel) {
      for (int v = 0; v < kVectors; ++v) {
        const float* columns = panel + d0 * block.lanes + v * kWidth;
        const Range range = split_columns<parts.value>(columns, block.lanes, 1.0f, out + panel_at(v * kWidth, words));
        fits &= everywhere(range.within(kLeast, kMost));
      }
    }
  });
  return fits;
}

int64_t add_rows_in_parts(const Block& block, const Workspace& w, int64_t count, const float* panel, float* out,
                          int64_t* rest) {
  const Parts parts{3, parts_of(block.query.dtype)};
  const int64_t words = room_for_part(block.lanes), row_words = parts.left * words;
  const Operand weights{reinterpret_cast<const char*>(w.key_parts), row_words * 4};
  int64_t index[kChunk];  // (rows) their rows in the queue
  int64_t rows = 0, left = 0;
  for (int64_t j = 0; j < count; ++j) {
    const Range range = split_row<3>(w.tile + j * kLanes, block.lanes, kWeightFactor, w.key_parts + rows * row_words);
    if (everywhere(range.within(0x1p-149f, kMostWeight))) {
      index[rows++] = w.index[j];
    } else {
      rest[left++] = j;
    }
  }
  for (int64_t d0 = 0; d0 < block.D; d0 += kPanel, panel += parts.right * words * kPanel) {
    const int64_t width = block.D - d0 < kPanel ? block.D - d0 : kPanel;
    const int vectors = static_cast<int>((width + kWidth - 1) / kWidth);
    multiply_in_tiles(weights, rows, panel, words, vectors, w.scores, Ahead{}, parts);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = out + index[r] * block.D + d0;
      for (int64_t d = 0; d < width; ++d) row[d] += w.scores[r * kLanes + d] * (1.0f / kWeightFactor);
    }
  }
  return left;
}

}  // namespace negmine::cpu::NEGMINE_SIMD
#endif
