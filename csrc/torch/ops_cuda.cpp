// The CUDA ops over the queue. They check tensors, fill the params structs of kernels/cuda, and launch the kernels on
// the current stream of the device of the tensors. ops_cuda_rows.cpp has the ops over synthetic negatives.
//
// Only torch's stable ABI (2.10) is used. The ops are declared in negmine/ops. The checks here only prevent invalid
// memory accesses; Python checks what the arguments mean. Values on the device, such as num_rows and ranks, are not
// read here.
#include <Python.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "csrc/torch/arguments.h"
#include "csrc/torch/boxing.h"
#include "csrc/torch/checks.h"
#include "csrc/torch/cuda_params.h"
#include "kernels/cuda/count_negatives.h"
#include "kernels/cuda/info_nce.h"
#include "kernels/cuda/logsumexp.h"
#include "kernels/cuda/logsumexp_grad_keys.h"
#include "kernels/cuda/mine_hardest.h"
#include "kernels/cuda/rank_thresholds.h"
#include "kernels/cuda/rank_window.h"

namespace negmine {
namespace {

using checks::floats;
using checks::longs;
using checks::new_bytes;
using checks::new_floats;
using checks::new_longs;
using checks::OptionalTensor;
using checks::ScalarType;
using checks::Tensor;

int64_t* longs_of(Tensor& output) { return static_cast<int64_t*>(output.mutable_data_ptr()); }
float* floats_of(Tensor& output) { return static_cast<float*>(output.mutable_data_ptr()); }

// The arguments that every op over the queue has. The constructor checks them and makes their device current. For
// shapes and dtypes that these kernels do not support, Python chooses another backend.
struct Scored {
  Tensor q, keys;  // (B, D), (K, D)
  PoolTensors pool;
  int64_t B, K, D;
  cuda::Storage storage;
  int processors = 0;
  void* stream = nullptr;

  Scored(const char* op, const Tensor& query, const Tensor& negative_keys, const PoolArguments& given)
      : q(checks::matrix(op, "query", query, "(B, D)")),
        keys(checks::matrix(op, "negative_keys", negative_keys, "(K, D)")),
        pool(op, q, keys, given),
        B(q.size(0)),
        K(keys.size(0)),
        D(q.size(1)),
        storage(storage_of(q)) {
    checks::same_width(op, q, keys);
    checks::require(!pool.bias, op, ": bias is not supported by this backend.");
    checks::require(!pool.guide_limit, op, ": a guide is not supported by this backend.");
    checks::require(storage != cuda::Storage::kFloat32 && storage == storage_of(keys), op,
                    ": query and negative_keys must both be bfloat16 or both float16, got ",
                    checks::dtype_text(q.scalar_type()), " and ", checks::dtype_text(keys.scalar_type()), ".");
    checks::require(D <= 256 && K <= INT32_MAX - 1024 && B <= INT32_MAX - 1024, op,
                    ": D must be at most 256, B and K below 2^31 - 1024, got ", D, ", ", B, " and ", K, ".");
    set_device(op, q);
    require_launched(op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, q.get_device_index()));
    stream = current_stream(q);
  }

  // Params of an op, with the fields filled that all these ops have.
  template <class Params>
  Params params() const {
    const OptionalTensor& mask = pool.negative_mask;
    const auto* usable = mask.has_value() ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
    const bool by_pair = mask.has_value() && mask->dim() == 2;
    Params p = {};
    p.B = B, p.K = K, p.D = D;
    p.query = q.data_ptr();
    p.negative_keys = keys.data_ptr();
    p.query_stride = q.stride(0);
    p.negative_keys_stride = keys.stride(0);
    p.storage = storage;
    p.pool = {.key_mask = by_pair ? nullptr : usable,
              .pair_mask = by_pair ? usable : nullptr,
              .pair_mask_stride = by_pair ? mask->stride(0) : 0,
              .query_ids = longs(pool.query_ids),
              .negative_ids = longs(pool.negative_ids),
              .query_labels = longs(pool.query_labels),
              .negative_labels = longs(pool.negative_labels),
              .same_label = pool.same_label,
              .lower = longs(pool.lower),
              .upper = longs(pool.upper),
              .num_rows = longs(pool.num_rows)};
    return p;
  }
};

// Writes the N hardest columns of each pool to scores and index (B, N).
void mine(const char* op, const Scored& in, int64_t N, Tensor& scores, Tensor& index) {
  const cuda::MiningPlan plan = cuda::plan_mining(in.B, in.K, N, in.processors);
  checks::require(cuda::fits(plan, N), op, ": N = ", N, " of K = ", in.K,
                  " takes more shared memory than a block has.");
  Tensor workspace = new_bytes(in.q, plan.workspace);
  auto p = in.params<cuda::MineHardestParams>();
  p.N = N;
  p.plan = plan;
  p.scores = floats_of(scores);
  p.index = longs_of(index);
  p.workspace = workspace.mutable_data_ptr();
  require_launched(op, cuda::mine_hardest(p, in.stream));
}

// Returns the sort keys (B, R) at ranks (B, R).
Tensor find_ranks(const char* op, const Scored& in, const Tensor& ranks) {
  const int64_t R = ranks.size(1);
  const cuda::RankingPlan plan = cuda::plan_ranking(in.B, in.K, R, in.processors);
  checks::require(cuda::fits(plan), op, ": K = ", in.K, " takes a workspace of more than 4 GiB.");
  Tensor sort_keys = new_longs(in.q, {in.B, R});
  Tensor workspace = new_bytes(in.q, plan.workspace);
  auto p = in.params<cuda::RankThresholdsParams>();
  p.R = R;
  p.ranks = longs(ranks);
  p.plan = plan;
  p.sort_keys = longs_of(sort_keys);
  p.workspace = workspace.mutable_data_ptr();
  require_launched(op, cuda::rank_thresholds(p, in.stream));
  return sort_keys;
}

// Restricts the pool to the columns between the two ranks (B, 2) of each row. The pool then refers to bounds (2, B),
// which must stay alive until the kernels that use the pool are launched. Returns the sort keys (B, 2).
Tensor narrow(const char* op, const Scored& in, const Tensor& ranks, Tensor& bounds, cuda::Pool& pool) {
  Tensor sort_keys = find_ranks(op, in, ranks);
  const cuda::RankWindowParams window = {.B = in.B,
                                         .ranks = longs(ranks),
                                         .pool_lower = pool.lower,
                                         .sort_keys = longs_of(sort_keys),
                                         .lower = longs_of(bounds),
                                         .upper = longs_of(bounds) + in.B};
  require_launched(op, cuda::rank_window(window, in.stream));
  pool.lower = window.lower;
  pool.upper = window.upper;
  return sort_keys;
}

// Writes the number of columns of each pool to count (B,).
void count_pool(const char* op, const Scored& in, const cuda::Pool& pool, Tensor& count) {
  const cuda::CountingPlan plan = cuda::plan_counting(in.B, in.K, in.processors);
  Tensor workspace = new_bytes(in.q, plan.workspace);
  auto p = in.params<cuda::CountNegativesParams>();
  p.pool = pool;
  p.plan = plan;
  p.count = longs_of(count);
  p.workspace = workspace.mutable_data_ptr();
  require_launched(op, cuda::count_negatives(p, in.stream));
}

std::tuple<Tensor, Tensor, Tensor> mine_hardest(const Tensor& query, const Tensor& negative_keys, int64_t N,
                                                bool want_count, const PoolArguments& pool) {
  // Checks.
  const char* op = "mine_hardest";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Scored in(op, query, negative_keys, pool);
  checks::require(N >= 0, op, ": N must not be negative, got ", N, ".");
  // Outputs.
  Tensor scores = new_floats(in.q, {in.B, N});
  Tensor index = new_longs(in.q, {in.B, N});
  Tensor num_kept = new_longs(in.q, {want_count ? in.B : 0});
  // Run.
  mine(op, in, N, scores, index);
  if (want_count) {  // NaN scores do not count, and any bound leaves them out
    cuda::Pool bounded = in.params<cuda::CountNegativesParams>().pool;
    const bool is_bounded = bounded.lower != nullptr || bounded.upper != nullptr;
    Tensor lowest = new_longs(in.q, {is_bounded ? 0 : in.B});
    if (!is_bounded) {
      torch::stable::fill_(lowest, static_cast<double>(cuda::kLowestSortKey));  // exact: 31 bits followed by zeros
      bounded.lower = longs_of(lowest);
    }
    count_pool(op, in, bounded, num_kept);
  }
  return {scores, index, num_kept};
}

Tensor rank_thresholds(const Tensor& query, const Tensor& negative_keys, const Tensor& ranks,
                       const PoolArguments& pool) {
  const char* op = "rank_thresholds";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Scored in(op, query, negative_keys, pool);
  return find_ranks(op, in, checks::index_matrix(op, "ranks", ranks, in.B, in.q));
}

Tensor count_negatives(const Tensor& query, const Tensor& negative_keys, const PoolArguments& pool) {
  const char* op = "count_negatives";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Scored in(op, query, negative_keys, pool);
  Tensor count = new_longs(in.q, {in.B});
  count_pool(op, in, in.params<cuda::CountNegativesParams>().pool, count);
  return count;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> logsumexp(
    const Tensor& query, const Tensor& negative_keys, const Tensor& scales, const OptionalTensor& pivot, bool want_mean,
    int64_t N, const OptionalTensor& ranks, const PoolArguments& pool) {
  // Checks.
  const char* op = "logsumexp";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Scored in(op, query, negative_keys, pool);
  const Tensor factors = checks::scales(op, scales, in.q);
  const OptionalTensor pivots = checks::vector(op, "pivot", pivot, ScalarType::Float, in.B, in.q);
  const OptionalTensor asked = checks::rank_pairs(op, ranks, in.B, in.q);
  checks::mined_or_ranked(op, N, asked.has_value());
  const int64_t S = factors.size(0);
  const cuda::SummingPlan plan = cuda::plan_summing(in.B, in.K, in.D, want_mean, in.processors);

  // Outputs.
  Tensor lse = new_floats(in.q, {S, in.B});
  Tensor mean = new_floats(in.q, {S, want_mean ? in.B : 0, in.D});
  Tensor num_kept = new_longs(in.q, {in.B});
  Tensor num_above = new_longs(in.q, {in.B});
  Tensor scores = new_floats(in.q, {in.B, N});
  Tensor index = new_longs(in.q, {in.B, N});
  Tensor workspace = new_bytes(in.q, plan.workspace);

  // Params.
  auto p = in.params<cuda::LogSumExpParams>();
  p.pivot = floats(pivots);
  p.want_mean = want_mean;
  p.plan = plan;
  p.num_kept = longs_of(num_kept);
  p.num_above = longs_of(num_above);
  p.workspace = workspace.mutable_data_ptr();

  // Run.
  if (N > 0) mine(op, in, N, scores, index);
  Tensor bounds = new_longs(in.q, {2, asked.has_value() ? in.B : 0});
  Tensor sort_keys = asked.has_value() ? narrow(op, in, *asked, bounds, p.pool) : new_longs(in.q, {in.B, 0});
  for (int64_t s = 0; s < S; ++s) {
    p.scale = floats(factors) + s;
    p.lse = floats_of(lse) + s * in.B;
    p.mean = floats_of(mean) + (want_mean ? s * in.B * in.D : 0);
    require_launched(op, cuda::logsumexp(p, in.stream));
  }
  return {lse, mean, num_kept, num_above, scores, index, sort_keys};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce(
    const Tensor& query, const Tensor& positive_key, const Tensor& negative_keys, const Tensor& scale,
    const OptionalTensor& pivot, bool want_gradient, bool decoupled, const OptionalTensor& ranks, int64_t hard,
    int64_t skip, const DrawArguments& draws, const PoolArguments& pool) {
  // Checks.
  const char* op = "info_nce";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Scored in(op, query, negative_keys, pool);
  const Tensor positive = checks::positives(op, positive_key, in.q);
  const Tensor factor = checks::scalar(op, "scale", scale, ScalarType::Float, in.q);
  const OptionalTensor pivots = checks::vector(op, "pivot", pivot, ScalarType::Float, in.B, in.q);
  const OptionalTensor asked = checks::rank_pairs(op, ranks, in.B, in.q);
  const DrawTensors draw_tensors(op, in.q, draws);
  const bool mixes = checks::mixes(op, hard, skip, draws.S(), asked.has_value());
  const cuda::SummingPlan plan = cuda::plan_summing(in.B, in.K, in.D, want_gradient, in.processors);

  // Outputs.
  const int64_t B = in.B;
  Tensor rows = new_floats(in.q, {B});
  Tensor d_query = new_floats(in.q, {want_gradient ? B : 0, in.D});
  Tensor d_scale = new_floats(in.q, {want_gradient ? B : 0});
  Tensor weight = new_floats(in.q, {B});
  Tensor lse = new_floats(in.q, {B});
  Tensor total = new_floats(in.q, {B});
  Tensor num_kept = new_longs(in.q, {B});
  Tensor num_above = new_longs(in.q, {B});
  Tensor num_mixed = new_longs(in.q, {B});
  Tensor workspace = new_bytes(in.q, plan.workspace);

  // Params.
  cuda::InfoNceParams p = {};
  p.sum = in.params<cuda::LogSumExpParams>();
  p.sum.scale = floats(factor);
  p.sum.pivot = floats(pivots);
  p.sum.want_mean = want_gradient;
  p.sum.plan = plan;
  p.sum.lse = floats_of(lse);
  p.sum.num_kept = longs_of(num_kept);
  p.sum.num_above = longs_of(num_above);
  p.sum.workspace = workspace.mutable_data_ptr();
  p.positive_key = positive.data_ptr();
  p.positive_key_stride = positive.stride(0);
  p.positive_key_storage = storage_of(positive);
  p.decoupled = decoupled;
  p.rows = floats_of(rows);
  p.d_query = floats_of(d_query);
  p.d_scale = floats_of(d_scale);
  p.weight = floats_of(weight);
  p.total = floats_of(total);
  p.num_mixed = longs_of(num_mixed);

  // Run.
  const int64_t mined = mixes ? std::min(skip + hard, std::max(in.K, skip + 1)) : 0;
  Tensor scores = new_floats(in.q, {B, mined});
  Tensor index = new_longs(in.q, {B, mined});
  if (mixes) {
    mine(op, in, mined, scores, index);
    p.mixing = mixing_of(in.q, in.keys, draws, draw_tensors);
    p.mixing.N = mined - skip;
    p.mixing.hard_index = longs(index) + skip;
    p.mixing.hard_index_stride = mined;
  }
  Tensor bounds = new_longs(in.q, {2, asked.has_value() ? B : 0});
  Tensor sort_keys = asked.has_value() ? narrow(op, in, *asked, bounds, p.sum.pool) : new_longs(in.q, {B, 0});
  require_launched(op, cuda::info_nce(p, in.stream));
  return {rows, d_query, d_scale, weight, lse, total, num_kept, num_above, num_mixed, sort_keys};
}

Tensor logsumexp_grad_keys(const Tensor& query, const Tensor& negative_keys, const Tensor& scale, const Tensor& lse,
                           const Tensor& weight, const PoolArguments& pool) {
  // Checks.
  const char* op = "logsumexp_grad_keys";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Scored in(op, query, negative_keys, pool);
  const Tensor factor = checks::scalar(op, "scale", scale, ScalarType::Float, in.q);
  const Tensor sums = checks::vector(op, "lse", lse, ScalarType::Float, in.B, in.q);
  const Tensor weights = checks::vector(op, "weight", weight, ScalarType::Float, in.B, in.q);
  const cuda::KeysGradPlan plan = cuda::plan_grad_keys(in.B, in.K, in.D, in.processors);

  // Outputs.
  Tensor grad_keys = new_floats(in.q, {in.K, in.D});
  Tensor workspace = new_bytes(in.q, plan.workspace);

  // Params.
  auto p = in.params<cuda::LogSumExpGradKeysParams>();
  p.scale = floats(factor);
  p.lse = floats(sums);
  p.weight = floats(weights);
  p.plan = plan;
  p.grad_keys = floats_of(grad_keys);
  p.workspace = workspace.mutable_data_ptr();
  require_launched(op, cuda::logsumexp_grad_keys(p, in.stream));
  return grad_keys;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(negmine_cuda, CUDA, m) {
  m.impl("count_negatives", boxed<&count_negatives>);
  m.impl("info_nce", boxed<&info_nce>);
  m.impl("logsumexp", boxed<&logsumexp>);
  m.impl("logsumexp_grad_keys", boxed<&logsumexp_grad_keys>);
  m.impl("mine_hardest", boxed<&mine_hardest>);
  m.impl("rank_thresholds", boxed<&rank_thresholds>);
}

}  // namespace negmine

// Importing negmine._ops_cuda runs the registration above; the module itself is empty.
PyMODINIT_FUNC PyInit__ops_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ops_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
