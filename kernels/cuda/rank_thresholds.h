// rank_thresholds on CUDA: the sort key at each rank of each query's pool, exact, from bf16 or fp16 storage, without
// the (B, K) scores. sm_80 and newer. The scores are those of mine_hardest, to the bit.
//
//   query (B, D), negative_keys (K, D)    of one 16-bit storage; any row stride, in elements; D contiguous, D <= 256
//   ranks (B, R), sort_keys (B, R)            as kernels/README.md says
#pragma once

#include <cstdint>

#include "kernels/cuda/pool.h"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

// How the work is cut and what memory it takes: a function of the shape and the card's processors alone.
struct RankingPlan {
  int64_t sample;     // columns sampled, a power of two; 0: every column is a survivor
  int64_t rows;       // queries that share the workspace
  int64_t splits;     // parts of the queue; a row has 4 * splits buffers
  int64_t room;       // survivors of one buffer
  int64_t workspace;  // bytes
};

// least_sample is 2048, or less in tests, where a small queue then goes the way of a long one.
RankingPlan plan_ranking(int64_t B, int64_t K, int64_t R, int64_t processors, int64_t least_sample = 2048);

// Whether the offsets in the workspace fit in 32 bits.
bool fits(const RankingPlan& plan);

struct RankThresholdsParams {
  int64_t B, K, D, R;

  // Inputs.
  const void* query;             // (B, D)
  const void* negative_keys;     // (K, D)
  int64_t query_stride;          // from row to row, in elements
  int64_t negative_keys_stride;  // from row to row, in elements
  Storage storage;               // of both
  const int64_t* ranks;          // (B, R)
  Pool pool;
  RankingPlan plan;

  // Outputs.
  int64_t* sort_keys;  // (B, R)
  void* workspace;     // plan.workspace bytes, aligned to 16
};

// Enqueues the kernels on the current device; stream is a cudaStream_t. Returns a cudaError_t.
int rank_thresholds(const RankThresholdsParams& params, void* stream);

}  // namespace negmine::cuda
