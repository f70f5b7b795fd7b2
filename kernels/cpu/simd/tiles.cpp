// The two products of the kernels in AMX tiles: 2 by 2 accumulators, two tiles of the left operand and two of the
// right, so that four products wait for four loads. Operands in parts go through the same accumulators.
//
// The rows of the queue are the left operand as they lie; the block's queries in pairs, as AVX512-BF16 takes them too,
// are the right one. For the mean the rows are turned: its contraction runs over the queue.
#include "kernels/cpu/simd/tiles.h"

#if defined(NEGMINE_TILES)
namespace negmine::cpu::NEGMINE_SIMD {

#if defined(NEGMINE_EMULATED_TILES)
thread_local EmulatedTile emulated_tiles[8];
Tiles::Tiles() = default;
Tiles::~Tiles() = default;
#else
Tiles::Tiles() {
  struct alignas(64) Shape {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Shape) == 64);
  Shape shape;
  for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = kTile;
  asm volatile("ldtilecfg %0" ::"m"(shape));
}
Tiles::~Tiles() { asm volatile("tilerelease"); }
#endif

namespace {

// Up to 16 rows of T words. Where they lie at equal distances and whole, a tile of them is read in place.
struct Strip {
  const float* const* rows;
  int64_t count, T;
  int64_t stride;  // bytes; 0: not at equal distances, or fewer than 16

  static Strip of(const float* const* rows, int64_t count, int64_t T) {
    count = count < kTile ? count : kTile;
    if (count < kTile) return {rows, count, T, 0};
    const auto from_first = [&](int64_t r) {
      return reinterpret_cast<intptr_t>(rows[r]) - reinterpret_cast<intptr_t>(rows[0]);
    };
    const intptr_t stride = from_first(1);
    bool even = true;
    for (int64_t r = 2; r < kTile; ++r) even &= from_first(r) == r * stride;
    return {rows, count, T, even ? stride : 0};
  }
};

// Words [t, t + 16) of the strip, zeros past its ends.
template <int kIndex>
NEGMINE_INLINE void load_strip(const Strip& strip, int64_t t) {
  if (strip.stride != 0 && t + kTile <= strip.T) {
    return load_tile<kIndex>(reinterpret_cast<const char*>(strip.rows[0]) + t * 4, strip.stride);
  }
  alignas(64) float copy[kTile][kTile] = {};
  const int64_t words = strip.T - t < kTile ? strip.T - t : kTile;
  for (int64_t r = 0; r < strip.count; ++r) {
    std::memcpy(copy[r], reinterpret_cast<const char*>(strip.rows[r]) + t * 4, static_cast<size_t>(words) * 4);
  }
  load_tile<kIndex>(copy, sizeof copy[0]);
}

// Tiles 0..3 = (top, bottom) x b (parts, whole_tiles(T), 32 of kLanes columns); the bottom only where kTall is 2, the
// second 16 columns only where kWide is 2. Rows of the strips hold the parts of T words each.
template <int kTall, int kWide>
NEGMINE_INLINE void multiply_strips(const Strip& top, const Strip& bottom, const float* b, const Parts& parts,
                                    const Ahead& ahead) {
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  constexpr int64_t kStride = kLanes * sizeof(float), kLine = 64;
  const int64_t T = top.T / parts.left, T_right = whole_tiles(T);
  const int64_t per_step = ahead.bytes > T_right / kTile * kLine ? 2 * kLine : kLine;  // bytes of each row ahead
  const int first_pass = parts.left * parts.right == 1 ? 1 : 0;
  for (int pass = first_pass; pass < 2; ++pass) {  // the products of the first parts last: the others are small
    for (int64_t t = 0; t < T; t += kTile) {
      const int64_t asked = pass == first_pass ? ahead.bytes : 0;
      for (int64_t at = t / kTile * per_step, end = at + per_step; at < end && at < asked; at += kLine) {
        const char* next = ahead.first + at;
        for (int64_t r = 0; r < ahead.rows; ++r, next += ahead.stride) __builtin_prefetch(next, 0, 2);
      }
      for (int i = pass == 0 ? parts.left - 1 : 0; i >= 0; --i) {
        const int last = pass == 1 ? 0 : parts.right - 1 < 2 - i ? parts.right - 1 : 2 - i;
        const int first = pass == 0 && i == 0 ? 1 : 0;
        if (last < first) continue;
        load_strip<4>(top, i * T + t);
        if constexpr (kTall == 2) load_strip<5>(bottom, i * T + t);
        for (int j = last; j >= first; --j) {
          const float* right = b + (j * T_right + t) * kLanes;
          load_tile<6>(right, kStride);
          product<0, 4, 6>();
          if constexpr (kTall == 2) product<2, 5, 6>();
          if constexpr (kWide == 2) {
            load_tile<7>(right + kTile, kStride);
            product<1, 4, 7>();
            if constexpr (kTall == 2) product<3, 5, 7>();
          }
        }
      }
    }
  }
}

NEGMINE_INLINE void multiply_strips(const Strip& top, const Strip& bottom, const float* b, int wide, const Parts& parts,
                                    const Ahead& ahead) {
  if (bottom.count > 0) {
    wide == 2 ? multiply_strips<2, 2>(top, bottom, b, parts, ahead)
              : multiply_strips<2, 1>(top, bottom, b, parts, ahead);
  } else {
    wide == 2 ? multiply_strips<1, 2>(top, bottom, b, parts, ahead)
              : multiply_strips<1, 1>(top, bottom, b, parts, ahead);
  }
}

// Elements [d, d + 16) of a row of D, zeros past its end.
NEGMINE_INLINE H load_part(const float* row, int64_t d, int64_t D) {
  const uint16_t* from = reinterpret_cast<const uint16_t*>(row) + d;
  if (d + kTile <= D) return load(from);
  uint16_t part[kTile] = {};
  std::memcpy(part, from, static_cast<size_t>(D - d) * sizeof part[0]);
  return load(part);
}

// The chunk turned: out (whole_tiles(D), words), where word j of row d is element d of the chunk's rows 2 j and 2 j
// + 1.
void turn_rows(const Block& block, const Workspace& w, int64_t count, int64_t words, float* out) {
  for (int64_t d = 0; d < block.D; d += kTile) {
    for (int64_t j0 = 0; j0 < words; j0 += kTile) {
      V x[kTile];  // (16 pairs of rows, 16 of D)
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t j = 2 * (j0 + i);
        const H first = j < count ? load_part(w.rows[j], d, block.D) : H{};
        x[i] = pair_up(first, j + 1 < count ? load_part(w.rows[j + 1], d, block.D) : H{});
      }
      transpose(x);
      for (int64_t i = 0; i < kTile; ++i) store(out + (d + i) * words + j0, x[i]);
    }
  }
}

// w.tile (count, kLanes), the chunk's weights, becomes (words, kLanes) pairs of rows rounded to bf16.
void pair_weights(const Block& block, const Workspace& w, int64_t count, int64_t words) {
  for (int v = 0; v < vectors_of(block); ++v) {
    float* column = w.tile + v * kWidth;
    for (int64_t j = 0; j < words; ++j) {
      const V first = 2 * j < count ? load(column + 2 * j * kLanes) : all(0.0f);
      const V second = 2 * j + 1 < count ? load(column + (2 * j + 1) * kLanes) : all(0.0f);
      store(column + j * kLanes, pair_up(to_bfloat16(first), to_bfloat16(second)));
    }
  }
}

// 16 rows of the mean = correction * mean + factor * a tile of the product.
template <int kIndex>
NEGMINE_INLINE void add_tile(float factor, const float* correction, int64_t rows, float* mean) {
  alignas(64) float sum[kTile][kTile];
  store_tile<kIndex>(sum, sizeof sum[0]);
  for (int64_t r = 0; r < rows && r < kTile; ++r) {
    store(mean + r * kLanes, fma(load(mean + r * kLanes), load(correction), load(sum[r]) * factor));
  }
}

}  // namespace

void multiply_in_tiles(const float* const* a, int64_t rows, const float* b, int64_t T, int vectors, float* out,
                       const Ahead& ahead, const Parts& parts) {
  const Tiles tiles;
  const Ahead none;
  const int64_t words = parts.left * T;  // of a row
  constexpr int64_t kStride = kLanes * sizeof(float);
  for (int v = 0; v < vectors; v += 2) {
    const int wide = vectors - v < 2 ? 1 : 2;
    for (int64_t row = 0; row < rows; row += 2 * kTile) {
      const int64_t below = rows - row < kTile ? 0 : rows - row - kTile;
      const Strip top = Strip::of(a + row, rows - row, words), bottom = Strip::of(a + row + kTile, below, words);
      multiply_strips(top, bottom, b + v * kWidth, wide, parts, v == 0 ? part_of(ahead, row, 2 * kTile) : none);
      float* cell = out + row * kLanes + v * kWidth;
      store_tile<0>(cell, kStride);
      if (wide == 2) store_tile<1>(cell + kTile, kStride);
      if (below > 0) store_tile<2>(cell + kTile * kLanes, kStride);
      if (below > 0 && wide == 2) store_tile<3>(cell + kTile * kLanes + kTile, kStride);
    }
  }
}

void add_turned(const Block& block, const float* turned, int64_t words, const float* weights, const Parts& parts,
                float factor, const float* correction, float* mean) {
  const int64_t D = block.D, room = parts.left * words;
  const Tiles tiles;
  const float* rows[2 * kTile];  // (32) of `turned`
  for (int64_t d = 0; d < D; d += 2 * kTile) {
    for (int64_t r = 0; r < 2 * kTile; ++r) rows[r] = turned + (d + r) * room;
    const Strip top = Strip::of(rows, kTile, room);
    const Strip bottom = Strip::of(rows + kTile, D - d > kTile ? kTile : 0, room);
    for (int v = 0; v < vectors_of(block); v += 2) {
      const int wide = vectors_of(block) - v < 2 ? 1 : 2;
      multiply_strips(top, bottom, weights + v * kWidth, wide, parts, Ahead{});
      const float* by = correction + v * kWidth;
      float* cell = mean + d * kLanes + v * kWidth;
      add_tile<0>(factor, by, D - d, cell);
      if (wide == 2) add_tile<1>(factor, by + kTile, D - d, cell + kTile);
      if (bottom.count > 0) add_tile<2>(factor, by, D - d - kTile, cell + kTile * kLanes);
      if (bottom.count > 0 && wide == 2) add_tile<3>(factor, by + kTile, D - d - kTile, cell + kTile * kLanes + kTile);
    }
  }
}

void add_mean_in_tiles(const Block& block, const Workspace& w, int64_t count, const float* correction, float* mean) {
  const int64_t words = whole_tiles((count + 1) / 2);
  turn_rows(block, w, count, words, w.widened);
  pair_weights(block, w, count, words);
  add_turned(block, w.widened, words, w.tile, Parts{}, 1.0f, correction, mean);
}

bool tiles_are_right() {
  constexpr int64_t kCount = 2 * kTile, kT = 2 * kTile;  // small whole numbers: every sum is exact
  static_assert(kLanes >= 2 * kTile);
  const auto left = [](int64_t r, int64_t t, int64_t half) { return static_cast<float>((r + 3 * t + half) % 7 - 3); };
  const auto right = [](int64_t t, int64_t c, int64_t half) { return static_cast<float>((t + 5 * c + half) % 5 - 2); };
  alignas(64) float a[kCount][kT], b[kT][kLanes] = {}, out[kCount][kLanes];
  const float* rows[kCount];
  for (int64_t t = 0; t < kT; ++t) {
    for (int64_t i = 0; i < kCount; ++i) {
      rows[i] = a[i];
      a[i][t] = float_of(static_cast<uint32_t>(to_bfloat16(left(i, t, 1))) << 16 | to_bfloat16(left(i, t, 0)));
      b[t][i] = float_of(static_cast<uint32_t>(to_bfloat16(right(t, i, 1))) << 16 | to_bfloat16(right(t, i, 0)));
    }
  }
  multiply_in_tiles(rows, kCount, &b[0][0], kT, 2, &out[0][0], Ahead{});
  for (int64_t r = 0; r < kCount; ++r) {
    for (int64_t c = 0; c < 2 * kTile; ++c) {
      float want = 0.0f;
      for (int64_t t = 0; t < 2 * kT; ++t) want += left(r, t / 2, t % 2) * right(t / 2, c, t % 2);
      if (out[r][c] != want) return false;
    }
  }
  return true;
}

}  // namespace negmine::cpu::NEGMINE_SIMD
#endif
