// The kernels of mine_hardest before and after its scan: they choose a cut from a sample of scores, and select the N
// highest sort keys of the survivors.
#pragma once

#include <cstdint>

#include "kernels/cuda/sample.cuh"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/sort_key.cuh"

namespace negmine::cuda {

constexpr int kFinishThreads = 256;  // one for each bin
constexpr int kDigit = 8;            // bits of a sort key that one step of the radix selection decides
constexpr int kBins = 1 << kDigit;
constexpr int kFromBuffers = -1;  // instead of a number of survivors: the row was not recovered

// The arguments of the kernels for one chunk of queries.
struct Pass {
  int64_t first, B;  // row i of the workspace belongs to query first + i, of B queries in total
  int32_t rows;      // queries in this chunk
  int32_t N;
  int32_t sample_rank, splits, room, capacity;
  Survivor* survivors;  // (rows, splits, kLanes, room); before the scan, the sample uses this memory
  int32_t* found;       // (rows, splits, kLanes) number of survivors, or kLost
  Cut* cuts;            // (rows,)
  int32_t* recovered;   // (rows,) number of survivors that the recovery wrote to the row's buffers, or kFromBuffers
  float* scores;        // (B, N)
  int64_t* index;       // (B, N)
};

// cuts[row] = a cut that sample_rank + 1 sampled columns reach, or a few more; all columns reach it if the sample has
// fewer. The cut need not be exact, because certain() checks the survivors. One block for each row; each thread holds
// kHeld of the row's scores.
__global__ void __launch_bounds__(kCutThreads) cut_kernel(Pool pool, bool by_pair, Sample sample, Pass p, int K) {
  int* partial = reinterpret_cast<int*>(shared_memory());  // (2, 32)
  const int row = blockIdx.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (by_pair) hide(sample, pool, K);
  const uint32_t* ranks = sample.ranks + static_cast<int64_t>(row) * sample.size;
  uint32_t held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    held[i] = at < sample.size ? ranks[at] : 0u;
  }
  int turn = 0;
  // The number of sampled scores for which are_in(rank, position) is true. All threads must call it.
  const auto count_of = [&](auto are_in) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) count += are_in(held[i], static_cast<int>(threadIdx.x + i * blockDim.x));
    count = sum_over_warp(count);
    if (lane == 0) partial[32 * turn + warp] = count;
    __syncthreads();
    count = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) count += partial[32 * turn + w];
    turn ^= 1;
    return count;
  };
  // Invariant: at least `wanted` ranks are >= low, and fewer are >= high.
  const int wanted = p.sample_rank + 1, enough = wanted + wanted / 16;
  int reached = count_of([](uint32_t rank, int) { return rank >= kRankOfMinusInfinity; });
  uint32_t low = kRankOfMinusInfinity, high = reached < wanted ? low : 0xFFFFFFFFu;
  while (reached > enough && high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const int count = count_of([&](uint32_t rank, int) { return rank >= middle; });
    if (count < wanted) {
      high = middle;
    } else {
      low = middle, reached = count;
    }
  }
  Cut cut = {score_of(low), kAllColumns};
  if (reached > enough) {              // too many scores are equal: divide their columns
    int begin = 0, end = sample.size;  // fewer than `wanted` are before begin, at least as many before end
    while (reached > enough && end - begin > 1) {
      const int middle = (begin + end) / 2;
      const int count = count_of([&](uint32_t rank, int at) { return rank > low || (rank == low && at < middle); });
      if (count < wanted) {
        begin = middle;
      } else {
        end = middle, reached = count;
      }
    }
    if (end < sample.size) {
      cut.columns = static_cast<int32_t>((sample.column_of(K, end) + kChunk - 1) / kChunk * kChunk);
    }
  }
  if (threadIdx.x == 0) p.cuts[row] = cut;
}

// A bin of sort keys that have the same digit, and the number of sort keys in higher bins.
struct Bin {
  int digit, higher;
};

// The bin with the wanted-th highest sort key. bins (kBins,): the number of sort keys by digit. One warp calls it.
__device__ __forceinline__ Bin find_bin(const int* bins, int wanted, int lane) {
  constexpr int kOwn = kBins / kWarp;
  const int top = kBins - 1 - kOwn * lane;  // lane 0 has the highest bins
  int own = 0;
  for (int i = 0; i < kOwn; ++i) own += bins[top - i];
  int up_to = own;
#pragma unroll
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const int other = __shfl_up_sync(kAllLanes, up_to, apart);
    if (lane >= apart) up_to += other;
  }
  const int owner = __popc(__ballot_sync(kAllLanes, up_to < wanted));  // first lane that reaches it
  Bin bin = {top, up_to - own};
  while (lane == owner && bin.higher + bins[bin.digit] < wanted) bin.higher += bins[bin.digit--];
  return {__shfl_sync(kAllLanes, bin.digit, owner), __shfl_sync(kAllLanes, bin.higher, owner)};
}

// Writes the first N of a row's survivors, sorted, to scores and index. One block for each row.
//
// Survivors are packed into sort keys. The N-th highest is found by radix selection, from the highest bit in which sort
// keys differ. Those that reach it are sorted.
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(Pass p, int sorted_size) {
  uint64_t* sort_keys = reinterpret_cast<uint64_t*>(shared_memory());  // (capacity,)
  uint64_t* sorted = sort_keys + p.capacity;                           // (sorted_size,), a power of two >= N
  int* bins = reinterpret_cast<int*>(sorted + sorted_size);            // (kBins,)
  int* filled = bins + kBins;
  int* chosen = filled + 1;
  int* bin_found = filled + 2;  // digit, higher
  unsigned* differing = reinterpret_cast<unsigned*>(filled + 4);
  const int row = blockIdx.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int buffers = p.splits * kLanes;
  const Survivor* survivors = p.survivors + static_cast<int64_t>(row) * buffers * p.room;
  const int recovered = p.recovered[row];
  if (threadIdx.x == 0) *filled = *chosen = 0, *differing = 0u;
  for (int i = threadIdx.x; i < sorted_size; i += kFinishThreads) sorted[i] = 0;
  __syncthreads();

  for (int buffer = warp; buffer < (recovered < 0 ? buffers : 1); buffer += kFinishThreads / kWarp) {
    const int count = recovered < 0 ? p.found[row * static_cast<int64_t>(buffers) + buffer] : recovered;
    int start = lane == 0 ? atomicAdd(filled, count) : 0;
    start = __shfl_sync(kAllLanes, start, 0);
    for (int i = lane; i < count; i += kWarp) {
      const Survivor survivor = survivors[static_cast<int64_t>(buffer) * p.room + i];
      sort_keys[start + i] = pack_sort_key(__uint_as_float(survivor.x), static_cast<int32_t>(survivor.y));
    }
  }
  __syncthreads();
  const int count = *filled;

  uint64_t last = 1;  // what is chosen is >= last
  if (count > p.N) {
    const uint64_t any = sort_keys[0];
    unsigned differs = 0;
    for (int i = threadIdx.x; i < count; i += kFinishThreads)
      differs |= static_cast<unsigned>((sort_keys[i] ^ any) >> 32);
    if (differs) atomicOr(differing, differs);
    __syncthreads();
    const unsigned high = *differing;
    const int top = high ? 63 - __clz(static_cast<int>(high)) : 31;  // all sort keys are equal above this bit
    uint64_t decided = top == 63 ? 0 : ~uint64_t{0} << (top + 1);
    last = any & decided;
    int wanted = p.N;
    for (int shift = top - kDigit + 1; true; shift -= kDigit) {
      shift = shift < 0 ? 0 : shift;
      bins[threadIdx.x] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kFinishThreads) {
        if (((sort_keys[i] ^ last) & decided) == 0) atomicAdd(&bins[sort_keys[i] >> shift & (kBins - 1)], 1);
      }
      __syncthreads();
      if (warp == 0) {
        const Bin bin = find_bin(bins, wanted, lane);
        if (lane == 0) bin_found[0] = bin.digit, bin_found[1] = bin.higher;
      }
      __syncthreads();
      const int digit = bin_found[0];
      wanted -= bin_found[1];
      const uint64_t mask = static_cast<uint64_t>(kBins - 1) << shift;
      last = (last & ~mask) | static_cast<uint64_t>(digit) << shift;
      decided |= mask;
      const bool done = bins[digit] == wanted;  // becomes true, because no two sort keys are equal
      __syncthreads();
      if (done) break;
    }
  }
  for (int i = threadIdx.x; i < count; i += kFinishThreads) {
    if (sort_keys[i] >= last) sorted[atomicAdd(chosen, 1)] = sort_keys[i];
  }
  __syncthreads();

  // A bitonic sort in descending order; zeros come last.
  for (int run = 2; run <= sorted_size; run *= 2) {
    for (int apart = run / 2; apart > 0; apart /= 2) {
      for (int pair = threadIdx.x; pair < sorted_size / 2; pair += kFinishThreads) {
        const int a = 2 * pair - (pair & (apart - 1)), b = a + apart;  // apart is a power of 2
        const uint64_t x = sorted[a], y = sorted[b];
        if ((x < y) == ((a & run) == 0)) sorted[a] = y, sorted[b] = x;
      }
      __syncthreads();
    }
  }
  const int64_t out = (p.first + row) * p.N;
  for (int i = threadIdx.x; i < p.N; i += kFinishThreads) {
    const uint64_t at = sorted[i];
    p.scores[out + i] = at ? score_of(static_cast<uint32_t>(at >> 32)) : -INFINITY;
    p.index[out + i] = at ? index_of(at) : -1;
  }
}

}  // namespace negmine::cuda
