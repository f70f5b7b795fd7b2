// info_nce as a torch operator: a loss with its gradient in one call. For small batches, the overhead of several calls
// would dominate.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "csrc/torch/boxing.h"
#include "csrc/torch/cpu_params.h"
#include "kernels/cpu/info_nce.h"

namespace negmine {
namespace {

using checks::floats;
using checks::longs;
using checks::new_floats;
using checks::new_longs;
using checks::OptionalTensor;
using checks::ScalarType;
using checks::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce(
    const Tensor& query, const Tensor& positive_key, const Tensor& negative_keys, const Tensor& scale,
    const OptionalTensor& pivot, bool want_gradient, bool decoupled, const OptionalTensor& ranks, int64_t hard,
    int64_t skip, const DrawArguments& draws, const PoolArguments& pool) {
  // Checks.
  const char* op = "info_nce";
  const Scored in(op, query, negative_keys, pool);
  const Tensor positive = checks::positives(op, positive_key, query);
  const Tensor factor = checks::scalar(op, "scale", scale, ScalarType::Float, query);
  const OptionalTensor pivots = checks::vector(op, "pivot", pivot, ScalarType::Float, in.B, query);
  const OptionalTensor asked = checks::rank_pairs(op, ranks, in.B, query);
  const DrawTensors draw_tensors(op, query, draws);
  checks::mixes(op, hard, skip, draws.S(), asked.has_value());
  // Outputs.
  const int64_t B = in.B;
  Tensor rows = new_floats(query, {B});
  Tensor d_query = new_floats(query, {want_gradient ? B : 0, in.D});
  Tensor d_scale = new_floats(query, {want_gradient ? B : 0});
  Tensor weight = new_floats(query, {B});
  Tensor lse = new_floats(query, {B});
  Tensor total = new_floats(query, {B});
  Tensor num_kept = new_longs(query, {B});
  Tensor num_above = new_longs(query, {B});
  Tensor num_mixed = new_longs(query, {B});
  Tensor sort_keys = new_longs(query, {B, asked.has_value() ? 2 : 0});
  // Params.
  auto p = in.params<cpu::InfoNceParams>();
  p.positive_key = matrix_of(positive);
  p.scale = floats(factor);
  p.pivot = floats(pivots);
  p.ranks = longs(asked);
  p.decoupled = decoupled;
  p.hard = hard;
  p.skip = skip;
  p.draws = draws_of(draws, draw_tensors);
  p.rows = output<float>(rows);
  p.d_query = want_gradient ? output<float>(d_query) : nullptr;
  p.d_scale = want_gradient ? output<float>(d_scale) : nullptr;
  p.weight = output<float>(weight);
  p.lse = output<float>(lse);
  p.total = output<float>(total);
  p.num_kept = output<int64_t>(num_kept);
  p.num_above = output<int64_t>(num_above);
  p.mixed = output<int64_t>(num_mixed);
  p.sort_keys = output<int64_t>(sort_keys);
  // Run.
  cpu::info_nce(p, in.threads(p.mixes() ? 4 * draws.S() : 0));
  return {rows, d_query, d_scale, weight, lse, total, num_kept, num_above, num_mixed, sort_keys};
}

STABLE_TORCH_LIBRARY_IMPL(negmine_cpu, CPU, m) { m.impl("info_nce", boxed<&info_nce>); }

}  // namespace
}  // namespace negmine
