// count_negatives on CUDA: the number of columns in each query's pool. Scores are computed only if there are bounds,
// and are then bit-identical to those of mine_hardest. sm_80 and newer.
//
//   query (B, D), negative_keys (K, D)    both bf16 or both fp16; any row stride; D contiguous, at most 256
//   count (B,)                            see kernels/README.md
#pragma once

#include <cstdint>

#include "kernels/cuda/pool.h"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

// How the work is split and how much workspace it needs. It depends only on the shape and on the number of
// multiprocessors of the GPU.
struct CountingPlan {
  int64_t splits;         // parts of the queue
  int64_t shared_splits;  // the same if all queries have the same pool, which is then counted only once
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
