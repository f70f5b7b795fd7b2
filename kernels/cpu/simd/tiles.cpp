// The two products of the kernels with AMX tiles: 2 by 2 accumulators, two tiles of the left operand and two of the
// right operand, so that there is one load for each product. Operands in parts use the same accumulators.
//
// For scores, the rows of the queue are the left operand, read in place, and the block's queries in pairs, as for
// AVX512-BF16, are the right operand. For the mean, which contracts over the queue, the rows are transposed.
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

// Pairs of halves of words, one of a and one of b, of each quarter's lower half, or its upper half.
NEGMINE_INLINE V low_pairs(V a, V b) { return (V)_mm512_maskz_unpacklo_epi16(-1, (__m512i)a, (__m512i)b); }
NEGMINE_INLINE V high_pairs(V a, V b) { return (V)_mm512_maskz_unpackhi_epi16(-1, (__m512i)a, (__m512i)b); }

// Tiles 4 and 5 = 16 words of rows [0, 16) and [16, 32); 5 only if kTall is 2.
template <int kTall>
NEGMINE_INLINE void load_left(const char* words, int64_t stride) {
  load_tile<4>(words, stride);
  if constexpr (kTall == 2) load_tile<5>(words + kTile * stride, stride);
}

// Tiles 0..3 += those rows times 16 words of columns [0, 16) and [16, 32); the latter only if kWide is 2.
template <int kTall, int kWide>
NEGMINE_INLINE void add_products(const float* columns) {
  constexpr int64_t kStride = kTilePanel * sizeof(float);
  load_tile<6>(columns, kStride);
  product<0, 4, 6>();
  if constexpr (kTall == 2) product<2, 5, 6>();
  if constexpr (kWide == 2) {
    load_tile<7>(columns + kTile, kStride);
    product<1, 4, 7>();
    if constexpr (kTall == 2) product<3, 5, 7>();
  }
}

// Bytes [from, to) of each row ahead, as far as it goes.
NEGMINE_INLINE void fetch(const Ahead& ahead, int64_t from, int64_t to) {
  for (int64_t at = from; at < to && at < ahead.bytes; at += 64) {
    const char* next = ahead.first + at;
#pragma GCC unroll 4
    for (int64_t r = 0; r < ahead.rows; ++r, next += ahead.stride) __builtin_prefetch(next, 0, 2);
  }
}

// Tiles 0..3 = rows [0, 16) and [16, 32) of left x columns [0, 16) and [16, 32) of right; the second rows only where
// kTall is 2, the second columns only where kWide is 2. Rows ahead are fetched meanwhile, a few lines at each step.
template <int kTall, int kWide>
NEGMINE_INLINE void multiply_strip(const Operand& left, const float* right, int64_t T, const Ahead& ahead) {
  const int64_t per_step = ahead.bytes > T * 4 ? 8 : 4;  // bytes of a row ahead to a word of T
  for (int64_t t = 0; t < T; t += kTile) {
    fetch(ahead, t * per_step, (t + kTile) * per_step);
    load_left<kTall>(left.first + t * 4, left.stride);
    add_products<kTall, kWide>(right + t * kTilePanel);
  }
}

// The same for operands in parts, or in one. Apart from the loop above, which then keeps what it needs in registers.
template <int kTall, int kWide>
__attribute__((noinline)) void multiply_parts(const Operand& left, const float* right, int64_t T, const Parts& parts,
                                              const Ahead& ahead) {
  const int64_t per_step = ahead.bytes > T * 4 ? 8 : 4;
  for (int pass = 0; pass < 2; ++pass) {  // the products of the first parts last: the others are small
    for (int64_t t = 0; t < T; t += kTile) {
      if (pass == 0) fetch(ahead, t * per_step, (t + kTile) * per_step);
      for (int i = pass == 0 ? parts.left - 1 : 0; i >= 0; --i) {
        const int last = pass == 1 ? 0 : parts.right - 1 < 2 - i ? parts.right - 1 : 2 - i;
        const int first = pass == 0 && i == 0 ? 1 : 0;
        if (last < first) continue;
        load_left<kTall>(left.first + (i * T + t) * 4, left.stride);
        for (int j = last; j >= first; --j) add_products<kTall, kWide>(right + (j * T + t) * kTilePanel);
      }
    }
  }
}

// 32 rows, or 16 where kTall is 1, by 32 columns, or 16 where kWide is 1, into out (32, kLanes).
template <int kTall, int kWide>
NEGMINE_INLINE void multiply_strip_into(const Operand& left, const float* right, int64_t T, float* out,
                                        const Ahead& ahead, const Parts& parts) {
  constexpr int64_t kStride = kLanes * sizeof(float);
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  if (parts.left == 1 && parts.right == 1) {
    multiply_strip<kTall, kWide>(left, right, T, ahead);
  } else {
    multiply_parts<kTall, kWide>(left, right, T, parts, ahead);
  }
  store_tile<0>(out, kStride);
  if constexpr (kWide == 2) store_tile<1>(out + kTile, kStride);
  if constexpr (kTall == 2) store_tile<2>(out + kTile * kLanes, kStride);
  if constexpr (kTall == 2 && kWide == 2) store_tile<3>(out + kTile * kLanes + kTile, kStride);
}

// 32 columns of out (rows, kLanes), or 16 where kWide is 1. A function of its own: its arguments fill the registers.
template <int kWide>
__attribute__((noinline)) void multiply_columns(const Operand& left, int64_t rows, const float* right, int64_t T,
                                                float* out, const Ahead& ahead, const Parts& parts) {
  for (int64_t row = 0; row < rows; row += 2 * kTile) {
    const Operand strip{left.first + row * left.stride, left.stride};
    const Ahead some = part_of(ahead, row, 2 * kTile);
    rows - row > kTile ? multiply_strip_into<2, kWide>(strip, right, T, out + row * kLanes, some, parts)
                       : multiply_strip_into<1, kWide>(strip, right, T, out + row * kLanes, some, parts);
  }
}

template <int kWide>
NEGMINE_INLINE void add_packed_columns(const Operand& turned, int64_t from, int64_t to, const float* weights,
                                       float* mean) {
  constexpr int64_t kStride = kLanes * sizeof(float);
  float* below = mean + kTile * kLanes;
  load_tile<0>(mean, kStride);
  load_tile<2>(below, kStride);
  if constexpr (kWide == 2) load_tile<1>(mean + kTile, kStride);
  if constexpr (kWide == 2) load_tile<3>(below + kTile, kStride);
  for (int64_t t = from; t < to; t += kTile) {
    load_left<2>(turned.first + t * 4, turned.stride);
    add_products<2, kWide>(weights + t * kTilePanel);
  }
  store_tile<0>(mean, kStride);
  store_tile<2>(below, kStride);
  if constexpr (kWide == 2) store_tile<1>(mean + kTile, kStride);
  if constexpr (kWide == 2) store_tile<3>(below + kTile, kStride);
}

}  // namespace

void multiply_in_tiles(const Operand& left, int64_t rows, const float* right, int64_t T, int vectors, float* out,
                       const Ahead& ahead, const Parts& parts) {
  for (int v = 0; v < vectors; v += 2) {
    const float* panel = right + panel_at(v * kTile, parts.right * T);
    const Ahead some = v == 0 ? ahead : Ahead{};
    v + 1 < vectors ? multiply_columns<2>(left, rows, panel, T, out + v * kTile, some, parts)
                    : multiply_columns<1>(left, rows, panel, T, out + v * kTile, some, parts);
  }
}

void add_turned(const Block& block, const float* turned, int64_t words, const float* weights, const Parts& parts,
                float factor, const float* correction, float* mean) {
  const int64_t row = parts.left * words, vectors = vectors_of(block);
  alignas(64) float sums[2 * kTile][kLanes];
  for (int64_t d = 0; d < block.D; d += 2 * kTile) {
    const Operand left{reinterpret_cast<const char*>(turned + d * row), row * 4};
    multiply_in_tiles(left, 2 * kTile, weights, words, static_cast<int>(vectors), &sums[0][0], Ahead{}, parts);
    for (int64_t r = 0; r < 2 * kTile; ++r) {
      for (int64_t lane = 0; lane < vectors * kWidth; lane += kWidth) {
        float* cell = mean + (d + r) * kLanes + lane;
        store(cell, fma(load(cell), load(correction + lane), load(&sums[r][lane]) * factor));
      }
    }
  }
}

void place_pairs(const Block& block, const Workspace& w, Chunk& chunk) {
  const Matrix& keys = block.negative_keys;
  const int64_t D = block.D, count = chunk.count, row = keys.row_stride * 2;
  if (count == 0) return;
  const auto at = [&](int64_t j) { return static_cast<const char*>(keys.data) + w.index[j] * row; };
  const bool whole = D % 32 == 0 && count % 32 == 0 && w.index[count - 1] - w.index[0] + 1 == count;
  chunk.left = whole ? at(0) : reinterpret_cast<const char*>(w.padded);
  chunk.stride = whole ? row : room_for_mean(D) * 2;
  for (int64_t j = 0; !whole && j < (count + 31) / 32 * 32; ++j) {
    char* out = reinterpret_cast<char*>(w.padded) + j * chunk.stride;
    const int64_t bytes = j < count ? 2 * D : 0;
    if (bytes != 0) std::memcpy(out, at(j), static_cast<size_t>(bytes));
    std::memset(out + bytes, 0, static_cast<size_t>(chunk.stride - bytes));
  }
}

void turn_pairs(const Block& block, const Workspace& w, const Chunk& chunk) {
  const int64_t words = room_for_part(chunk.count);
  for (int64_t t = 0; t < words; t += kTile) {
    for (int64_t d = 0; d < block.D; d += 2 * kTile) {
      V low[kTile], high[kTile];  // (16 pairs of rows, 16 of D)
      for (int64_t i = 0; i < kTile; ++i) {
        const char* row = chunk.left + 2 * (t + i) * chunk.stride + 2 * d;
        const V first = load(reinterpret_cast<const float*>(row));
        const V second = load(reinterpret_cast<const float*>(row + chunk.stride));
        low[i] = low_pairs(first, second);  // of every 8 of D the first 4
        high[i] = high_pairs(first, second);
      }
      transpose(low);
      transpose(high);
      for (int64_t i = 0; i < kTile; ++i) {
        float* out = w.turned + (d + i / 4 * 8 + i % 4) * words + t;
        store(out, low[i]);
        store(out + 4 * words, high[i]);
      }
    }
  }
}

void pack_rows(const Block& block, const float* weights, int64_t count, float* pairs) {
  for (int64_t lane = 0; lane < vectors_of(block) * kWidth; lane += kWidth) {
    float* out = pairs + panel_at(lane, room_for_part(count));
    for (int64_t j = 0; j < (count + 31) / 32 * 32; j += 2) {
      const V first = j < count ? load(weights + j * kLanes + lane) : all(0.0f);
      const V second = j + 1 < count ? load(weights + (j + 1) * kLanes + lane) : all(0.0f);
      store(out + j / 2 * kTilePanel, pack_weights(first, second));
    }
  }
}

void scale_mean(const Block& block, const float* correction, float* mean) {
  for (int64_t lane = 0; lane < vectors_of(block) * kWidth; lane += kWidth) {
    const V by = load(correction + lane);
    for (int64_t d = 0; d < block.D; ++d) store(mean + d * kLanes + lane, load(mean + d * kLanes + lane) * by);
  }
}

void add_packed(const Block& block, const Workspace& w, const Chunk& chunk, int64_t from, int64_t to,
                const float* weights, float* mean) {
  const int64_t words = room_for_part(chunk.count);
  for (int64_t d = 0; d < block.D; d += 2 * kTile) {
    const Operand turned{reinterpret_cast<const char*>(w.turned + d * words), words * 4};
    for (int v = 0; v < vectors_of(block); v += 2) {
      const float* panel = weights + panel_at(v * kTile, words);
      float* rows = mean + d * kLanes + v * kTile;  // (32, kLanes)
      v + 1 < vectors_of(block) ? add_packed_columns<2>(turned, from, to, panel, rows)
                                : add_packed_columns<1>(turned, from, to, panel, rows);
    }
  }
}

bool tiles_are_right() {
  constexpr int64_t kCount = 2 * kTile, kT = 2 * kTile;  // small whole numbers: every sum is exact
  static_assert(kLanes >= 2 * kTile);
  const auto left = [](int64_t r, int64_t t, int64_t half) { return static_cast<float>((r + 3 * t + half) % 7 - 3); };
  const auto right = [](int64_t t, int64_t c, int64_t half) { return static_cast<float>((t + 5 * c + half) % 5 - 2); };
  alignas(64) float a[kCount][kT], b[kT][kTilePanel] = {}, out[kCount][kLanes];
  for (int64_t t = 0; t < kT; ++t) {
    for (int64_t i = 0; i < kCount; ++i) {
      a[i][t] = float_of(static_cast<uint32_t>(to_bfloat16(left(i, t, 1))) << 16 | to_bfloat16(left(i, t, 0)));
      b[t][i] = float_of(static_cast<uint32_t>(to_bfloat16(right(t, i, 1))) << 16 | to_bfloat16(right(t, i, 0)));
    }
  }
  const Tiles tiles;
  const Operand rows{reinterpret_cast<const char*>(a), sizeof a[0]};
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
