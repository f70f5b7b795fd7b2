// logsumexp_grad_keys, computed as the backward pass of FlashAttention: a block keeps a tile of keys, streams the
// queries, and sums them with the weighted probabilities of its keys. Scores and probabilities exist only in registers.
//
//   prepare  computes the shift and the weight of each query
//   grad     computes the scores again, their probabilities times the weights, and the weighted sums of queries. Each
//            row of grad_keys is written by one block for each part of the batch.
//   add      adds the parts of the batch, if there are several, in a fixed order, so that the bits do not depend on
//            timing
//
// Here the keys are the rows and the queries are the columns, so that the accumulators of the scores are fragments of
// the next product. In the passes that computed lse and the bounds, the queries are the rows. The scores are
// bit-identical nevertheless: a step adds 16 products, which are exact and do not depend on the order of the factors,
// to the result of the step before, and the order of the steps is that of score_tile.cuh.
//
// Weighted probabilities are rounded to the storage type. The range of fp16 includes neither the large weights that a
// gradient scaler causes nor the small probabilities of a long queue. So the weights are multiplied by a power of 2,
// which is exact, to bring the largest just below 2^15, and the sums are divided by it. Only weighted probabilities
// below about 2^-40 times the largest weight are lost.
//
// Queries with weight 0 or an empty pool contribute nothing, whatever values they have, as if a (B,) mask hid them.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <type_traits>
#include <utility>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/logsumexp_grad_keys.h"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/sort_key.cuh"
#include "kernels/cuda/tile_map.h"
#include "kernels/cuda/visible.cuh"
#include "kernels/cuda/warp.cuh"

namespace negmine::cuda {
namespace {

constexpr int kBlocks = 2;  // for each multiprocessor
constexpr int kPrepareThreads = 1024, kAddThreads = 256;
constexpr int kTopExponent = 14;  // of the largest weight, after scaling

struct Term {
  float shift, weight;  // a probability is 2^(logit + shift) times weight
};

// What the grad kernel needs of each query. The arrays are padded to whole tiles, and the padding contributes nothing.
struct Terms {
  float* back;     // one number: the factor that reverses the scaling of the weights
  int32_t* every;  // one number: whether every query contributes
  Term* of;        // (B, padded)
  uint8_t* heard;  // (B, padded), whether a query contributes
};

int64_t columns_of(int64_t B) { return (B + kKeys - 1) / kKeys * kKeys; }

template <int kSteps>
struct Cut {
  static constexpr int kSixteens = kSteps > 8 ? 1 : 2;  // as many as the registers of the sums allow
  static constexpr int kRows = kThreads / kWarp * 16 * kSixteens;
  static constexpr int kKeyBytes = kRows * 16 * Tiles<kSteps>::kPieces;
  static constexpr int kLag = kSteps <= 8;  // see stream(): tiles during which sums may still be computed
  static constexpr int kBytes = kKeyBytes + Tiles<kSteps>::kRing + Tiles<kSteps>::kBarriers;
  static_assert(kBytes + kLag * Tiles<kSteps>::kTileBytes <= kSharedBytes);
};

// One block.
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const float* lse, const float* weight, int B, int columns, Terms terms) {
  float* of_warps = reinterpret_cast<float*>(shared_memory());  // (kPrepareThreads / kWarp,)
  const auto over = [](float value) {
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, apart));
    return value;
  };
  float largest = 0x1p-100f;
  for (int b = threadIdx.x; b < B; b += kPrepareThreads) {
    const float size = fabsf(weight[b]);
    if (size <= FLT_MAX) largest = fmaxf(largest, size);
  }
  largest = over(largest);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = largest;
  __syncthreads();
  largest = over(of_warps[threadIdx.x % kWarp]);
  static_assert(kPrepareThreads == kWarp * kWarp);
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
  const auto power = [](int of) { return __uint_as_float(static_cast<uint32_t>(127 + of) << 23); };
  const float gain = power(kTopExponent - exponent);
  bool silent = false;
  for (int b = threadIdx.x; b < columns; b += kPrepareThreads) {
    const bool heard = b < B && weight[b] != 0.0f && lse[b] != -INFINITY;
    terms.of[b] = heard ? Term{-lse[b] * kLog2E, weight[b] * gain} : Term{0.0f, 0.0f};
    terms.heard[b] = heard;
    silent |= b < B && !heard;
  }
  const bool some = __syncthreads_or(silent);
  if (threadIdx.x == 0) *terms.back = power(exponent - kTopExponent), *terms.every = !some;
}

// in: the rows are keys and the columns are queries, and the ids and labels are exchanged accordingly. in.pool.num_rows
// is still the number of valid rows of the K keys. key_mask: (K,) or null. grad: (gridDim.y, K, D).
template <Storage kStorage, int kSteps, bool kByPair>
__global__ void __launch_bounds__(kThreads, kBlocks)
    grad_kernel(const __grid_constant__ TileMap tiles, Inputs in, int K, const uint8_t* key_mask, const float* scale_at,
                Terms terms, float* grad) {
  using Cut = Cut<kSteps>;
  constexpr int kSixteens = Cut::kSixteens, kOwn = 2 * kSixteens;
  constexpr int kAtOnce = kByPair ? 1 : 2, kChunks = kHasWarpgroups ? kAtOnce : 1,
                kLag = kHasWarpgroups ? Cut::kLag : 0;
  const int first = blockIdx.x * Cut::kRows, row = first + row_of<kSixteens>(0);
  const int there = valid_rows(in.pool, K);
  const auto usable = [&](int k) { return k < there && (!key_mask || key_mask[k]); };
  gather_queries<kSteps, kSixteens>(shared_memory(), in.query,
                                    [&](int own) { return usable(first + own) ? int64_t{first + own} : int64_t{-1}; });
  const SharedQueries<kSteps, kSixteens> keys(shared_memory());
  if (*terms.every) in.pool.key_mask = nullptr;
  [[maybe_unused]] const int lane = lane_of_rows<kSteps>();
  const int t = threadIdx.x % kQuad;
  const float factor = *scale_at * kLog2E;

  float sums[kSteps / 2][kSixteens][4][4] = {};  // like scores, with 32 dimensions in place of 32 queries
  uint32_t p[kSixteens][2 * kChunks][4];         // weighted probabilities: fragments of 16 rows and 16 queries each
  uint32_t seen[kChunks] = {};                   // the bits of the scores of each chunk that are in the pool
  bool partial = true;
  const auto before = [&](int column) {
    partial = kByPair || column + kChunks * kChunk > in.K || in.pool.key_mask;
#pragma unroll
    for (int c = 0; c < kChunks && partial; ++c) {
      seen[c] = visible<kSixteens, kByPair, true>(in, row, K, column + c * kChunk + 2 * t);
    }
    if constexpr (kLag > 0) wait_for_products(sums);  // this late, so that they overlap with the wait for the next tile
  };
  [[maybe_unused]] bool mended = false;  // whether query elements that are not finite are replaced by zeros
  const auto use = [&](int begin, ScoresOf<kSixteens>(&s)[kChunks], SharedAddress queries) {
    const int column = begin + 2 * t;
    // Computes the fragment p[m][k].
    const auto weigh = [&](int m, int k, auto some_are_hidden) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = k % 2 * 2 + i / 2, bit = shift_of(2 * m + i % 2) + 4 * n;
        const float4 two = *reinterpret_cast<const float4*>(terms.of + column + 16 * k + i / 2 * 8);  // two Terms
        const float* score = s[k / 2][m][n] + i % 2 * 2;
        float low = power_of_2(fmaf(score[0], factor, two.x)) * two.y;
        float high = power_of_2(fmaf(score[1], factor, two.z)) * two.w;
        if (decltype(some_are_hidden)::value) {
          low = seen[k / 2] >> bit & 1 ? low : 0.0f;
          high = seen[k / 2] >> bit & 2 ? high : 0.0f;
        }
        p[m][k][i] = pair_of<kStorage>(low, high);
      }
    };
    const auto weigh_all = [&](int m, auto some_are_hidden) {
#pragma unroll
      for (int k = 0; k < 2 * kChunks; ++k) weigh(m, k, some_are_hidden);
    };
    const auto bound = [&](int m) {
      if constexpr (kByPair) {
        const auto bounded = [&](const int64_t* bounds, auto is_inside) {
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              const Bound own = bound_of(bounds[min(column + c * kChunk + j / 2 * 8 + j % 2, in.K - 1)]);
#pragma unroll
              for (int r = 2 * m; r < 2 * m + 2; ++r) {
                const float score = s[c][m][j / 2][r % 2 * 2 + j % 2];
                if (!is_inside(own, score, row + 8 * r)) seen[c] &= ~(bit_of(j) << shift_of(r));
              }
            }
          }
        };
        if (in.pool.lower) bounded(in.pool.lower, is_at_least);
        if (in.pool.upper) bounded(in.pool.upper, is_at_most);
      }
    };
    const auto mend = [&] {
      if constexpr (kByPair) {
        if (mended) make_finite<kStorage, kSteps, kChunks * kChunk>(queries);
      }
    };
    if constexpr (kHasWarpgroups) {
      const auto sum_up = [&](int m) {
        begin_sums(sums, m, p[m]);
#pragma unroll
        for (int k = 0; k < 2 * kChunks; ++k) {
          add_rows_later<kStorage>(sums, m, p[m][k],
                                   rows_descriptor(queries, Tiles<kSteps>::kSlabBytes) + k * kSixteenRows);
        }
        end_products();
      };
#pragma unroll
      for (int m = 0; m < kSixteens; ++m) {
        // The other scores and sums of the warpgroup remain in progress while these 64 rows are processed. With
        // kByPair there are fewer free registers, so the sums come after the loop.
        if (kByPair && m == kSixteens - 1) {
          wait_for_products<0>(s, m);
        } else {
          wait_for_products<kSixteens - 1>(s, m);
        }
        bound(m);
        if (partial) {
          weigh_all(m, std::true_type());
        } else {
          weigh_all(m, std::false_type());
        }
        if constexpr (!kByPair) sum_up(m);
      }
      mend();
#pragma unroll
      for (int m = 0; m < (kByPair ? kSixteens : 0); ++m) sum_up(m);
    } else {
#pragma unroll
      for (int m = 0; m < kSixteens; ++m) bound(m);
      mend();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int m = 0; m < kSixteens; ++m) {
          if (partial) {
            weigh(m, k, std::true_type());
          } else {
            weigh(m, k, std::false_type());
          }
        }
#pragma unroll
        for (int pair = 0; pair < kSteps; ++pair) {
          uint32_t value[4];  // 16 queries: the 8 dimensions from 16 * pair on, and the next 8
          load_transposed(value, at_step<kSteps>(queries + lane, pair) + further<kSteps>(16 * k, 0));
#pragma unroll
          for (int m = 0; m < kSixteens; ++m) {
            multiply<kStorage>(sums[pair / 2][m][pair % 2 * 2], p[m][k], value[0], value[1]);
            multiply<kStorage>(sums[pair / 2][m][pair % 2 * 2 + 1], p[m][k], value[2], value[3]);
          }
        }
      }
    }
    if constexpr (kHasWarpgroups && kLag == 0) wait_for_products(sums);
  };
  const auto find = [&](int query) { return in.key(query); };
  const auto walk = [&] {
    stream<kStorage, kSteps, kSixteens, kTwoZeros, kAtOnce, kLag>(
        keys, shared_memory() + Cut::kKeyBytes, MappedRows{in.keys, tiles}, blockIdx.y, gridDim.y,
        first < there ? in.K : 0, !in.pool.key_mask, find, use, before);
    if constexpr (kLag > 0) wait_for_products(sums);
  };
  if constexpr (kByPair) {
    // A query from which a key is hidden has weight 0 for it, but 0 times an element that is not finite is NaN. If a
    // result is not finite, all of it is computed again with zeros in place of such elements.
    while (true) {
      walk();
      bool broken = false;
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const bool counts = row + 8 * r < K && usable(row + 8 * r);
#pragma unroll
        for (int n = 0; n < 2 * kSteps; ++n) {
          const float* two = &sums[n / 4][r / 2][n % 4][r % 2 * 2];
          broken |= counts && (!(fabsf(two[0]) <= FLT_MAX) || !(fabsf(two[1]) <= FLT_MAX));
        }
      }
      if (!__syncthreads_or(broken) || mended) break;
      mended = true;
#pragma unroll
      for (int n = 0; n < kSteps / 2; ++n) {
#pragma unroll
        for (int i = 0; i < kSixteens * 16; ++i) sums[n][i / 16][i / 4 % 4][i % 4] = 0.0f;
      }
    }
  } else {
    walk();
  }

  const float back = *terms.back;
  const int D = static_cast<int>(in.keys.D);
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int k = row + 8 * r;
    if (k >= K) continue;
    const bool shut_out = !usable(k);  // its scores, and so its sums, are NaN
    float* own = grad + (blockIdx.y * int64_t{K} + k) * D;
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
      const int d = 8 * n + 2 * t;
      const float low = shut_out ? 0.0f : sums[n / 4][r / 2][n % 4][r % 2 * 2] * back;
      const float high = shut_out ? 0.0f : sums[n / 4][r / 2][n % 4][r % 2 * 2 + 1] * back;
      if (D % 2 == 0 && d < D) {
        *reinterpret_cast<float2*>(own + d) = make_float2(low, high);
      } else {
        if (d < D) own[d] = low;
        if (d + 1 < D) own[d + 1] = high;
      }
    }
  }
}

__global__ void __launch_bounds__(kAddThreads) add_kernel(const float* parts, int splits, int64_t size, float* grad) {
  const int64_t i = blockIdx.x * int64_t{kAddThreads} + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int part = 0; part < splits; ++part) sum += parts[part * size + i];
  grad[i] = sum;
}

template <Storage kStorage, int kSteps, bool kByPair>
cudaError_t grad(const Inputs& in, const LogSumExpGradKeysParams& params, const Terms& terms, float* to, void* stream) {
  using Cut = Cut<kSteps>;
  const dim3 grid(static_cast<unsigned>((params.K + Cut::kRows - 1) / Cut::kRows),
                  static_cast<unsigned>(params.plan.splits));
  return launch(grad_kernel<kStorage, kSteps, kByPair>, grid, kThreads,
                Cut::kBytes + (has_compute_capability_9_0() ? Cut::kLag * Tiles<kSteps>::kTileBytes : 0), stream,
                map_tiles(in.keys, params.B, params.storage), in, static_cast<int>(params.K), params.pool.key_mask,
                params.scale, terms, to);
}

template <Storage kStorage, bool kByPair>
cudaError_t grad_at_width(const Inputs& in, const LogSumExpGradKeysParams& params, const Terms& terms, float* to,
                          void* stream) {
  if (params.D <= 64) return grad<kStorage, 4, kByPair>(in, params, terms, to, stream);
  if (params.D <= 128) return grad<kStorage, 8, kByPair>(in, params, terms, to, stream);
  return grad<kStorage, 16, kByPair>(in, params, terms, to, stream);
}

template <Storage kStorage>
cudaError_t grad_of_pool(const Inputs& in, const LogSumExpGradKeysParams& params, const Terms& terms, float* to,
                         void* stream) {
  return params.pool.by_pair() ? grad_at_width<kStorage, true>(in, params, terms, to, stream)
                               : grad_at_width<kStorage, false>(in, params, terms, to, stream);
}

int64_t bytes_of_parts(int64_t splits, int64_t K, int64_t D) {
  return splits == 1 ? 0 : (4 * splits * K * D + 15) / 16 * 16;
}

int64_t workspace_of(int64_t splits, int64_t B, int64_t K, int64_t D) {
  return bytes_of_parts(splits, K, D) + 16 + columns_of(B) * static_cast<int64_t>(sizeof(Term) + 1);
}

}  // namespace

KeysGradPlan plan_grad_keys(int64_t B, int64_t K, int64_t D, int64_t processors) {
  const int64_t rows = D <= 64 ? Cut<4>::kRows : D <= 128 ? Cut<8>::kRows : Cut<16>::kRows;
  const int64_t tiles = std::max<int64_t>((K + rows - 1) / rows, 1);
  const int64_t splits = std::max<int64_t>(std::min(kBlocks * processors / tiles, (B / kKeys + 1) / 2), 1);
  return {splits, workspace_of(splits, B, K, D)};
}

int logsumexp_grad_keys(const LogSumExpGradKeysParams& params, void* stream) {
  const auto [B, K, D, splits] = std::array{params.B, params.K, params.D, params.plan.splits};
  if (K == 0 || D == 0) return cudaSuccess;
  char* memory = static_cast<char*>(params.workspace);
  auto* parts = reinterpret_cast<float*>(memory);
  memory += bytes_of_parts(splits, K, D);
  auto* back = reinterpret_cast<float*>(memory);
  auto* of = reinterpret_cast<Term*>(memory + 16);
  const Terms terms = {back, reinterpret_cast<int32_t*>(back + 1), of, reinterpret_cast<uint8_t*>(of + columns_of(B))};
  const int columns = static_cast<int>(columns_of(B));
  cudaError_t error = launch(prepare_kernel, dim3(1), kPrepareThreads, 4 * kPrepareThreads / kWarp, stream, params.lse,
                             params.weight, static_cast<int>(B), columns, terms);
  if (error != cudaSuccess) return error;

  Pool pool = params.pool;
  pool.key_mask = terms.heard;
  std::swap(pool.query_ids, pool.negative_ids);
  std::swap(pool.query_labels, pool.negative_labels);
  const Inputs in = {rows_of(params.negative_keys, params.negative_keys_stride, D),
                     rows_of(params.query, params.query_stride, D), static_cast<int32_t>(B), pool};
  float* to = splits == 1 ? params.grad_keys : parts;
  error = params.storage == Storage::kBFloat16 ? grad_of_pool<Storage::kBFloat16>(in, params, terms, to, stream)
                                               : grad_of_pool<Storage::kFloat16>(in, params, terms, to, stream);
  if (error != cudaSuccess || splits == 1) return error;
  const dim3 grid(static_cast<unsigned>((K * D + kAddThreads - 1) / kAddThreads));
  return launch(add_kernel, grid, kAddThreads, 0, stream, parts, static_cast<int>(splits), K * D, params.grad_keys);
}

}  // namespace negmine::cuda
