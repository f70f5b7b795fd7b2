// Calls logsumexp_grad_keys with sigmoid(scale s - lse), where lse_b = -offset.
#include "kernels/cpu/softplus_sum_grad_keys.h"

#include <vector>

namespace negmine::cpu {

void softplus_sum_grad_keys(const LogsumexpGradKeysParams& p, const float* offset, const Parallel& parallel) {
  const std::vector<float> shift(p.B, -*offset);  // (B,)
  LogsumexpGradKeysParams shifted = p;
  shifted.lse = shift.data();
  shifted.sigmoid = true;
  logsumexp_grad_keys(shifted, parallel);
}

}  // namespace negmine::cpu
