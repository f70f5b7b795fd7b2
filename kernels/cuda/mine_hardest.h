// mine_hardest on CUDA: the N hardest columns of each query's pool, by an exact search. The (B, K) scores are never
// stored. sm_80 and newer.
//
//   query (B, D), negative_keys (K, D)    both bf16 or both fp16; any row stride; D contiguous, at most 256
//   scores (B, N), index (B, N)           hardest first, ties by index; (-inf, -1) past the end of the pool
#pragma once

#include <cstdint>

#include "kernels/cuda/pool.h"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

// How the work is split and how much workspace it needs. It depends only on the shape and on the number of
// multiprocessors of the GPU.
// "Survivors" are the columns that the scan keeps (mine_hardest.cu).
struct MiningPlan {
  int64_t sample;       // number of sampled columns, a power of two; 0: no sample, and the scan keeps all columns
  int64_t sample_rank;  // rank of the cut in the sample, from 0; at least N columns nearly always reach the cut
  int64_t capacity;     // most survivors of a row that the finish can take; a row with more is recovered
  int64_t rows;         // queries that are processed at a time
  int64_t splits;       // parts of the queue; a row has 4 * splits buffers
  int64_t room;         // most survivors in one buffer
  int64_t workspace;    // bytes
};

// Tests pass a smaller least_sample, so that small queues are sampled as long ones are.
MiningPlan plan_mining(int64_t B, int64_t K, int64_t N, int64_t processors, int64_t least_sample = 2048);

// Whether the finish of a row fits into shared memory.
bool fits(const MiningPlan& plan, int64_t N);

struct MineHardestParams {
  int64_t B, K, D, N;

  // Inputs.
  const void* query;             // (B, D)
  const void* negative_keys;     // (K, D)
  int64_t query_stride;          // from row to row, in elements
  int64_t negative_keys_stride;  // from row to row, in elements
  Storage storage;               // of both
  Pool pool;
  MiningPlan plan;

  // Outputs.
  float* scores;    // (B, N)
  int64_t* index;   // (B, N)
  void* workspace;  // plan.workspace bytes, aligned to 16
};

// Enqueues the kernels on the current device; stream is a cudaStream_t. Returns a cudaError_t.
int mine_hardest(const MineHardestParams& params, void* stream);

}  // namespace negmine::cuda
