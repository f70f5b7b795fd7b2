// Selection of the sort key at each wanted rank among the survivors of the scan of rank_thresholds.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/brackets.cuh"
#include "kernels/cuda/sort_key.cuh"
#include "kernels/cuda/survivors.cuh"

namespace negmine::cuda {

constexpr int64_t kNowhere = INT64_MIN;  // the sort key of a rank past the end of the pool
constexpr int kSelectThreads = 256;
constexpr int kFew = 512;  // this many sort keys, or fewer, are ranked by comparing all pairs

// The arguments of the kernels for one chunk of queries and one or two ranks of each.
struct Ranking {
  int64_t first, B;  // row i of the workspace belongs to query first + i, of B queries in total
  int32_t rows;      // queries in this chunk
  int32_t splits, room;
  RowRanks ranks;
  Survivor* survivors;  // (rows, splits, kLanes, room); before the scan, the sample uses this memory
  int32_t* found;       // (rows, splits, kLanes) number of survivors, or kLost
  int32_t* counted;     // (rows, splits, brackets), see append_where_odd
  Cut* cuts;            // (rows, 2 brackets)
  int32_t* missing;     // (rows, brackets) ranks that must be recovered, in the order of the array of ranks, or -1
  int64_t* sort_keys;   // output (B, R), from the column of the first of these ranks on
};

// The shared memory of a block that selects. The sort key at each of the two ranks is in [low, low + span).
struct Selection {
  int cells[2][kCellInts];
  uint64_t low[2], span[2];
  int64_t wanted[2];         // its position among the survivors in this range, counted from 1, highest first
  int few[2];                // -1, or, once there are at most kFew survivors in this range, their number
  int total[2], counted[2];  // the survivors in each bracket, and the sum of Ranking::counted
  unsigned lost;
  uint64_t sort_keys[2][kFew];
};

// The number of bits by which an offset below a span is shifted right to give the number of its cell.
__device__ __forceinline__ int shift_of(uint64_t span) {
  static_assert(kCells == 1 << 10);
  return max(64 - 10 - __clzll(static_cast<int64_t>(span - 1)), 0);
}

// Writes the sort key at each rank of a row, or marks the rank as missing. One block for each row.
template <int kBrackets>
__global__ void __launch_bounds__(kSelectThreads, 4) finish_kernel(Ranking p) {
  auto& shared = *reinterpret_cast<Selection*>(shared_memory());
  const int row = blockIdx.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  constexpr int kWarps = kSelectThreads / kWarp;
  const int4* found = reinterpret_cast<const int4*>(p.found) + static_cast<int64_t>(row) * p.splits;
  const Cut* cuts = p.cuts + row * int64_t{2 * kBrackets};
  const auto own_cut = [&](int r, int c) {
    const bool merged = kBrackets == 2 && r == 1 && cuts[2 * r].score != cuts[2 * r].score;
    return cuts[merged ? c : 2 * r + c];
  };
  if (threadIdx.x == 0) shared.lost = 0, shared.counted[0] = shared.counted[1] = 0;
  if (threadIdx.x < kBrackets) {
    const int r = threadIdx.x;
    shared.low[r] = own_cut(r, 1).floor();
    shared.span[r] = own_cut(r, 0).floor() - shared.low[r];
    shared.few[r] = -1;
    shared.total[r] = 0;
  }
  __syncthreads();
  const int32_t* counted = p.counted + static_cast<int64_t>(row) * p.splits * kBrackets;
  for (int i = threadIdx.x; i < p.splits * kBrackets; i += kSelectThreads) {
    atomicAdd(&shared.counted[i % kBrackets], counted[i]);
  }
  // Calls use(sort_key) for every survivor, with four loads in flight.
  const auto each = [&](auto use) {
    for (int split = warp; split < p.splits; split += kWarps) {
      const int4 n = found[split];
      const int counts[kLanes] = {n.x, n.y, n.z, n.w};
      const Survivor* from = p.survivors + (static_cast<int64_t>(row) * p.splits + split) * kLanes * p.room;
      const int most = max(max(n.x, n.y), max(n.z, n.w));
      for (int i = lane; i < most; i += kWarp) {
        Survivor own[kLanes] = {};
#pragma unroll
        for (int l = 0; l < kLanes; ++l) {
          if (i < counts[l]) own[l] = from[l * p.room + i];
        }
#pragma unroll
        for (int l = 0; l < kLanes; ++l) {
          if (i < counts[l]) use(pack_sort_key(__uint_as_float(own[l].x), static_cast<int32_t>(own[l].y)));
        }
      }
    }
  };
  for (int split = threadIdx.x; split < p.splits; split += kSelectThreads) {
    const int4 n = found[split];
    if (min(min(n.x, n.y), min(n.z, n.w)) == kLost) atomicOr(&shared.lost, 1u);
  }
  for (bool is_first = true; true; is_first = false) {
    for (int i = threadIdx.x; i < kBrackets * kCellInts; i += kSelectThreads)
      shared.cells[i / kCellInts][i % kCellInts] = 0;
    __syncthreads();
    each([&](uint64_t at) {
#pragma unroll
      for (int r = 0; r < kBrackets; ++r) {
        const uint64_t offset = at - shared.low[r];
        if (offset < shared.span[r] && shared.few[r] < 0) {
          atomicAdd(&shared.cells[r][at_cell(static_cast<int>(offset >> shift_of(shared.span[r])))], 1);
        }
      }
    });
    __syncthreads();
    if (is_first) {
      if (warp < kBrackets) {
        int own = 0;
        for (int i = lane; i < kCells; i += kWarp) own += shared.cells[warp][at_cell(i)];
        own = sum_over_warp(own);
        if (lane == 0) shared.total[warp] = own;
      }
      __syncthreads();
      if (threadIdx.x < kBrackets) {
        const int r = threadIdx.x;
        const auto [rank, column] = p.ranks.of(p.first + row, r);
        const bool merged = kBrackets == 2 && r == 1 && cuts[2 * r].score != cuts[2 * r].score;
        int64_t above = shared.counted[merged ? 0 : r];
        if (r == 1 && !merged) above += shared.total[0];  // append_where_odd leaves these out
        const Cut below = own_cut(r, 1);
        const bool to_the_end = below.is_everything();
        const bool inside = !shared.lost && rank >= above && rank < above + shared.total[r];
        const bool past = !shared.lost && to_the_end && rank >= above + shared.total[r];
        const bool is_missing = rank >= 0 && !inside && !past;
        // There are fewer than INT32_MAX columns, so a clamped rank is still past the end.
        p.missing[row * int64_t{kBrackets} + column] =
            is_missing ? static_cast<int32_t>(min(rank, int64_t{INT32_MAX - 1})) : -1;
        if (!inside || rank < 0) {
          if (!is_missing) p.sort_keys[(p.first + row) * p.ranks.stride + column] = kNowhere;
          shared.few[r] = 0;
        }
        shared.wanted[r] = rank - above + 1;
      }
      __syncthreads();
    }
    if (warp < kBrackets && shared.few[warp] < 0) {
      const int r = warp;
      const uint64_t low = shared.low[r], span = shared.span[r];
      const int64_t wanted = shared.wanted[r];
      const int shift = shift_of(span);
      const Cell cell = find_cell(shared.cells[r], static_cast<int>(wanted), lane);
      __syncwarp();  // lane 0 changes what the others have read
      if (lane == 0) {
        const uint64_t begin = static_cast<uint64_t>(cell.cell) << shift;
        shared.wanted[r] = wanted - cell.higher;
        shared.low[r] = low + begin;
        shared.span[r] = min(uint64_t{1} << shift, span - begin);
        if (cell.count <= kFew) shared.few[r] = cell.count;
      }
    }
    __syncthreads();
    if (shared.few[0] >= 0 && (kBrackets == 1 || shared.few[1] >= 0)) break;
    __syncthreads();
  }

  if (threadIdx.x < kBrackets) shared.total[threadIdx.x] = 0;
  __syncthreads();
  each([&](uint64_t at) {
#pragma unroll
    for (int r = 0; r < kBrackets; ++r) {
      if (at - shared.low[r] < shared.span[r] && shared.few[r] > 0) {
        shared.sort_keys[r][atomicAdd(&shared.total[r], 1)] = at;
      }
    }
  });
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kBrackets; ++r) {
    const int few = shared.few[r];
    for (int i = threadIdx.x; i < few; i += kSelectThreads) {
      const uint64_t own = shared.sort_keys[r][i];
      int rank = 1;
      for (int j = 0; j < few; ++j) rank += shared.sort_keys[r][j] > own;
      if (rank != shared.wanted[r]) continue;
      const int column = p.ranks.of(p.first + row, r).column;
      p.sort_keys[(p.first + row) * p.ranks.stride + column] = static_cast<int64_t>(own ^ uint64_t{1} << 63);
    }
  }
}

}  // namespace negmine::cuda
