// Products of weights and rows in bf16 parts: the mean, and rows of the gradient of the keys.
#include "kernels/cpu/simd/parts.h"

#if defined(NEGMINE_TILES)
namespace negmine::cpu::NEGMINE_SIMD {
namespace {

// The chunk turned: out (D rounded up to 16, kParts, room_for_part(count)).
template <int kParts>
void turn_rows(const Block& block, const Workspace& w, int64_t count, float* out) {
  const int64_t words = room_for_part(count);
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
      for (int64_t i = 0; i < kTile; ++i) split<kParts>(low[i], high[i], words, out + (d + i) * kParts * words + t);
    }
  }
}

}  // namespace

bool add_mean_in_parts(const Block& block, const Workspace& w, int64_t count, const float* correction, float* mean) {
  for (int64_t j = 0; j < count; ++j) {
    if (w.in_parts[j] == 0) return false;
  }
  for_parts(block.negative_keys.dtype, [&](auto parts) { turn_rows<parts.value>(block, w, count, w.key_parts); });
  for (int v = 0; v < vectors_of(block); ++v) {
    split_columns<3>(w.tile + v * kWidth, count, kWeightFactor, w.weight_parts + v * kWidth);
  }
  const Parts parts{parts_of(block.negative_keys.dtype), 3};
  add_turned(block, w.key_parts, room_for_part(count), w.weight_parts, parts, 1.0f / kWeightFactor, correction, mean);
  return true;
}

bool split_panel(const Block& block, const float* panel, float* out) {
  bool fits = true;
  for_parts(block.query.dtype, [&](auto parts) {
    const int64_t room = parts.value * room_for_part(block.lanes) * kPanel;
    for (int64_t d0 = 0; d0 < block.D; d0 += kPanel, out += room) {
      for (int v = 0; v < kVectors; ++v) {
        const float* columns = panel + d0 * block.lanes + v * kWidth;
        const Range range = split_columns<parts.value>(columns, block.lanes, 1.0f, out + v * kWidth);
        fits &= everywhere(range.within(kLeast, kMost));
      }
    }
  });
  return fits;
}

int64_t add_rows_in_parts(const Block& block, const Workspace& w, int64_t count, const float* panel, float* out,
                          int64_t* rest) {
  const Parts parts{3, parts_of(block.query.dtype)};
  const int64_t words = room_for_part(block.lanes);
  const float* weights[kChunk];  // (rows)
  int64_t index[kChunk];         // (rows) their places in the queue
  int64_t rows = 0, left = 0;
  for (int64_t j = 0; j < count; ++j) {
    float* row = w.key_parts + rows * parts.left * words;
    const Range range = split_row<3>(w.tile + j * kLanes, block.lanes, kWeightFactor, row);
    if (everywhere(range.within(0x1p-149f, kMostWeight))) {
      weights[rows] = row;
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
