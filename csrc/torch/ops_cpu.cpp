// The CPU kernels that walk the queue as torch operators; csrc/torch/schemas.cpp declares them, and ops_cpu_rows.cpp
// has those that walk one query's own vectors.
//
// Tensors become the structs of kernels/cpu and torch's parallel_for becomes their Parallel; there is no arithmetic
// here. Only torch's stable ABI is used, so one build serves every torch from 2.10 on. The module itself offers
// isa(), isa_for(query, keys) and set_isa(name).
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "csrc/torch/cpu_params.h"
#include "kernels/cpu/count_negatives.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/logsumexp.h"
#include "kernels/cpu/logsumexp_grad_keys.h"
#include "kernels/cpu/logsumexp_window.h"
#include "kernels/cpu/mine_hardest.h"
#include "kernels/cpu/rank_thresholds.h"
#include "kernels/cpu/softplus_sum.h"
#include "kernels/cpu/softplus_sum_grad_keys.h"

namespace negmine {
namespace {

using checks::floats;
using checks::longs;
using checks::new_empty;
using checks::OptionalTensor;
using checks::PoolTensors;
using checks::ScalarType;
using checks::Tensor;

cpu::Pool pool_of(const PoolTensors& t) {
  cpu::Pool pool;
  if (t.negative_mask.has_value()) {
    pool.negative_mask = static_cast<const uint8_t*>(t.negative_mask->data_ptr());
    pool.mask_per_query = t.negative_mask->dim() == 2;
    pool.mask_row_stride = pool.mask_per_query ? t.negative_mask->stride(0) : 0;
  }
  pool.query_ids = longs(t.query_ids);
  pool.negative_ids = longs(t.negative_ids);
  pool.query_labels = longs(t.query_labels);
  pool.negative_labels = longs(t.negative_labels);
  pool.same_label = t.same_label;
  pool.lower = longs(t.lower);
  pool.upper = longs(t.upper);
  return pool;
}

// query (B, D), negative_keys (K, D) and the pool of one call, checked.
struct Scored {
  Tensor query, negative_keys;
  PoolTensors pool;
  int64_t B, K, D;

  template <class... Pool>
  Scored(const char* op, const Tensor& q, const Tensor& keys, const Pool&... pool_tensors)
      : query(checks::matrix(op, "query", q, "(B, D)")),
        negative_keys(checks::matrix(op, "negative_keys", keys, "(K, D)")),
        pool(op, query, negative_keys, pool_tensors...),
        B(query.size(0)),
        K(negative_keys.size(0)),
        D(query.size(1)) {
    checks::same_width(op, query, negative_keys);
  }

  // The members that every params struct over the queue starts with.
  template <class Params>
  Params params() const {
    Params p;
    p.query = matrix_of(query);
    p.negative_keys = matrix_of(negative_keys);
    p.B = B, p.K = K, p.D = D;
    p.pool = pool_of(pool);
    return p;
  }
};

#define POOL_ARGUMENTS                                                                                        \
  const OptionalTensor &negative_mask, const OptionalTensor &query_ids, const OptionalTensor &negative_ids,   \
      const OptionalTensor &query_labels, const OptionalTensor &negative_labels, const OptionalTensor &lower, \
      const OptionalTensor &upper, bool same_label
#define POOL negative_mask, query_ids, negative_ids, query_labels, negative_labels, lower, upper, same_label

// Log-sum-exps at one scale, or at several, which are then the first dimension: outputs and params.
struct Sums {
  Sums(const char* op, const Scored& in, const Tensor& scale, int64_t scales, const OptionalTensor& pivot,
       bool want_mean)
      : factor(scales == 1 ? checks::scalar(op, "scale", scale, in.query)
                           : checks::vector(op, "scale", scale, ScalarType::Float, scales, in.query)),
        pivots(checks::vector(op, "pivot", pivot, ScalarType::Float, in.B, in.query)),
        lse(scales == 1 ? new_empty(in.query, {in.B}, ScalarType::Float)
                        : new_empty(in.query, {scales, in.B}, ScalarType::Float)),
        mean(scales == 1 ? new_empty(in.query, {want_mean ? in.B : 0, in.D}, ScalarType::Float)
                         : new_empty(in.query, {scales, want_mean ? in.B : 0, in.D}, ScalarType::Float)),
        kept(new_empty(in.query, {in.B}, ScalarType::Long)),
        above(new_empty(in.query, {in.B}, ScalarType::Long)),
        params(in.params<cpu::LogsumexpParams>()) {
    params.scales = scales;
    params.scale = floats(factor);
    params.pivot = floats(pivots);
    params.lse = output<float>(lse);
    params.mean = want_mean ? output<float>(mean) : nullptr;
    params.kept = output<int64_t>(kept);
    params.above = output<int64_t>(above);
  }

  Tensor factor;
  OptionalTensor pivots;
  Tensor lse, mean, kept, above;
  cpu::LogsumexpParams params;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> logsumexp(const Tensor& query, const Tensor& negative_keys,
                                                     const Tensor& scale, const OptionalTensor& pivot, bool want_mean,
                                                     POOL_ARGUMENTS) {
  const Scored in("logsumexp", query, negative_keys, POOL);
  const Sums sums("logsumexp", in, scale, 1, pivot, want_mean);
  cpu::logsumexp(sums.params, torch_threads());
  return {sums.lse, sums.mean, sums.kept, sums.above};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logsumexp_pair(const Tensor& query, const Tensor& negative_keys,
                                                          const Tensor& scale, const OptionalTensor& pivot,
                                                          bool want_mean, POOL_ARGUMENTS) {
  const Scored in("logsumexp_pair", query, negative_keys, POOL);
  const Sums sums("logsumexp_pair", in, scale, 2, pivot, want_mean);
  cpu::logsumexp(sums.params, torch_threads());
  return {sums.lse, sums.mean, sums.kept, sums.above};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> logsumexp_mine(const Tensor& query,
                                                                          const Tensor& negative_keys, int64_t N,
                                                                          const Tensor& scale,
                                                                          const OptionalTensor& pivot, bool want_mean,
                                                                          POOL_ARGUMENTS) {
  const Scored in("logsumexp_mine", query, negative_keys, POOL);
  checks::require(N >= 1, "logsumexp_mine: N must be at least 1, got ", N, ".");
  const Sums sums("logsumexp_mine", in, scale, 1, pivot, want_mean);
  Tensor scores = new_empty(query, {in.B, N}, ScalarType::Float);
  Tensor index = new_empty(query, {in.B, N}, ScalarType::Long);
  auto mined = in.params<cpu::MineHardestParams>();
  mined.N = N;
  mined.scores = output<float>(scores);
  mined.index = output<int64_t>(index);
  cpu::logsumexp_mine(sums.params, mined, torch_threads());
  return {sums.lse, sums.mean, sums.kept, sums.above, scores, index};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logsumexp_window(const Tensor& query, const Tensor& negative_keys,
                                                                    const Tensor& ranks, const Tensor& scale,
                                                                    const OptionalTensor& pivot, bool want_mean,
                                                                    POOL_ARGUMENTS) {
  const Scored in("logsumexp_window", query, negative_keys, POOL);
  const Sums sums("logsumexp_window", in, scale, 1, pivot, want_mean);
  const Tensor asked = checks::index_matrix("logsumexp_window", "ranks", ranks, in.B, query);
  checks::require(asked.size(1) == 2, "logsumexp_window: ranks must be (B, 2), got ", asked.size(1), " columns.");
  Tensor places = new_empty(query, {in.B, 2}, ScalarType::Long);
  cpu::logsumexp_window(sums.params, longs(asked), output<int64_t>(places), torch_threads());
  return {sums.lse, sums.mean, sums.kept, sums.above, places};
}

Tensor logsumexp_grad_keys(const Tensor& query, const Tensor& negative_keys, const Tensor& scale, const Tensor& lse,
                           const Tensor& weight, POOL_ARGUMENTS) {
  // Checks.
  const Scored in("logsumexp_grad_keys", query, negative_keys, POOL);
  const Tensor factor = checks::scalar("logsumexp_grad_keys", "scale", scale, query);
  const Tensor sums = checks::vector("logsumexp_grad_keys", "lse", lse, ScalarType::Float, in.B, query);
  const Tensor weights = checks::vector("logsumexp_grad_keys", "weight", weight, ScalarType::Float, in.B, query);
  // Outputs.
  Tensor grad_keys = new_empty(query, {in.K, in.D}, ScalarType::Float);
  // Params.
  auto p = in.params<cpu::LogsumexpGradKeysParams>();
  p.scale = floats(factor);
  p.lse = floats(sums);
  p.weight = floats(weights);
  p.grad_keys = output<float>(grad_keys);
  // Run.
  cpu::logsumexp_grad_keys(p, torch_threads());
  return grad_keys;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> softplus_sum(const Tensor& query, const Tensor& negative_keys,
                                                        const Tensor& scale, const Tensor& bias, bool want_pull,
                                                        POOL_ARGUMENTS) {
  // Checks.
  const Scored in("softplus_sum", query, negative_keys, POOL);
  const Tensor factor = checks::scalar("softplus_sum", "scale", scale, query);
  const Tensor offset = checks::scalar("softplus_sum", "bias", bias, query);
  // Outputs.
  Tensor total = new_empty(query, {in.B}, ScalarType::Float);
  Tensor pull = new_empty(query, {want_pull ? in.B : 0, in.D}, ScalarType::Float);
  Tensor mass = new_empty(query, {in.B}, ScalarType::Float);
  Tensor kept = new_empty(query, {in.B}, ScalarType::Long);
  // Params.
  auto p = in.params<cpu::SoftplusSumParams>();
  p.scale = floats(factor);
  p.bias = floats(offset);
  p.total = output<float>(total);
  p.pull = want_pull ? output<float>(pull) : nullptr;
  p.mass = output<float>(mass);
  p.kept = output<int64_t>(kept);
  // Run.
  cpu::softplus_sum(p, torch_threads());
  return {total, pull, mass, kept};
}

Tensor softplus_sum_grad_keys(const Tensor& query, const Tensor& negative_keys, const Tensor& scale, const Tensor& bias,
                              const Tensor& weight, POOL_ARGUMENTS) {
  // Checks.
  const Scored in("softplus_sum_grad_keys", query, negative_keys, POOL);
  const Tensor factor = checks::scalar("softplus_sum_grad_keys", "scale", scale, query);
  const Tensor offset = checks::scalar("softplus_sum_grad_keys", "bias", bias, query);
  const Tensor weights = checks::vector("softplus_sum_grad_keys", "weight", weight, ScalarType::Float, in.B, query);
  // Outputs.
  Tensor grad_keys = new_empty(query, {in.K, in.D}, ScalarType::Float);
  // Params.
  auto p = in.params<cpu::LogsumexpGradKeysParams>();
  p.scale = floats(factor);
  p.weight = floats(weights);
  p.grad_keys = output<float>(grad_keys);
  // Run.
  cpu::softplus_sum_grad_keys(p, floats(offset), torch_threads());
  return grad_keys;
}

// kept (B,) is filled where it is wanted.
std::tuple<Tensor, Tensor> run_mine_hardest(const char* op, const Tensor& query, const Tensor& negative_keys, int64_t N,
                                            int64_t least, Tensor* kept, POOL_ARGUMENTS) {
  // Checks.
  const Scored in(op, query, negative_keys, POOL);
  checks::require(N >= least, op, ": N must be at least ", least, ", got ", N, ".");
  // Outputs.
  Tensor scores = new_empty(query, {in.B, N}, ScalarType::Float);
  Tensor index = new_empty(query, {in.B, N}, ScalarType::Long);
  if (kept != nullptr) *kept = new_empty(query, {in.B}, ScalarType::Long);
  // Params.
  auto p = in.params<cpu::MineHardestParams>();
  p.N = N;
  p.scores = output<float>(scores);
  p.index = output<int64_t>(index);
  if (kept != nullptr) p.kept = output<int64_t>(*kept);
  // Run.
  cpu::mine_hardest(p, torch_threads());
  return {scores, index};
}

std::tuple<Tensor, Tensor> mine_hardest(const Tensor& query, const Tensor& negative_keys, int64_t N, POOL_ARGUMENTS) {
  return run_mine_hardest("mine_hardest", query, negative_keys, N, 0, nullptr, POOL);
}

std::tuple<Tensor, Tensor, Tensor> mine_hardest_kept(const Tensor& query, const Tensor& negative_keys, int64_t N,
                                                     POOL_ARGUMENTS) {
  Tensor kept;
  auto [scores, index] = run_mine_hardest("mine_hardest_kept", query, negative_keys, N, 1, &kept, POOL);
  return {scores, index, kept};
}

std::tuple<Tensor, Tensor, Tensor> mine_listed(const Tensor& query, const Tensor& negative_keys, const Tensor& listed,
                                               int64_t N, const OptionalTensor& most) {
  // Checks.
  const OptionalTensor none;
  const Scored in("mine_listed", query, negative_keys, none, none, none, none, none, none, none, false);
  const Tensor columns = checks::index_matrix("mine_listed", "index", listed, in.B, query);
  const OptionalTensor highest = checks::vector("mine_listed", "most", most, ScalarType::Float, in.B, query);
  const int64_t M = columns.size(1);
  checks::require(N >= 1, "mine_listed: N must be at least 1, got ", N, ".");
  for (int64_t i = 0; i < in.B * M; ++i) {
    const int64_t column = longs(columns)[i];
    checks::require(column >= -1 && column < in.K, "mine_listed: index must hold rows of negative_keys in [0, ", in.K,
                    ") or -1, got ", column, ".");
  }
  // Outputs.
  Tensor scores = new_empty(query, {in.B, N}, ScalarType::Float);
  Tensor index = new_empty(query, {in.B, N}, ScalarType::Long);
  Tensor kept = new_empty(query, {in.B}, ScalarType::Long);
  // Params.
  auto p = in.params<cpu::MineHardestParams>();
  p.N = N;
  p.scores = output<float>(scores);
  p.index = output<int64_t>(index);
  p.kept = output<int64_t>(kept);
  // Run.
  cpu::mine_listed(p, longs(columns), M, floats(highest), torch_threads());
  return {scores, index, kept};
}

Tensor rank_thresholds(const Tensor& query, const Tensor& negative_keys, const Tensor& ranks, POOL_ARGUMENTS) {
  // Checks.
  const Scored in("rank_thresholds", query, negative_keys, POOL);
  const Tensor asked = checks::index_matrix("rank_thresholds", "ranks", ranks, in.B, query);
  // Outputs.
  Tensor order = new_empty(query, {in.B, asked.size(1)}, ScalarType::Long);
  // Params.
  auto p = in.params<cpu::RankThresholdsParams>();
  p.R = asked.size(1);
  p.ranks = longs(asked);
  p.order = output<int64_t>(order);
  // Run.
  cpu::rank_thresholds(p, torch_threads());
  return order;
}

Tensor count_negatives(const Tensor& query, const Tensor& negative_keys, POOL_ARGUMENTS) {
  // Checks.
  const Scored in("count_negatives", query, negative_keys, POOL);
  // Outputs.
  Tensor count = new_empty(query, {in.B}, ScalarType::Long);
  // Params.
  auto p = in.params<cpu::CountNegativesParams>();
  p.count = output<int64_t>(count);
  // Run.
  cpu::count_negatives(p, torch_threads());
  return count;
}

STABLE_TORCH_LIBRARY_IMPL(negmine, CPU, m) {
  m.impl("logsumexp", TORCH_BOX(&logsumexp));
  m.impl("logsumexp_pair", TORCH_BOX(&logsumexp_pair));
  m.impl("logsumexp_mine", TORCH_BOX(&logsumexp_mine));
  m.impl("logsumexp_window", TORCH_BOX(&logsumexp_window));
  m.impl("logsumexp_grad_keys", TORCH_BOX(&logsumexp_grad_keys));
  m.impl("softplus_sum", TORCH_BOX(&softplus_sum));
  m.impl("softplus_sum_grad_keys", TORCH_BOX(&softplus_sum_grad_keys));
  m.impl("mine_hardest", TORCH_BOX(&mine_hardest));
  m.impl("mine_hardest_kept", TORCH_BOX(&mine_hardest_kept));
  m.impl("mine_listed", TORCH_BOX(&mine_listed));
  m.impl("rank_thresholds", TORCH_BOX(&rank_thresholds));
  m.impl("count_negatives", TORCH_BOX(&count_negatives));
}

PyObject* py_isa(PyObject*, PyObject*) { return PyUnicode_FromString(cpu::isa()); }

PyObject* py_isa_for(PyObject*, PyObject* arguments) {
  const char *query = nullptr, *keys = nullptr;
  if (PyArg_ParseTuple(arguments, "ss", &query, &keys) == 0) return nullptr;
  const char* name = cpu::isa_for(query, keys);
  if (name != nullptr) return PyUnicode_FromString(name);
  PyErr_SetString(PyExc_ValueError, "isa_for: query and keys must be float32, bfloat16 or float16.");
  return nullptr;
}

PyObject* py_set_isa(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (text == nullptr) return nullptr;
  return PyBool_FromLong(cpu::set_isa(text));
}

PyMethodDef methods[] = {
    {"isa", py_isa, METH_NOARGS, "The forced instruction set, or '' where each pair of storage types has its own."},
    {"isa_for", py_isa_for, METH_VARARGS,
     "The instruction set for queries and keys that are float32, bfloat16, float16."},
    {"set_isa", py_set_isa, METH_O,
     "Force amxbf16, avx512bf16, avx512, avx2 or portable; '' chooses by storage again. False where this one is "
     "lacking."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ops_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace negmine

extern "C" PyMODINIT_FUNC PyInit__ops_cpu() { return PyModule_Create(&negmine::module); }
