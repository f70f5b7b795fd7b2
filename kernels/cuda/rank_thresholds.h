// rank_thresholds on CUDA: the exact sort key at each rank of each query's pool. The (B, K) scores are never stored,
// and are bit-identical to those of mine_hardest. sm_80 and newer.
//
//   query (B, D), negative_keys (K, D)    both bf16 or both fp16; any row stride; D contiguous, at most 256
//   ranks (B, R), sort_keys (B, R)        see kernels/README.md
#pragma once

#include <cstdint>

#include "kernels/cuda/pool.h"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

// How the work is split and how much workspace it needs. It depends only on the shape and on the number of
// multiprocessors of the GPU.
// "Survivors" are the columns that the scan keeps (rank_thresholds.cu).
struct RankingPlan {
  int64_t sample;     // number of sampled columns, a power of two; 0: no sample, and the scan keeps all columns
  int64_t rows;       // queries that are processed at a time
  int64_t splits;     // parts of the queue; a row has 4 * splits buffers
  int64_t room;       // most survivors in one buffer
  int64_t workspace;  // bytes
};

// Tests pass a smaller least_sample, so that small queues are sampled as long ones are.
RankingPlan plan_ranking(int64_t B, int64_t K, int64_t R, int64_t processors, int64_t least_sample = 2048);

// Whether offsets in the workspace fit into 32 bits.
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
