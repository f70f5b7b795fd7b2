// logsumexp_grad_keys on CUDA: the gradient of weighted log-sum-exps with respect to the keys. The (B, K) probabilities
// are never stored. sm_80 and newer.
//
//   query (B, D), negative_keys (K, D)    both bf16 or both fp16; any row stride; D contiguous, at most 256
//   lse (B,), weight (B,)                 of each query
//   grad_keys (K, D)                      see kernels/README.md
#pragma once

#include <cstdint>

#include "kernels/cuda/pool.h"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

// How the work is split and how much workspace it needs. It depends only on the shape and on the number of
// multiprocessors of the GPU.
struct KeysGradPlan {
  int64_t splits;     // parts of the batch
  int64_t workspace;  // bytes
};

KeysGradPlan plan_grad_keys(int64_t B, int64_t K, int64_t D, int64_t processors);

struct LogSumExpGradKeysParams {
  int64_t B, K, D;

  // Inputs.
  const void* query;             // (B, D)
  const void* negative_keys;     // (K, D)
  int64_t query_stride;          // from row to row, in elements
  int64_t negative_keys_stride;  // from row to row, in elements
  Storage storage;               // of both
  const float* scale;            // one number
  const float* lse;              // (B,)
  const float* weight;           // (B,)
  Pool pool;
  KeysGradPlan plan;

  // Outputs.
  float* grad_keys;  // (K, D)
  void* workspace;   // plan.workspace bytes, aligned to 16
};

// Enqueues the kernels on the current device; stream is a cudaStream_t. Returns a cudaError_t.
int logsumexp_grad_keys(const LogSumExpGradKeysParams& params, void* stream);

}  // namespace negmine::cuda
