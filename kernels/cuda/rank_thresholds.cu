// rank_thresholds: for every two ranks, one pass over the queue keeps the columns that may be at these ranks, and
// counts prove that the ranks are among them.
//
//   sample   the scores of evenly spaced columns are computed
//   bracket  two cuts are chosen around each rank, between which its sort key nearly always is (brackets.cuh)
//   scan     one pass over the queue counts the columns above the brackets and keeps the columns inside: the survivors.
//            Each row, lane and split of the queue has its own buffer, so there are no atomic operations, and the
//            contents do not depend on timing.
//   finish   a rank is certain if no buffer overflowed, at most `rank` columns are above its bracket, and more than
//            `rank` are above or inside it. Then its sort key is selected among the survivors.
//   recover  for the other ranks, if there are any, the digits of the sort key are found, with one pass over the queue
//            for each digit. Blocks without such a row return at once, so the host need not wait to learn whether there
//            are any.
//
// Every pass computes its scores with score_tile.cuh, so they are bit-identical.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "kernels/cuda/brackets.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/rank_thresholds.h"
#include "kernels/cuda/ranking.cuh"
#include "kernels/cuda/recovery.cuh"
#include "kernels/cuda/sample.cuh"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/survivors.cuh"
#include "kernels/cuda/tile_map.h"
#include "kernels/cuda/visible.cuh"

namespace negmine::cuda {
namespace {

constexpr int64_t kScratchBytes = 128 << 20;    // a workspace up to this size is never divided into chunks
constexpr int64_t kMostScratchBytes = 1 << 30;  // unless one tile of rows needs more

template <Storage kStorage, int kSteps, bool kByPair, int kBrackets>
__global__ void __launch_bounds__(kThreads, 2)
    scan_kernel(const __grid_constant__ TileMap tiles, Inputs in, Ranking p) {
  in.keep_valid_rows();
  uint32_t query[2][kSteps][4];
  load_queries<kSteps>(query, shared_memory(), in.query, p.first + blockIdx.x * int64_t{kRows}, p.B);
  const int t = threadIdx.x % kLanes, row_size = p.splits * kLanes * p.room * 8;  // bytes
  float cut[4][2 * kBrackets];
  int counted[4][kBrackets] = {};
  uint32_t at[4], lost = 0;  // where the next survivor goes, in bytes
  int turn = 0;              // the column from which on a cut is compared with another number (Cut::least_of)
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = blockIdx.x * int64_t{kRows} + row_of(i);
    at[i] = static_cast<uint32_t>(row) * row_size + (blockIdx.y * kLanes + t) * p.room * 8;
  }
  const uint32_t start = at[0], limit = start + (p.room - kSlack) * 8;  // of row 0 of this lane
  const auto find = [&](int column) { return in.key(column); };
  char* const survivors = reinterpret_cast<char*>(p.survivors);
  const int query_row = static_cast<int>(p.first) + blockIdx.x * kRows + row_of(0), B = static_cast<int>(p.B);
  uint32_t seen = 0xFFFFFFFFu;
  const auto before = [&](int column) {  // before scores take up registers
    if constexpr (kByPair) seen = visible<2, true>(in, query_row, B, column + 2 * t);
  };
  const auto use = [&](int column, const Scores& s, SharedAddress) {
    if (column >= turn) {
      turn = INT32_MAX;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = blockIdx.x * int64_t{kRows} + row_of(i);
#pragma unroll
        for (int c = 0; c < 2 * kBrackets; ++c) {
          const Cut own = row < p.rows ? p.cuts[row * (2 * kBrackets) + c] : Cut{NAN, 0};
          cut[i][c] = own.least_of(column);
          if (column < own.columns) turn = min(turn, own.columns);
        }
      }
    }
    if constexpr (kByPair) seen = inside_bounds<2>(seen, in.pool, s, query_row, B, column + 2 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t end = limit + 8 * i * row_size;
      if (at[i] > end) at[i] = end, lost |= 1u << i;  // this chunk may not fit
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float score = s[i / 2][j / 2][i % 2 * 2 + j % 2];
        if (kByPair && !(seen & bit_of(j) << shift_of(i))) score = NAN;
        append_where_odd(cut[i], score, column + 8 * (j / 2) + 2 * t + j % 2, survivors, at[i], counted[i]);
      }
    }
  };
  // Splits take tiles in turn, because keys that are close in the queue are often similar and would fill one buffer.
  constexpr int kAtOnce = kByPair ? 1 : 2;
  stream<kStorage, kSteps, 2, kTwoNaNs, kAtOnce>(query, shared_memory(), MappedRows{in.keys, tiles}, blockIdx.y,
                                                 p.splits, in.K, !in.pool.key_mask, find, use, before);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = blockIdx.x * int64_t{kRows} + row_of(i);
    const auto count = static_cast<int32_t>((at[i] - start - 8 * i * row_size) / 8);
    if (row < p.rows) p.found[(row * p.splits + blockIdx.y) * kLanes + t] = lost >> i & 1 ? kLost : count;
    int own = 0;
#pragma unroll
    for (int c = 0; c < kBrackets; ++c) {
      int sum = counted[i][c];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      own = t == c ? sum : own;
    }
    if (row < p.rows && t < kBrackets) p.counted[(row * p.splits + blockIdx.y) * kBrackets + t] = own;
  }
}

template <Storage kStorage, int kSteps>
__global__ void __launch_bounds__(kThreads, 2)
    recover_kernel(const __grid_constant__ TileMap tiles, Inputs in, Ranking p) {
  const int64_t first = blockIdx.x * int64_t{kRows}, own = first + threadIdx.x;  // each thread decides about one row
  const int32_t missing = own < p.rows ? p.missing[own * p.ranks.count + blockIdx.y] : -1;
  if (!__syncthreads_or(missing >= 0)) return;

  auto& books = *reinterpret_cast<Recovery*>(shared_memory() + Tiles<kSteps>::kBytes);
  books.want(missing + 1);
  uint32_t query[2][kSteps][4];
  load_queries<kSteps>(query, shared_memory(), in.query, p.first + first, p.B);
  find_last<kStorage, kSteps>(books, query, tiles, in, p.first + first);
  // The lowest of the rank + 1 highest sort keys is the one at the rank.
  auto* lowest = reinterpret_cast<unsigned long long*>(&books.bins[0][0]);  // (kRows,)
  __syncthreads();
  lowest[threadIdx.x] = ~0ull;
  visit<kStorage, kSteps>(
      books, query, tiles, in, p.first + first, [&](int row, uint64_t at) { return at >= books.last[row]; },
      [&](int row, uint64_t at) { atomicMin(&lowest[row], static_cast<unsigned long long>(at)); });
  if (missing < 0) return;
  const bool is_there = books.wanted[threadIdx.x] == 0;
  p.sort_keys[(p.first + own) * p.ranks.stride + blockIdx.y] =
      is_there ? static_cast<int64_t>(uint64_t{lowest[threadIdx.x]} ^ uint64_t{1} << 63) : kNowhere;
}

// Launches all kernels for one chunk of queries and one or two ranks of each.
template <Storage kStorage, int kSteps, int kBrackets>
cudaError_t find_places(const TileMap& tiles, const Inputs& in, const Sample& sample, const Ranking& p, void* stream) {
  const unsigned row_tiles = (p.rows + kRows - 1) / kRows, splits = p.splits;
  constexpr int kShared = Tiles<kSteps>::kBytes;
  static_assert(kShared + sizeof(Recovery) <= kSharedBytes);
  const bool by_pair = in.pool.by_pair();
  cudaError_t error = cudaSuccess;
  const auto then = [&](auto... arguments) {
    if (error == cudaSuccess) error = launch(arguments...);
  };
  if (sample.size > 0) {
    const unsigned parts = std::min<unsigned>(splits, (sample.size + kKeys - 1) / kKeys);
    then(sample_kernel<kStorage, kSteps>, dim3(row_tiles, parts), kThreads, kShared, stream, in, sample);
  }
  const int searchers = std::max(sample.size / kHeld, kWarp), searching = sizeof(Search);
  then(brackets_kernel, dim3(p.rows), searchers, searching, stream, in.pool, by_pair, sample, in.K, p.ranks, p.cuts);
  if (by_pair) {
    then(scan_kernel<kStorage, kSteps, true, kBrackets>, dim3(row_tiles, splits), kThreads, kShared, stream, tiles, in,
         p);
  } else {
    then(scan_kernel<kStorage, kSteps, false, kBrackets>, dim3(row_tiles, splits), kThreads, kShared, stream, tiles, in,
         p);
  }
  const int selecting = sizeof(Selection), with_books = kShared + static_cast<int>(sizeof(Recovery));
  then(finish_kernel<kBrackets>, dim3(p.rows), kSelectThreads, selecting, stream, p);
  then(recover_kernel<kStorage, kSteps>, dim3(row_tiles, kBrackets), kThreads, with_books, stream, tiles, in, p);
  return error;
}

template <Storage kStorage, int kSteps>
cudaError_t find_one_or_two(const TileMap& tiles, const Inputs& in, const Sample& sample, const Ranking& p,
                            void* stream) {
  return p.ranks.count == 1 ? find_places<kStorage, kSteps, 1>(tiles, in, sample, p, stream)
                            : find_places<kStorage, kSteps, 2>(tiles, in, sample, p, stream);
}

template <Storage kStorage>
cudaError_t find_at_width(const TileMap& tiles, const Inputs& in, const Sample& sample, const Ranking& p,
                          void* stream) {
  if (in.query.D <= 64) return find_one_or_two<kStorage, 4>(tiles, in, sample, p, stream);
  if (in.query.D <= 128) return find_one_or_two<kStorage, 8>(tiles, in, sample, p, stream);
  return find_one_or_two<kStorage, 16>(tiles, in, sample, p, stream);
}

// The sizes in bytes of the parts of the workspace, in this order.
struct Layout {
  int64_t survivors, found, cuts, counted, missing;
};

Layout layout_of(const RankingPlan& plan) {
  const int64_t buffers = plan.rows * plan.splits * kLanes;
  return {std::max(8 * buffers * plan.room, (4 * plan.rows * plan.sample + 15) / 16 * 16), 4 * buffers,
          4 * plan.rows * static_cast<int64_t>(sizeof(Cut)), 4 * 2 * plan.rows * plan.splits, 4 * 2 * plan.rows};
}

}  // namespace

RankingPlan plan_ranking(int64_t B, int64_t K, int64_t R, int64_t processors, int64_t least_sample) {
  RankingPlan plan = {};
  double likely = static_cast<double>(K);  // survivors of a row
  if (K > 4 * least_sample) {
    int64_t eighth = 1;  // K / 8, rounded up to a power of two
    while (8 * eighth < K) eighth *= 2;
    plan.sample = std::clamp<int64_t>(eighth, least_sample, kMostSampled);
    // The ranks are known only on the device, so there is room for the widest bracket, which is that of the median.
    const double share = static_cast<double>(plan.sample) / static_cast<double>(K);
    const double reach = kReach * std::sqrt(plan.sample / 4.0 * (1 - share)) + kPositionsBelow;
    const double coarse = static_cast<double>(plan.sample / (kCells / 4) + 1);  // columns of one cell in cut_at()
    const double kept = static_cast<double>(std::min<int64_t>(R, 2)) * (2 * (reach + coarse) + 1);
    likely = std::min(likely, (kept + 2 * std::sqrt(kept)) / share);
  }
  const int64_t key_tiles = (K + kKeys - 1) / kKeys;
  // Two blocks for each multiprocessor. A buffer has room for its likely load plus six standard deviations.
  const auto cut_rows = [&](int64_t rows) {
    plan.rows = std::min(std::max<int64_t>(B, 1), (rows + kRows - 1) / kRows * kRows);
    const int64_t row_tiles = (plan.rows + kRows - 1) / kRows;
    plan.splits = std::min({2 * processors / row_tiles, key_tiles / 2, static_cast<int64_t>(likely) / (8 * kLanes)});
    plan.splits = std::max<int64_t>(plan.splits, 1);
    const int64_t all = (key_tiles + plan.splits - 1) / plan.splits * (kKeys / kLanes);
    const double load = likely / static_cast<double>(plan.splits * kLanes);
    const int64_t most = static_cast<int64_t>(load + 6 * std::sqrt(load) + 6);
    plan.room = (plan.sample == 0 ? all : std::min(all, most)) + kSlack;
    const Layout bytes = layout_of(plan);
    plan.workspace = bytes.survivors + bytes.found + bytes.cuts + bytes.counted + bytes.missing;
  };
  const int64_t budget = std::clamp(B * K / 2, kScratchBytes, kMostScratchBytes);  // a quarter of a 16-bit score matrix
  const int64_t most_chunks = std::max<int64_t>((B + kRows - 1) / kRows, 1);
  int64_t chunks = 1;
  do {
    cut_rows(std::max<int64_t>((B + chunks - 1) / chunks, 1));
  } while (plan.workspace > budget && ++chunks <= most_chunks);
  return plan;
}

bool fits(const RankingPlan& plan) { return layout_of(plan).survivors <= UINT32_MAX; }

int rank_thresholds(const RankThresholdsParams& params, void* stream) {
  const RankingPlan& plan = params.plan;
  if (params.B == 0 || params.R == 0) return cudaSuccess;
  const Layout bytes = layout_of(plan);
  char* workspace = static_cast<char*>(params.workspace);
  char *found = workspace + bytes.survivors, *cuts = found + bytes.found, *counted = cuts + bytes.cuts;
  const Inputs in = {rows_of(params.query, params.query_stride, params.D),
                     rows_of(params.negative_keys, params.negative_keys_stride, params.D),
                     static_cast<int32_t>(params.K), params.pool};
  const TileMap tiles = map_tiles(in.keys, params.K, params.storage);
  for (int64_t first = 0; first < params.B; first += plan.rows) {
    const auto rows = static_cast<int32_t>(std::min(plan.rows, params.B - first));
    const Sample sample = {first, params.B, rows, static_cast<int32_t>(plan.sample),
                           reinterpret_cast<uint32_t*>(workspace)};
    for (int64_t r = 0; r < params.R; r += 2) {
      const Ranking pass = {
          .first = first,
          .B = params.B,
          .rows = rows,
          .splits = static_cast<int32_t>(plan.splits),
          .room = static_cast<int32_t>(plan.room),
          .ranks = {params.ranks + r, params.R, static_cast<int32_t>(std::min<int64_t>(params.R - r, 2))},
          .survivors = reinterpret_cast<Survivor*>(workspace),
          .found = reinterpret_cast<int32_t*>(found),
          .counted = reinterpret_cast<int32_t*>(counted),
          .cuts = reinterpret_cast<Cut*>(cuts),
          .missing = reinterpret_cast<int32_t*>(counted + bytes.counted),
          .sort_keys = params.sort_keys + r,
      };
      const cudaError_t error = params.storage == Storage::kBFloat16
                                    ? find_at_width<Storage::kBFloat16>(tiles, in, sample, pass, stream)
                                    : find_at_width<Storage::kFloat16>(tiles, in, sample, pass, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace negmine::cuda
