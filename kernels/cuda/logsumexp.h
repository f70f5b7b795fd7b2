// logsumexp on CUDA: the log-sum-exp of each query's logits over its pool, and the mean of the keys weighted by the
// softmax. The (B, K) scores are never stored, and are bit-identical to those of mine_hardest. sm_80 and newer.
//
//   query (B, D), negative_keys (K, D)    both bf16 or both fp16; any row stride; D contiguous, at most 256
//   lse (B,), mean (B, D), num_kept (B,), num_above (B,)    see kernels/README.md
#pragma once

#include <cstdint>

#include "kernels/cuda/pool.h"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

// How the work is split and how much workspace it needs. It depends only on the shape and on the number of
// multiprocessors of the GPU.
struct SummingPlan {
  int64_t splits;     // parts of the queue
  int64_t workspace;  // bytes
};

SummingPlan plan_summing(int64_t B, int64_t K, int64_t D, bool want_mean, int64_t processors);

struct LogSumExpParams {
  int64_t B, K, D;

  // Inputs.
  const void* query;             // (B, D)
  const void* negative_keys;     // (K, D)
  int64_t query_stride;          // from row to row, in elements
  int64_t negative_keys_stride;  // from row to row, in elements
  Storage storage;               // of both
  const float* scale;            // one number
  const float* pivot;            // (B,), or null
  bool want_mean;
  Pool pool;
  SummingPlan plan;

  // Outputs.
  float* lse;          // (B,)
  float* mean;         // (B, D), untouched unless want_mean
  int64_t* num_kept;   // (B,)
  int64_t* num_above;  // (B,), zeros where pivot is null
  void* workspace;     // plan.workspace bytes, aligned to 16
};

// Enqueues the kernels on the current device; stream is a cudaStream_t. Returns a cudaError_t.
int logsumexp(const LogSumExpParams& params, void* stream);

}  // namespace negmine::cuda
