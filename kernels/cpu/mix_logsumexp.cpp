// The task grid of mix_logsumexp: one query a task.
#include "kernels/cpu/mix_logsumexp.h"

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {

void mix_logsumexp(const MixLogsumexpParams& p, const Parallel& parallel) {
  const auto make_mixed = [&] { return make_buffer<float>((kRowChunk + 3) * p.D); };  // (kRowChunk + 3, D)
  for_each_task(parallel, p.B, make_mixed, [&](Buffer<float>& mixed, int64_t b) {
    kernels().mix_logsumexp_row(p.query, p.negative_keys, p.D, p.draws, b, *p.scale, mixed.get(), p.lse + b,
                                p.mean == nullptr ? nullptr : p.mean + b * p.D);
  });
}

}  // namespace negmine::cpu
