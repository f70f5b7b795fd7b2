// count_negatives on CUDA: the columns in each query's pool. With bounds the scores are those of mine_hardest, to the
// bit, of bf16 or fp16 storage; without them nothing but masks is read. sm_80 and newer.
//
//   query (B, D), negative_keys (K, D)    of one 16-bit storage; any row stride, in elements; D contiguous, D <= 256
//   count (B,)                            as kernels/README.md says
#pragma once

#include <cstdint>

#include "kernels/cuda/pool.h"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

// How the work is cut and what memory it takes: a function of the shape and the card's processors alone.
struct CountingPlan {
  int64_t splits;         // parts of the queue
  int64_t shared_splits;  // the same where all queries see the same columns, and one is counted for all
  int64_t workspace;      // bytes
};

CountingPlan plan_counting(int64_t B, int64_t K, int64_t processors);

struct CountNegativesParams {
  int64_t B, K, D;

  // Inputs.
  const void* query;             // (B, D)
  const void* negative_keys;     // (K, D)
  int64_t query_stride;          // from row to row, in elements
  int64_t negative_keys_stride;  // from row to row, in elements
  Storage storage;               // of both
  Pool pool;
  CountingPlan plan;

  // Outputs.
  int64_t* count;   // (B,)
  void* workspace;  // plan.workspace bytes, aligned to 4
};

// Enqueues the kernels on the current device; stream is a cudaStream_t. Returns a cudaError_t.
int count_negatives(const CountNegativesParams& params, void* stream);

}  // namespace negmine::cuda
