// The tasks of mix_logsumexp: one for each query.
#include "kernels/cpu/mix_logsumexp.h"

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {

void mix_logsumexp(const MixLogsumexpParams& p, const Parallel& parallel) {
  const auto make_room = [&] { return make_buffer<float>(mixing_room(p.D)); };
  for_each_task(parallel, p.B, make_room, [&](Buffer<float>& room, int64_t b) {
    kernels().mix_logsumexp_row(p.query, p.negative_keys, p.D, p.draws, b, *p.scale, room.get(), p.lse + b,
                                p.mean == nullptr ? nullptr : p.mean + b * p.D);
  });
}

}  // namespace negmine::cpu
