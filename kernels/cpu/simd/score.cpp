// Scores of a chunk of the queue against a block of queries: a register tile of 6 rows by kPanel queries, sequential
// over d.
//
// The rows are read where they lie (fp32) or widened once per chunk (bf16, fp16); the queries are transposed once per
// block.
#include "kernels/cpu/simd/score.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

constexpr int64_t kChain =
    256;  // longest chain of fused multiply-adds; also keeps a panel of b in the first-level cache

// out (6, kVec * kWidth) [+]= a (6, [t0, t1)) x b ([t0, t1), kPanel)
template <int kVec>
NEGMINE_INLINE void multiply_tile(const float* const* a, const float* b, int64_t t0, int64_t t1, float* out) {
  V acc[kRows][kVec];  // (6, kVec * kWidth)
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVec; ++v) acc[r][v] = all(0.0f);
  }
  const float* row[kRows] = {a[0], a[1], a[2], a[3], a[4], a[5]};
  for (int64_t t = t0; t < t1; ++t) {
    V column[kVec];  // (kVec * kWidth)
    for (int v = 0; v < kVec; ++v) column[v] = load(b + t * kPanel + v * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const V x = all(row[r][t]);  // one broadcast at a time: 24 accumulators leave few registers
      for (int v = 0; v < kVec; ++v) acc[r][v] = fma(x, column[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVec; ++v) {
      float* cell = out + r * kLanes + v * kWidth;
      store(cell, t0 == 0 ? acc[r][v] : load(cell) + acc[r][v]);
    }
  }
}

template <int kVec>
void multiply_panel(const float* const* a, int64_t rows, const float* b, int64_t T, float* out) {
  int64_t t0 = 0;
  do {
    const int64_t t1 = T - t0 > kChain ? t0 + kChain : T;
    for (int64_t row = 0; row < rows; row += kRows) multiply_tile<kVec>(a + row, b, t0, t1, out + row * kLanes);
    t0 = t1;
  } while (t0 < T);
}

}  // namespace

__attribute__((noinline)) void multiply(const float* const* a, int64_t rows, const float* b, int64_t T, int vectors,
                                        float* out) {
  for (; vectors > 0; vectors -= kVectors, b += T * kPanel, out += kPanel) {
    switch (vectors) {
      case 1:
        multiply_panel<1>(a, rows, b, T, out);
        break;
#if defined(__AVX512F__)
      case 2:
        multiply_panel<2>(a, rows, b, T, out);
        break;
      case 3:
        multiply_panel<3>(a, rows, b, T, out);
        break;
#endif
      default:
        multiply_panel<kVectors>(a, rows, b, T, out);
    }
  }
}

void begin_block(const Block& block, const Workspace& w) {
  const int64_t D = block.D, padded = static_cast<int64_t>(vectors_of(block)) * kWidth;
  for (int64_t d = 0; d < (D > kLanes ? D : kLanes); ++d) w.zeros[d] = 0.0f;
  for (int64_t lane = 0; lane < padded; ++lane) {
    float* out = w.q_t + (lane / kPanel) * D * kPanel + lane % kPanel;
    const float* q = lane < block.lanes ? widen_row(block.query, block.first_query + lane, D, w.row) : w.zeros;
    for (int64_t d = 0; d < D; ++d) out[d * kPanel] = q[d];
  }
  begin_pool(block, w);
}

int64_t load_chunk(const Block& block, const Workspace& w, int64_t* k, bool widen) {
  const int64_t most = chunk_rows(block.D);
  const uint8_t* mask = block.pool.mask_per_query ? nullptr : block.pool.negative_mask;
  int64_t count = 0;
  for (; *k < block.k_end && count < most; ++*k) {
    if (mask != nullptr && mask[*k] == 0) continue;
    w.index[count] = *k;
    if (widen) w.rows[count] = widen_row(block.negative_keys, *k, block.D, w.widened + count * block.D);
    ++count;
  }
  for (int64_t row = count; row < count + kRows; ++row) w.rows[row] = w.zeros;
  return count;
}

}  // namespace negmine::cpu::NEGMINE_SIMD
