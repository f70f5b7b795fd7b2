// mix_logsumexp: one block sums the synthetic negatives of one query, its warps every eighth slot each.
//
// Each lane draws another slot, a turn ahead of the loads, and the warp then takes slots together, so that several rows
// are on their way at once. A mix stays in registers while its norm and its score are found, and is added to the mean
// by the weight of its score: relative to a shift, which follows the largest score and moves only where one passes it
// by kHeadroom. Warps are merged in their order. Embeddings wider than what a warp holds take one block per slice of
// them, which reads a whole mix for its norm and score and its slice once more, from cache.
//
//   query (B, D), negative_keys (K, D), hard_index (B, N) -> lse (B,), mean (B, D)
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mix_logsumexp.h"
#include "kernels/cuda/mixing.cuh"
#include "kernels/cuda/ptx.cuh"

namespace negmine::cuda {
namespace {

constexpr int kWarps = 8;
constexpr float kHeadroom = 8.0f;  // a power of 2

// Rows of one storage that are read four elements at a time have their kernel; all others have one.
enum class Kind { kAny, kFloat32, kBFloat16, kFloat16 };

template <Kind kKind>
__device__ __forceinline__ Layouts known(Layouts layouts) {
  constexpr Storage kStorage = kKind == Kind::kFloat32    ? Storage::kFloat32
                               : kKind == Kind::kBFloat16 ? Storage::kBFloat16
                                                          : Storage::kFloat16;
  if constexpr (kKind != Kind::kAny) layouts = {{kStorage, true}, {kStorage, true}};
  return layouts;
}

// kHeld: chunks of a lane, the slice of D whose mean the block sums; kSliced: there are more.
template <Kind kKind, int kHeld, bool kSliced>
__global__ void __launch_bounds__(kWarps* kWarp, 2) mix_logsumexp_kernel(MixLogSumExpParams out, Layouts given) {
  constexpr int kTogether = kHeld == 4 ? 2 : 4;  // slots whose mixes are held at once
  constexpr int kSlice = kHeld * kPass;
  const Mixing& p = out.mixing;
  const Layouts layouts = known<kKind>(given);
  float* of_warps = reinterpret_cast<float*>(shared_memory());  // shift and sum (2, kWarps), means (kWarps, kSlice)
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t b = blockIdx.x, D = p.D;
  const auto S = static_cast<int32_t>(p.pairs + p.with_query);  // csrc/torch refuses more
  const int64_t begin = kSliced ? blockIdx.y * int64_t{kSlice} : 0;
  const int64_t* hard_index = p.hard_index + b * p.hard_index_stride;  // (N,)
  const int64_t count = count_parents(hard_index, p.N, lane);
  const Row query = query_at(p, layouts.query, b);
  const float scale = *out.scale * kLog2E;
  const auto element = [&](int c) { return begin + c * kPass + kQuad * lane; };
  const auto element_of = [&](const Row& row, int64_t d) { return d < D ? load(row, d, D) : Chunk{}; };
  Chunk own[kHeld];
#pragma unroll
  for (int c = 0; c < kHeld; ++c) own[c] = element_of(query, element(c));

  float shift = -FLT_MAX, sum = 0.0f;
  Chunk mean[kHeld] = {};
  for (int32_t base = 0; base < S && count > 0; base += kWarps * kWarp) {
    const int32_t drawn_slot = base + lane * kWarps + warp;
    const Parents drawn = draw(p, b, drawn_slot < S ? drawn_slot : S - 1, hard_index, count);
    const auto first_drawn = static_cast<int32_t>(drawn.first), second_drawn = static_cast<int32_t>(drawn.second);
    for (int i = 0; i < kWarp && base + i * kWarps + warp < S; i += kTogether) {
      Chunk mixed[kTogether][kHeld];
      float squares[kTogether] = {}, scores[kTogether] = {};
      const auto add = [&](int of, const Chunk& mix, const Chunk& query) {
#pragma unroll
        for (int e = 0; e < kQuad; ++e) {
          squares[of] += mix.value[e] * mix.value[e];
          scores[of] += mix.value[e] * query.value[e];
        }
      };
#pragma unroll
      for (int of = 0; of < kTogether; ++of) {
        const int32_t first_parent = __shfl_sync(kAllLanes, first_drawn, i + of);  // of fewer than 2^31 columns
        const Row second = key_at(p, layouts.keys, __shfl_sync(kAllLanes, second_drawn, i + of));
        const float coefficient = __shfl_sync(kAllLanes, drawn.coefficient, i + of);
        const Row first = first_parent < 0 ? query : key_at(p, layouts.keys, first_parent);
        if constexpr (kSliced) {
          for (int64_t d = kQuad * lane; d < D; d += kPass) {
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
        if (base + (i + of) * kWarps + warp >= S) scores[of] = -INFINITY;
        most = fmaxf(most, scores[of]);
      }
      if (most > shift + kHeadroom) {
        const float next = fminf(most, FLT_MAX), decay = power_of_2(shift - next);
        shift = next, sum *= decay;
#pragma unroll
        for (int c = 0; c < kHeld; ++c) {
#pragma unroll
          for (int e = 0; e < kQuad; ++e) mean[c].value[e] *= decay;
        }
      }
#pragma unroll
      for (int of = 0; of < kTogether; ++of) {
        const float weight = power_of_2(scores[of] - shift), of_mix = weight / squares[of];
        sum += weight;
#pragma unroll
        for (int c = 0; c < kHeld; ++c) {
#pragma unroll
          for (int e = 0; e < kQuad; ++e) mean[c].value[e] = fmaf(of_mix, mixed[of][c].value[e], mean[c].value[e]);
        }
      }
    }
  }

  float* means = of_warps + 2 * kWarps;
  if (lane == 0) of_warps[warp] = shift, of_warps[kWarps + warp] = sum;
#pragma unroll
  for (int c = 0; c < kHeld; ++c) {
#pragma unroll
    for (int e = 0; e < kQuad; ++e) means[warp * kSlice + c * kPass + kQuad * lane + e] = mean[c].value[e];
  }
  __syncthreads();
  float top = -FLT_MAX, total = 0.0f, weights[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, of_warps[w]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    weights[w] = power_of_2(of_warps[w] - top);
    total = fmaf(weights[w], of_warps[kWarps + w], total);
  }
  if (threadIdx.x == 0 && begin == 0) out.lse[b] = (top + log2f(total)) * kLn2;
  if (!out.want_mean) return;
  for (int at = threadIdx.x; at < kSlice && begin + at < D; at += kWarps * kWarp) {
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all = fmaf(weights[w], means[w * kSlice + at], all);
    out.mean[b * D + begin + at] = total == 0.0f ? 0.0f : all / total;
  }
}

template <Kind kKind, int kHeld, bool kSliced>
cudaError_t sum(const MixLogSumExpParams& params, const Layouts& layouts, void* stream) {
  const int64_t slices = kSliced && params.want_mean ? (params.mixing.D + kHeld * kPass - 1) / (kHeld * kPass) : 1;
  const dim3 grid(static_cast<unsigned>(params.mixing.B), static_cast<unsigned>(slices));
  const int bytes = 4 * kWarps * (2 + kHeld * kPass);
  return launch(mix_logsumexp_kernel<kKind, kHeld, kSliced>, grid, kWarps * kWarp, bytes, stream, params, layouts);
}

template <Kind kKind>
cudaError_t sum_at_width(const MixLogSumExpParams& params, const Layouts& layouts, void* stream) {
  const int64_t D = params.mixing.D;
  if (D <= kPass) return sum<kKind, 1, false>(params, layouts, stream);
  if (D <= 2 * kPass) return sum<kKind, 2, false>(params, layouts, stream);
  if (D <= 4 * kPass) return sum<kKind, 4, false>(params, layouts, stream);
  return sum<kKind, 4, true>(params, layouts, stream);
}

}  // namespace

int mix_logsumexp(const MixLogSumExpParams& params, void* stream) {
  const Mixing& p = params.mixing;
  if (p.B == 0) return cudaSuccess;
  const Layouts layouts = layouts_of(p);
  if (!layouts.query.in_quads || !layouts.keys.in_quads || p.query_storage != p.negative_keys_storage) {
    return sum_at_width<Kind::kAny>(params, layouts, stream);
  }
  return p.query_storage == Storage::kFloat32    ? sum_at_width<Kind::kFloat32>(params, layouts, stream)
         : p.query_storage == Storage::kBFloat16 ? sum_at_width<Kind::kBFloat16>(params, layouts, stream)
                                                 : sum_at_width<Kind::kFloat16>(params, layouts, stream);
}

}  // namespace negmine::cuda
