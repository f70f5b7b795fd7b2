// The CPU kernels that read the whole queue as torch operators, which negmine/ops declares. ops_cpu_rows.cpp has the
// kernels that read a list of vectors for each query, and ops_cpu_info_nce.cpp the kernel of a whole loss.
//
// The functions fill the structs of kernels/cpu from tensors and do no arithmetic. Only torch's stable ABI is used, so
// one build works with every torch from 2.10 on. The Python module has the functions isa(), isa_for(query, keys) and
// set_isa(name).
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "csrc/torch/boxing.h"
#include "csrc/torch/cpu_params.h"
#include "kernels/cpu/codes.h"
#include "kernels/cpu/count_negatives.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/logsumexp.h"
#include "kernels/cpu/logsumexp_grad_keys.h"
#include "kernels/cpu/logsumexp_window.h"
#include "kernels/cpu/maxsim.h"
#include "kernels/cpu/mine_hardest.h"
#include "kernels/cpu/rank_thresholds.h"
#include "kernels/cpu/softplus_sum.h"
#include "kernels/cpu/softplus_sum_grad_keys.h"

namespace negmine {
namespace {

using checks::floats;
using checks::longs;
using checks::new_floats;
using checks::new_longs;
using checks::OptionalTensor;
using checks::ScalarType;
using checks::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> logsumexp(
    const Tensor& query, const Tensor& negative_keys, const Tensor& scales, const OptionalTensor& pivot, bool want_mean,
    int64_t N, const OptionalTensor& ranks, const PoolArguments& pool) {
  // Checks.
  const char* op = "logsumexp";
  const Scored in(op, query, negative_keys, pool);
  const Tensor factors = checks::scales(op, scales, query);
  const int64_t S = factors.size(0);
  const OptionalTensor pivots = checks::vector(op, "pivot", pivot, ScalarType::Float, in.B, query);
  const OptionalTensor asked = checks::rank_pairs(op, ranks, in.B, query);
  checks::mined_or_ranked(op, N, asked.has_value());
  // Outputs.
  Tensor lse = new_floats(query, {S, in.B});
  Tensor mean = new_floats(query, {S, want_mean ? in.B : 0, in.D});
  Tensor num_kept = new_longs(query, {in.B});
  Tensor num_above = new_longs(query, {in.B});
  Tensor scores = new_floats(query, {in.B, N});
  Tensor index = new_longs(query, {in.B, N});
  Tensor sort_keys = new_longs(query, {in.B, asked.has_value() ? 2 : 0});
  // Params.
  auto p = in.params<cpu::LogsumexpParams>();
  p.scales = S;
  p.scale = floats(factors);
  p.pivot = floats(pivots);
  p.lse = output<float>(lse);
  p.mean = want_mean ? output<float>(mean) : nullptr;
  p.num_kept = output<int64_t>(num_kept);
  p.num_above = output<int64_t>(num_above);
  // Run.
  if (asked.has_value()) {
    cpu::logsumexp_between(p, longs(asked), output<int64_t>(sort_keys), in.threads());
  } else if (N > 0) {
    auto mined = in.params<cpu::MineHardestParams>();
    mined.N = N;
    mined.scores = output<float>(scores);
    mined.index = output<int64_t>(index);
    cpu::logsumexp_mine(p, mined, in.threads());
  } else {
    cpu::logsumexp(p, in.threads());
  }
  return {lse, mean, num_kept, num_above, scores, index, sort_keys};
}

std::tuple<Tensor, Tensor, Tensor> prefix_logsumexp(const Tensor& query, const Tensor& negative_keys,
                                                    const std::vector<int64_t>& widths, const Tensor& scale,
                                                    bool want_mean, const PoolArguments& pool) {
  // Checks.
  const char* op = "prefix_logsumexp";
  const Scored in(op, query, negative_keys, pool);
  checks::require(!pool.lower && !pool.upper, op, ": lower and upper are not supported.");
  const int64_t W = static_cast<int64_t>(widths.size());
  checks::require(W >= 1 && W <= cpu::kMostWidths, op, ": widths must be 1 to ", cpu::kMostWidths, " numbers, got ", W,
                  ".");
  for (int64_t i = 0, before = 0; i < W; before = widths[i++]) {
    checks::require(widths[i] > before && widths[i] <= in.D, op, ": widths must ascend from 1 to D = ", in.D, ", got ",
                    widths[i], " after ", before, ".");
  }
  const Tensor factor = checks::scalar(op, "scale", scale, ScalarType::Float, query);
  // Outputs.
  Tensor lse = new_floats(query, {W, in.B});
  Tensor mean = new_floats(query, {W, want_mean ? in.B : 0, in.D});
  Tensor num_kept = new_longs(query, {in.B});
  // Params.
  auto p = in.params<cpu::LogsumexpParams>();
  p.scales = W;
  p.widths = widths.data();
  p.scale = floats(factor);
  p.lse = output<float>(lse);
  p.mean = want_mean ? output<float>(mean) : nullptr;
  p.num_kept = output<int64_t>(num_kept);
  // Run.
  cpu::logsumexp(p, in.threads());
  return {lse, mean, num_kept};
}

// The memory of a gradient (rows, columns), after setting the rows that are not valid (from num_rows on) to zero.
float* zero_invalid_rows(Tensor& gradient, const Scored& in, int64_t columns) {
  float* out = output<float>(gradient);
  std::fill_n(out + in.K * columns, (in.rows - in.K) * columns, 0.0f);
  return out;
}

// The gradient with respect to the keys (rows, D), or if not of_keys to the bias (rows,).
Tensor logsumexp_grad(const char* op, bool of_keys, const Tensor& query, const Tensor& negative_keys,
                      const Tensor& scale, const Tensor& lse, const Tensor& weight, const PoolArguments& pool) {
  // Checks.
  const Scored in(op, query, negative_keys, pool);
  const Tensor factor = checks::scalar(op, "scale", scale, ScalarType::Float, query);
  const Tensor sums = checks::vector(op, "lse", lse, ScalarType::Float, in.B, query);
  const Tensor weights = checks::vector(op, "weight", weight, ScalarType::Float, in.B, query);
  // Outputs.
  Tensor gradient = of_keys ? new_floats(query, {in.rows, in.D}) : new_floats(query, {in.rows});
  // Params.
  auto p = in.params<cpu::LogsumexpGradKeysParams>();
  p.scale = floats(factor);
  p.lse = floats(sums);
  p.weight = floats(weights);
  (of_keys ? p.grad_keys : p.grad_bias) = zero_invalid_rows(gradient, in, of_keys ? in.D : 1);
  // Run.
  cpu::logsumexp_grad_keys(p, in.threads());
  return gradient;
}

Tensor logsumexp_grad_keys(const Tensor& query, const Tensor& negative_keys, const Tensor& scale, const Tensor& lse,
                           const Tensor& weight, const PoolArguments& pool) {
  return logsumexp_grad("logsumexp_grad_keys", true, query, negative_keys, scale, lse, weight, pool);
}

Tensor logsumexp_grad_bias(const Tensor& query, const Tensor& negative_keys, const Tensor& scale, const Tensor& lse,
                           const Tensor& weight, const PoolArguments& pool) {
  return logsumexp_grad("logsumexp_grad_bias", false, query, negative_keys, scale, lse, weight, pool);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> softplus_sum(const Tensor& query, const Tensor& negative_keys,
                                                        const Tensor& scale, const Tensor& offset,
                                                        bool want_sigmoid_keys, const PoolArguments& pool) {
  // Checks.
  const char* op = "softplus_sum";
  const Scored in(op, query, negative_keys, pool);
  const Tensor factor = checks::scalar(op, "scale", scale, ScalarType::Float, query);
  const Tensor shift = checks::scalar(op, "offset", offset, ScalarType::Float, query);
  // Outputs.
  Tensor total = new_floats(query, {in.B});
  Tensor sigmoid_keys = new_floats(query, {want_sigmoid_keys ? in.B : 0, in.D});
  Tensor sigmoid_sum = new_floats(query, {in.B});
  Tensor num_kept = new_longs(query, {in.B});
  // Params.
  auto p = in.params<cpu::SoftplusSumParams>();
  p.scale = floats(factor);
  p.offset = floats(shift);
  p.total = output<float>(total);
  p.sigmoid_keys = want_sigmoid_keys ? output<float>(sigmoid_keys) : nullptr;
  p.sigmoid_sum = output<float>(sigmoid_sum);
  p.num_kept = output<int64_t>(num_kept);
  // Run.
  cpu::softplus_sum(p, in.threads());
  return {total, sigmoid_keys, sigmoid_sum, num_kept};
}

// The gradient with respect to the keys (rows, D), or if not of_keys to the bias (rows,).
Tensor softplus_sum_grad(const char* op, bool of_keys, const Tensor& query, const Tensor& negative_keys,
                         const Tensor& scale, const Tensor& offset, const Tensor& weight, const PoolArguments& pool) {
  // Checks.
  const Scored in(op, query, negative_keys, pool);
  const Tensor factor = checks::scalar(op, "scale", scale, ScalarType::Float, query);
  const Tensor shift = checks::scalar(op, "offset", offset, ScalarType::Float, query);
  const Tensor weights = checks::vector(op, "weight", weight, ScalarType::Float, in.B, query);
  // Outputs.
  Tensor gradient = of_keys ? new_floats(query, {in.rows, in.D}) : new_floats(query, {in.rows});
  // Params.
  auto p = in.params<cpu::LogsumexpGradKeysParams>();
  p.scale = floats(factor);
  p.weight = floats(weights);
  (of_keys ? p.grad_keys : p.grad_bias) = zero_invalid_rows(gradient, in, of_keys ? in.D : 1);
  // Run.
  cpu::softplus_sum_grad_keys(p, floats(shift), in.threads());
  return gradient;
}

Tensor softplus_sum_grad_keys(const Tensor& query, const Tensor& negative_keys, const Tensor& scale,
                              const Tensor& offset, const Tensor& weight, const PoolArguments& pool) {
  return softplus_sum_grad("softplus_sum_grad_keys", true, query, negative_keys, scale, offset, weight, pool);
}

Tensor softplus_sum_grad_bias(const Tensor& query, const Tensor& negative_keys, const Tensor& scale,
                              const Tensor& offset, const Tensor& weight, const PoolArguments& pool) {
  return softplus_sum_grad("softplus_sum_grad_bias", false, query, negative_keys, scale, offset, weight, pool);
}

std::tuple<Tensor, Tensor, Tensor> mine_hardest(const Tensor& query, const Tensor& negative_keys, int64_t N,
                                                bool want_count, const PoolArguments& pool) {
  // Checks.
  const char* op = "mine_hardest";
  const Scored in(op, query, negative_keys, pool);
  checks::require(N >= 0, op, ": N must not be negative, got ", N, ".");
  // Outputs.
  Tensor scores = new_floats(query, {in.B, N});
  Tensor index = new_longs(query, {in.B, N});
  Tensor num_kept = new_longs(query, {want_count ? in.B : 0});
  // Params.
  auto p = in.params<cpu::MineHardestParams>();
  p.N = N;
  p.scores = output<float>(scores);
  p.index = output<int64_t>(index);
  p.num_kept = want_count ? output<int64_t>(num_kept) : nullptr;
  // Run.
  cpu::mine_hardest(p, in.threads());
  return {scores, index, num_kept};
}

std::tuple<Tensor, Tensor, Tensor> mine_gathered(const Tensor& query, const Tensor& negative_keys, const Tensor& listed,
                                                 int64_t N, const OptionalTensor& max_score) {
  // Checks.
  const char* op = "mine_gathered";
  const Scored in(op, query, negative_keys, PoolArguments());
  const Tensor columns = checks::index_matrix(op, "index", listed, in.B, query);
  const OptionalTensor highest = checks::vector(op, "max_score", max_score, ScalarType::Float, in.B, query);
  const int64_t M = columns.size(1);
  checks::require(N >= 1, op, ": N must be at least 1, got ", N, ".");
  const int64_t* column = longs(columns);  // (B, M)
  for (int64_t i = 0; i < in.B * M; ++i) {
    checks::require(column[i] >= -1 && column[i] < in.K, op, ": index must hold rows of negative_keys in [0, ", in.K,
                    ") or -1, got ", column[i], ".");
  }
  // Outputs.
  Tensor scores = new_floats(query, {in.B, N});
  Tensor index = new_longs(query, {in.B, N});
  Tensor num_kept = new_longs(query, {in.B});
  // Params.
  auto p = in.params<cpu::MineHardestParams>();
  p.N = N;
  p.scores = output<float>(scores);
  p.index = output<int64_t>(index);
  p.num_kept = output<int64_t>(num_kept);
  // Run.
  const double products = static_cast<double>(in.B) * static_cast<double>(M) * static_cast<double>(in.D);
  cpu::mine_gathered(p, column, M, floats(highest), torch_threads(products));
  return {scores, index, num_kept};
}

std::tuple<Tensor, Tensor, Tensor> round_to_codes(const Tensor& vectors) {
  // Checks.
  const Tensor in = checks::matrix("round_to_codes", "vectors", vectors, "(M, D)");
  // Params.
  cpu::RoundToCodesParams p;
  p.vectors = matrix_of(in);
  p.M = in.size(0);
  p.D = in.size(1);
  p.width = (p.D + 3) / 4 * 4;
  // Outputs.
  Tensor codes = checks::new_codes(in, p.M, p.width);
  Tensor scale = new_floats(in, {p.M});
  Tensor norms = new_floats(in, {2, p.M});
  p.codes = output<uint8_t>(codes);
  p.scale = output<float>(scale);
  p.norm = output<float>(norms);
  p.error = p.norm + p.M;
  // Run.
  cpu::round_to_codes(p, torch_threads(8.0 * static_cast<double>(p.M) * static_cast<double>(p.D)));
  return {codes, scale, norms};
}

std::tuple<Tensor, Tensor, Tensor> mine_hardest_codes(const Tensor& query, const Tensor& query_scale,
                                                      const Tensor& negative_keys, const Tensor& negative_scale,
                                                      int64_t N, const PoolArguments& pool) {
  // Checks.
  const char* op = "mine_hardest_codes";
  checks::require(cpu::code_kernels() != nullptr, op, ": this processor cannot multiply codes (AVX512-VNNI).");
  const Tensor codes = checks::codes(op, "query", query, "(B, C)");
  const Tensor keys = checks::codes(op, "negative_keys", negative_keys, "(K, C)");
  checks::same_width(op, codes, keys);
  const PoolTensors given(op, codes, keys, pool);
  const int64_t B = codes.size(0), rows = keys.size(0);
  const Tensor of_query = checks::vector(op, "query_scale", query_scale, ScalarType::Float, B, query);
  const Tensor of_keys = checks::vector(op, "negative_scale", negative_scale, ScalarType::Float, rows, query);
  checks::require(N >= 0, op, ": N must not be negative, got ", N, ".");
  // Outputs.
  Tensor scores = new_floats(query, {B, N});
  Tensor index = new_longs(query, {B, N});
  Tensor num_kept = new_longs(query, {B});
  // Params.
  cpu::MineHardestParams p;
  p.query = matrix_of(codes);
  p.query.scale = floats(of_query);
  p.negative_keys = matrix_of(keys);
  p.negative_keys.scale = floats(of_keys);
  p.B = B;
  p.K = given.num_rows.has_value() ? std::clamp<int64_t>(*longs(given.num_rows), 0, rows) : rows;
  p.D = codes.size(1);
  p.N = N;
  p.pool = pool_of(given);
  p.scores = output<float>(scores);
  p.index = output<int64_t>(index);
  p.num_kept = output<int64_t>(num_kept);
  // Run.
  const double products = static_cast<double>(B) * static_cast<double>(p.K) * static_cast<double>(p.D);
  cpu::mine_hardest(p, torch_threads(products));
  return {scores, index, num_kept};
}

Tensor rank_thresholds(const Tensor& query, const Tensor& negative_keys, const Tensor& ranks,
                       const PoolArguments& pool) {
  // Checks.
  const char* op = "rank_thresholds";
  const Scored in(op, query, negative_keys, pool);
  const Tensor asked = checks::index_matrix(op, "ranks", ranks, in.B, query);
  // Outputs.
  Tensor sort_keys = new_longs(query, {in.B, asked.size(1)});
  // Params.
  auto p = in.params<cpu::RankThresholdsParams>();
  p.R = asked.size(1);
  p.ranks = longs(asked);
  p.sort_keys = output<int64_t>(sort_keys);
  // Run.
  cpu::rank_thresholds(p, in.threads());
  return sort_keys;
}

Tensor count_negatives(const Tensor& query, const Tensor& negative_keys, const PoolArguments& pool) {
  // Checks.
  const Scored in("count_negatives", query, negative_keys, pool);
  // Outputs.
  Tensor count = new_longs(query, {in.B});
  // Params.
  auto p = in.params<cpu::CountNegativesParams>();
  p.count = output<int64_t>(count);
  // Run.
  cpu::count_negatives(p, in.threads());
  return count;
}

// Token vectors (rows, tokens, D) reshaped to (rows * tokens, D).
Tensor token_matrix(const char* op, const char* name, const Tensor& t, const char* wanted) {
  checks::require(t.dim() == 3, op, ": ", name, " must be ", wanted, ", got the shape ", checks::Shape{t}, ".");
  return checks::matrix(op, name, torch::stable::reshape(t, {t.size(0) * t.size(1), t.size(2)}), wanted);
}

std::tuple<Tensor, Tensor> maxsim(const Tensor& query, const Tensor& negative_keys, const OptionalTensor& query_lengths,
                                  const OptionalTensor& negative_lengths, bool want_index) {
  // Checks.
  const char* op = "maxsim";
  const Tensor tokens = token_matrix(op, "query", query, "(B, I, D)");
  const Tensor keys = token_matrix(op, "negative_keys", negative_keys, "(K, J, D)");
  checks::same_width(op, tokens, keys);
  const int64_t B = query.size(0), I = query.size(1), K = negative_keys.size(0), J = negative_keys.size(1);
  checks::require(I >= 1 && J >= 1, op, ": query (B, I, D) and negative_keys (K, J, D) must have tokens, got ",
                  checks::Shape{query}, " and ", checks::Shape{negative_keys}, ".");
  const OptionalTensor of_query = checks::vector(op, "query_lengths", query_lengths, ScalarType::Long, B, query);
  const OptionalTensor of_keys = checks::vector(op, "negative_lengths", negative_lengths, ScalarType::Long, K, query);
  // Outputs.
  Tensor scores = new_floats(query, {B, K});
  Tensor index = new_longs(query, {want_index ? B : 0, I, K});
  // Params.
  const cpu::MaxsimParams p{matrix_of(tokens),
                            matrix_of(keys),
                            B,
                            I,
                            K,
                            J,
                            tokens.size(1),
                            longs(of_query),
                            longs(of_keys),
                            output<float>(scores),
                            want_index ? output<int64_t>(index) : nullptr};
  // Run.
  cpu::maxsim(p, torch_threads(static_cast<double>(B * I) * static_cast<double>(K * J) * static_cast<double>(p.D)));
  return {scores, index};
}

STABLE_TORCH_LIBRARY_IMPL(negmine_cpu, CPU, m) {
  m.impl("logsumexp", boxed<&logsumexp>);
  m.impl("prefix_logsumexp", boxed<&prefix_logsumexp>);
  m.impl("logsumexp_grad_keys", boxed<&logsumexp_grad_keys>);
  m.impl("logsumexp_grad_bias", boxed<&logsumexp_grad_bias>);
  m.impl("softplus_sum", boxed<&softplus_sum>);
  m.impl("softplus_sum_grad_keys", boxed<&softplus_sum_grad_keys>);
  m.impl("softplus_sum_grad_bias", boxed<&softplus_sum_grad_bias>);
  m.impl("maxsim", boxed<&maxsim>);
  m.impl("mine_hardest", boxed<&mine_hardest>);
  m.impl("mine_gathered", boxed<&mine_gathered>);
  m.impl("mine_hardest_codes", boxed<&mine_hardest_codes>);
  m.impl("round_to_codes", boxed<&round_to_codes>);
  m.impl("rank_thresholds", boxed<&rank_thresholds>);
  m.impl("count_negatives", boxed<&count_negatives>);
}

PyObject* py_isa(PyObject*, PyObject*) { return PyUnicode_FromString(cpu::isa()); }

PyObject* py_isa_for(PyObject*, PyObject* arguments) {
  const char *query = nullptr, *keys = nullptr;
  if (PyArg_ParseTuple(arguments, "ss", &query, &keys) == 0) return nullptr;
  const char* name = cpu::isa_for(query, keys);
  if (name != nullptr) return PyUnicode_FromString(name);
  PyErr_SetString(PyExc_ValueError, "isa_for: query and keys must be float32, bfloat16 or float16, or both uint8.");
  return nullptr;
}

PyObject* py_set_isa(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (text == nullptr) return nullptr;
  return PyBool_FromLong(cpu::set_isa(text));
}

PyMethodDef methods[] = {
    {"isa", py_isa, METH_NOARGS,
     "The instruction set that set_isa() forced, or '' if it is chosen by the storage types."},
    {"isa_for", py_isa_for, METH_VARARGS,
     "The instruction set for queries and keys with these dtypes: float32, bfloat16 or float16, or both uint8."},
    {"set_isa", py_set_isa, METH_O,
     "Use amxbf16, avx512bf16, avx512, avx2 or portable for all storage types, or with '' choose by storage types "
     "again. Returns False, and changes nothing, if the processor does not support it."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ops_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace negmine

extern "C" PyMODINIT_FUNC PyInit__ops_cpu() { return PyModule_Create(&negmine::module); }
