// kernels/cuda/logsumexp.cu and info_nce.cu, which calls it, behind C functions, for ctypes: the splits, and the
// arguments of each op in the order of its params struct, with Mixing as a structure; splits as the caller likes.
#include "kernels/cuda/logsumexp.cu"

#include "kernels/cuda/info_nce.cu"

using namespace negmine::cuda;

extern "C" int64_t emulated_splits(int64_t B, int64_t K, int64_t D, bool want_mean, int64_t processors) {
  return plan_summing(B, K, D, want_mean, processors).splits;
}

extern "C" int64_t emulated_boxes() { return boxes; }

extern "C" int emulated_logsumexp(int64_t B, int64_t K, int64_t D, const void* query, const void* negative_keys,
                                  int64_t query_stride, int64_t negative_keys_stride, int32_t storage,
                                  const float* scale, const float* pivot, bool want_mean, const uint8_t* key_mask,
                                  const uint8_t* pair_mask, int64_t pair_mask_stride, const int64_t* query_ids,
                                  const int64_t* negative_ids, const int64_t* query_labels,
                                  const int64_t* negative_labels, bool same_label, const int64_t* lower,
                                  const int64_t* upper, const int64_t* num_rows, int64_t splits, float* lse,
                                  float* mean, int64_t* num_kept, int64_t* num_above) {
  const int64_t bytes = workspace_of(splits, B, D, want_mean);
  std::vector<char>& room = emulator::room;
  room.assign(static_cast<size_t>(bytes) + 16, '\xFF');
  char* workspace = room.data() + (16 - reinterpret_cast<uintptr_t>(room.data()) % 16) % 16;
  const LogSumExpParams params = {
      .B = B,
      .K = K,
      .D = D,
      .query = query,
      .negative_keys = negative_keys,
      .query_stride = query_stride,
      .negative_keys_stride = negative_keys_stride,
      .storage = static_cast<Storage>(storage),
      .scale = scale,
      .pivot = pivot,
      .want_mean = want_mean,
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
      .lse = lse,
      .mean = mean,
      .num_kept = num_kept,
      .num_above = num_above,
      .workspace = workspace,
  };
  return logsumexp(params, nullptr);
}

extern "C" int emulated_info_nce(int64_t B, int64_t K, int64_t D, const void* query, const void* negative_keys,
                                 int64_t query_stride, int64_t negative_keys_stride, int32_t storage,
                                 const float* scale, const float* pivot, bool want_gradient, const uint8_t* key_mask,
                                 const uint8_t* pair_mask, int64_t pair_mask_stride, const int64_t* query_ids,
                                 const int64_t* negative_ids, const int64_t* query_labels,
                                 const int64_t* negative_labels, bool same_label, const int64_t* lower,
                                 const int64_t* upper, const int64_t* num_rows, int64_t splits,
                                 const void* positive_key, int64_t positive_key_stride, int32_t positive_key_storage,
                                 bool decoupled, const Mixing* mixing, bool backwards, float* rows, float* d_query,
                                 float* d_scale, float* weight, float* lse, float* total, int64_t* num_kept,
                                 int64_t* num_above, int64_t* num_mixed) {
  emulator::backwards = backwards;
  const int64_t bytes = workspace_of(splits, B, D, want_gradient);
  std::vector<char>& room = emulator::room;
  room.assign(static_cast<size_t>(bytes) + 16, '\xFF');
  char* workspace = room.data() + (16 - reinterpret_cast<uintptr_t>(room.data()) % 16) % 16;
  const InfoNceParams params = {
      .sum = {.B = B,
              .K = K,
              .D = D,
              .query = query,
              .negative_keys = negative_keys,
              .query_stride = query_stride,
              .negative_keys_stride = negative_keys_stride,
              .storage = static_cast<Storage>(storage),
              .scale = scale,
              .pivot = pivot,
              .want_mean = want_gradient,
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
              .lse = lse,
              .mean = nullptr,
              .num_kept = num_kept,
              .num_above = num_above,
              .workspace = workspace},
      .positive_key = positive_key,
      .positive_key_stride = positive_key_stride,
      .positive_key_storage = static_cast<Storage>(positive_key_storage),
      .decoupled = decoupled,
      .mixing = mixing ? *mixing : Mixing{},
      .rows = rows,
      .d_query = d_query,
      .d_scale = d_scale,
      .weight = weight,
      .total = total,
      .num_mixed = num_mixed,
  };
  return info_nce(params, nullptr);
}
