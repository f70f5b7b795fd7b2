// The sums of each row over the parts of the queue, and the function that merges them. logsumexp returns the result;
// info_nce computes the loss from it.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/logsumexp.h"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/warp.cuh"

namespace negmine::cuda {

constexpr int kMergeThreads = 256, kMergeWarps = kMergeThreads / kWarp;

// The sums of each row over each part of the queue, with logits to base 2.
struct Parts {
  float* shift;        // (splits, B)
  float* sum;          // (splits, B) sum of 2^(logit - shift)
  float* along;        // (splits, B) sum of 2^(logit - shift) times the score
  int32_t* num_kept;   // (splits, B)
  int32_t* num_above;  // (splits, B)
  float* mean;         // (splits, B, width_of(D)) sum of 2^(logit - shift) times the key
};

template <Storage kStorage>
__device__ __forceinline__ float element(const char* row, int d) {
  const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[d];
  return kStorage == Storage::kBFloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                        : __half2float(__ushort_as_half(bits));
}

// The width of the mean of a part: D, padded.
inline int width_of(int64_t D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }

// The parts in params.workspace. The mean comes first, because it must be aligned.
inline Parts parts_of(const LogSumExpParams& params) {
  const int64_t rows = params.plan.splits * params.B;
  float* mean = static_cast<float*>(params.workspace);
  float* shift = mean + (params.want_mean ? rows * width_of(params.D) : 0);
  auto* num_kept = reinterpret_cast<int32_t*>(shift + 3 * rows);
  return {shift, shift + rows, shift + 2 * rows, num_kept, num_kept + rows, mean};
}

// Enqueues the kernel that writes the parts. Defined in logsumexp.cu.
int sum_parts(const LogSumExpParams& params, void* stream);

// The position of the mean in the shared memory of merge_parts, and the size of this memory; both in floats.
__host__ __device__ constexpr int mean_at(int splits) { return (splits + 3) / 4 * 4; }
__host__ __device__ constexpr int merge_floats(int splits, int width, bool want_mean) {
  return mean_at(splits) + (want_mean ? kMergeWarps * width : 0);
}

// The merged sums of a row: the sum of 2^logit is 2^top * sum.
struct Merged {
  float top, sum;
  int64_t num_kept, num_above;
};

// Merges the parts of row b of B in a fixed order. All kMergeThreads threads of the block call it. memory: shared,
// merge_floats() numbers, which hold the weights of the parts and a partial sum of the means for each warp. If
// want_mean, element d of the mean of the row is in memory[mean_at(splits) + d] afterwards; only lane d % kWarp of the
// first warp may read it before the threads are synchronised.
template <Storage kStorage>
__device__ __forceinline__ Merged merge_parts(const Rows& query, const Parts& parts, int splits, int width,
                                              bool want_mean, int64_t b, int64_t B, float* memory) {
  float* weights = memory;                  // (splits,)
  float* means = memory + mean_at(splits);  // (kMergeWarps, width)
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Merged all = {-FLT_MAX, 0.0f, 0, 0};
  float along = 0.0f;
  for (int part = lane; part < splits; part += kWarp) all.top = fmaxf(all.top, parts.shift[part * B + b]);
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    all.top = fmaxf(all.top, __shfl_xor_sync(kAllLanes, all.top, apart));
  }
  for (int part = lane; part < splits; part += kWarp) {
    const int64_t at = part * B + b;
    const float weight = power_of_2(parts.shift[at] - all.top);
    if (warp == 0) weights[part] = weight;
    all.sum += weight * parts.sum[at];
    along += weight * parts.along[at];
    all.num_kept += parts.num_kept[at];
    all.num_above += parts.num_above[at];
  }
  all.sum = over_warp(all.sum), along = over_warp(along);
  all.num_kept = over_warp(all.num_kept), all.num_above = over_warp(all.num_above);
  if (!want_mean) return all;
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
  if (warp > 0) return all;
  const char* own = query.base + b * query.stride;
  float dot = 0.0f, squares = 0.0f;  // query . mean, and query . query
  for (int d = lane; d < query.D; d += kWarp) {
    float total = 0.0f;
    for (int of = 0; of < kMergeWarps; ++of) total += means[of * width + d];
    total = all.sum == 0.0f ? 0.0f : total / all.sum;
    means[d] = total;  // overwrites the first partial sum, which no other lane reads
    const float q = element<kStorage>(own, d);
    dot = fmaf(q, total, dot), squares = fmaf(q, q, squares);
  }
  dot = over_warp(dot), squares = over_warp(squares);
  // `along` can be NaN if a kept score is -inf, because its weight is 0. Then the mean is not corrected.
  const float missing = all.sum == 0.0f || along != along ? 0.0f : along / all.sum - dot;
  const float more = squares == 0.0f ? 0.0f : missing / squares;
  for (int d = lane; d < query.D; d += kWarp) means[d] = fmaf(element<kStorage>(own, d), more, means[d]);
  return all;
}

}  // namespace negmine::cuda
