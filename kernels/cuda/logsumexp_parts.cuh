// What the parts of the queue say of the sums of logsumexp, and how they are merged.
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

// What the parts of the queue say of each row: logits in powers of 2.
struct Parts {
  float* shift;        // (splits, B)
  float* sum;          // (splits, B) of 2^(logit - shift)
  float* along;        // (splits, B) of the same times the score
  int32_t* num_kept;   // (splits, B)
  int32_t* num_above;  // (splits, B)
  float* mean;         // (splits, B, 16 kSteps) of 2^(logit - shift) times the key
};

template <Storage kStorage>
__device__ __forceinline__ float element(const char* row, int d) {
  const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[d];
  return kStorage == Storage::kBFloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                        : __half2float(__ushort_as_half(bits));
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
  int64_t num_kept = 0, num_above = 0;
  for (int part = lane; part < splits; part += kWarp) top = fmaxf(top, parts.shift[part * B + b]);
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, apart));
  for (int part = lane; part < splits; part += kWarp) {
    const int64_t at = part * B + b;
    const float weight = power_of_2(parts.shift[at] - top);
    if (warp == 0) weights[part] = weight;
    sum += weight * parts.sum[at];
    along += weight * parts.along[at];
    num_kept += parts.num_kept[at];
    num_above += parts.num_above[at];
  }
  sum = over_warp(sum), along = over_warp(along);
  num_kept = over_warp(num_kept), num_above = over_warp(num_above);
  if (threadIdx.x == 0) {
    out.lse[b] = (top + log2f(sum)) * kLn2;
    out.num_kept[b] = num_kept;
    out.num_above[b] = num_above;
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
  // No number of a kept score of -inf, which weighs nothing, times 0: then the mean stays what products say.
  const float missing = sum == 0.0f || along != along ? 0.0f : along / sum - dot;
  const float more = squares == 0.0f ? 0.0f : missing / squares;
  for (int d = lane; d < query.D; d += kWarp) {
    out.mean[b * query.D + d] = fmaf(element<kStorage>(own, d), more, means[d]);
  }
}

}  // namespace negmine::cuda
