// C functions with which ctypes calls kernels/cuda/rank_thresholds.cu: its plan; and the op, with its arguments in the
// order of its params struct.
#include "kernels/cuda/rank_thresholds.cu"

using namespace negmine::cuda;

// numbers (5,): sample, rows, splits, room, workspace.
extern "C" void emulated_plan(int64_t B, int64_t K, int64_t R, int64_t processors, int64_t least_sample,
                              int64_t* numbers, bool* fitting) {
  const RankingPlan plan = plan_ranking(B, K, R, processors, least_sample);
  const int64_t all[] = {plan.sample, plan.rows, plan.splits, plan.room, plan.workspace};
  std::copy(std::begin(all), std::end(all), numbers);
  *fitting = fits(plan);
}

extern "C" int emulated_rank_thresholds(int64_t B, int64_t K, int64_t D, int64_t R, const void* query,
                                        const void* negative_keys, int64_t query_stride, int64_t negative_keys_stride,
                                        int32_t storage, const int64_t* ranks, const uint8_t* key_mask,
                                        const uint8_t* pair_mask, int64_t pair_mask_stride, const int64_t* query_ids,
                                        const int64_t* negative_ids, const int64_t* query_labels,
                                        const int64_t* negative_labels, bool same_label, const int64_t* lower,
                                        const int64_t* upper, const int64_t* num_rows, const int64_t* plan,
                                        int64_t* sort_keys, void* workspace) {
  const RankThresholdsParams params = {
      .B = B,
      .K = K,
      .D = D,
      .R = R,
      .query = query,
      .negative_keys = negative_keys,
      .query_stride = query_stride,
      .negative_keys_stride = negative_keys_stride,
      .storage = static_cast<Storage>(storage),
      .ranks = ranks,
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
      .plan = {.sample = plan[0], .rows = plan[1], .splits = plan[2], .room = plan[3], .workspace = plan[4]},
      .sort_keys = sort_keys,
      .workspace = workspace,
  };
  return rank_thresholds(params, nullptr);
}

extern "C" int64_t emulated_terms() { return terms; }

// The offset of Ranking::missing in the workspace.
extern "C" int64_t emulated_missing_at(const int64_t* plan) {
  const Layout bytes = layout_of({plan[0], plan[1], plan[2], plan[3], plan[4]});
  return bytes.survivors + bytes.found + bytes.cuts + bytes.counted;
}
