// The CPU kernels that walk one query's own vectors as torch operators: synthetic negatives, and columns by name.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "csrc/torch/cpu_params.h"
#include "kernels/cpu/listed_grad_keys.h"
#include "kernels/cpu/listed_logsumexp.h"
#include "kernels/cpu/mix_logsumexp.h"
#include "kernels/cpu/mix_negatives.h"

namespace negmine {
namespace {

using checks::floats;
using checks::longs;
using checks::new_empty;
using checks::OptionalTensor;
using checks::ScalarType;
using checks::Tensor;

#define DRAW_ARGUMENTS                                                                                       \
  int64_t pairs, int64_t with_query, double pair_low, double pair_high, double query_low, double query_high, \
      bool distinct, const OptionalTensor &quantiles, int64_t seed, int64_t step, int64_t row_offset
#define DRAWS pairs, with_query, pair_low, pair_high, query_low, query_high, distinct, quantiles, seed, step, row_offset

// query (B, D), negative_keys (K, D) and the draws of one call, checked: the parents index the queue.
struct Mixed {
  Tensor query, negative_keys, hard_index;
  OptionalTensor quantile_table;
  int64_t B, D;
  cpu::Draws draws;

  Mixed(const char* op, const Tensor& q, const Tensor& keys, const Tensor& hard, DRAW_ARGUMENTS)
      : query(checks::matrix(op, "query", q, "(B, D)")),
        negative_keys(checks::matrix(op, "negative_keys", keys, "(K, D)")),
        hard_index(checks::index_matrix(op, "hard_index", hard, query.size(0), query)),
        quantile_table(checks::vector(op, "quantiles", quantiles, ScalarType::Float, 4097, query)),
        B(query.size(0)),
        D(query.size(1)) {
    checks::same_width(op, query, negative_keys);
    checks::require(pairs >= 0 && with_query >= 0, op, ": pairs and with_query must not be negative, got ", pairs,
                    " and ", with_query, ".");
    draws = {longs(hard_index),
             hard_index.size(1),
             pairs,
             with_query,
             pair_low,
             pair_high,
             query_low,
             query_high,
             distinct,
             floats(quantile_table),
             static_cast<uint32_t>(seed),
             static_cast<uint32_t>(step),
             row_offset};
    const int64_t K = negative_keys.size(0);
    for (int64_t b = 0; b < B; ++b) {
      const int64_t n_b = cpu::count_hard(draws, b);
      for (int64_t n = 0; n < n_b; ++n) {
        const int64_t row = draws.hard_index[b * draws.N + n];
        checks::require(row >= 0 && row < K, op, ": hard_index must hold rows of negative_keys in [0, ", K,
                        "), then -1 to the end, got ", row, " at (", b, ", ", n, ").");
      }
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> mix_negatives(const Tensor& query, const Tensor& negative_keys,
                                                 const Tensor& hard_index, DRAW_ARGUMENTS) {
  // Checks.
  const Mixed in("mix_negatives", query, negative_keys, hard_index, DRAWS);
  // Outputs.
  const int64_t S = in.draws.S();
  Tensor vectors = new_empty(query, {in.B, S, in.D});
  Tensor parents = new_empty(query, {in.B, S, 2}, ScalarType::Long);
  Tensor coefficients = new_empty(query, {in.B, S}, ScalarType::Float);
  // Params.
  const cpu::MixNegativesParams p{
      matrix_of(in.query),      matrix_of(in.negative_keys), in.B, in.D, in.draws, vectors.mutable_data_ptr(),
      output<int64_t>(parents), output<float>(coefficients)};
  // Run.
  cpu::mix_negatives(p, torch_threads());
  return {vectors, parents, coefficients};
}

std::tuple<Tensor, Tensor> mix_logsumexp(const Tensor& query, const Tensor& negative_keys, const Tensor& hard_index,
                                         const Tensor& scale, bool want_mean, DRAW_ARGUMENTS) {
  // Checks.
  const Mixed in("mix_logsumexp", query, negative_keys, hard_index, DRAWS);
  const Tensor factor = checks::scalar("mix_logsumexp", "scale", scale, query);
  // Outputs.
  Tensor lse = new_empty(query, {in.B}, ScalarType::Float);
  Tensor mean = new_empty(query, {want_mean ? in.B : 0, in.D}, ScalarType::Float);
  // Params.
  const cpu::MixLogsumexpParams p{matrix_of(in.query),
                                  matrix_of(in.negative_keys),
                                  in.B,
                                  in.D,
                                  in.draws,
                                  floats(factor),
                                  output<float>(lse),
                                  want_mean ? output<float>(mean) : nullptr};
  // Run.
  cpu::mix_logsumexp(p, torch_threads());
  return {lse, mean};
}

// A list of columns, each a row of the keys or -1.
void require_rows(const char* op, const Tensor& index, int64_t K) {
  const int64_t M = index.size(1), *row = longs(index);
  for (int64_t i = 0; i < index.numel(); ++i) {
    checks::require(row[i] >= -1 && row[i] < K, op, ": index must hold rows in [0, ", K, "), or -1, got ", row[i],
                    " at (", i / M, ", ", i % M, ").");
  }
}

std::tuple<Tensor, Tensor, Tensor> listed_logsumexp(const Tensor& query, const Tensor& negative_keys,
                                                    const Tensor& index, const Tensor& scale, bool want_mean) {
  // Checks.
  const char* op = "listed_logsumexp";
  const Tensor q = checks::matrix(op, "query", query, "(B, D)");
  const Tensor keys = checks::matrix(op, "negative_keys", negative_keys, "(K, D)");
  checks::same_width(op, q, keys);
  const int64_t B = q.size(0), D = q.size(1);
  const Tensor listed = checks::index_matrix(op, "index", index, B, q);
  require_rows(op, listed, keys.size(0));
  const Tensor factor = checks::scalar(op, "scale", scale, q);
  // Outputs.
  const int64_t M = listed.size(1);
  Tensor scores = new_empty(q, {B, M}, ScalarType::Float);
  Tensor lse = new_empty(q, {B}, ScalarType::Float);
  Tensor mean = new_empty(q, {want_mean ? B : 0, D}, ScalarType::Float);
  // Params.
  const cpu::ListedLogsumexpParams p{matrix_of(q),
                                     matrix_of(keys),
                                     B,
                                     D,
                                     M,
                                     longs(listed),
                                     floats(factor),
                                     output<float>(scores),
                                     output<float>(lse),
                                     want_mean ? output<float>(mean) : nullptr};
  // Run.
  cpu::listed_logsumexp(p, torch_threads());
  return {scores, lse, mean};
}

Tensor listed_grad_keys(const Tensor& query, const Tensor& index, const Tensor& weight, int64_t K) {
  // Checks.
  const char* op = "listed_grad_keys";
  const Tensor q = checks::matrix(op, "query", query, "(B, D)");
  const int64_t B = q.size(0), D = q.size(1);
  checks::require(K >= 0, op, ": K must not be negative, got ", K, ".");
  const Tensor listed = checks::index_matrix(op, "index", index, B, q);
  require_rows(op, listed, K);
  const int64_t M = listed.size(1);
  checks::require(weight.dim() == 2 && weight.size(0) == B && weight.size(1) == M, op,
                  ": weight must have the shape of index, got ", checks::shape_text(weight), ".");
  const Tensor weights = torch::stable::reshape(weight, {B * M});
  const Tensor flat = checks::vector(op, "weight", weights, ScalarType::Float, B * M, q);
  // Outputs.
  Tensor grad_keys = new_empty(q, {K, D}, ScalarType::Float);
  // Params.
  const cpu::ListedGradKeysParams p{matrix_of(q), B, K, D, M, longs(listed), floats(flat), output<float>(grad_keys)};
  // Run.
  cpu::listed_grad_keys(p, torch_threads());
  return grad_keys;
}

STABLE_TORCH_LIBRARY_IMPL(negmine, CPU, m) {
  m.impl("mix_negatives", TORCH_BOX(&mix_negatives));
  m.impl("mix_logsumexp", TORCH_BOX(&mix_logsumexp));
  m.impl("listed_logsumexp", TORCH_BOX(&listed_logsumexp));
  m.impl("listed_grad_keys", TORCH_BOX(&listed_grad_keys));
}

}  // namespace
}  // namespace negmine
