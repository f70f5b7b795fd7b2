// The log-sum-exp and the softmax mean of the synthetic negatives of one query, by one block of eight warps. Each warp
// takes every eighth slot.
//
// Each lane of a warp draws one of 32 slots. The warp then mixes a few of these slots together, so that several loads
// are in flight at once. A mix stays in registers while its norm and its score are computed. It is then added to the
// mean, weighted by 2^(logit - shift). The shift becomes the largest logit of these slots if that exceeds it by more
// than kMixHeadroom, and is not changed otherwise. The warps are merged in a fixed order.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>

#include "kernels/cuda/mixing.cuh"
#include "kernels/cuda/ptx.cuh"

namespace negmine::cuda {

constexpr int kMixWarps = 8, kMixThreads = kMixWarps * kWarp;
constexpr float kMixHeadroom = 8.0f;  // an exponent of 2

// There is a kernel for each storage type, which reads four elements at a time, and one for all other cases: rows that
// are not in_quads, or queries and keys of different storage types.
enum class Kind { kAny, kFloat32, kBFloat16, kFloat16 };

template <Kind kKind>
__device__ __forceinline__ Layouts known(Layouts layouts) {
  constexpr Storage kStorage = kKind == Kind::kFloat32    ? Storage::kFloat32
                               : kKind == Kind::kBFloat16 ? Storage::kBFloat16
                                                          : Storage::kFloat16;
  if constexpr (kKind != Kind::kAny) layouts = {{kStorage, true}, {kStorage, true}};
  return layouts;
}

// The size of the shared memory of sum_mixes, in floats.
constexpr int mix_floats(int slice) { return kMixWarps * (2 + slice); }

// The sums of the block, the same in every thread: the sum of 2^logit is 2^top * total.
template <int kSlice>
struct MixSums {
  bool some;  // whether the query has a negative to mix
  float top, total;
  float weights[kMixWarps];
  const float* means;  // (kMixWarps, kSlice), shared

  // Element `at` of the slice of the mean.
  __device__ float mean(int at) const {
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < kMixWarps; ++w) all = fmaf(weights[w], means[w * kSlice + at], all);
    return total == 0.0f ? 0.0f : all / total;
  }
};

// Sums the mixes of query b. All kMixThreads threads of the block call it.
//
// kHeld: the number of chunks of a mix that a lane holds. A warp so holds the slice of kHeld * kPass elements from
// `begin` on, of which it computes the mean. kSliced: D is larger than the slice, and the other elements are read for
// the norm and the score of a mix. of_warps: shared, mix_floats() numbers, for the shifts and sums (2, kMixWarps) and
// the means (kMixWarps, kSlice).
template <Kind kKind, int kHeld, bool kSliced>
__device__ __forceinline__ MixSums<kHeld * kPass> sum_mixes(const Mixing& p, const float* scale_at,
                                                            const Layouts& given, int64_t b, int64_t begin,
                                                            float* of_warps) {
  constexpr int kTogether = kHeld == 4 ? 2 : 4;  // slots that are mixed together
  constexpr int kSlice = kHeld * kPass;
  const Layouts layouts = known<kKind>(given);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t D = p.D;
  const auto S = static_cast<int32_t>(p.pairs + p.with_query);         // csrc/torch checks that it fits
  const int64_t* hard_index = p.hard_index + b * p.hard_index_stride;  // (N,)
  const int64_t count = count_parents(hard_index, p.N, lane);
  const Row query = query_at(p, layouts.query, b);
  const float scale = *scale_at * kLog2E;
  const auto element = [&](int c) { return begin + c * kPass + kElements * lane; };
  const auto element_of = [&](const Row& row, int64_t d) { return d < D ? load(row, d, D) : Chunk{}; };
  Chunk own[kHeld];
#pragma unroll
  for (int c = 0; c < kHeld; ++c) own[c] = element_of(query, element(c));

  float shift = -FLT_MAX, sum = 0.0f;
  Chunk mean[kHeld] = {};
  for (int32_t base = 0; base < S && count > 0; base += kMixWarps * kWarp) {
    const int32_t drawn_slot = base + lane * kMixWarps + warp;
    const Parents drawn = draw(p, b, drawn_slot < S ? drawn_slot : S - 1, hard_index, count);
    const auto first_drawn = static_cast<int32_t>(drawn.first), second_drawn = static_cast<int32_t>(drawn.second);
    for (int i = 0; i < kWarp && base + i * kMixWarps + warp < S; i += kTogether) {
      Chunk mixed[kTogether][kHeld];
      float squares[kTogether] = {}, scores[kTogether] = {};
      const auto add = [&](int of, const Chunk& mix, const Chunk& query) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          squares[of] += mix.value[e] * mix.value[e];
          scores[of] += mix.value[e] * query.value[e];
        }
      };
#pragma unroll
      for (int of = 0; of < kTogether; ++of) {
        const int32_t first_parent = __shfl_sync(kAllLanes, first_drawn, i + of);  // there are fewer than 2^31 columns
        const Row second = key_at(p, layouts.keys, __shfl_sync(kAllLanes, second_drawn, i + of));
        const float coefficient = __shfl_sync(kAllLanes, drawn.coefficient, i + of);
        const Row first = first_parent < 0 ? query : key_at(p, layouts.keys, first_parent);
        if constexpr (kSliced) {
          for (int64_t d = kElements * lane; d < D; d += kPass) {
            add(of, mix(coefficient, load(first, d, D), load(second, d, D)), load(query, d, D));
          }
        }
#pragma unroll
        for (int c = 0; c < kHeld; ++c) {
          mixed[of][c] = mix(coefficient, element_of(first, element(c)), element_of(second, element(c)));
        }
      }
      float most = -INFINITY;
#pragma unroll
      for (int of = 0; of < kTogether; ++of) {
#pragma unroll
        for (int c = 0; c < (kSliced ? 0 : kHeld); ++c) add(of, mixed[of][c], own[c]);
        squares[of] = norm_of(over_warp(squares[of]));
        scores[of] = over_warp(scores[of]) / squares[of] * scale;
        if (base + (i + of) * kMixWarps + warp >= S) scores[of] = -INFINITY;
        most = fmaxf(most, scores[of]);
      }
      if (most > shift + kMixHeadroom) {
        const float next = fminf(most, FLT_MAX), decay = power_of_2(shift - next);
        shift = next, sum *= decay;
#pragma unroll
        for (int c = 0; c < kHeld; ++c) {
#pragma unroll
          for (int e = 0; e < kElements; ++e) mean[c].value[e] *= decay;
        }
      }
#pragma unroll
      for (int of = 0; of < kTogether; ++of) {
        const float weight = power_of_2(scores[of] - shift), of_mix = weight / squares[of];
        sum += weight;
#pragma unroll
        for (int c = 0; c < kHeld; ++c) {
#pragma unroll
          for (int e = 0; e < kElements; ++e) mean[c].value[e] = fmaf(of_mix, mixed[of][c].value[e], mean[c].value[e]);
        }
      }
    }
  }

  float* means = of_warps + 2 * kMixWarps;
  if (lane == 0) of_warps[warp] = shift, of_warps[kMixWarps + warp] = sum;
#pragma unroll
  for (int c = 0; c < kHeld; ++c) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) means[warp * kSlice + c * kPass + kElements * lane + e] = mean[c].value[e];
  }
  __syncthreads();
  MixSums<kSlice> sums = {count > 0, -FLT_MAX, 0.0f, {}, means};
#pragma unroll
  for (int w = 0; w < kMixWarps; ++w) sums.top = fmaxf(sums.top, of_warps[w]);
#pragma unroll
  for (int w = 0; w < kMixWarps; ++w) {
    sums.weights[w] = power_of_2(of_warps[w] - sums.top);
    sums.total = fmaf(sums.weights[w], of_warps[kMixWarps + w], sums.total);
  }
  return sums;
}

}  // namespace negmine::cuda
