// C functions with which ctypes calls kernels/cuda/logsumexp_grad_keys.cu: the planned number of splits; and the op,
// with its arguments in the order of its params struct, any number of splits, and blocks in either order.
#include "kernels/cuda/logsumexp_grad_keys.cu"

using namespace negmine::cuda;

extern "C" int64_t emulated_splits(int64_t B, int64_t K, int64_t D, int64_t processors) {
  return plan_grad_keys(B, K, D, processors).splits;
}

extern "C" int64_t emulated_workspace(int64_t B, int64_t K, int64_t D, int64_t processors) {
  return plan_grad_keys(B, K, D, processors).workspace;
}

extern "C" int64_t emulated_boxes() { return boxes; }

extern "C" int emulated_logsumexp_grad_keys(int64_t B, int64_t K, int64_t D, const void* query,
                                            const void* negative_keys, int64_t query_stride,
                                            int64_t negative_keys_stride, int32_t storage, const float* scale,
                                            const float* lse, const float* weight, const uint8_t* key_mask,
                                            const uint8_t* pair_mask, int64_t pair_mask_stride,
                                            const int64_t* query_ids, const int64_t* negative_ids,
                                            const int64_t* query_labels, const int64_t* negative_labels,
                                            bool same_label, const int64_t* lower, const int64_t* upper,
                                            const int64_t* num_rows, int64_t splits, bool backwards, float* grad_keys) {
  const int64_t bytes = workspace_of(splits, B, K, D);
  std::vector<char>& room = emulator::room;
  room.assign(static_cast<size_t>(bytes) + 16, '\xFF');
  char* workspace = room.data() + (16 - reinterpret_cast<uintptr_t>(room.data()) % 16) % 16;
  const LogSumExpGradKeysParams params = {
      .B = B,
      .K = K,
      .D = D,
      .query = query,
      .negative_keys = negative_keys,
      .query_stride = query_stride,
      .negative_keys_stride = negative_keys_stride,
      .storage = static_cast<Storage>(storage),
      .scale = scale,
      .lse = lse,
      .weight = weight,
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
      .plan = {.splits = splits, .workspace = bytes},
      .grad_keys = grad_keys,
      .workspace = workspace,
  };
  emulator::backwards = backwards;
  return logsumexp_grad_keys(params, nullptr);
}
