// A C function with which ctypes calls kernels/cuda/count_negatives.cu: the op, with its arguments in the order of its
// params struct, planned for a given number of multiprocessors.
#include "kernels/cuda/count_negatives.cu"

using namespace negmine::cuda;

extern "C" int emulated_count_negatives(int64_t B, int64_t K, int64_t D, const void* query, const void* negative_keys,
                                        int64_t query_stride, int64_t negative_keys_stride, int32_t storage,
                                        const uint8_t* key_mask, const uint8_t* pair_mask, int64_t pair_mask_stride,
                                        const int64_t* query_ids, const int64_t* negative_ids,
                                        const int64_t* query_labels, const int64_t* negative_labels, bool same_label,
                                        const int64_t* lower, const int64_t* upper, const int64_t* num_rows,
                                        int64_t processors, int64_t* count) {
  const CountingPlan plan = plan_counting(B, K, processors);
  emulator::room.assign(static_cast<size_t>(plan.workspace), '\xF7');
  const CountNegativesParams params = {
      .B = B,
      .K = K,
      .D = D,
      .query = query,
      .negative_keys = negative_keys,
      .query_stride = query_stride,
      .negative_keys_stride = negative_keys_stride,
      .storage = static_cast<Storage>(storage),
      .pool = {.key_mask = key_mask,
               .pair_mask = pair_mask,
               .pair_mask_stride = pair_mask_stride,
               .query_ids = query_ids,
               .negative_ids = negative_ids,
               .query_labels = query_labels,
               .negative_labels = negative_labels,
               .same_label = same_label,
               .lower = lower,
               .upper = upper,
               .num_rows = num_rows},
      .plan = plan,
      .count = count,
      .workspace = emulator::room.data(),
  };
  return count_negatives(params, nullptr);
}
