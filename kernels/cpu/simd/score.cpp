// Scores of a chunk of the queue and a block of queries. A tile of 6 or 12 rows by kPanel queries is kept in registers,
// in a loop over d.
//
// Rows of fp32 are read in place; rows of bf16 and fp16 are widened once per chunk. Queries are transposed once per
// block. With AMX, both are multiplied in tiles (tiles.h, parts.h) if that is as accurate.
#include "kernels/cpu/simd/score.h"

#include "kernels/cpu/simd/parts.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

constexpr int64_t kChain = 256;  // longest chain of fused multiply-adds, for which a panel of b fits into the cache

constexpr int64_t kLine = 16;  // words of a cache line

// Prefetches the cache line that begins with word `line`, of each row ahead.
NEGMINE_INLINE void prefetch_line(const Ahead& ahead, int64_t line) {
  if (line * 4 >= ahead.bytes) return;
  const char* next = ahead.first + line * 4;
  for (int64_t r = 0; r < ahead.rows; ++r, next += ahead.stride) __builtin_prefetch(next, 0, 2);
}

// out (kTall, kVec * kWidth) [+]= a (kTall, [t0, t1)) x b ([t0, t1), kPanel). With each cache line of the rows of a,
// one line of the rows ahead is prefetched. If they were prefetched all at once between chunks, the processor would
// wait for memory instead of multiplying.
template <int kTall, int kVec, bool kPairs>
NEGMINE_INLINE void multiply_tile(const float* const* a, const float* b, int64_t t0, int64_t t1, float* out,
                                  const Ahead& ahead) {
  V acc[kTall][kVec];  // (kTall, kVec * kWidth)
  const float* row[kTall];
  for (int r = 0; r < kTall; ++r) {
    for (int v = 0; v < kVec; ++v) acc[r][v] = all(0.0f);
    row[r] = a[r];
  }
  for (int64_t line = t0; line < t1; line += kLine) {
    const int64_t end = t1 - line < kLine ? t1 : line + kLine;
    prefetch_line(ahead, line);
    for (int64_t t = line; t < end; ++t) {
      V column[kVec];  // (kVec * kWidth)
      for (int v = 0; v < kVec; ++v) column[v] = load(b + t * kPanel + v * kWidth);
      for (int r = 0; r < kTall; ++r) {
        const V x = all(word_of(row[r], t));  // one broadcast at a time, because 24 accumulators leave few registers
        for (int v = 0; v < kVec; ++v) acc[r][v] = step<kPairs>(x, column[v], acc[r][v]);
      }
    }
  }
  for (int r = 0; r < kTall; ++r) {
    for (int v = 0; v < kVec; ++v) {
      float* cell = out + r * kLanes + v * kWidth;
      store(cell, t0 == 0 ? acc[r][v] : load(cell) + acc[r][v]);
    }
  }
}

template <int kVec, bool kPairs>
void multiply_panel(const float* const* a, int64_t rows, const float* b, int64_t T, float* out, const Ahead& ahead) {
  constexpr int64_t kSteps = kPairs ? kChain / 2 : kChain;
  constexpr int kTall = kVec == 1 ? 2 * kRows : kRows;  // with fewer chains, each would wait for its own additions
  int64_t t0 = 0;
  do {
    const int64_t t1 = T - t0 > kSteps ? t0 + kSteps : T;
    int64_t row = 0;
    for (; row + kTall <= rows; row += kTall) {
      multiply_tile<kTall, kVec, kPairs>(a + row, b, t0, t1, out + row * kLanes, part_of(ahead, row, kTall));
    }
    for (; row < rows; row += kRows) {
      multiply_tile<kRows, kVec, kPairs>(a + row, b, t0, t1, out + row * kLanes, part_of(ahead, row, kRows));
    }
    t0 = t1;
  } while (t0 < T);
}

template <bool kPairs>
NEGMINE_INLINE void multiply_panels(const float* const* a, int64_t rows, const float* b, int64_t T, int vectors,
                                    float* out, const Ahead& ahead) {
  const Ahead none;
  bool first = true;  // only the first panel prefetches
  for (; vectors > 0; vectors -= kVectors, b += T * kPanel, out += kPanel, first = false) {
    const Ahead& fetched = first ? ahead : none;
    switch (vectors) {
      case 1:
        multiply_panel<1, kPairs>(a, rows, b, T, out, fetched);
        break;
      case 2:
        multiply_panel<2, kPairs>(a, rows, b, T, out, fetched);
        break;
      case 3:
        multiply_panel<kThree, kPairs>(a, rows, b, T, out, fetched);
        break;
      default:
        multiply_panel<kVectors, kPairs>(a, rows, b, T, out, fetched);
    }
  }
}

#if defined(NEGMINE_PAIRS)
#if defined(NEGMINE_QUADS)
constexpr int64_t kTogether = 4;  // elements of a row that one product takes
#else
constexpr int64_t kTogether = 2;
#endif

// Row `row` of the queue in pairs or quads: a pointer to it, or to a copy in out (D + 3) with zeros after it.
NEGMINE_INLINE const float* pair_row(const Matrix& m, int64_t row, int64_t D, uint16_t* out) {
  const uint16_t* in = static_cast<const uint16_t*>(m.data) + row * m.row_stride;
  if (D % kTogether == 0) return reinterpret_cast<const float*>(in);
  std::memcpy(out, in, static_cast<size_t>(D) * sizeof(uint16_t));
  for (int64_t d = D; d % kTogether != 0; ++d) out[d] = 0;
  return reinterpret_cast<const float*>(out);
}

#if defined(NEGMINE_QUADS)
// out (6, kVec * kWidth) [+]= a (6, [t0, t1)) x b ([t0, t1), kPanel): products of 2 rows by 2 queries.
template <int kVec>
NEGMINE_INLINE void multiply_quads_tile(const float* const* a, const float* b, int64_t t0, int64_t t1, float* out,
                                        const Ahead& ahead) {
  constexpr int kTwoRows = kRows / 2, kTwoQueries = kVec * kWidth / 2;
  V acc[kTwoRows][kTwoQueries];  // (2, 2) each
  for (auto& row : acc) {
    for (V& cell : row) cell = all(0.0f);
  }
  for (int64_t line = t0; line < t1; line += kLine) {
    const int64_t end = t1 - line < kLine ? t1 : line + kLine;
    prefetch_line(ahead, line);
    for (int64_t t = line; t < end; t += 2) {
      V rows[kTwoRows];
      for (int r = 0; r < kTwoRows; ++r) {
        const auto half = [&](int of) { return vld1_u8(reinterpret_cast<const uint8_t*>(a[2 * r + of] + t)); };
        rows[r] = (V)vcombine_u8(half(0), half(1));
      }
      for (int q = 0; q < kTwoQueries; ++q) {
        const V queries = load(b + t * kPanel + q * kWidth);
        for (int r = 0; r < kTwoRows; ++r) acc[r][q] = fma_quads(rows[r], queries, acc[r][q]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVec; ++v) {
      const V left = acc[r / 2][2 * v], right = acc[r / 2][2 * v + 1];
      const V found =
          r % 2 == 0 ? __builtin_shuffle(left, right, VI{0, 1, 4, 5}) : __builtin_shuffle(left, right, VI{2, 3, 6, 7});
      float* cell = out + r * kLanes + v * kWidth;
      store(cell, t0 == 0 ? found : load(cell) + found);
    }
  }
}

template <int kVec>
void multiply_quads_panel(const float* const* a, int64_t rows, const float* b, int64_t T, float* out,
                          const Ahead& ahead) {
  for (int64_t t0 = 0; t0 < T; t0 += kChain / 2) {
    const int64_t t1 = T - t0 > kChain / 2 ? t0 + kChain / 2 : T;
    for (int64_t row = 0; row < rows; row += kRows) {
      multiply_quads_tile<kVec>(a + row, b, t0, t1, out + row * kLanes, part_of(ahead, row, kRows));
    }
  }
}

// multiply() of rows and queries in quads: T is even.
void multiply_quads(const float* const* a, int64_t rows, const float* b, int64_t T, int vectors, float* out,
                    const Ahead& ahead) {
  for (Ahead fetched = ahead; vectors > 0; vectors -= kVectors, b += T * kPanel, out += kPanel, fetched = {}) {
    switch (vectors) {
      case 1:
        multiply_quads_panel<1>(a, rows, b, T, out, fetched);
        break;
      case 2:
        multiply_quads_panel<2>(a, rows, b, T, out, fetched);
        break;
      case 3:
        multiply_quads_panel<3>(a, rows, b, T, out, fetched);
        break;
      default:
        multiply_quads_panel<kVectors>(a, rows, b, T, out, fetched);
    }
  }
}

// Writes the block's queries in quads, followed by zeros.
void transpose_pairs(const Block& block, const Workspace& w, int64_t padded) {
  const uint16_t* first = static_cast<const uint16_t*>(block.query.data) + block.first_query * block.query.row_stride;
  for (int64_t lane = 0; lane < padded; ++lane) {
    const uint16_t* q = first + lane * block.query.row_stride;
    const auto element = [&](int64_t d) { return lane < block.lanes && d < block.D ? uint32_t{q[d]} : 0u; };
    for (int64_t t = 0; t < pair_words_of(block.D); ++t) {
      *pair_word(block, w, lane, t) = float_of(element(2 * t + 1) << 16 | element(2 * t));
    }
  }
}
#else
// Writes the block's queries as pairs to w.q_t (T, kPanel), or in the layout of tiles; 16 by 16 words at a time.
void transpose_pairs(const Block& block, const Workspace& w, int64_t padded) {
  static_assert(kPanel == kLanes);
#if defined(NEGMINE_TILES)
  const int64_t D = block.D, T = whole_tiles((D + 1) / 2);
#else
  const int64_t D = block.D, T = pair_words_of(D);
#endif
  const char* first = static_cast<const char*>(block.query.data) + block.first_query * block.query.row_stride * 2;
  for (int64_t lane = 0; lane < padded; lane += kWidth) {
    for (int64_t t = 0; t < T; t += kWidth) {
      V x[kWidth];  // (16 queries, 16 words)
      const int64_t left = 2 * D - 4 * t, bytes = left < 0 ? 0 : left < 64 ? left : 64;
      for (int64_t i = 0; i < kWidth; ++i) {
        x[i] = all(0.0f);
        const char* from = first + (lane + i) * block.query.row_stride * 2 + 4 * t;
        if (lane + i < block.lanes) std::memcpy(&x[i], from, static_cast<size_t>(bytes));
      }
      transpose(x);
      for (int64_t i = 0; i < kWidth && t + i < T; ++i) store(pair_word(block, w, lane, t + i), x[i]);
    }
  }
}
#endif
#endif

#if defined(__AVX512F__)
// Codes (matrix.h) are multiplied four elements at a time: the bytes of the queue's rows as unsigned numbers, which are
// 128 too large, by the queries' elements as signed numbers. Each sum therefore starts at -128 times the sum of the
// query's elements.

// Adds to each word of sum the four products of unsigned bytes of a with signed bytes of b. In assembly, because gcc
// copies the accumulators in every step of the loop if its intrinsic function is used. AVX512-VNNI is not among the
// instructions that the other kernels of this instruction set need, so code_kernels() in dispatch.cpp asks for it.
NEGMINE_INLINE void add_products(VI& sum, VI a, VI b) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

// The first value of the sum of each lane, and its scale. They are stored after the block's words in w.q_t.
struct LaneCodes {
  int32_t* start;  // (kLanes)
  float* scale;    // (kLanes)
};

NEGMINE_INLINE LaneCodes lane_codes(const Block& block, const Workspace& w) {
  float* after_words = w.q_t + block.D / 4 * kPanel;
  return {reinterpret_cast<int32_t*>(after_words), after_words + kLanes};
}

// Writes the block's queries to w.q_t (D / 4, kPanel), four elements in each word, and zeros to lanes without a query.
void transpose_codes(const Block& block, const Workspace& w, int64_t padded) {
  static_assert(kPanel == kLanes);
  const LaneCodes lanes = lane_codes(block, w);
  const uint8_t* first = static_cast<const uint8_t*>(block.query.data) + block.first_query * block.query.row_stride;
  for (int64_t lane = 0; lane < padded; ++lane) {
    const uint8_t* q = first + lane * block.query.row_stride;
    int32_t total = 0;
    for (int64_t t = 0; t < block.D / 4; ++t) {
      uint32_t word = 0x80808080u;
      if (lane < block.lanes) std::memcpy(&word, q + 4 * t, sizeof word);
      word ^= 0x80808080u;
      for (int i = 0; i < 4; ++i) total += static_cast<int8_t>(word >> 8 * i & 0xFF);
      w.q_t[t * kPanel + lane] = float_of(word);
    }
    lanes.start[lane] = -128 * total;
    lanes.scale[lane] = lane < block.lanes ? block.query.scale[block.first_query + lane] : 0.0f;
  }
}

// out (kTall, kVec * kWidth) = scales of rows and lanes times a (kTall, T) x b (T, kPanel).
template <int kTall, int kVec>
NEGMINE_INLINE void multiply_codes_tile(const float* const* a, const float* b, int64_t T, const LaneCodes& lanes,
                                        const float* row_scale, float* out, const Ahead& ahead) {
  VI acc[kTall][kVec];
  for (int r = 0; r < kTall; ++r) {
    for (int v = 0; v < kVec; ++v) acc[r][v] = load(lanes.start + v * kWidth);
  }
  for (int64_t line = 0; line < T; line += kLine) {
    const int64_t end = T - line < kLine ? T : line + kLine;
    prefetch_line(ahead, line);
    for (int64_t t = line; t < end; ++t) {
      VI column[kVec];
      for (int v = 0; v < kVec; ++v) column[v] = (VI)load(b + t * kPanel + v * kWidth);
      for (int r = 0; r < kTall; ++r) {
        const VI x = (VI)all(word_of(a[r], t));
        for (int v = 0; v < kVec; ++v) add_products(acc[r][v], x, column[v]);
      }
    }
  }
  for (int r = 0; r < kTall; ++r) {
    for (int v = 0; v < kVec; ++v) {
      const V sum = (V)_mm512_maskz_cvtepi32_ps(0xFFFF, (__m512i)acc[r][v]);
      store(out + r * kLanes + v * kWidth, sum * (row_scale[r] * load(lanes.scale + v * kWidth)));
    }
  }
}

template <int kVec>
void multiply_codes_panel(const Block& block, const Workspace& w, int64_t first, int64_t count, const Ahead& ahead) {
  const LaneCodes lanes = lane_codes(block, w);
  for (int64_t row = 0; row < count; row += kRows) {
    float scale[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      scale[r] = row + r < count ? block.negative_keys.scale[w.index[row + r]] : 0.0f;
    }
    multiply_codes_tile<kRows, kVec>(w.rows + first + row, w.q_t, block.D / 4, lanes, scale, w.tile + row * kLanes,
                                     part_of(ahead, row, kRows));
  }
}

// score_rows() of codes.
void score_codes(const Block& block, const Workspace& w, int64_t first, int64_t count, const Ahead& ahead) {
  switch (vectors_of(block)) {
    case 1:
      return multiply_codes_panel<1>(block, w, first, count, ahead);
    case 2:
      return multiply_codes_panel<2>(block, w, first, count, ahead);
    case 3:
      return multiply_codes_panel<3>(block, w, first, count, ahead);
    default:
      return multiply_codes_panel<4>(block, w, first, count, ahead);
  }
}
#endif

}  // namespace

__attribute__((noinline)) void multiply(const float* const* a, int64_t rows, const float* b, int64_t T, int vectors,
                                        [[maybe_unused]] bool pairs, float* out, const Ahead& ahead) {
#if defined(NEGMINE_QUADS)
  if (pairs) return multiply_quads(a, rows, b, T, vectors, out, ahead);
#elif defined(NEGMINE_PAIRS) && !defined(NEGMINE_TILES)
  if (pairs) return multiply_panels<true>(a, rows, b, T, vectors, out, ahead);
#endif
  multiply_panels<false>(a, rows, b, T, vectors, out, ahead);
}

Ahead ahead_of(const Block& block, const Workspace& w, const Chunk& chunk) {
  if (chunk.count == 0) return {};
  const Matrix& keys = block.negative_keys;
  const int64_t element = element_bytes(keys.dtype), next = w.index[chunk.count - 1] + 1;
  const int64_t left = block.k_end - next, most = chunk_rows(block);
  return {.first = static_cast<const char*>(keys.data) + next * keys.row_stride * element,
          .rows = left < most ? left : most,
          .stride = keys.row_stride * element,
          .bytes = block.D * element};
}

void score_rows(const Block& block, const Workspace& w, [[maybe_unused]] const Chunk& chunk, int64_t first,
                int64_t count, const Ahead& ahead) {
  if (count == 0) return;
#if defined(__AVX512F__)
  if (in_codes(block)) return score_codes(block, w, first, count, ahead);
#endif
#if defined(NEGMINE_TILES)
  if (!in_pairs(block)) return score_in_parts(block, w, chunk, first, count, ahead);
  const Operand left{chunk.left + first * chunk.stride, chunk.stride};
  multiply_in_tiles(left, count, w.q_t, whole_tiles((block.D + 1) / 2), vectors_of(block), w.tile, ahead);
#else
  const bool pairs = in_pairs(block);
  multiply(w.rows + first, count, w.q_t, pairs ? pair_words_of(block.D) : block.D, vectors_of(block), pairs, w.tile,
           ahead);
#endif
}

void begin_block(const Block& block, const Workspace& w) {
  const int64_t D = block.D, padded = static_cast<int64_t>(vectors_of(block)) * kWidth;
  for (int64_t d = 0; d < (D > kLanes ? D : kLanes); ++d) w.zeros[d] = 0.0f;
#if defined(__AVX512F__)
  if (in_codes(block)) {
    transpose_codes(block, w, padded);
    return begin_pool(block, w);
  }
#endif
#if defined(NEGMINE_PAIRS)
  if (in_pairs(block)) transpose_pairs(block, w, padded);
#endif
  for (int64_t lane = 0; lane < padded && !in_pairs(block); ++lane) {
    float* out = w.q_t + (lane / kPanel) * D * kPanel + lane % kPanel;
    const float* q = lane < block.lanes ? widen_row(block.query, block.first_query + lane, D, w.row) : w.zeros;
    for (int64_t d = 0; d < D; ++d) out[d * kPanel] = q[d];
  }
#if defined(NEGMINE_TILES)
  if (!in_pairs(block)) split_queries(block, w);
#endif
  begin_pool(block, w);
}

namespace {

// Loads the rows of the queue in w.index (chunk.count) for score_rows().
void load_rows(const Block& block, const Workspace& w, Chunk& chunk) {
#if defined(NEGMINE_TILES)
  if (in_pairs(block)) return place_pairs(block, w, chunk);
#endif
  for (int64_t j = 0; j < chunk.count; ++j) {
    if (in_codes(block)) {
      const uint8_t* first = static_cast<const uint8_t*>(block.negative_keys.data);
      w.rows[j] = reinterpret_cast<const float*>(first + w.index[j] * block.negative_keys.row_stride);
      continue;
    }
#if defined(NEGMINE_PAIRS) && !defined(NEGMINE_TILES)
    if (in_pairs(block)) {
      w.rows[j] = pair_row(block.negative_keys, w.index[j], block.D, w.padded + j * (block.D + 3));
      continue;
    }
#endif
    w.rows[j] = widen_row(block.negative_keys, w.index[j], block.D, w.widened + j * block.D);
  }
  for (int64_t j = chunk.count; j < chunk.count + kRows; ++j) w.rows[j] = w.zeros;
#if defined(NEGMINE_TILES)
  split_keys(block, w, chunk);
#endif
}

}  // namespace

Chunk load_chunk(const Block& block, const Workspace& w, int64_t* k, bool rows) {
  const int64_t most = chunk_rows(block);
  const uint8_t* mask = block.pool.mask_per_query ? nullptr : block.pool.negative_mask;
  Chunk chunk;
  int64_t row = *k, count = 0;
  if (mask == nullptr) {
    const int64_t last = row + most < block.k_end ? row + most : block.k_end;
    while (row < last) w.index[count++] = row++;
  } else {
    for (; row < block.k_end && count < most; ++row) {
      if (mask[row] != 0) w.index[count++] = row;
    }
  }
  *k = row;
  chunk.count = count;
  if (rows) load_rows(block, w, chunk);
  if (block.pool.guided()) {
    Chunk guide = guide_of(chunk);
    load_rows(guide_of(block), *w.guide, guide);
    chunk.guide = guide;
  }
  return chunk;
}

}  // namespace negmine::cpu::NEGMINE_SIMD
