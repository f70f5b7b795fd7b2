// info_nce: the sum kernel of logsumexp.cu, then a kernel with one block for each row. The block sums the row's
// synthetic negatives, if there are any (mix_sums.cuh), merges the parts of its log-sum-exp (logsumexp_parts.cuh), and
// computes the loss and the gradient:
//
//     x = scale q . positive,   gap = lse - x,   row = log(1 + exp(gap)),   share = sigmoid(gap)
//     d row / d q = scale share (mean - positive),   d row / d scale = share q . (mean - positive)
//
// If decoupled, row = gap and share = 1. A row without negatives has loss 0 and gradient 0.
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>

#include "kernels/cuda/info_nce.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/logsumexp_parts.cuh"
#include "kernels/cuda/mix_sums.cuh"

namespace negmine::cuda {
namespace {

static_assert(kMergeThreads == kMixThreads);

struct NoMixes {
  static constexpr bool some = false;
  static constexpr float top = -FLT_MAX, total = 0.0f;
  __device__ float mean(int) const { return 0.0f; }
};

// log(1 + e) for e in [0, 1], also accurate for small e; the polynomial of kernels/triton/numerics.py.
__device__ __forceinline__ float log1p_unit(float e) {
  float y = fmaf(e, 0.005253457929939032f, -0.02958850748836994f);
  y = fmaf(y, e, 0.07836166769266129f);
  y = fmaf(y, e, -0.13674770295619965f);
  y = fmaf(y, e, 0.19111430644989014f);
  y = fmaf(y, e, -0.24844369292259216f);
  y = fmaf(y, e, 0.33319270610809326f);
  y = fmaf(y, e, -0.49999502301216125f);
  return e * fmaf(y, e, 1.0f);
}

// kHeld: the number of chunks of a mix that a lane holds (mix_sums.cuh); 0 if there are no synthetic negatives.
template <Storage kStorage, int kHeld, bool kInQuads>
__global__ void __launch_bounds__(kMergeThreads, 2)
    loss_kernel(Rows query, Parts parts, int splits, int width, InfoNceParams p, Layouts layouts) {
  constexpr Kind kKind = !kInQuads ? Kind::kAny : kStorage == Storage::kBFloat16 ? Kind::kBFloat16 : Kind::kFloat16;
  float* memory = reinterpret_cast<float*>(shared_memory());
  const int64_t b = blockIdx.x, D = query.D;
  const bool want_gradient = p.sum.want_mean;
  const auto mixes = [&] {
    if constexpr (kHeld > 0) {
      float* room = memory + merge_floats(splits, width, want_gradient);
      return sum_mixes<kKind, kHeld, false>(p.mixing, p.sum.scale, layouts, b, 0, room);
    } else {
      return NoMixes();
    }
  }();
  const Merged real = merge_parts<kStorage>(query, parts, splits, width, want_gradient, b, gridDim.x, memory);
  if (threadIdx.x >= kWarp) return;

  const float top = fmaxf(real.top, mixes.top);
  const float of_real = power_of_2(real.top - top) * real.sum, of_mixes = power_of_2(mixes.top - top) * mixes.total;
  const float sum = of_real + of_mixes, lse = (top + log2f(sum)) * kLn2;
  const float share_of_real = sum == 0.0f ? 0.0f : of_real / sum, share_of_mixes = sum == 0.0f ? 0.0f : of_mixes / sum;

  const int lane = threadIdx.x;
  const char* own = query.base + b * query.stride;
  const char* positive =
      static_cast<const char*>(p.positive_key) + b * p.positive_key_stride * bytes_of(p.positive_key_storage);
  float* mean = memory + mean_at(splits);
  float score = 0.0f, along = 0.0f;  // query . positive, and query . mean
  for (int d = lane; d < D; d += kWarp) {
    const float q = element<kStorage>(own, d);
    score = fmaf(q, element_of(positive, p.positive_key_storage, d), score);
    if (!want_gradient) continue;
    mean[d] = share_of_real * mean[d] + share_of_mixes * mixes.mean(d);  // only this lane reads mean[d]
    along = fmaf(q, mean[d], along);
  }
  score = over_warp(score), along = over_warp(along);

  const float scale = *p.sum.scale, x = scale * score, gap = lse - x;
  const bool some = real.num_kept > 0 || mixes.some;
  float row, share, total;
  if (p.decoupled) {
    row = some ? gap : 0.0f * x;
    share = some ? 1.0f : 0.0f;
    total = lse;
  } else {
    const float e = power_of_2(-fabsf(gap) * kLog2E), excess = log1p_unit(e);
    row = (gap > 0.0f ? gap : 0.0f) + excess;
    share = (gap > 0.0f ? 1.0f : e) / (1.0f + e);
    total = (gap > 0.0f ? lse : x) + excess;
  }
  const float weight = scale * share;
  if (lane == 0) {
    p.rows[b] = row;
    p.weight[b] = weight;
    p.sum.lse[b] = lse;
    p.total[b] = total;
    p.sum.num_kept[b] = real.num_kept;
    p.sum.num_above[b] = real.num_above;
    p.num_mixed[b] = mixes.some ? p.mixing.pairs + p.mixing.with_query : 0;
    if (want_gradient) p.d_scale[b] = share * (along - score);
  }
  if (!want_gradient) return;
  for (int d = lane; d < D; d += kWarp) {
    p.d_query[b * D + d] = weight * (mean[d] - element_of(positive, p.positive_key_storage, d));
  }
}

template <Storage kStorage, int kHeld, bool kInQuads>
cudaError_t finish(const InfoNceParams& params, const Layouts& layouts, void* stream) {
  const LogSumExpParams& sum = params.sum;
  const int splits = static_cast<int>(sum.plan.splits), width = width_of(sum.D);
  const int floats = merge_floats(splits, width, sum.want_mean) + (kHeld > 0 ? mix_floats(kHeld * kPass) : 0);
  return launch(loss_kernel<kStorage, kHeld, kInQuads>, dim3(static_cast<unsigned>(sum.B)), kMergeThreads, 4 * floats,
                stream, rows_of(sum.query, sum.query_stride, sum.D), parts_of(sum), splits, width, params, layouts);
}

template <Storage kStorage>
cudaError_t finish_rows(const InfoNceParams& params, void* stream) {
  const Mixing& mixing = params.mixing;
  if (mixing.pairs + mixing.with_query == 0) return finish<kStorage, 0, false>(params, {}, stream);
  const Layouts layouts = layouts_of(mixing);
  const bool in_quads = layouts.query.in_quads && layouts.keys.in_quads;
  if (mixing.D <= kPass) {
    return in_quads ? finish<kStorage, 1, true>(params, layouts, stream)
                    : finish<kStorage, 1, false>(params, layouts, stream);
  }
  return in_quads ? finish<kStorage, 2, true>(params, layouts, stream)
                  : finish<kStorage, 2, false>(params, layouts, stream);
}

}  // namespace

int info_nce(const InfoNceParams& params, void* stream) {
  if (params.sum.B == 0) return cudaSuccess;
  if (const int error = sum_parts(params.sum, stream)) return error;
  return params.sum.storage == Storage::kBFloat16 ? finish_rows<Storage::kBFloat16>(params, stream)
                                                  : finish_rows<Storage::kFloat16>(params, stream);
}

}  // namespace negmine::cuda
