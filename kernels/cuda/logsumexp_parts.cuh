// What the parts of the queue say of the sums of a row, and how they are merged: by logsumexp, and by info_nce, which
// computes the loss from them.
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

// Columns of a part's mean.
inline int width_of(int64_t D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }

// The parts in params.workspace; the mean is first, for its alignment.
inline Parts parts_of(const LogSumExpParams& params) {
  const int64_t rows = params.plan.splits * params.B;
  float* mean = static_cast<float*>(params.workspace);
  float* shift = mean + (params.want_mean ? rows * width_of(params.D) : 0);
  auto* num_kept = reinterpret_cast<int32_t*>(shift + 3 * rows);
  return {shift, shift + rows, shift + 2 * rows, num_kept, num_kept + rows, mean};
}

// Enqueues the kernel that writes the parts; logsumexp.cu has it.
int sum_parts(const LogSumExpParams& params, void* stream);

// The first of the numbers of shared memory of merge_parts that hold the mean, and how many it takes.
__host__ __device__ constexpr int mean_at(int splits) { return (splits + 3) / 4 * 4; }
__host__ __device__ constexpr int merge_floats(int splits, int width, bool want_mean) {
  return mean_at(splits) + (want_mean ? kMergeWarps * width : 0);
}

// What all parts say of a row: sum of 2^logit = 2^top sum.
struct Merged {
  float top, sum;
  int64_t num_kept, num_above;
};

// Adds the parts of row b of B in order. All threads of a block of kMergeThreads; shared memory holds the weights of
// the parts and, of each warp, the sum of those means that it adds. With want_mean the mean of the row is left in
// memory[mean_at(splits) + d] for the first warp, whose lanes have the d that are theirs modulo kWarp.
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
  float dot = 0.0f, squares = 0.0f;  // of the query and the mean, and of the query
  for (int d = lane; d < query.D; d += kWarp) {
    float total = 0.0f;
    for (int of = 0; of < kMergeWarps; ++of) total += means[of * width + d];
    total = all.sum == 0.0f ? 0.0f : total / all.sum;
    means[d] = total;  // no other lane reads it
    const float q = element<kStorage>(own, d);
    dot = fmaf(q, total, dot), squares = fmaf(q, q, squares);
  }
  dot = over_warp(dot), squares = over_warp(squares);
  // No number of a kept score of -inf, which weighs nothing, times 0: then the mean stays what products say.
  const float missing = all.sum == 0.0f || along != along ? 0.0f : along / all.sum - dot;
  const float more = squares == 0.0f ? 0.0f : missing / squares;
  for (int d = lane; d < query.D; d += kWarp) means[d] = fmaf(element<kStorage>(own, d), more, means[d]);
  return all;
}

}  // namespace negmine::cuda
