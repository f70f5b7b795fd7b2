// The CUDA ops over the queue: tensors -> the params structs of kernels/cuda, on the current stream of the tensors'
// device. The ops that walk one query's own vectors: ops_cuda_rows.cpp.
//
// Only torch's stable ABI (2.10) is used. The ops are declared in schemas.cpp, in the library that Python loads first.
// Checks here protect memory; the meaning of arguments is checked in negmine/.
#include <Python.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "csrc/torch/checks.h"
#include "csrc/torch/cuda_params.h"
#include "kernels/cuda/count_negatives.h"
#include "kernels/cuda/logsumexp.h"
#include "kernels/cuda/logsumexp_grad_keys.h"
#include "kernels/cuda/mine_hardest.h"
#include "kernels/cuda/rank_thresholds.h"

namespace negmine {
namespace {

using checks::floats;
using checks::longs;
using checks::new_empty;
using checks::OptionalTensor;
using checks::ScalarType;
using checks::Tensor;

#define POOL_ARGUMENTS                                                                                        \
  const OptionalTensor &negative_mask, const OptionalTensor &query_ids, const OptionalTensor &negative_ids,   \
      const OptionalTensor &query_labels, const OptionalTensor &negative_labels, const OptionalTensor &lower, \
      const OptionalTensor &upper, bool same_label
#define POOL negative_mask, query_ids, negative_ids, query_labels, negative_labels, lower, upper, same_label

// What every op over the queue is given, checked, and its device made current. Shapes and storage that the kernels do
// not take: negmine/backends.py sends them to another backend.
struct Scored {
  Tensor q, keys;  // (B, D), (K, D)
  checks::PoolTensors pool;
  int64_t B, K, D;
  cuda::Storage storage;
  int processors = 0;

  Scored(const char* op, const Tensor& query, const Tensor& negative_keys, POOL_ARGUMENTS)
      : q(checks::matrix(op, "query", query, "(B, D)")),
        keys(checks::matrix(op, "negative_keys", negative_keys, "(K, D)")),
        pool(op, q, keys, POOL),
        B(q.size(0)),
        K(keys.size(0)),
        D(q.size(1)),
        storage(storage_of(q)) {
    checks::same_width(op, q, keys);
    checks::require(storage != cuda::Storage::kFloat32 && storage == storage_of(keys), op,
                    ": query and negative_keys must both be bfloat16 or both float16, got ",
                    checks::dtype_text(q.scalar_type()), " and ", checks::dtype_text(keys.scalar_type()), ".");
    checks::require(D <= 256 && K <= INT32_MAX - 1024 && B <= INT32_MAX - 1024, op,
                    ": D must be at most 256, B and K below 2^31 - 1024, got ", D, ", ", B, " and ", K, ".");
    set_device(op, q);
    require_launched(op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, q.get_device_index()));
  }

  // The part that the params of these ops share.
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
              .upper = longs(pool.upper)};
    return p;
  }
};

std::tuple<Tensor, Tensor> mine_hardest(const Tensor& query, const Tensor& negative_keys, int64_t N, POOL_ARGUMENTS) {
  // Checks.
  const char* op = "mine_hardest";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Scored in(op, query, negative_keys, POOL);
  checks::require(N >= 0, op, ": N must not be negative, got ", N, ".");
  const cuda::MiningPlan plan = cuda::plan_mining(in.B, in.K, N, in.processors);
  checks::require(cuda::fits(plan, N), op, ": N = ", N, " of K = ", in.K,
                  " takes more shared memory than a block has.");

  // Outputs.
  Tensor scores = new_empty(in.q, {in.B, N}, ScalarType::Float);
  Tensor index = new_empty(in.q, {in.B, N}, ScalarType::Long);
  Tensor workspace = new_empty(in.q, {plan.workspace}, ScalarType::Byte);

  // Params.
  auto p = in.params<cuda::MineHardestParams>();
  p.N = N;
  p.plan = plan;
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  p.workspace = workspace.mutable_data_ptr();
  require_launched(op, cuda::mine_hardest(p, current_stream(in.q)));
  return {scores, index};
}

Tensor rank_thresholds(const Tensor& query, const Tensor& negative_keys, const Tensor& ranks, POOL_ARGUMENTS) {
  // Checks.
  const char* op = "rank_thresholds";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Scored in(op, query, negative_keys, POOL);
  const Tensor asked = checks::index_matrix(op, "ranks", ranks, in.B, in.q);  // (B, R)
  const int64_t R = asked.size(1);
  const cuda::RankingPlan plan = cuda::plan_ranking(in.B, in.K, R, in.processors);
  checks::require(cuda::fits(plan), op, ": K = ", in.K, " takes a workspace of more than 4 GiB.");

  // Outputs.
  Tensor order = new_empty(in.q, {in.B, R}, ScalarType::Long);
  Tensor workspace = new_empty(in.q, {plan.workspace}, ScalarType::Byte);

  // Params.
  auto p = in.params<cuda::RankThresholdsParams>();
  p.R = R;
  p.ranks = longs(asked);
  p.plan = plan;
  p.order = static_cast<int64_t*>(order.mutable_data_ptr());
  p.workspace = workspace.mutable_data_ptr();
  require_launched(op, cuda::rank_thresholds(p, current_stream(in.q)));
  return order;
}

Tensor count_negatives(const Tensor& query, const Tensor& negative_keys, POOL_ARGUMENTS) {
  // Checks.
  const char* op = "count_negatives";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Scored in(op, query, negative_keys, POOL);
  const cuda::CountingPlan plan = cuda::plan_counting(in.B, in.K, in.processors);

  // Outputs.
  Tensor count = new_empty(in.q, {in.B}, ScalarType::Long);
  Tensor workspace = new_empty(in.q, {plan.workspace}, ScalarType::Byte);

  // Params.
  auto p = in.params<cuda::CountNegativesParams>();
  p.plan = plan;
  p.count = static_cast<int64_t*>(count.mutable_data_ptr());
  p.workspace = workspace.mutable_data_ptr();
  require_launched(op, cuda::count_negatives(p, current_stream(in.q)));
  return count;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logsumexp(const Tensor& query, const Tensor& negative_keys,
                                                     const Tensor& scale, const OptionalTensor& pivot, bool want_mean,
                                                     POOL_ARGUMENTS) {
  // Checks.
  const char* op = "logsumexp";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Scored in(op, query, negative_keys, POOL);
  const Tensor factor = checks::scalar(op, "scale", scale, in.q);
  const OptionalTensor pivots = checks::vector(op, "pivot", pivot, ScalarType::Float, in.B, in.q);
  const cuda::SummingPlan plan = cuda::plan_summing(in.B, in.K, in.D, want_mean, in.processors);

  // Outputs.
  Tensor lse = new_empty(in.q, {in.B}, ScalarType::Float);
  Tensor mean = new_empty(in.q, {want_mean ? in.B : 0, in.D}, ScalarType::Float);
  Tensor kept = new_empty(in.q, {in.B}, ScalarType::Long);
  Tensor above = new_empty(in.q, {in.B}, ScalarType::Long);
  Tensor workspace = new_empty(in.q, {plan.workspace}, ScalarType::Byte);

  // Params.
  auto p = in.params<cuda::LogSumExpParams>();
  p.scale = floats(factor);
  p.pivot = floats(pivots);
  p.want_mean = want_mean;
  p.plan = plan;
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.mean = static_cast<float*>(mean.mutable_data_ptr());
  p.kept = static_cast<int64_t*>(kept.mutable_data_ptr());
  p.above = static_cast<int64_t*>(above.mutable_data_ptr());
  p.workspace = workspace.mutable_data_ptr();
  require_launched(op, cuda::logsumexp(p, current_stream(in.q)));
  return {lse, mean, kept, above};
}

Tensor logsumexp_grad_keys(const Tensor& query, const Tensor& negative_keys, const Tensor& scale, const Tensor& lse,
                           const Tensor& weight, POOL_ARGUMENTS) {
  // Checks.
  const char* op = "logsumexp_grad_keys";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Scored in(op, query, negative_keys, POOL);
  const Tensor factor = checks::scalar(op, "scale", scale, in.q);
  const Tensor sums = checks::vector(op, "lse", lse, ScalarType::Float, in.B, in.q);
  const Tensor weights = checks::vector(op, "weight", weight, ScalarType::Float, in.B, in.q);
  const cuda::KeysGradPlan plan = cuda::plan_grad_keys(in.B, in.K, in.D, in.processors);

  // Outputs.
  Tensor grad_keys = new_empty(in.q, {in.K, in.D}, ScalarType::Float);
  Tensor workspace = new_empty(in.q, {plan.workspace}, ScalarType::Byte);

  // Params.
  auto p = in.params<cuda::LogSumExpGradKeysParams>();
  p.scale = floats(factor);
  p.lse = floats(sums);
  p.weight = floats(weights);
  p.plan = plan;
  p.grad_keys = static_cast<float*>(grad_keys.mutable_data_ptr());
  p.workspace = workspace.mutable_data_ptr();
  require_launched(op, cuda::logsumexp_grad_keys(p, current_stream(in.q)));
  return grad_keys;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(negmine, CUDA, m) {
  m.impl("count_negatives", TORCH_BOX(&count_negatives));
  m.impl("logsumexp", TORCH_BOX(&logsumexp));
  m.impl("logsumexp_grad_keys", TORCH_BOX(&logsumexp_grad_keys));
  m.impl("mine_hardest", TORCH_BOX(&mine_hardest));
  m.impl("rank_thresholds", TORCH_BOX(&rank_thresholds));
}

}  // namespace negmine

// Importing negmine._ops_cuda runs the registration above; the module itself is empty.
PyMODINIT_FUNC PyInit__ops_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ops_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
