// mine_hardest on CUDA: the N hardest columns of each query's pool, exact, from bf16 or fp16 storage, without the
// (B, K) scores. sm_80 and newer.
//
//   query (B, D), negative_keys (K, D)    of one 16-bit storage; any row stride, in elements; D contiguous, D <= 256
//   scores (B, N), index (B, N)           hardest first, ties by index; (-inf, -1) past the end of the pool
#pragma once

#include <cstdint>

#include "kernels/cuda/pool.h"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

// How the work is cut and what memory it takes: a function of the shape and the card's processors alone.
struct MiningPlan {
  int64_t sample;       // columns sampled, a power of two; 0: every column is a survivor
  int64_t sample_rank;  // from 0: the sampled score at this rank nearly always admits at least N columns
  int64_t capacity;     // survivors of a row that are finished; a row with more is done again
  int64_t rows;         // queries that share the workspace
  int64_t splits;       // parts of the queue; a row has 4 * splits buffers
  int64_t room;         // survivors of one buffer
  int64_t workspace;    // bytes
};

// least_sample is 2048, or less in tests, where a small queue then goes the way of a long one.
MiningPlan plan_mining(int64_t B, int64_t K, int64_t N, int64_t processors, int64_t least_sample = 2048);

// Whether shared memory holds what finishing a row takes, for D <= 256.
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
