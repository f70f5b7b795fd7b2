// softplus_sum_grad_keys: the gradient of sum_b weight_b total_b / scale with respect to the keys, total_b of
// softplus_sum; softplus_sum_grad_bias: that of sum_b weight_b total_b with respect to the bias. Explained in
// kernels/README.md.
#pragma once
#include "kernels/cpu/logsumexp_grad_keys.h"

namespace negmine::cpu {

// p.lse is not used; `offset` () replaces it.
void softplus_sum_grad_keys(const LogsumexpGradKeysParams& p, const float* offset, const Parallel& parallel);

}  // namespace negmine::cpu
