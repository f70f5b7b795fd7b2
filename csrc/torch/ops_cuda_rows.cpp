// The CUDA ops over the synthetic negatives of each query.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "csrc/torch/arguments.h"
#include "csrc/torch/boxing.h"
#include "csrc/torch/cuda_params.h"
#include "kernels/cuda/mix_logsumexp.h"
#include "kernels/cuda/mix_negatives.h"

namespace negmine {
namespace {

using checks::floats;
using checks::longs;
using checks::new_floats;
using checks::new_longs;
using checks::OptionalTensor;
using checks::ScalarType;
using checks::Tensor;

// The arguments that both ops have: query (B, D), negative_keys (K, D), hard_index (B, N) and the draws. The
// constructor checks them and makes their device current. It does not check that hard_index contains valid rows of
// negative_keys, because that would read GPU memory.
struct Mixed {
  Tensor query, negative_keys, hard_index;
  DrawTensors tensors;
  cuda::Mixing mixing;

  Mixed(const char* op, const Tensor& q, const Tensor& keys, const Tensor& hard, const DrawArguments& given)
      : query(checks::matrix(op, "query", q, "(B, D)")),
        negative_keys(checks::matrix(op, "negative_keys", keys, "(K, D)")),
        hard_index(checks::index_matrix(op, "hard_index", hard, query.size(0), query)),
        tensors(op, query, given) {
    checks::same_width(op, query, negative_keys);
    mixing = mixing_of(query, negative_keys, given, tensors);
    mixing.N = hard_index.size(1);
    mixing.hard_index = longs(hard_index);
    mixing.hard_index_stride = hard_index.stride(0);
    set_device(op, query);
  }
};

std::tuple<Tensor, Tensor, Tensor> mix_negatives(const Tensor& query, const Tensor& negative_keys,
                                                 const Tensor& hard_index, const DrawArguments& draws) {
  // Checks.
  const char* op = "mix_negatives";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Mixed in(op, query, negative_keys, hard_index, draws);

  // Outputs.
  const int64_t B = in.mixing.B, S = draws.S();
  Tensor vectors = checks::new_empty(in.query, {B, S, in.mixing.D}, checks::dtype_of(in.query));
  Tensor parents = new_longs(in.query, {B, S, 2});
  Tensor coefficients = new_floats(in.query, {B, S});

  // Params.
  const cuda::MixNegativesParams params = {
      .mixing = in.mixing,
      .vectors = vectors.mutable_data_ptr(),
      .parents = static_cast<int64_t*>(parents.mutable_data_ptr()),
      .coefficients = static_cast<float*>(coefficients.mutable_data_ptr()),
  };
  require_launched(op, cuda::mix_negatives(params, current_stream(in.query)));
  return {vectors, parents, coefficients};
}

std::tuple<Tensor, Tensor> mix_logsumexp(const Tensor& query, const Tensor& negative_keys, const Tensor& hard_index,
                                         const Tensor& scale, bool want_mean, const DrawArguments& draws) {
  // Checks.
  const char* op = "mix_logsumexp";
  require_on_gpu(op, query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Mixed in(op, query, negative_keys, hard_index, draws);
  const Tensor factor = checks::scalar(op, "scale", scale, ScalarType::Float, in.query);

  // Outputs.
  const int64_t B = in.mixing.B;
  Tensor lse = new_floats(in.query, {B});
  Tensor mean = new_floats(in.query, {want_mean ? B : 0, in.mixing.D});

  // Params.
  const cuda::MixLogSumExpParams params = {
      .mixing = in.mixing,
      .scale = floats(factor),
      .want_mean = want_mean,
      .lse = static_cast<float*>(lse.mutable_data_ptr()),
      .mean = static_cast<float*>(mean.mutable_data_ptr()),
  };
  require_launched(op, cuda::mix_logsumexp(params, current_stream(in.query)));
  return {lse, mean};
}

STABLE_TORCH_LIBRARY_IMPL(negmine_cuda, CUDA, m) {
  m.impl("mix_negatives", boxed<&mix_negatives>);
  m.impl("mix_logsumexp", boxed<&mix_logsumexp>);
}

}  // namespace
}  // namespace negmine
