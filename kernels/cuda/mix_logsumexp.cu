// mix_logsumexp: one block sums the synthetic negatives of one query (mix_sums.cuh). If D is larger than what a warp
// can hold in registers, each slice of D has a block. Such a block reads all elements of a mix for its norm and score,
// and then the elements of its slice again, from cache.
//
//   query (B, D), negative_keys (K, D), hard_index (B, N) -> lse (B,), mean (B, D)
#include <cuda_runtime.h>

#include <cmath>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mix_logsumexp.h"
#include "kernels/cuda/mix_sums.cuh"

namespace negmine::cuda {
namespace {

// One block for each query or, if kSliced, for each query and slice of D.
template <Kind kKind, int kHeld, bool kSliced>
__global__ void __launch_bounds__(kMixThreads, 2) mix_logsumexp_kernel(MixLogSumExpParams out, Layouts layouts) {
  constexpr int kSlice = kHeld * kPass;
  const int64_t b = blockIdx.x, D = out.mixing.D, begin = kSliced ? blockIdx.y * int64_t{kSlice} : 0;
  const auto sums = sum_mixes<kKind, kHeld, kSliced>(out.mixing, out.scale, layouts, b, begin,
                                                     reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x == 0 && begin == 0) out.lse[b] = (sums.top + log2f(sums.total)) * kLn2;
  if (!out.want_mean) return;
  for (int at = threadIdx.x; at < kSlice && begin + at < D; at += kMixThreads) {
    out.mean[b * D + begin + at] = sums.mean(at);
  }
}

template <Kind kKind, int kHeld, bool kSliced>
cudaError_t sum(const MixLogSumExpParams& params, const Layouts& layouts, void* stream) {
  const int64_t slices = kSliced && params.want_mean ? (params.mixing.D + kHeld * kPass - 1) / (kHeld * kPass) : 1;
  const dim3 grid(static_cast<unsigned>(params.mixing.B), static_cast<unsigned>(slices));
  constexpr int kBytes = 4 * mix_floats(kHeld * kPass);
  return launch(mix_logsumexp_kernel<kKind, kHeld, kSliced>, grid, kMixThreads, kBytes, stream, params, layouts);
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
