// kernels/cuda/mix_negatives.cu behind a C function, for ctypes: the arguments of the op in the order of its params
// struct.
#include "kernels/cuda/mix_negatives.cu"

extern "C" int emulated_mix_negatives(int64_t B, int64_t N, int64_t D, const void* query, const void* negative_keys,
                                      const int64_t* hard_index, int64_t query_stride, int64_t negative_keys_stride,
                                      int64_t hard_index_stride, int32_t query_storage, int32_t negative_keys_storage,
                                      int64_t pairs, int64_t with_query, float pair_low, float pair_high,
                                      float query_low, float query_high, bool distinct, const float* quantiles,
                                      uint32_t seed, uint32_t step, int64_t row_offset, void* vectors, int64_t* parents,
                                      float* coefficients) {
  using negmine::cuda::Storage;
  const negmine::cuda::MixNegativesParams params = {
      .B = B,
      .N = N,
      .D = D,
      .query = query,
      .negative_keys = negative_keys,
      .hard_index = hard_index,
      .query_stride = query_stride,
      .negative_keys_stride = negative_keys_stride,
      .hard_index_stride = hard_index_stride,
      .query_storage = static_cast<Storage>(query_storage),
      .negative_keys_storage = static_cast<Storage>(negative_keys_storage),
      .pairs = pairs,
      .with_query = with_query,
      .pair_low = pair_low,
      .pair_high = pair_high,
      .query_low = query_low,
      .query_high = query_high,
      .distinct = distinct,
      .quantiles = quantiles,
      .seed = seed,
      .step = step,
      .row_offset = row_offset,
      .vectors = vectors,
      .parents = parents,
      .coefficients = coefficients,
  };
  return negmine::cuda::mix_negatives(params, nullptr);
}
