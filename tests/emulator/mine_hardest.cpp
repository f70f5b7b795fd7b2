// C functions with which ctypes calls kernels/cuda/mine_hardest.cu: the op, with its arguments in the order of its
// params struct; its plan; one product of each kind; and the scores of all pairs, with each way to hold queries.
#include "kernels/cuda/mine_hardest.cu"

using namespace negmine::cuda;

// plan (7,): sample, sample_rank, capacity, rows, splits, room, workspace.
extern "C" void emulated_plan(int64_t B, int64_t K, int64_t N, int64_t processors, int64_t least_sample,
                              int64_t* numbers, bool* fitting) {
  const MiningPlan plan = plan_mining(B, K, N, processors, least_sample);
  const int64_t all[] = {plan.sample, plan.sample_rank, plan.capacity, plan.rows,
                         plan.splits, plan.room,        plan.workspace};
  std::copy(std::begin(all), std::end(all), numbers);
  *fitting = fits(plan, N);
}

extern "C" int emulated_mine_hardest(int64_t B, int64_t K, int64_t D, int64_t N, const void* query,
                                     const void* negative_keys, int64_t query_stride, int64_t negative_keys_stride,
                                     int32_t storage, const uint8_t* key_mask, const uint8_t* pair_mask,
                                     int64_t pair_mask_stride, const int64_t* query_ids, const int64_t* negative_ids,
                                     const int64_t* query_labels, const int64_t* negative_labels, bool same_label,
                                     const int64_t* lower, const int64_t* upper, const int64_t* num_rows,
                                     const int64_t* plan, float* scores, int64_t* index, void* workspace) {
  const MineHardestParams params = {
      .B = B,
      .K = K,
      .D = D,
      .N = N,
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
      .plan = {.sample = plan[0],
               .sample_rank = plan[1],
               .capacity = plan[2],
               .rows = plan[3],
               .splits = plan[4],
               .room = plan[5],
               .workspace = plan[6]},
      .scores = scores,
      .index = index,
      .workspace = workspace,
  };
  return mine_hardest(params, nullptr);
}

extern "C" int64_t emulated_boxes() { return boxes; }

extern "C" int64_t emulated_terms() { return terms; }

// product (16, 8) fp32 = left (16, 16) times the transpose of right (8, 16), bf16 or fp16, by one warp. Fragments are
// filled according to the formulas in ptx.cuh.
template <Storage kStorage>
void one_product(const uint16_t* left, const uint16_t* right, float* product) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t a[4], b[2];
  float d[4] = {};
  for (int i = 0; i < 4; ++i) std::memcpy(&a[i], left + 16 * (g + 8 * (i % 2)) + 2 * t + 8 * (i / 2), 4);
  for (int i = 0; i < 2; ++i) std::memcpy(&b[i], right + 16 * g + 2 * t + 8 * i, 4);
  multiply<kStorage>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) product[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = d[i];
}

extern "C" int emulated_product(int32_t storage, const uint16_t* left, const uint16_t* right, float* product) {
  cudaLaunchConfig_t launch = {};
  launch.blockDim = dim3(32);
  const bool bf16 = static_cast<Storage>(storage) == Storage::kBFloat16;
  return cudaLaunchKernelEx(&launch, bf16 ? one_product<Storage::kBFloat16> : one_product<Storage::kFloat16>, left,
                            right, product);
}

// product (64, 64) fp32 = left (64, 16) times the transpose of right (64, 16), by one warpgroup. Fragments are filled
// according to the formulas in ptx_sm90.cuh, and right is in shared memory as the first 16 columns of a slab.
template <Storage kStorage>
void one_warpgroup_product(const uint16_t* left, const uint16_t* right, float* product) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = threadIdx.x; i < 64 * 16; i += 128) {
    const int row = i / 16, column = i % 16;
    std::memcpy(shared_memory() + 128 * row + 16 * (column / 8 ^ row % 8) + 2 * (column % 8), right + i, 2);
  }
  show_to_products();
  __syncthreads();
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&a[i], left + 16 * (16 * warp + g + 8 * (i % 2)) + 2 * t + 8 * (i / 2), 4);
  }
  float d[2][1][4][4];
  begin_products();
  multiply_later<kStorage, false>(d, 0, a, descriptor_of(shared_address(shared_memory())));
  end_products();
  wait_for_products(d);
  for (int n = 0; n < 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      product[64 * (16 * warp + g + 8 * (i / 2)) + 8 * n + 2 * t + i % 2] = d[n / 4][0][n % 4][i];
    }
  }
}

extern "C" int emulated_warpgroup_product(int32_t storage, const uint16_t* left, const uint16_t* right,
                                          float* product) {
  cudaLaunchConfig_t launch = {};
  launch.blockDim = dim3(128);
  launch.dynamicSmemBytes = 64 * 128;
  const bool bf16 = static_cast<Storage>(storage) == Storage::kBFloat16;
  return cudaLaunchKernelEx(&launch,
                            bf16 ? one_warpgroup_product<Storage::kBFloat16> : one_warpgroup_product<Storage::kFloat16>,
                            left, right, product);
}

// product (64, 32 kChunks) fp32 = left (64, 16) times right (16, 32 kChunks), by one warpgroup. right is in shared
// memory as rows `first` to first + 15 of a tile whose slabs begin every `slab_bytes` bytes.
template <Storage kStorage, int kChunks>
void one_sum_of_rows(const uint16_t* left, const uint16_t* right, int first, int apart, float* product) {
  constexpr int kWidth = 32 * kChunks;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = threadIdx.x; i < 16 * kWidth; i += 128) {
    const int row = first + i / kWidth, column = i % kWidth;
    const int place = column / 64 * apart + 128 * row + 16 * (column % 64 / 8 ^ row % 8) + 2 * (column % 8);
    if (row < 64) std::memcpy(shared_memory() + place, right + i, 2);  // past the tile is where products may not read
  }
  show_to_products();
  __syncthreads();
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&a[i], left + 16 * (16 * warp + g + 8 * (i % 2)) + 2 * t + 8 * (i / 2), 4);
  }
  float d[kChunks][1][4][4] = {};
  begin_products();
  add_rows_later<kStorage>(d, 0, a, rows_descriptor(shared_address(shared_memory()) + 128 * first, apart));
  end_products();
  wait_for_products(d);
  for (int n = 0; n < 4 * kChunks; ++n) {
    for (int i = 0; i < 4; ++i) {
      product[kWidth * (16 * warp + g + 8 * (i / 2)) + 8 * n + 2 * t + i % 2] = d[n / 4][0][n % 4][i];
    }
  }
}

extern "C" int emulated_sum_of_rows(int32_t storage, const uint16_t* left, const uint16_t* right, int32_t width,
                                    int32_t first, int32_t apart, float* product) {
  cudaLaunchConfig_t launch = {};
  launch.blockDim = dim3(128);
  launch.dynamicSmemBytes = width / 64 * 64 * 128;
  const auto start = [&](auto of) {
    constexpr Storage kOf = decltype(of)::value;
    auto* kernel = width == 64    ? one_sum_of_rows<kOf, 2>
                   : width == 128 ? one_sum_of_rows<kOf, 4>
                                  : one_sum_of_rows<kOf, 8>;
    return cudaLaunchKernelEx(&launch, kernel, left, right, first, apart, product);
  };
  return static_cast<Storage>(storage) == Storage::kBFloat16
             ? start(std::integral_constant<Storage, Storage::kBFloat16>())
             : start(std::integral_constant<Storage, Storage::kFloat16>());
}

// scores (B, K) by one block, for B <= 64 kSixteens, with each way to hold queries and to take chunks.
template <Storage kStorage, int kSixteens, bool kShared, int kAtOnce>
void all_scores(Rows query, Rows keys, int64_t B, int K, float* scores) {
  constexpr int kSteps = 8, kQueryBytes = kSixteens * Tiles<kSteps>::kTileBytes;
  const auto use = [&](int column, const ScoresOf<kSixteens>& s, SharedAddress) {
    for (int i = 0; i < 2 * kSixteens; ++i) {
      for (int j = 0; j < 8; ++j) {
        const int row = row_of<kSixteens>(i), k = column + 8 * (j / 2) + 2 * (threadIdx.x % 4) + j % 2;
        if (row < B && k < K) scores[row * K + k] = s[i / 2][j / 2][i % 2 * 2 + j % 2];
      }
    }
  };
  const auto all = [&](const auto& held, char* ring) {
    const auto find = [&](int column) { return column < K ? int64_t{column} : int64_t{-1}; };
    stream<kStorage, kSteps, kSixteens, kTwoNaNs, kAtOnce>(held, ring, keys, 0, 1, K, true, find, use);
  };
  if constexpr (kShared) {
    gather_queries<kSteps, kSixteens>(shared_memory(), query, 0, B);
    all(SharedQueries<kSteps, kSixteens>(shared_memory()), shared_memory() + kQueryBytes);
  } else {
    uint32_t fragments[kSixteens][kSteps][4];
    load_queries<kSteps>(fragments, shared_memory(), query, 0, B);
    all(fragments, shared_memory());
  }
}

extern "C" int emulated_scores(int32_t sixteens, bool shared, int32_t at_once, int64_t B, int64_t K, int64_t D,
                               const void* query, const void* keys, float* scores) {
  cudaLaunchConfig_t launch = {};
  launch.blockDim = dim3(kThreads);
  launch.dynamicSmemBytes = 2 * Tiles<8>::kTileBytes + Tiles<8>::kBytes;
  constexpr Storage kStorage = Storage::kBFloat16;
  auto* kernel = all_scores<kStorage, 2, false, 2>;
  if (sixteens == 2 && !shared && at_once == 1) kernel = all_scores<kStorage, 2, false, 1>;
  if (sixteens == 2 && shared && at_once == 2) kernel = all_scores<kStorage, 2, true, 2>;
  if (sixteens == 2 && shared && at_once == 1) kernel = all_scores<kStorage, 2, true, 1>;
  if (sixteens == 1 && !shared && at_once == 2) kernel = all_scores<kStorage, 1, false, 2>;
  if (sixteens == 1 && !shared && at_once == 1) kernel = all_scores<kStorage, 1, false, 1>;
  if (sixteens == 1 && shared && at_once == 2) kernel = all_scores<kStorage, 1, true, 2>;
  if (sixteens == 1 && shared && at_once == 1) kernel = all_scores<kStorage, 1, true, 1>;
  return cudaLaunchKernelEx(&launch, kernel, rows_of(query, D, D), rows_of(keys, D, D), B, static_cast<int>(K), scores);
}
