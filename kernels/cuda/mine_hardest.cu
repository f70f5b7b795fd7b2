// mine_hardest: one pass over the queue keeps the columns that may be among the N hardest, and a check proves that the
// N hardest are among them.
//
//   sample   the scores of evenly spaced columns give a cut (sample.cuh) that at least N columns nearly always reach
//   scan     one pass over the queue keeps the columns that reach the cut, a little more than N: the survivors. Each
//            row, lane and split of the queue has its own buffer, so there are no atomic operations, and the contents
//            do not depend on timing.
//   recover  a row is certain if at least N columns reached its cut, or all columns reach it, and no buffer overflowed.
//            For the other rows, if there are any, the search is repeated exactly: the digits of the sort key of the
//            N-th column are found, with one pass over the queue for each digit. Blocks without such a row return at
//            once, so the host need not wait to learn whether there are any.
//   finish   the first N survivors of each row are sorted
//
// Every pass computes its scores with score_tile.cuh, so they are bit-identical.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mine_hardest.h"
#include "kernels/cuda/recovery.cuh"
#include "kernels/cuda/sample.cuh"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/selection.cuh"
#include "kernels/cuda/tile_map.h"

namespace negmine::cuda {
namespace {

constexpr int kFinishExtra = 4 * (kBins + 8);   // shared memory of the finish besides its sort keys, in bytes
constexpr int64_t kScratchBytes = 144 << 20;    // a workspace up to this size is never divided into chunks
constexpr int64_t kMostScratchBytes = 1 << 30;  // offsets in it have 32 bits
// How far the cut is below the expected position of the N-th column in the sample: standard deviations, and positions.
constexpr double kSigmas = 4.75, kPositionsBelow = 4;

template <Storage kStorage, int kSteps, bool kByPair>
__global__ void __launch_bounds__(kThreads, 2) scan_kernel(const __grid_constant__ TileMap tiles, Inputs in, Pass p) {
  in.keep_valid_rows();
  uint32_t query[2][kSteps][4];
  load_queries<kSteps>(query, shared_memory(), in.query, p.first + blockIdx.x * int64_t{kRows}, p.B);
  const int t = threadIdx.x % kLanes, row_size = p.splits * kLanes * p.room * 8;  // bytes
  float cut[4];
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
  // Removes columns outside the pool of row i from its survivors, which are at [begin, end). Returns the new end.
  const auto only_seen = [&](int i, uint32_t begin, uint32_t end) {
    const int64_t b = p.first + blockIdx.x * int64_t{kRows} + row_of(i);
    uint32_t to = begin;
#pragma unroll 1
    for (uint32_t from = begin; from < end; from += 8) {
      const Survivor survivor = *reinterpret_cast<const Survivor*>(survivors + from);
      if (!sees(in.pool, b, survivor.y, __uint_as_float(survivor.x))) continue;
      *reinterpret_cast<Survivor*>(survivors + to) = survivor;
      to += 8;
    }
    return to;
  };
  const auto use = [&](int column, const Scores& s, SharedAddress) {
    if (column >= turn) {
      turn = INT32_MAX;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = blockIdx.x * int64_t{kRows} + row_of(i);
        const Cut own = row < p.rows ? p.cuts[row] : Cut{NAN, 0};
        cut[i] = own.least_of(column);
        if (column < own.columns) turn = min(turn, own.columns);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t end = limit + 8 * i * row_size;
      if (at[i] > end) {  // no room for what this chunk may add
        if (kByPair) at[i] = only_seen(i, start + 8 * i * row_size, at[i]);
        if (at[i] > end) at[i] = end, lost |= 1u << i;
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          append_where_reaches(cut[i], s[i / 2][n][i % 2 * 2 + c], column + 8 * n + 2 * t + c, survivors, at[i]);
        }
      }
    }
  };
  // Splits take tiles in turn, because keys that are close in the queue are often similar and would fill one buffer.
  stream<kStorage, kSteps>(query, shared_memory(), MappedRows{in.keys, tiles}, blockIdx.y, p.splits, in.K,
                           !in.pool.key_mask, find, use);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = blockIdx.x * int64_t{kRows} + row_of(i);
    const uint32_t begin = start + 8 * i * row_size;
    if (kByPair) at[i] = only_seen(i, begin, at[i]);
    const auto count = static_cast<int32_t>((at[i] - begin) / 8);
    if (row < p.rows) p.found[(row * p.splits + blockIdx.y) * kLanes + t] = lost >> i & 1 ? kLost : count;
  }
}

// Whether the survivors of a row are certain to include its N hardest columns.
__device__ bool certain(const Pass& p, int64_t row) {
  const int4* found = reinterpret_cast<const int4*>(p.found) + row * p.splits;
  int64_t total = 0;
  int least = 0;
  for (int split = 0; split < p.splits; ++split) {
    const int4 lanes = found[split];
    total += static_cast<int64_t>(lanes.x) + lanes.y + lanes.z + lanes.w;
    least = min(least, min(min(lanes.x, lanes.y), min(lanes.z, lanes.w)));
  }
  return least != kLost && total <= p.capacity && (total >= p.N || p.cuts[row].is_everything());
}

template <Storage kStorage, int kSteps>
__global__ void __launch_bounds__(kThreads, 2)
    recover_kernel(const __grid_constant__ TileMap tiles, Inputs in, Pass p) {
  const int64_t first = blockIdx.x * int64_t{kRows}, own = first + threadIdx.x;  // each thread decides about one row
  const bool failed = own < p.rows && !certain(p, own);
  if (own < p.rows) p.recovered[own] = failed ? 0 : kFromBuffers;
  if (!__syncthreads_or(failed)) return;

  auto& books = *reinterpret_cast<Recovery*>(shared_memory() + Tiles<kSteps>::kBytes);
  books.want(failed ? p.N : 0);
  uint32_t query[2][kSteps][4];
  load_queries<kSteps>(query, shared_memory(), in.query, p.first + first, p.B);
  find_last<kStorage, kSteps>(books, query, tiles, in, p.first + first);
  int32_t* kept = &books.bins[0][0];  // (kRows,)
  kept[threadIdx.x] = 0;
  const int64_t row_size = static_cast<int64_t>(p.splits) * kLanes * p.room;
  visit<kStorage, kSteps>(
      books, query, tiles, in, p.first + first, [&](int row, uint64_t at) { return at >= books.last[row]; },
      [&](int row, uint64_t at) {
        const auto score = __float_as_uint(score_of(static_cast<uint32_t>(at >> 32)));
        p.survivors[(first + row) * row_size + atomicAdd(&kept[row], 1)] =
            make_uint2(score, static_cast<uint32_t>(index_of(at)));
      });
  if (failed) p.recovered[own] = kept[threadIdx.x];
}

int64_t next_power_of_2(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

int64_t finish_bytes(int64_t capacity, int64_t N) { return 8 * (capacity + next_power_of_2(N)) + kFinishExtra; }

// Launches all kernels for one chunk of queries.
template <Storage kStorage, int kSteps>
cudaError_t mine(const TileMap& tiles, const Inputs& in, const Sample& sample, const Pass& p, void* stream) {
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
  const int cutters = std::max(sample.size / kHeld, kWarp);
  then(cut_kernel, dim3(p.rows), cutters, 2 * 32 * 4, stream, in.pool, by_pair, sample, p, in.K);
  if (by_pair) {
    then(scan_kernel<kStorage, kSteps, true>, dim3(row_tiles, splits), kThreads, kShared, stream, tiles, in, p);
  } else {
    then(scan_kernel<kStorage, kSteps, false>, dim3(row_tiles, splits), kThreads, kShared, stream, tiles, in, p);
  }
  const int with_books = kShared + static_cast<int>(sizeof(Recovery));
  then(recover_kernel<kStorage, kSteps>, dim3(row_tiles), kThreads, with_books, stream, tiles, in, p);
  const auto sorted_size = static_cast<int>(next_power_of_2(p.N)),
             bytes = static_cast<int>(finish_bytes(p.capacity, p.N));
  then(finish_kernel, dim3(p.rows), kFinishThreads, bytes, stream, p, sorted_size);
  return error;
}

template <Storage kStorage>
cudaError_t mine_at_width(const TileMap& tiles, const Inputs& in, const Sample& sample, const Pass& p, void* stream) {
  if (in.query.D <= 64) return mine<kStorage, 4>(tiles, in, sample, p, stream);
  if (in.query.D <= 128) return mine<kStorage, 8>(tiles, in, sample, p, stream);
  return mine<kStorage, 16>(tiles, in, sample, p, stream);
}

// The sizes in bytes of the parts of the workspace, in this order.
struct Layout {
  int64_t survivors, found, cuts, recovered;
};

Layout layout_of(const MiningPlan& plan) {
  const int64_t buffers = plan.rows * plan.splits * kLanes;
  return {std::max(8 * buffers * plan.room, (4 * plan.rows * plan.sample + 15) / 16 * 16), 4 * buffers,
          plan.rows * static_cast<int64_t>(sizeof(Cut)), 4 * plan.rows};
}

}  // namespace

MiningPlan plan_mining(int64_t B, int64_t K, int64_t N, int64_t processors, int64_t least_sample) {
  MiningPlan plan = {};
  plan.capacity = K;
  double likely = static_cast<double>(K);  // survivors of a row whose cut is two standard deviations too low
  if (K > 4 * least_sample) {
    const int64_t most = std::clamp<int64_t>(next_power_of_2(K) / 128, 8 * least_sample, kMostSampled);
    plan.sample = std::clamp<int64_t>(next_power_of_2(K) / 16, least_sample, most);
    // The position of the N-th column in the sample has a hypergeometric distribution. The cut is a few standard
    // deviations below its mean. The capacity is the number of columns that the sampled columns above the cut stand
    // for, plus a few standard deviations.
    const double share = static_cast<double>(plan.sample) / static_cast<double>(K);
    const double position = static_cast<double>(N) * share;
    const double deviation = std::sqrt(std::max(position * (1 - position / plan.sample) * (1 - share), 0.0));
    plan.sample_rank = static_cast<int64_t>(position + kSigmas * deviation + kPositionsBelow);
    const double kept = static_cast<double>(plan.sample_rank + 1);
    plan.capacity = std::min(K, static_cast<int64_t>((kept + kSigmas * std::sqrt(kept) + kPositionsBelow) / share) + 1);
    likely = std::min(likely, (kept + 2 * std::sqrt(kept)) / share);
  }
  const int64_t key_tiles = (K + kKeys - 1) / kKeys;
  // Two blocks for each multiprocessor. A buffer has room for its likely load plus six standard deviations.
  const auto cut_rows = [&](int64_t rows) {
    plan.rows = std::min(std::max<int64_t>(B, 1), (rows + kRows - 1) / kRows * kRows);
    const int64_t row_tiles = (plan.rows + kRows - 1) / kRows;
    plan.splits = std::min({2 * processors / row_tiles, key_tiles / 2, plan.capacity / (8 * kLanes)});
    plan.splits = std::max<int64_t>(plan.splits, 1);
    const int64_t all = (key_tiles + plan.splits - 1) / plan.splits * (kKeys / kLanes);
    const double load = likely / static_cast<double>(plan.splits * kLanes);
    const int64_t most = static_cast<int64_t>(load + 6 * std::sqrt(load) + 6);
    plan.room = (plan.sample == 0 ? all : std::min(all, most)) + kSlack;
    const Layout bytes = layout_of(plan);
    plan.workspace = bytes.survivors + bytes.found + bytes.cuts + bytes.recovered;
  };
  const int64_t budget =
      std::clamp(2 * B * K / 100 * 8, kScratchBytes, kMostScratchBytes);  // 8 % of a 16-bit score matrix
  const int64_t most_chunks = std::max<int64_t>((B + kRows - 1) / kRows, 1);
  int64_t chunks = 1;
  do {
    cut_rows(std::max<int64_t>((B + chunks - 1) / chunks, 1));
  } while (plan.workspace > budget && ++chunks <= most_chunks);
  return plan;
}

bool fits(const MiningPlan& plan, int64_t N) { return finish_bytes(plan.capacity, N) <= kSharedBytes; }

int mine_hardest(const MineHardestParams& params, void* stream) {
  const MiningPlan& plan = params.plan;
  if (params.B == 0 || params.N == 0) return cudaSuccess;
  const Layout bytes = layout_of(plan);
  char* workspace = static_cast<char*>(params.workspace);
  const Inputs in = {rows_of(params.query, params.query_stride, params.D),
                     rows_of(params.negative_keys, params.negative_keys_stride, params.D),
                     static_cast<int32_t>(params.K), params.pool};
  const TileMap tiles = map_tiles(in.keys, params.K, params.storage);
  for (int64_t first = 0; first < params.B; first += plan.rows) {
    const auto rows = static_cast<int32_t>(std::min(plan.rows, params.B - first));
    const Sample sample = {first, params.B, rows, static_cast<int32_t>(plan.sample),
                           reinterpret_cast<uint32_t*>(workspace)};
    const Pass pass = {
        .first = first,
        .B = params.B,
        .rows = rows,
        .N = static_cast<int32_t>(params.N),
        .sample_rank = static_cast<int32_t>(plan.sample_rank),
        .splits = static_cast<int32_t>(plan.splits),
        .room = static_cast<int32_t>(plan.room),
        .capacity = static_cast<int32_t>(plan.capacity),
        .survivors = reinterpret_cast<Survivor*>(workspace),
        .found = reinterpret_cast<int32_t*>(workspace + bytes.survivors),
        .cuts = reinterpret_cast<Cut*>(workspace + bytes.survivors + bytes.found),
        .recovered = reinterpret_cast<int32_t*>(workspace + bytes.survivors + bytes.found + bytes.cuts),
        .scores = params.scores,
        .index = params.index,
    };
    const cudaError_t error = params.storage == Storage::kBFloat16
                                  ? mine_at_width<Storage::kBFloat16>(tiles, in, sample, pass, stream)
                                  : mine_at_width<Storage::kFloat16>(tiles, in, sample, pass, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace negmine::cuda
