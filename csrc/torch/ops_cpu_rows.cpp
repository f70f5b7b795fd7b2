// The CPU kernels that read a list of vectors for each query, as torch operators: synthetic negatives, and lists of
// columns.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "csrc/torch/boxing.h"
#include "csrc/torch/cpu_params.h"
#include "kernels/cpu/gathered_grad_keys.h"
#include "kernels/cpu/gathered_logsumexp.h"
#include "kernels/cpu/mix_logsumexp.h"
#include "kernels/cpu/mix_negatives.h"

namespace negmine {
namespace {

using checks::floats;
using checks::longs;
using checks::new_floats;
using checks::new_longs;
using checks::OptionalTensor;
using checks::ScalarType;
using checks::Tensor;

// The checked query (B, D), negative_keys (K, D) and draws of one call. Every entry of hard_index is checked to be a
// row of negative_keys or -1.
struct Mixed {
  Tensor query, negative_keys, hard_index;
  DrawTensors tensors;
  int64_t B, D;
  cpu::Draws draws;

  Mixed(const char* op, const Tensor& q, const Tensor& keys, const Tensor& hard, const DrawArguments& given)
      : query(checks::matrix(op, "query", q, "(B, D)")),
        negative_keys(checks::matrix(op, "negative_keys", keys, "(K, D)")),
        hard_index(checks::index_matrix(op, "hard_index", hard, query.size(0), query)),
        tensors(op, query, given),
        B(query.size(0)),
        D(query.size(1)),
        draws(draws_of(given, tensors)) {
    checks::same_width(op, query, negative_keys);
    draws.hard_index = longs(hard_index);
    draws.N = hard_index.size(1);
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

  cpu::Parallel threads() const {
    return torch_threads(4.0 * static_cast<double>(B) * static_cast<double>(draws.S()) * static_cast<double>(D));
  }
};

std::tuple<Tensor, Tensor, Tensor> mix_negatives(const Tensor& query, const Tensor& negative_keys,
                                                 const Tensor& hard_index, const DrawArguments& draws) {
  // Checks.
  const Mixed in("mix_negatives", query, negative_keys, hard_index, draws);
  // Outputs.
  const int64_t S = in.draws.S();
  Tensor vectors = checks::new_empty(query, {in.B, S, in.D}, checks::dtype_of(in.query));
  Tensor parents = new_longs(query, {in.B, S, 2});
  Tensor coefficients = new_floats(query, {in.B, S});
  // Params.
  const cpu::MixNegativesParams p{
      matrix_of(in.query),      matrix_of(in.negative_keys), in.B, in.D, in.draws, vectors.mutable_data_ptr(),
      output<int64_t>(parents), output<float>(coefficients)};
  // Run.
  cpu::mix_negatives(p, in.threads());
  return {vectors, parents, coefficients};
}

std::tuple<Tensor, Tensor> mix_logsumexp(const Tensor& query, const Tensor& negative_keys, const Tensor& hard_index,
                                         const Tensor& scale, bool want_mean, const DrawArguments& draws) {
  // Checks.
  const Mixed in("mix_logsumexp", query, negative_keys, hard_index, draws);
  const Tensor factor = checks::scalar("mix_logsumexp", "scale", scale, ScalarType::Float, query);
  // Outputs.
  Tensor lse = new_floats(query, {in.B});
  Tensor mean = new_floats(query, {want_mean ? in.B : 0, in.D});
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
  cpu::mix_logsumexp(p, in.threads());
  return {lse, mean};
}

double num_products(int64_t B, int64_t M, int64_t D) {
  return static_cast<double>(B) * static_cast<double>(M) * static_cast<double>(D);
}

// Requires that every entry of a list of columns is a row of the keys or -1.
void require_rows(const char* op, const Tensor& index, int64_t K) {
  const int64_t M = index.size(1), *row = longs(index);
  for (int64_t i = 0; i < index.numel(); ++i) {
    checks::require(row[i] >= -1 && row[i] < K, op, ": index must hold rows in [0, ", K, "), or -1, got ", row[i],
                    " at (", i / M, ", ", i % M, ").");
  }
}

std::tuple<Tensor, Tensor, Tensor> gathered_logsumexp(const Tensor& query, const Tensor& negative_keys,
                                                      const Tensor& index, const Tensor& scale, bool want_mean) {
  // Checks.
  const char* op = "gathered_logsumexp";
  const Tensor q = checks::matrix(op, "query", query, "(B, D)");
  const Tensor keys = checks::matrix(op, "negative_keys", negative_keys, "(K, D)");
  checks::same_width(op, q, keys);
  const int64_t B = q.size(0), D = q.size(1);
  const Tensor listed = checks::index_matrix(op, "index", index, B, q);
  require_rows(op, listed, keys.size(0));
  const Tensor factor = checks::scalar(op, "scale", scale, ScalarType::Float, q);
  // Outputs.
  const int64_t M = listed.size(1);
  Tensor scores = new_floats(q, {B, M});
  Tensor lse = new_floats(q, {B});
  Tensor mean = new_floats(q, {want_mean ? B : 0, D});
  // Params.
  const cpu::GatheredLogsumexpParams p{matrix_of(q),
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
  cpu::gathered_logsumexp(p, torch_threads(num_products(B, M, D)));
  return {scores, lse, mean};
}

Tensor gathered_grad_keys(const Tensor& query, const Tensor& index, const Tensor& weight, int64_t K) {
  // Checks.
  const char* op = "gathered_grad_keys";
  const Tensor q = checks::matrix(op, "query", query, "(B, D)");
  const int64_t B = q.size(0), D = q.size(1);
  checks::require(K >= 0, op, ": K must not be negative, got ", K, ".");
  const Tensor listed = checks::index_matrix(op, "index", index, B, q);
  require_rows(op, listed, K);
  const int64_t M = listed.size(1);
  checks::require(weight.dim() == 2 && weight.size(0) == B && weight.size(1) == M, op,
                  ": weight must have the shape of index, got ", checks::Shape{weight}, ".");
  const Tensor weights = torch::stable::reshape(weight, {B * M});
  const Tensor flat = checks::vector(op, "weight", weights, ScalarType::Float, B * M, q);
  // Outputs.
  Tensor grad_keys = new_floats(q, {K, D});
  // Params.
  const cpu::GatheredGradKeysParams p{matrix_of(q), B, K, D, M, longs(listed), floats(flat), output<float>(grad_keys)};
  // Run.
  cpu::gathered_grad_keys(p, torch_threads(num_products(B, M, D) + num_products(K, 1, D)));
  return grad_keys;
}

STABLE_TORCH_LIBRARY_IMPL(negmine_cpu, CPU, m) {
  m.impl("mix_negatives", boxed<&mix_negatives>);
  m.impl("mix_logsumexp", boxed<&mix_logsumexp>);
  m.impl("gathered_logsumexp", boxed<&gathered_logsumexp>);
  m.impl("gathered_grad_keys", boxed<&gathered_grad_keys>);
}

}  // namespace
}  // namespace negmine
