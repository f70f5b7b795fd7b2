// The CUDA ops that walk one query's own vectors: synthetic negatives.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "csrc/torch/cuda_params.h"
#include "kernels/cuda/mix_negatives.h"

namespace negmine {
namespace {

using checks::floats;
using checks::longs;
using checks::new_empty;
using checks::OptionalTensor;
using checks::ScalarType;
using checks::Tensor;

// hard_index must hold rows of negative_keys: a GPU's memory is not read here to see whether it does.
std::tuple<Tensor, Tensor, Tensor> mix_negatives(const Tensor& query, const Tensor& negative_keys,
                                                 const Tensor& hard_index, int64_t pairs, int64_t with_query,
                                                 double pair_low, double pair_high, double query_low, double query_high,
                                                 bool distinct, const OptionalTensor& quantiles, int64_t seed,
                                                 int64_t step, int64_t row_offset) {
  // Checks.
  const char* op = "mix_negatives";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Tensor q = checks::matrix(op, "query", query, "(B, D)");                     // (B, D)
  const Tensor keys = checks::matrix(op, "negative_keys", negative_keys, "(K, D)");  // (K, D)
  checks::same_width(op, q, keys);
  const Tensor index = checks::index_matrix(op, "hard_index", hard_index, q.size(0), q);  // (B, N)
  const OptionalTensor table = checks::vector(op, "quantiles", quantiles, ScalarType::Float, 4097, q);
  checks::require(pairs >= 0 && with_query >= 0, op, ": pairs and with_query must not be negative, got ", pairs,
                  " and ", with_query, ".");
  const int64_t B = q.size(0), D = q.size(1), S = pairs + with_query;

  // Outputs.
  Tensor vectors = new_empty(q, {B, S, D});
  Tensor parents = new_empty(q, {B, S, 2}, ScalarType::Long);
  Tensor coefficients = new_empty(q, {B, S}, ScalarType::Float);

  // Params.
  const cuda::MixNegativesParams params = {
      .B = B,
      .N = index.size(1),
      .D = D,
      .query = q.data_ptr(),
      .negative_keys = keys.data_ptr(),
      .hard_index = longs(index),
      .query_stride = q.stride(0),
      .negative_keys_stride = keys.stride(0),
      .hard_index_stride = index.stride(0),
      .query_storage = storage_of(q),
      .negative_keys_storage = storage_of(keys),
      .pairs = pairs,
      .with_query = with_query,
      .pair_low = static_cast<float>(pair_low),
      .pair_high = static_cast<float>(pair_high),
      .query_low = static_cast<float>(query_low),
      .query_high = static_cast<float>(query_high),
      .distinct = distinct,
      .quantiles = floats(table),
      .seed = static_cast<uint32_t>(seed),
      .step = static_cast<uint32_t>(step),
      .row_offset = row_offset,
      .vectors = vectors.mutable_data_ptr(),
      .parents = static_cast<int64_t*>(parents.mutable_data_ptr()),
      .coefficients = static_cast<float*>(coefficients.mutable_data_ptr()),
  };

  set_device(op, q);
  require_launched(op, cuda::mix_negatives(params, current_stream(q)));
  return {vectors, parents, coefficients};
}

STABLE_TORCH_LIBRARY_IMPL(negmine, CUDA, m) { m.impl("mix_negatives", TORCH_BOX(&mix_negatives)); }

}  // namespace
}  // namespace negmine
