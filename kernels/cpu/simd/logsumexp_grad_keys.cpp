// Rows of the gradient of log-sum-exp with respect to the keys: out_k += sum_b weight_b exp(x_bk - lse_b) q_b, where
// x_bk = scale s_bk + bias_k.
//
// The scores' tile, once its scores are probabilities, is itself the left operand of a product with the block's
// queries, so the second product is the same multiply() with lanes as the contraction and d across the vector, or with
// AMX its parts.
// softplus_sum_grad_keys is the same with sigmoid(x_bk - lse_b), where lse_b = -offset. The gradient of the bias is the
// sum of the tile's weights over the queries.
#include "kernels/cpu/simd/parts.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

// panel (D / kPanel, lanes, kPanel): the queries as right operand. A query that does not contribute is replaced by
// zeros. So is a query that is not finite, because 0 times it, for a hidden pair, would not be 0; lost[lane] marks it.
void pack_queries(const Block& block, const Workspace& w, const float* lse, const float* weight, float* panel,
                  bool* lost) {
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    const bool silent = weight[lane] == 0.0f || lse[lane] == -__builtin_inff();
    const float* q = silent ? w.zeros : widen_row(block.query, block.first_query + lane, block.D, w.row);
    float range = 0.0f;
    for (int64_t d = 0; d < block.D; ++d) range += q[d] - q[d];  // NaN where one is not finite
    lost[lane] = range != 0.0f;
    if (lost[lane]) q = w.zeros;
    for (int64_t d0 = 0; d0 < block.D; d0 += kPanel) {
      float* out = panel + d0 * block.lanes + lane * kPanel;
      for (int64_t d = 0; d < kPanel; ++d) out[d] = d0 + d < block.D ? q[d0 + d] : 0.0f;
    }
  }
}

// Replaces the scores of the chunk by weight times the derivative, 0 outside the pool and for queries that do not
// contribute.
template <bool kSigmoid>
void weigh(const Block& block, const Workspace& w, int64_t count, float scale, const float* bias, const float* lse,
           const float* weight) {
  const int vectors = vectors_of(block);
  for (int v = 0; v < vectors; ++v) {
    const V shift = load(lse + v * kWidth), factor = load(weight + v * kWidth);
    const VI silent = (factor == 0.0f) | (shift == -__builtin_inff());
    for (int64_t j = 0; j < count; ++j) {
      float* cell = w.tile + j * kLanes + v * kWidth;
      const V score = load(cell);
      const V x = fma(score, all(scale), all(bias[j]) - shift);
      const V g = factor * (kSigmoid ? logistic(x).sigmoid : exp(x));
      store(cell, (is_excluded(score) | silent) ? all(0.0f) : g);
    }
  }
}

// A query that is not finite makes the rows to which it contributes NaN.
void mark_lost(const Block& block, const Workspace& w, int64_t count, const bool* lost) {
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    for (int64_t j = 0; j < count && lost[lane]; ++j) {
      float* cell = w.tile + j * kLanes + lane;
      if (*cell != 0.0f) *cell = __builtin_nanf("");
    }
  }
}

// Of the queries of a block, 0 past its lanes.
struct Lanes {
  Lanes(const Block& block, const float* of_lse, const float* of_weight) {
    for (int64_t lane = 0; lane < block.lanes; ++lane) {
      lse[lane] = of_lse[block.first_query + lane];
      weight[lane] = of_weight[block.first_query + lane];
    }
  }

  float lse[kLanes] = {}, weight[kLanes] = {};
};

// add(count) with the weights of each chunk of the block's range in the place of its scores, after begin_block.
template <bool kSigmoid, class Add>
void for_weights(const Block& block, const Workspace& w, float scale, const Lanes& lanes, const Add& add) {
  for (int64_t k = block.k_begin; k < block.k_end;) {
    const Chunk chunk = load_chunk(block, w, &k, true);
    score_chunk(block, w, chunk);
    apply_masks(block, w, chunk, 0, chunk.count);
    if (block.pool.bounded()) apply_bounds(block, w, chunk.count);
    float biases[kChunk] = {};
    bias_of(block, w, chunk, biases);
    weigh<kSigmoid>(block, w, chunk.count, scale, biases, lanes.lse, lanes.weight);
    add(chunk.count);
  }
}

template <bool kSigmoid>
void grad_keys_range(const Block& block, const Workspace& w, float scale, const float* lse, const float* weight,
                     float* panel, float* out) {
  const Tiles tiles;
  begin_block(block, w);
  const Lanes lanes(block, lse, weight);
  bool lost[kLanes] = {}, some_are_lost = false;
  pack_queries(block, w, lanes.lse, lanes.weight, panel, lost);
  for (const bool one : lost) some_are_lost |= one;
#if defined(NEGMINE_TILES)
  float* split = panel + block.lanes * ((block.D + kPanel - 1) / kPanel * kPanel);
  const bool in_parts = split_panel(block, panel, split);
#endif
  float product[kRows * kLanes];  // (6, kLanes)
  for_weights<kSigmoid>(block, w, scale, lanes, [&](int64_t count) {
    if (some_are_lost) mark_lost(block, w, count, lost);
    int64_t rest[kChunk], left = count;  // rows of the chunk
    for (int64_t j = 0; j < count; ++j) rest[j] = j;
#if defined(NEGMINE_TILES)
    if (in_parts) left = add_rows_in_parts(block, w, count, split, out, rest);
#endif
    for (int64_t j0 = 0; j0 < left; j0 += kRows) {
      const int64_t rows = left - j0 < kRows ? left - j0 : kRows;
      const float* g[kRows];  // (6, lanes)
      for (int64_t r = 0; r < kRows; ++r) g[r] = r < rows ? w.tile + rest[j0 + r] * kLanes : w.zeros;
      for (int64_t d0 = 0; d0 < block.D; d0 += kPanel) {
        multiply(g, kRows, panel + d0 * block.lanes, block.lanes, kVectors, false, product, Ahead{});
        const int64_t width = block.D - d0 < kPanel ? block.D - d0 : kPanel;
        for (int64_t r = 0; r < rows; ++r) {
          float* row = out + w.index[rest[j0 + r]] * block.D + d0;
          for (int64_t d = 0; d < width; ++d) row[d] += product[r * kLanes + d];
        }
      }
    }
  });
}

template <bool kSigmoid>
void grad_bias_range(const Block& block, const Workspace& w, float scale, const float* lse, const float* weight,
                     float* out) {
  const Tiles tiles;
  begin_block(block, w);
  const Lanes lanes(block, lse, weight);
  for_weights<kSigmoid>(block, w, scale, lanes, [&](int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      V total = all(0.0f);
      for (int v = 0; v < vectors_of(block); ++v) total += load(w.tile + j * kLanes + v * kWidth);
      out[w.index[j]] += sum(total);
    }
  });
}

}  // namespace

void logsumexp_grad_keys_range(const Block& block, const Workspace& w, float scale, const float* lse,
                               const float* weight, float* panel, float* out) {
  grad_keys_range<false>(block, w, scale, lse, weight, panel, out);
}

void softplus_sum_grad_keys_range(const Block& block, const Workspace& w, float scale, const float* lse,
                                  const float* weight, float* panel, float* out) {
  grad_keys_range<true>(block, w, scale, lse, weight, panel, out);
}

void logsumexp_grad_bias_range(const Block& block, const Workspace& w, float scale, const float* lse,
                               const float* weight, float* out) {
  grad_bias_range<false>(block, w, scale, lse, weight, out);
}

void softplus_sum_grad_bias_range(const Block& block, const Workspace& w, float scale, const float* lse,
                                  const float* weight, float* out) {
  grad_bias_range<true>(block, w, scale, lse, weight, out);
}

}  // namespace negmine::cpu::NEGMINE_SIMD
