// The tasks of gathered_logsumexp: one for each query.
#include "kernels/cpu/gathered_logsumexp.h"

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {

void gathered_logsumexp(const GatheredLogsumexpParams& p, const Parallel& parallel) {
  const auto make_room = [&] { return make_buffer<float>((kRowChunk + 1) * p.D); };  // (kRowChunk + 1, D)
  for_each_task(parallel, p.B, make_room, [&](Buffer<float>& room, int64_t b) {
    kernels().gathered_logsumexp_row(p.query, p.negative_keys, p.D, p.index + b * p.M, p.M, b, *p.scale, room.get(),
                                     p.scores + b * p.M, p.lse + b, p.mean == nullptr ? nullptr : p.mean + b * p.D);
  });
}

}  // namespace negmine::cpu
