// logsumexp, computed as FlashAttention computes attention: the scores, their exponentials and the weighted sum of the
// keys exist only in registers.
//
//   sum      A block keeps a tile of queries and streams its part of the queue. The logits of a row are taken relative
//            to a shift. If the powers of 2 that a lane computes for the row in one step add up to more than kMost, the
//            shift is raised to the largest logit of this step; otherwise it does not change. So the maximum is seldom
//            computed, the sums are rescaled only a few times for each queue, and nothing overflows. The probabilities
//            are rounded to the storage type and multiplied by the key tile from which they were computed. A warpgroup
//            does this for 64 rows while it computes the probabilities of the next 64.
//   merge    The parts of a row are added in a fixed order, so that the bits do not depend on timing.
//
// Rounding the probabilities to 8 or 11 significant bits is accurate enough for the mean, except in the direction of
// the query. That component is the softmax mean of the scores, from which the gradient of the scale is computed. So the
// softmax mean of the scores is also summed in fp32, and the mean is corrected with it at the end (merge_parts).
//
// Sources: FlashAttention (Dao et al. 2022), here with the keys as values; FlashAttention-4 for rescaling seldom.
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/logsumexp.h"
#include "kernels/cuda/logsumexp_parts.cuh"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/sort_key.cuh"
#include "kernels/cuda/tile_map.h"
#include "kernels/cuda/visible.cuh"
#include "kernels/cuda/warp.cuh"

namespace negmine::cuda {
namespace {

constexpr float kMost = 32768.0f;  // within the range of fp16
constexpr int kBlocks = 2;         // for each multiprocessor

// The number of queries of a block, and whether they are in registers or in shared memory. It depends on the number of
// registers that the mean leaves.
template <int kSteps, bool kWantMean>
struct Cut {
  static constexpr int kSixteens = kWantMean && kSteps > 8 ? 1 : 2;
  static constexpr bool kShared = kWantMean && kSteps >= 8;
  static constexpr int kAtOnce = 2;  // chunks whose scores a warpgroup computes at once
  static constexpr int kRows = kThreads / kWarp * 16 * kSixteens;
  static constexpr int kLag = kWantMean && kSteps <= 8;  // see stream(): tiles during which sums may still be computed
  static constexpr int kRing = Tiles<kSteps>::kRing + Tiles<kSteps>::kBarriers;
  static constexpr int kQueryBytes = kRows * 16 * Tiles<kSteps>::kPieces;
  static constexpr int kBytes = kShared ? kQueryBytes + kRing : std::max(kQueryBytes, kRing);
  static_assert(kBytes + kLag * Tiles<kSteps>::kTileBytes <= kSharedBytes);
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
    sum_kernel(const __grid_constant__ TileMap tiles, Inputs in, int B, const float* scale_at, const float* pivot,
               Parts parts) {
  in.keep_valid_rows();
  using Cut = Cut<kSteps, kWantMean>;
  constexpr int kSixteens = Cut::kSixteens, kOwn = 2 * kSixteens;
  constexpr int kChunks = kHasWarpgroups ? Cut::kAtOnce : 1, kLag = kHasWarpgroups ? Cut::kLag : 0;
  constexpr bool kSumsLater = kWantMean && kHasWarpgroups;
  const int first = blockIdx.x * Cut::kRows, row = first + row_of<kSixteens>(0);
  const Queries<kSteps, kSixteens, Cut::kShared> query(shared_memory(), in.query, first, B);
  [[maybe_unused]] const int lane = lane_of_rows<kSteps>();
  const int t = threadIdx.x % kQuad;
  const float scale = *scale_at;
  const bool negated = scale < 0.0f;
  float factor = fabsf(scale) * kLog2E;
  if (factor < FLT_MIN) factor = FLT_MIN;  // 0 would turn the -inf of hidden columns into NaN

  float mean[kWantMean ? kSteps / 2 : 1][kSixteens][4][4] = {};  // like scores, with 32 dimensions in place of 32 keys
  uint32_t p[kSixteens][2 * kChunks][4];                         // probabilities: fragments of 16 rows and 16 keys each
  // To save registers, lane t of a quad has these values only for row t of the rows that the quad shares.
  float shift = -FLT_MAX, sum = 0.0f, along = 0.0f;
  int32_t num_kept = 0, num_above = 0;  // num_kept counts the lane's own columns if not kByPair

  uint32_t seen[kChunks] = {};  // the bits of the scores of each chunk that are in the pool (visible.cuh)
  bool partial = true;
  const auto before = [&](int column) {
    partial = kByPair || column + kChunks * kChunk > in.K || in.pool.key_mask;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      seen[c] = kSixteens == 2 ? 0xFFFFFFFFu : 0xFFFFu;
      if (partial) seen[c] = visible<kSixteens, kByPair>(in, row, B, column + c * kChunk + 2 * t);
    }
    if constexpr (kLag > 0) wait_for_products(mean);  // this late, so that they overlap with the wait for the next tile
  };
  [[maybe_unused]] bool mended = false;  // whether key elements that are not finite are replaced by zeros
  const auto use = [&](int begin, ScoresOf<kSixteens>(&s)[kChunks], SharedAddress keys) {
    if constexpr (kWantMean && kByPair) {
      if (mended) {
        if constexpr (kHasWarpgroups) wait_for_products(s);
        make_finite<kStorage, kSteps, kChunks * kChunk>(keys);
      }
    }
    const auto of_row = [&](int r, const auto* values) { return row + 8 * r < B ? values[row + 8 * r] : 0; };
    uint32_t higher[kChunks] = {};
    float sums[kOwn], alongs[kOwn];
#pragma unroll
    for (int m = 0; m < kSixteens; ++m) {
      // Leaves the other products of the warpgroup in progress while these 64 rows are processed.
      if constexpr (kHasWarpgroups) {
        if (kSixteens == 2 && (kWantMean || m == 0)) {
          wait_for_products<1>(s, m);
        } else {
          wait_for_products<0>(s, m);
        }
      }
      // Calls use(chunk, row, column, score) for every score of the lane's two rows.
      const auto each = [&](auto use) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
#pragma unroll
          for (int r = 2 * m; r < 2 * m + 2; ++r) {
#pragma unroll
            for (int j = 0; j < 8; ++j) use(c, r, j, s[c][m][j / 2][r % 2 * 2 + j % 2]);
          }
        }
      };
      if (pivot) {
        float own[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) own[r] = of_row(2 * m + r, pivot);
        each([&](int c, int r, int j, float score) {
          higher[c] |= score > own[r % 2] ? seen[c] & bit_of(j) << shift_of(r) : 0u;
        });
      }
      if constexpr (kByPair) {
        const auto bounded = [&](const int64_t* bounds, auto is_inside) {
#pragma unroll
          for (int r = 2 * m; r < 2 * m + 2; ++r) {
            Bound own = bound_of(of_row(r, bounds));
            own.index -= begin + 2 * t;  // compared with constants below, which need no registers
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
#pragma unroll
              for (int j = 0; j < 8; ++j) {
                const float score = s[c][m][j / 2][r % 2 * 2 + j % 2];
                if (!is_inside(own, score, c * kChunk + j / 2 * 8 + j % 2)) seen[c] &= ~(bit_of(j) << shift_of(r));
              }
            }
          }
        };
        if (in.pool.lower) bounded(in.pool.lower, is_at_least);
        if (in.pool.upper) bounded(in.pool.upper, is_at_most);
      }
      if (negated) each([](int, int, int, float& score) { score = -score; });
      if (partial) {
        each([&](int c, int r, int j, float& score) {
          if (!(seen[c] & bit_of(j) << shift_of(r))) score = -INFINITY;
        });
      }

      float shifts[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) shifts[r] = __shfl_sync(kAllLanes, shift, 2 * m + r, kQuad);
      const auto weigh = [&](auto some_are_hidden) {
#pragma unroll
        for (int r = 0; r < 2; ++r) sums[2 * m + r] = alongs[2 * m + r] = 0.0f;
#pragma unroll
        for (int k = 0; k < 2 * kChunks; ++k) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = i % 2;
            float pair[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const float score = s[k / 2][m][k % 2 * 2 + i / 2][2 * r + c];
              pair[c] = power_of_2(fmaf(score, factor, -shifts[r]));
              sums[2 * m + r] += pair[c];
              if (!kWantMean || (decltype(some_are_hidden)::value && pair[c] == 0.0f)) continue;  // 0 * -inf is NaN
              alongs[2 * m + r] = fmaf(pair[c], score, alongs[2 * m + r]);
            }
            p[m][k][i] = pair_of<kStorage>(pair[0], pair[1]);
          }
        }
      };
      if (partial) {
        weigh(std::true_type());
      } else {
        weigh(std::false_type());
      }
      // Compares the sums, because a sum of at most kMost has no term above kMost.
      const bool passes[] = {sums[2 * m] > kMost, sums[2 * m + 1] > kMost};
      if (__ballot_sync(kAllLanes, passes[0] || passes[1])) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const bool of_quad = __ballot_sync(kAllLanes, passes[r]) >> threadIdx.x % kWarp / kQuad * kQuad & 0xFu;
          float most = -INFINITY;
          each([&](int, int own, int, float score) {
            if (own % 2 == r) most = fmaxf(most, score);
          });
          most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
          most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
          const float next = fminf(most * factor, FLT_MAX);  // stays finite, so a logit of infinity makes sums infinite
          const bool moves = of_quad && next > shifts[r];
          const float decay = moves ? power_of_2(shifts[r] - next) : 1.0f;
          shifts[r] = moves ? next : shifts[r];
#pragma unroll
          for (int d = 0; d < (kWantMean ? 2 * kSteps : 0); ++d) {
            mean[d / 4][m][d % 4][2 * r] *= decay;
            mean[d / 4][m][d % 4][2 * r + 1] *= decay;
          }
        }
        if (kSixteens == 1 || t / 2 == m) {
          const float next = either(t & 1, shifts[0], shifts[1]), decay = power_of_2(shift - next);
          shift = next, sum *= decay, along *= decay;
        }
        weigh(std::true_type());
      }
      if constexpr (kSumsLater) {
        begin_sums(mean, m, p[m]);
#pragma unroll
        for (int k = 0; k < 2 * kChunks; ++k) {
          add_rows_later<kStorage>(mean, m, p[m][k],
                                   rows_descriptor(keys, Tiles<kSteps>::kSlabBytes) + k * kSixteenRows);
        }
        end_products();
      }
    }
    if constexpr (kWantMean && !kHasWarpgroups) {
#pragma unroll
      for (int k = 0; k < 2 * kChunks; ++k) {
#pragma unroll
        for (int pair = 0; pair < kSteps; ++pair) {
          uint32_t value[4];  // 16 keys: the 8 dimensions from 16 * pair on, and the next 8
          load_transposed(value, at_step<kSteps>(keys + lane, pair) + further<kSteps>(16 * k, 0));
#pragma unroll
          for (int m = 0; m < kSixteens; ++m) {
            multiply<kStorage>(mean[pair / 2][m][pair % 2 * 2], p[m][k], value[0], value[1]);
            multiply<kStorage>(mean[pair / 2][m][pair % 2 * 2 + 1], p[m][k], value[2], value[3]);
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (pivot) num_above += count_of_row<kSixteens>(higher[c]);
      num_kept += kByPair ? count_of_row<kSixteens>(seen[c]) : __popc(seen[c] & kRowBits);
    }
    if constexpr (kSixteens == 2) {
      sum += of_own_row(sums[0], sums[1], sums[2], sums[3]);
      if (kWantMean) along += of_own_row(alongs[0], alongs[1], alongs[2], alongs[3]);
    } else {
      sum += of_own_row(sums[0], sums[1]);
      if (kWantMean) along += of_own_row(alongs[0], alongs[1]);
    }
    if constexpr (kSumsLater && kLag == 0) wait_for_products(mean);
  };
  const auto find = [&](int column) { return in.key(column); };
  const auto walk = [&] {
    stream<kStorage, kSteps, kSixteens, kTwoZeros, Cut::kAtOnce, kLag>(
        query.held(), shared_memory() + (Cut::kShared ? Cut::kQueryBytes : 0), MappedRows{in.keys, tiles}, blockIdx.y,
        gridDim.y, in.K, !in.pool.key_mask, find, use, before);
    if constexpr (kLag > 0) wait_for_products(mean);
  };
  if constexpr (kWantMean && kByPair) {
    // A hidden key has weight 0, but 0 times an element that is not finite is NaN. If a result is not finite, all of it
    // is computed again with zeros in place of such elements.
    while (true) {
      walk();
      bool broken = t < kOwn && row + 8 * t < B && !(fabsf(along) <= FLT_MAX);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
#pragma unroll
        for (int d = 0; d < 2 * kSteps; ++d) {
          const float* two = &mean[d / 4][r / 2][d % 4][r % 2 * 2];
          broken |= row + 8 * r < B && (!(fabsf(two[0]) <= FLT_MAX) || !(fabsf(two[1]) <= FLT_MAX));
        }
      }
      if (!__syncthreads_or(broken) || mended) break;
      mended = true;
      shift = -FLT_MAX, sum = along = 0.0f, num_kept = num_above = 0;
#pragma unroll
      for (int d = 0; d < kSteps / 2; ++d) {
#pragma unroll
        for (int i = 0; i < kSixteens * 16; ++i) mean[d][i / 16][i / 4 % 4][i % 4] = 0.0f;
      }
    }
  } else {
    walk();
  }

  if constexpr (!kByPair) {
    num_kept += __shfl_xor_sync(kAllLanes, num_kept, 1);
    num_kept += __shfl_xor_sync(kAllLanes, num_kept, 2);
  }
  if (t < kOwn && row + 8 * t < B) {
    const int64_t at = blockIdx.y * int64_t{B} + row + 8 * t;
    parts.shift[at] = shift;
    parts.sum[at] = sum;
    parts.along[at] = negated ? -along : along;
    parts.num_kept[at] = num_kept;
    parts.num_above[at] = num_above;
  }
#pragma unroll
  for (int r = 0; r < (kWantMean ? kOwn : 0); ++r) {
    if (row + 8 * r >= B) continue;
    const int64_t at = blockIdx.y * int64_t{B} + row + 8 * r;
#pragma unroll
    for (int d = 0; d < 2 * kSteps; ++d) {
      *reinterpret_cast<float2*>(parts.mean + at * (16 * kSteps) + 8 * d + 2 * t) =
          make_float2(mean[d / 4][r / 2][d % 4][r % 2 * 2], mean[d / 4][r / 2][d % 4][r % 2 * 2 + 1]);
    }
  }
}

int64_t workspace_of(int64_t splits, int64_t B, int64_t D, bool want_mean) {
  return 4 * splits * B * (5 + (want_mean ? width_of(D) : 0));
}

template <Storage kStorage, int kSteps, bool kWantMean, bool kByPair>
cudaError_t sum(const Inputs& in, const LogSumExpParams& params, const Parts& parts, void* stream) {
  using Cut = Cut<kSteps, kWantMean>;
  const dim3 grid(static_cast<unsigned>((params.B + Cut::kRows - 1) / Cut::kRows),
                  static_cast<unsigned>(params.plan.splits));
  return launch(sum_kernel<kStorage, kSteps, kWantMean, kByPair>, grid, kThreads,
                Cut::kBytes + (has_compute_capability_9_0() ? Cut::kLag * Tiles<kSteps>::kTileBytes : 0), stream,
                map_tiles(in.keys, params.K, params.storage), in, static_cast<int>(params.B), params.scale,
                params.pivot, parts);
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
cudaError_t sum_of_storage(const Inputs& in, const LogSumExpParams& params, const Parts& parts, void* stream) {
  return params.want_mean ? sum_of_pool<kStorage, true>(in, params, parts, stream)
                          : sum_of_pool<kStorage, false>(in, params, parts, stream);
}

// One block for each row.
template <Storage kStorage>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(Rows query, Parts parts, int splits, int width, LogSumExpParams out) {
  float* memory = reinterpret_cast<float*>(shared_memory());
  const int64_t b = blockIdx.x;
  const Merged all = merge_parts<kStorage>(query, parts, splits, width, out.want_mean, b, gridDim.x, memory);
  if (threadIdx.x == 0) {
    out.lse[b] = (all.top + log2f(all.sum)) * kLn2;
    out.num_kept[b] = all.num_kept;
    out.num_above[b] = all.num_above;
  }
  if (!out.want_mean || threadIdx.x >= kWarp) return;
  for (int d = threadIdx.x; d < query.D; d += kWarp) out.mean[b * query.D + d] = memory[mean_at(splits) + d];
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

int sum_parts(const LogSumExpParams& params, void* stream) {
  const Inputs in = {rows_of(params.query, params.query_stride, params.D),
                     rows_of(params.negative_keys, params.negative_keys_stride, params.D),
                     static_cast<int32_t>(params.K), params.pool};
  const Parts parts = parts_of(params);
  return params.storage == Storage::kBFloat16 ? sum_of_storage<Storage::kBFloat16>(in, params, parts, stream)
                                              : sum_of_storage<Storage::kFloat16>(in, params, parts, stream);
}

int logsumexp(const LogSumExpParams& params, void* stream) {
  if (params.B == 0) return cudaSuccess;
  if (const int error = sum_parts(params, stream)) return error;
  const int splits = static_cast<int>(params.plan.splits), width = width_of(params.D);
  const bool is_bf16 = params.storage == Storage::kBFloat16;
  return launch(is_bf16 ? merge_kernel<Storage::kBFloat16> : merge_kernel<Storage::kFloat16>,
                dim3(static_cast<unsigned>(params.B)), kMergeThreads, 4 * merge_floats(splits, width, params.want_mean),
                stream, rows_of(params.query, params.query_stride, params.D), parts_of(params), splits, width, params);
}

}  // namespace negmine::cuda
