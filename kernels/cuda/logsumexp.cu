// logsumexp in flash form: scores, their exponentials and the sum of keys that these weigh pass through registers
// alone.
//
//   sum      a block keeps a tile of queries and walks its part of the queue. A row's logits are taken relative to a
//            shift, which follows their maximum and moves only where one passes it by kHeadroom: so sums are rescaled
//            a few times a queue, and nothing overflows. Probabilities, rounded to the storage, multiply the same key
//            tile that scored.
//   merge    the parts of a row added in order, so the bits do not depend on timing
//
// A probability of 8 or 11 bits is enough for the mean but for its part along the query, which is the softmax mean of
// the scores and alone decides the gradient of the scale: that is summed beside it in fp32 and put right at the end.
//
// Idea: FlashAttention (Dao et al. 2022) with keys as values; the shift that stays: FlashAttention-4.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/logsumexp.h"
#include "kernels/cuda/order.cuh"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/visible.cuh"

namespace negmine::cuda {
namespace {

constexpr float kHeadroom = 8.0f;  // a power of 2 by which a logit may pass the shift: 2^8 is far from overflow in fp16
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kBlocks = 2;  // on a processor
constexpr int kMergeThreads = 256, kMergeWarps = kMergeThreads / kWarp;

// What the parts of the queue say of each row: logits in powers of 2.
struct Parts {
  float* shift;    // (splits, B)
  float* sum;      // (splits, B) of 2^(logit - shift)
  float* along;    // (splits, B) of the same times the score
  int32_t* kept;   // (splits, B)
  int32_t* above;  // (splits, B)
  float* mean;     // (splits, B, 16 kSteps) of 2^(logit - shift) times the key
};

// How many queries a block has and where they are: what registers are left beside the mean decides.
template <int kSteps, bool kWantMean>
struct Cut {
  static constexpr int kSixteens = kWantMean && kSteps > 8 ? 1 : 2;
  static constexpr bool kShared = kWantMean && kSteps >= 8;
  static constexpr int kRows = kThreads / kWarp * 16 * kSixteens;
  static constexpr int kRing = Tiles<kSteps>::kStages * Tiles<kSteps>::kTileBytes;
  static constexpr int kQueryBytes = kRows * 16 * Tiles<kSteps>::kPieces;
  static constexpr int kBytes = kShared ? kQueryBytes + kRing : std::max(kQueryBytes, kRing);
  static_assert(kBytes <= kSharedBytes);
};

template <int kSteps, int kSixteens, bool kShared>
struct Queries {  // in registers
  uint32_t fragments[kSixteens][kSteps][4];

  __device__ Queries(char* memory, const Rows& matrix, int64_t first, int64_t B) {
    load_queries<kSteps>(fragments, memory, matrix, first, B);
  }
  __device__ const auto& held() const { return fragments; }
};

template <int kSteps, int kSixteens>
struct Queries<kSteps, kSixteens, true> {
  SharedQueries<kSteps, kSixteens> rows;

  __device__ Queries(char* memory, const Rows& matrix, int64_t first, int64_t B)
      : rows((gather_queries<kSteps, kSixteens>(memory, matrix, first, B), memory)) {}
  __device__ const auto& held() const { return rows; }
};

template <Storage kStorage, int kSteps, bool kWantMean, bool kByPair>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_kernel(Inputs in, int B, const float* scale_at, const float* pivot, Parts parts) {
  using Cut = Cut<kSteps, kWantMean>;
  constexpr int kSixteens = Cut::kSixteens, kOwn = 2 * kSixteens, kPairs = kWantMean ? kSteps : 0;
  const int first = blockIdx.x * Cut::kRows, row = first + row_of<kSixteens>(0);
  const Queries<kSteps, kSixteens, Cut::kShared> query(shared_memory(), in.query, first, B);
  const int lane = lane_of_rows<kSteps>();
  const int t = threadIdx.x % kQuad;
  const float scale = *scale_at;
  const bool negated = scale < 0.0f;
  float factor = fabsf(scale) * kLog2E;
  if (factor < FLT_MIN) factor = FLT_MIN;  // the -inf of what is hidden stays what it is

  float mean[kSixteens][2 * kPairs + 1][4] = {};
  // Each lane of a quad keeps the books of one of their rows, the t-th: registers are few.
  float shift = -FLT_MAX, sum = 0.0f, along = 0.0f;
  int32_t kept = 0, above = 0;  // where all rows see the same columns, kept is of the lane's own columns

  uint32_t seen = 0;  // of the scores of a chunk, those in the pool
  bool partial = true;
  const auto before = [&](int chunk) {
    partial = kByPair || chunk + kChunk > in.K || in.pool.key_mask;
    seen = kSixteens == 2 ? 0xFFFFFFFFu : 0xFFFFu;
    if (partial) seen = visible<kSixteens, kByPair>(in, row, B, chunk + 2 * t);
  };
  const auto use = [&](int chunk, ScoresOf<kSixteens>& s, SharedAddress keys) {
    const int column = chunk + 2 * t;
    // use(r, j, a score) for every score of a lane.
    const auto each = [&](auto use) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
#pragma unroll
        for (int j = 0; j < 8; ++j) use(r, j, s[r / 2][j / 2][r % 2 * 2 + j % 2]);
      }
    };
    const auto of_row = [&](int r, const auto* values) { return row + 8 * r < B ? values[row + 8 * r] : 0; };
    if (pivot) {
      uint32_t higher = 0;
      float own[kOwn];
#pragma unroll
      for (int r = 0; r < kOwn; ++r) own[r] = of_row(r, pivot);
      each([&](int r, int j, float score) { higher |= score > own[r] ? bit_of(j) << shift_of(r) : 0u; });
      above += count_of_row<kSixteens>(higher & seen);
    }
    if constexpr (kByPair) seen = inside_bounds<kSixteens>(seen, in.pool, s, row, B, column);
    kept += kByPair ? count_of_row<kSixteens>(seen) : __popc(seen & kRowBits);
    if (negated) each([](int, int, float& score) { score = -score; });
    if (partial) {
      each([&](int r, int j, float& score) {
        if (!(seen & bit_of(j) << shift_of(r))) score = -INFINITY;
      });
    }

    float most[kOwn], shifts[kOwn], sums[kOwn] = {}, alongs[kOwn] = {};
    bool moves = false;
#pragma unroll
    for (int r = 0; r < kOwn; ++r) most[r] = -INFINITY, shifts[r] = __shfl_sync(kAllLanes, shift, r, kQuad);
    each([&](int r, int, float score) { most[r] = fmaxf(most[r], score); });
#pragma unroll
    for (int r = 0; r < kOwn; ++r) moves |= most[r] * factor > shifts[r] + kHeadroom;
    if (__ballot_sync(kAllLanes, moves)) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(kAllLanes, most[r], 1));
        most[r] = fmaxf(most[r], __shfl_xor_sync(kAllLanes, most[r], 2));
        const float next =
            fminf(most[r] * factor, FLT_MAX);  // past an infinity the sums are infinite, the shift is not
        const bool moved = next > shifts[r] + kHeadroom;
        const float decay = moved ? power_of_2(shifts[r] - next) : 1.0f;
        shifts[r] = moved ? next : shifts[r];
#pragma unroll
        for (int d = 0; d < 2 * kPairs; ++d) {
          mean[r / 2][d][r % 2 * 2] *= decay;
          mean[r / 2][d][r % 2 * 2 + 1] *= decay;
        }
      }
      const float next = kSixteens == 2 ? either(t & 2, either(t & 1, shifts[0], shifts[1]),
                                                 either(t & 1, shifts[kOwn - 2], shifts[kOwn - 1]))
                                        : either(t & 1, shifts[0], shifts[1]);
      const float decay = power_of_2(shift - next);
      shift = next, sum *= decay, along *= decay;
    }
    // Half of the keys at a time: products of one may run beside the exponentials of the next.
#pragma unroll
    for (int half = 0; half < kChunk / 16; ++half) {
      uint32_t p[kSixteens][4];  // (16, 16) of the rows and these keys
#pragma unroll
      for (int m = 0; m < kSixteens; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = 2 * m + i % 2;
          float pair[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float score = s[m][2 * half + i / 2][i % 2 * 2 + c];
            pair[c] = power_of_2(fmaf(score, factor, -shifts[r]));
            sums[r] += pair[c];
            if (kWantMean && pair[c] != 0.0f) alongs[r] = fmaf(pair[c], score, alongs[r]);  // 0 * -inf is no number
          }
          p[m][i] = pair_of<kStorage>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        uint32_t value[4];  // of these keys and 8 dims from 16 pair on, and of the next 8 dims
        load_transposed(value, at_step<kSteps>(keys + lane, pair) + further<kSteps>(16 * half, 0));
#pragma unroll
        for (int m = 0; m < kSixteens; ++m) {
          multiply<kStorage>(mean[m][2 * pair], p[m], value[0], value[1]);
          multiply<kStorage>(mean[m][2 * pair + 1], p[m], value[2], value[3]);
        }
      }
    }
    if constexpr (kSixteens == 2) {
      sum += of_own_row(sums[0], sums[1], sums[2], sums[3]);
      if (kWantMean) along += of_own_row(alongs[0], alongs[1], alongs[2], alongs[3]);
    } else {
      sum += of_own_row(sums[0], sums[1]);
      if (kWantMean) along += of_own_row(alongs[0], alongs[1]);
    }
  };
  const auto find = [&](int column) { return in.key(column); };
  stream<kStorage, kSteps, kSixteens, kTwoZeros, 1>(query.held(),
                                                    shared_memory() + (Cut::kShared ? Cut::kQueryBytes : 0), in.keys,
                                                    blockIdx.y, gridDim.y, in.K, !in.pool.key_mask, find, use, before);

  if constexpr (!kByPair) {
    kept += __shfl_xor_sync(kAllLanes, kept, 1);
    kept += __shfl_xor_sync(kAllLanes, kept, 2);
  }
  if (t < kOwn && row + 8 * t < B) {
    const int64_t at = blockIdx.y * int64_t{B} + row + 8 * t;
    parts.shift[at] = shift;
    parts.sum[at] = sum;
    parts.along[at] = negated ? -along : along;
    parts.kept[at] = kept;
    parts.above[at] = above;
  }
#pragma unroll
  for (int r = 0; r < (kWantMean ? kOwn : 0); ++r) {
    if (row + 8 * r >= B) continue;
    const int64_t at = blockIdx.y * int64_t{B} + row + 8 * r;
#pragma unroll
    for (int d = 0; d < 2 * kPairs; ++d) {
      *reinterpret_cast<float2*>(parts.mean + at * (16 * kSteps) + 8 * d + 2 * t) =
          make_float2(mean[r / 2][d][r % 2 * 2], mean[r / 2][d][r % 2 * 2 + 1]);
    }
  }
}

template <Storage kStorage>
__device__ __forceinline__ float element(const char* row, int d) {
  const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[d];
  return kStorage == Storage::kBFloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                        : __half2float(__ushort_as_half(bits));
}

template <class T>
__device__ __forceinline__ T over_warp(T value) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

// Block = row; shared memory holds the weights of the parts and, of each warp, the sum of those means that it adds.
template <Storage kStorage>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(Rows query, Parts parts, int splits, int width, LogSumExpParams out) {
  float* weights = reinterpret_cast<float*>(shared_memory());  // (splits,)
  float* means = weights + (splits + 3) / 4 * 4;               // (kMergeWarps, width)
  const int64_t b = blockIdx.x, B = gridDim.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float top = -FLT_MAX, sum = 0.0f, along = 0.0f;
  int64_t kept = 0, above = 0;
  for (int part = lane; part < splits; part += kWarp) top = fmaxf(top, parts.shift[part * B + b]);
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, apart));
  for (int part = lane; part < splits; part += kWarp) {
    const int64_t at = part * B + b;
    const float weight = power_of_2(parts.shift[at] - top);
    if (warp == 0) weights[part] = weight;
    sum += weight * parts.sum[at];
    along += weight * parts.along[at];
    kept += parts.kept[at];
    above += parts.above[at];
  }
  sum = over_warp(sum), along = over_warp(along);
  kept = over_warp(kept), above = over_warp(above);
  if (threadIdx.x == 0) {
    out.lse[b] = (top + log2f(sum)) * kLn2;
    out.kept[b] = kept;
    out.above[b] = above;
  }
  if (!out.want_mean) return;
  __syncthreads();
  for (int d = 4 * lane; d < width; d += 4 * kWarp) {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int part = warp; part < splits; part += kMergeWarps) {
      const float4 own = *reinterpret_cast<const float4*>(parts.mean + (part * B + b) * width + d);
      const float weight = weights[part];
      total = make_float4(fmaf(weight, own.x, total.x), fmaf(weight, own.y, total.y), fmaf(weight, own.z, total.z),
                          fmaf(weight, own.w, total.w));
    }
    *reinterpret_cast<float4*>(means + warp * width + d) = total;
  }
  __syncthreads();
  if (warp > 0) return;
  const char* own = query.base + b * query.stride;
  float dot = 0.0f, squares = 0.0f;  // of the query and the mean, and of the query
  for (int d = lane; d < query.D; d += kWarp) {
    float total = 0.0f;
    for (int of = 0; of < kMergeWarps; ++of) total += means[of * width + d];
    total = sum == 0.0f ? 0.0f : total / sum;
    means[d] = total;  // no other lane reads it
    const float q = element<kStorage>(own, d);
    dot = fmaf(q, total, dot), squares = fmaf(q, q, squares);
  }
  dot = over_warp(dot), squares = over_warp(squares);
  const float missing = (sum == 0.0f ? 0.0f : along / sum) - dot, more = squares == 0.0f ? 0.0f : missing / squares;
  for (int d = lane; d < query.D; d += kWarp) {
    out.mean[b * query.D + d] = fmaf(element<kStorage>(own, d), more, means[d]);
  }
}

int width_of(int64_t D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }

int64_t workspace_of(int64_t splits, int64_t B, int64_t D, bool want_mean) {
  return 4 * splits * B * (5 + (want_mean ? width_of(D) : 0));
}

template <Storage kStorage, int kSteps, bool kWantMean, bool kByPair>
cudaError_t sum(const Inputs& in, const LogSumExpParams& params, const Parts& parts, void* stream) {
  using Cut = Cut<kSteps, kWantMean>;
  const dim3 grid(static_cast<unsigned>((params.B + Cut::kRows - 1) / Cut::kRows),
                  static_cast<unsigned>(params.plan.splits));
  return launch(sum_kernel<kStorage, kSteps, kWantMean, kByPair>, grid, kThreads, Cut::kBytes, stream, in,
                static_cast<int>(params.B), params.scale, params.pivot, parts);
}

template <Storage kStorage, bool kWantMean, bool kByPair>
cudaError_t sum_at_width(const Inputs& in, const LogSumExpParams& params, const Parts& parts, void* stream) {
  if (params.D <= 64) return sum<kStorage, 4, kWantMean, kByPair>(in, params, parts, stream);
  if (params.D <= 128) return sum<kStorage, 8, kWantMean, kByPair>(in, params, parts, stream);
  return sum<kStorage, 16, kWantMean, kByPair>(in, params, parts, stream);
}

template <Storage kStorage, bool kWantMean>
cudaError_t sum_of_pool(const Inputs& in, const LogSumExpParams& params, const Parts& parts, void* stream) {
  return params.pool.by_pair() ? sum_at_width<kStorage, kWantMean, true>(in, params, parts, stream)
                               : sum_at_width<kStorage, kWantMean, false>(in, params, parts, stream);
}

template <Storage kStorage>
cudaError_t sum_and_merge(const Inputs& in, const LogSumExpParams& params, const Parts& parts, void* stream) {
  const cudaError_t error = params.want_mean ? sum_of_pool<kStorage, true>(in, params, parts, stream)
                                             : sum_of_pool<kStorage, false>(in, params, parts, stream);
  if (error != cudaSuccess) return error;
  const int splits = static_cast<int>(params.plan.splits), width = width_of(params.D);
  const int bytes = 4 * ((splits + 3) / 4 * 4 + (params.want_mean ? kMergeWarps * width : 0));
  return launch(merge_kernel<kStorage>, dim3(static_cast<unsigned>(params.B)), kMergeThreads, bytes, stream, in.query,
                parts, splits, width, params);
}

template <int kSteps, bool kWantMean>
int64_t splits_of(int64_t B, int64_t K, int64_t processors) {
  using Cut = Cut<kSteps, kWantMean>;
  const int64_t row_tiles = std::max<int64_t>((B + Cut::kRows - 1) / Cut::kRows, 1);
  return std::max<int64_t>(std::min(kBlocks * processors / row_tiles, (K / kKeys + 1) / 2), 1);
}

template <int kSteps>
int64_t splits_of(int64_t B, int64_t K, bool want_mean, int64_t processors) {
  return want_mean ? splits_of<kSteps, true>(B, K, processors) : splits_of<kSteps, false>(B, K, processors);
}

}  // namespace

SummingPlan plan_summing(int64_t B, int64_t K, int64_t D, bool want_mean, int64_t processors) {
  const int64_t splits = D <= 64    ? splits_of<4>(B, K, want_mean, processors)
                         : D <= 128 ? splits_of<8>(B, K, want_mean, processors)
                                    : splits_of<16>(B, K, want_mean, processors);
  return {splits, workspace_of(splits, B, D, want_mean)};
}

int logsumexp(const LogSumExpParams& params, void* stream) {
  if (params.B == 0) return cudaSuccess;
  const Inputs in = {rows_of(params.query, params.query_stride, params.D),
                     rows_of(params.negative_keys, params.negative_keys_stride, params.D),
                     static_cast<int32_t>(params.K), params.pool};
  const int64_t rows = params.plan.splits * params.B;
  float* mean = static_cast<float*>(params.workspace);  // first, for its alignment
  float* shift = mean + (params.want_mean ? rows * width_of(params.D) : 0);
  auto* kept = reinterpret_cast<int32_t*>(shift + 3 * rows);
  const Parts parts = {shift, shift + rows, shift + 2 * rows, kept, kept + rows, mean};
  return params.storage == Storage::kBFloat16 ? sum_and_merge<Storage::kBFloat16>(in, params, parts, stream)
                                              : sum_and_merge<Storage::kFloat16>(in, params, parts, stream);
}

}  // namespace negmine::cuda
