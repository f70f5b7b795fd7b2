// count_negatives: blocks count the columns in parts of the queue, and the counts of the parts are then added.
//
// Without bounds, only masks, ids and labels are read. With bounds, scores are computed by the same code as in all
// other passes, so that the count agrees with what these passes find inside the bounds.
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/count_negatives.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/tile_map.h"
#include "kernels/cuda/visible.cuh"

namespace negmine::cuda {
namespace {

constexpr int kAddThreads = 128;

// Stores the counts of this block's part of the queue in parts (splits, rows). Lane t of a quad has the count of row t
// of the rows that the quad shares.
__device__ __forceinline__ void store(int32_t* parts, int rows, int row, int32_t count) {
  const int own = row + 8 * (threadIdx.x % kQuad);
  if (own < rows) parts[blockIdx.y * int64_t{rows} + own] = count;
}

template <bool kByPair>
__global__ void __launch_bounds__(kThreads) mask_kernel(Inputs in, int rows, int32_t* parts) {
  in.keep_valid_rows();
  const int row = blockIdx.x * kRows + row_of(0), t = threadIdx.x % kQuad;
  int32_t count = 0;
  for (int64_t column = blockIdx.y * int64_t{kChunk}; column < in.K; column += gridDim.y * int64_t{kChunk}) {
    count += count_of_row<2>(visible<2, kByPair>(in, row, rows, static_cast<int>(column) + 2 * t));
  }
  store(parts, rows, row, count);
}

template <Storage kStorage, int kSteps>
__global__ void __launch_bounds__(kThreads, 2)
    bound_kernel(const __grid_constant__ TileMap tiles, Inputs in, int rows, int32_t* parts) {
  in.keep_valid_rows();
  uint32_t query[2][kSteps][4];
  load_queries<kSteps>(query, shared_memory(), in.query, blockIdx.x * int64_t{kRows}, rows);
  const int row = blockIdx.x * kRows + row_of(0), t = threadIdx.x % kQuad;
  int32_t count = 0;
  const auto find = [&](int column) { return in.key(column); };
  const auto use = [&](int column, const Scores& s, SharedAddress) {
    const uint32_t seen = visible<2, true>(in, row, rows, column + 2 * t);
    count += count_of_row<2>(inside_bounds<2>(seen, in.pool, s, row, rows, column + 2 * t));
  };
  stream<kStorage, kSteps, 2, kTwoNaNs, 1>(query, shared_memory(), MappedRows{in.keys, tiles}, blockIdx.y, gridDim.y,
                                           in.K, !in.pool.key_mask, find, use);
  store(parts, rows, row, count);
}

// count[b] = the sum over the parts of the queue. If parts has one row, it is for all queries. If there are no parts,
// the pool of every query is all valid rows.
__global__ void __launch_bounds__(kAddThreads)
    add_kernel(const int32_t* parts, int splits, int rows, int64_t B, Inputs in, int64_t* count) {
  const int64_t b = blockIdx.x * int64_t{kAddThreads} + threadIdx.x;
  if (b >= B) return;
  int64_t sum = splits == 0 ? valid_rows(in.pool, in.K) : 0;
  for (int split = 0; split < splits; ++split) sum += parts[split * int64_t{rows} + (rows == 1 ? 0 : b)];
  count[b] = sum;
}

template <Storage kStorage>
cudaError_t count_bounded(const TileMap& tiles, const Inputs& in, dim3 grid, int rows, int32_t* parts, void* stream) {
  const auto run = [&](auto* kernel, int bytes) {
    return launch(kernel, grid, kThreads, bytes, stream, tiles, in, rows, parts);
  };
  if (in.query.D <= 64) return run(bound_kernel<kStorage, 4>, Tiles<4>::kBytes);
  if (in.query.D <= 128) return run(bound_kernel<kStorage, 8>, Tiles<8>::kBytes);
  return run(bound_kernel<kStorage, 16>, Tiles<16>::kBytes);
}

}  // namespace

CountingPlan plan_counting(int64_t B, int64_t K, int64_t processors) {
  const int64_t row_tiles = std::max<int64_t>((B + kRows - 1) / kRows, 1), most = (K / kKeys + 1) / 2;
  CountingPlan plan = {};
  plan.splits = std::clamp<int64_t>(most, 1, std::max<int64_t>(2 * processors / row_tiles, 1));
  plan.shared_splits = std::clamp<int64_t>(most, 1, 2 * processors);
  plan.workspace = 4 * std::max(plan.splits * B, plan.shared_splits);
  return plan;
}

int count_negatives(const CountNegativesParams& params, void* stream) {
  if (params.B == 0) return cudaSuccess;
  const Pool& pool = params.pool;
  const Inputs in = {rows_of(params.query, params.query_stride, params.D),
                     rows_of(params.negative_keys, params.negative_keys_stride, params.D),
                     static_cast<int32_t>(params.K), pool};
  const bool by_pair = pool.by_pair(), bounded = pool.lower || pool.upper;
  const int rows = by_pair ? static_cast<int>(params.B) : 1;
  const int64_t splits = by_pair ? params.plan.splits : pool.key_mask ? params.plan.shared_splits : 0;
  auto* parts = static_cast<int32_t*>(params.workspace);
  const dim3 grid((rows + kRows - 1) / kRows, static_cast<unsigned>(splits));
  cudaError_t error = cudaSuccess;
  if (bounded) {
    const TileMap tiles = map_tiles(in.keys, params.K, params.storage);
    error = params.storage == Storage::kBFloat16
                ? count_bounded<Storage::kBFloat16>(tiles, in, grid, rows, parts, stream)
                : count_bounded<Storage::kFloat16>(tiles, in, grid, rows, parts, stream);
  } else if (by_pair) {
    error = launch(mask_kernel<true>, grid, kThreads, 0, stream, in, rows, parts);
  } else if (splits > 0) {
    error = launch(mask_kernel<false>, grid, kThreads, 0, stream, in, rows, parts);
  }
  if (error != cudaSuccess) return error;
  const dim3 blocks(static_cast<unsigned>((params.B + kAddThreads - 1) / kAddThreads));
  return launch(add_kernel, blocks, kAddThreads, 0, stream, parts, static_cast<int>(splits), rows, params.B, in,
                params.count);
}

}  // namespace negmine::cuda
