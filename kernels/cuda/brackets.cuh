// Brackets: two cuts around each wanted rank, chosen from a sample of the row's scores so that the sort key at the rank
// is nearly always between them. A bracket need not be exact, because the counts of the scan show whether it contains
// its rank.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/sample.cuh"
#include "kernels/cuda/sort_key.cuh"

namespace negmine::cuda {

constexpr int kCellRows = 32, kCells = kCellRows * kCellRows;  // of a histogram
constexpr int kCellInts = kCellRows * (kCellRows + 1);         // its memory: rows are padded against bank conflicts
// How far a bracket reaches past the position that its rank has in the sample on average: standard deviations, and
// positions.
constexpr float kReach = 4.75f, kPositionsBelow = 4.0f, kPlacesAbove = 3.0f;

__device__ __forceinline__ int at_cell(int cell) { return cell / kCellRows * (kCellRows + 1) + cell % kCellRows; }

// A cell of a histogram, the number of elements in higher cells, and the number of elements in it.
struct Cell {
  int cell, higher, count;
};

__device__ __forceinline__ int sum_up_to(int value, int lane) {
#pragma unroll
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, apart);
    if (lane >= apart) value += other;
  }
  return value;
}

__device__ __forceinline__ Cell find_cell(const int* cells, int wanted, int lane) {
  static_assert(kCellRows == kWarp);
  int own = 0;
  for (int i = 0; i < kCellRows; ++i) own += cells[(kCellRows - 1 - lane) * (kCellRows + 1) + i];  // highest first
  const int up_to = sum_up_to(own, lane);
  const int owner = __popc(__ballot_sync(kAllLanes, up_to < wanted)), row = kCellRows - 1 - owner;
  const int before = __shfl_sync(kAllLanes, up_to - own, owner);
  const int count = cells[row * (kCellRows + 1) + kCellRows - 1 - lane];
  const int with = before + sum_up_to(count, lane);
  const int second = __popc(__ballot_sync(kAllLanes, with < wanted));
  return {row * kCellRows + kCellRows - 1 - second, __shfl_sync(kAllLanes, with - count, second),
          __shfl_sync(kAllLanes, count, second)};
}

// Cells of equal width over the scores from rank() `low` to rank() `high`. Infinities count as the largest finite
// numbers.
struct Grid {
  uint32_t low, high;
  float least, step, per_step;

  __device__ Grid(uint32_t low, uint32_t high) : low(low), high(high), least(number(low)) {
    const float half = 0.5f * number(high) - 0.5f * least;
    step = half * (2.0f / kCells);
    per_step = half > 0.0f ? fminf(kCells / half, FLT_MAX) : 0.0f;
  }
  static __device__ float number(uint32_t rank) { return fminf(fmaxf(score_of(rank), -FLT_MAX), FLT_MAX); }
  __device__ int cell_of(uint32_t rank) const {
    return min(static_cast<int>((0.5f * number(rank) - 0.5f * least) * per_step), kCells - 1);
  }
  // Scores at the lower and at the upper end of a cell.
  __device__ float below(int cell) const { return cell == 0 ? score_of(low) : fmaf(cell, step, least); }
  __device__ float above(int cell) const { return cell == kCells - 1 ? score_of(high) : fmaf(cell + 1, step, least); }
};

// The shared memory of a block that searches for the cuts of its row.
struct Search {
  int cells[2][kCellInts];
  unsigned low, high;
  int size;
  Cell found[4], narrower;
  Cut cuts[4];
};

// The ranks that one pass finds: one or two for each row of a (B, R) array, in ascending order.
struct RowRanks {
  const int64_t* ranks;  // of row 0
  int64_t stride;        // R
  int32_t count;

  struct Of {
    int64_t rank;
    int column;  // 0 or 1: the place of this rank in the array
  };

  __device__ Of of(int64_t b, int i) const {
    const int64_t* own = ranks + b * stride;
    const int column = count == 2 && own[1] < own[0] ? 1 - i : i;
    return {own[column], column};
  }
};

// Calls use(rank, position) for every score in the sample of the block's row.
template <class Use>
__device__ __forceinline__ void each_sampled(const Sample& sample, Use use) {
  const uint32_t* ranks = sample.ranks + static_cast<int64_t>(blockIdx.x) * sample.size;
#pragma unroll 4
  for (int at = threadIdx.x; at < sample.size; at += blockDim.x) {
    if (const uint32_t rank = ranks[at]) use(rank, at);
  }
}

// A cut next to the wanted-th highest sampled column, counted from 1. The column reaches the cut if is_low, and does
// not reach it otherwise. In either case the cut may be a few sampled columns further away, which only widens the
// bracket. `found` is the column's cell of `grid`. All threads must call it.
__device__ __forceinline__ Cut cut_at(Search& shared, const Sample& sample, int K, Grid grid, Cell found, int wanted,
                                      bool is_low) {
  const int lane = threadIdx.x % kWarp, group = max(sample.size / kCells, 1);
  int* cells = shared.cells[1];
  // Counts the sampled scores with a rank() from low to high by cells, and finds the cell of the wanted-th.
  const auto find = [&](uint32_t low, uint32_t high, auto cell_of) {
    for (int i = threadIdx.x; i < kCellInts; i += blockDim.x) cells[i] = 0;
    __syncthreads();
    each_sampled(sample, [&](uint32_t rank, int at) {
      if (rank >= low && rank <= high) atomicAdd(&cells[at_cell(cell_of(rank, at))], 1);
    });
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const Cell narrower = find_cell(cells, wanted, lane);
      if (lane == 0) shared.narrower = narrower;
    }
    __syncthreads();
    return shared.narrower;
  };
  while (found.count > sample.size / (kCells / 4) + 1) {  // too many columns in the cell: divide it
    wanted -= found.higher;
    __syncthreads();
    if (threadIdx.x == 0) shared.low = 0xFFFFFFFFu, shared.high = 0u;
    __syncthreads();
    unsigned low = 0xFFFFFFFFu, high = 0u;
    each_sampled(sample, [&](uint32_t rank, int) {
      if (rank < grid.low || rank > grid.high || grid.cell_of(rank) != found.cell) return;
      low = min(low, rank), high = max(high, rank);
    });
    low = __reduce_min_sync(kAllLanes, low), high = __reduce_max_sync(kAllLanes, high);
    if (lane == 0) atomicMin(&shared.low, low), atomicMax(&shared.high, high);
    __syncthreads();
    low = shared.low, high = shared.high;
    if (low == high) {  // all its scores are equal: divide their columns
      found = find(low, high, [&](uint32_t, int at) { return kCells - 1 - at / group; });
      const int at = (kCells - 1 - found.cell) * group;
      if (!is_low) return {score_of(low), static_cast<int32_t>(sample.column_of(K, at) / kChunk * kChunk)};
      if (at + group >= sample.size) return {score_of(low), kAllColumns};
      return {score_of(low), static_cast<int32_t>((sample.column_of(K, at + group) / kChunk + 1) * kChunk)};
    }
    if (low == grid.low && high == grid.high) break;  // cannot be divided further
    grid = Grid(low, high);
    found = find(low, high, [&](uint32_t rank, int) { return grid.cell_of(rank); });
  }
  return is_low ? Cut{grid.below(found.cell), kAllColumns} : Cut{grid.above(found.cell), 0};
}

// cuts[row] = the upper and the lower cut of the bracket of the smaller rank and, if there are two ranks, of that of
// the larger rank. If the brackets overlap, the first is extended to contain both ranks, and the second has cuts of
// NaN. One block for each row.
__global__ void __launch_bounds__(kCutThreads)
    brackets_kernel(Pool pool, bool by_pair, Sample sample, int K, RowRanks ranks, Cut* cuts) {
  auto& shared = *reinterpret_cast<Search*>(shared_memory());
  const int lane = threadIdx.x % kWarp, count = 2 * ranks.count;
  const Cut nothing = {INFINITY, 0}, everything = {-INFINITY, kAllColumns}, none = {NAN, 0};
  cuts += static_cast<int64_t>(blockIdx.x) * count;
  if (sample.size == 0) {
    for (int c = threadIdx.x; c < count; c += blockDim.x) cuts[c] = c == 0 ? nothing : c == 1 ? everything : none;
    return;
  }
  if (by_pair) hide(sample, pool, K);
  for (int i = threadIdx.x; i < kCellInts; i += blockDim.x) shared.cells[0][i] = 0;
  if (threadIdx.x == 0) shared.low = 0xFFFFFFFFu, shared.high = 0u, shared.size = 0;
  __syncthreads();
  unsigned low = 0xFFFFFFFFu, high = 0u;
  int size = 0;
  each_sampled(sample, [&](uint32_t rank, int) { low = min(low, rank), high = max(high, rank), ++size; });
  low = __reduce_min_sync(kAllLanes, low), high = __reduce_max_sync(kAllLanes, high);
  size = sum_over_warp(size);
  if (lane == 0) atomicMin(&shared.low, low), atomicMax(&shared.high, high), atomicAdd(&shared.size, size);
  __syncthreads();
  size = shared.size;
  const Grid grid(shared.low, shared.high);
  each_sampled(sample, [&](uint32_t rank, int) { atomicAdd(&shared.cells[0][at_cell(grid.cell_of(rank))], 1); });
  __syncthreads();
  // The position of cut c in the sample, counted from 1; 0 if no columns and size + 1 if all columns reach it.
  const auto position_of = [&](int c) {
    const int64_t rank = ranks.of(sample.first + blockIdx.x, c / 2).rank;
    if (rank < 0) return 0;
    const float share = static_cast<float>(sample.size) / K;
    const float position = fminf(static_cast<float>(rank + 1) * share, sample.size);
    const float reach = kReach * sqrtf(fmaxf(position * (1.0f - position / sample.size) * (1.0f - share), 0.0f));
    // The number of sampled columns above a rank has a skewed distribution. For ranks in the upper half its lower tail
    // is shorter than that of a normal distribution, so the upper cut can be closer; for the others it is longer. At
    // the very top, where the closer cut could be below the rank, the bracket has no upper end.
    const float skew = 2.0f * position <= sample.size ? kPlacesAbove : -kPositionsBelow;
    float at = ceilf(position + reach + kPositionsBelow);
    if (c % 2 == 0) at = position - reach < 1.0f ? 0.0f : floorf(position - reach + skew);
    return static_cast<int>(fminf(fmaxf(at, 0.0f), size + 1.0f));
  };
  for (int c = threadIdx.x / kWarp; c < count; c += blockDim.x / kWarp) {
    const int at = position_of(c);
    if (at < 1 || at > size) continue;
    const Cell found = find_cell(shared.cells[0], at, lane);
    if (lane == 0) shared.found[c] = found;
  }
  __syncthreads();
#pragma unroll 1
  for (int c = 0; c < count; ++c) {
    const int at = position_of(c);
    Cut own = at < 1 ? nothing : everything;
    if (at >= 1 && at <= size) {
      own = cut_at(shared, sample, K, grid, shared.found[c], at, c % 2 == 1);
    }
    if (threadIdx.x == 0) shared.cuts[c] = own;
  }
  if (threadIdx.x > 0) return;
  Cut* own = shared.cuts;
  for (int c = 0; c < count; c += 2) {
    if (own[c].floor() < own[c + 1].floor()) own[c] = own[c + 1];  // rounding exchanged them
  }
  if (count == 4 && own[1].floor() < own[2].floor()) {  // the brackets overlap
    if (own[3].floor() < own[1].floor()) own[1] = own[3];
    own[2] = own[3] = none;
  }
  for (int c = 0; c < count; ++c) cuts[c] = own[c];
}

}  // namespace negmine::cuda
