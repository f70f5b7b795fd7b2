// logsumexp_grad_keys: the gradient of sum_b weight_b lse_b / scale with respect to the keys; logsumexp_grad_bias: that
// of sum_b weight_b lse_b with respect to the bias. Explained in kernels/README.md.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/pool.h"

namespace negmine::cpu {

struct LogsumexpGradKeysParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, K = 0, D = 0;
  const float* scale = nullptr;   // ()
  const float* lse = nullptr;     // (B,)
  const float* weight = nullptr;  // (B,)
  Pool pool;
  float* grad_keys = nullptr;  // (K, D), or null if only grad_bias is wanted
  float* grad_bias = nullptr;  // (K,), or null
  bool sigmoid = false;        // the derivative is sigmoid(scale s - lse), not exp
};

void logsumexp_grad_keys(const LogsumexpGradKeysParams& p, const Parallel& parallel);

}  // namespace negmine::cpu
