// The tasks of mix_negatives: one for each query.
#include "kernels/cpu/mix_negatives.h"

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {

void mix_negatives(const MixNegativesParams& p, const Parallel& parallel) {
  const int64_t S = p.draws.S(), element = p.query.dtype == Dtype::kFloat32 ? 4 : 2;
  const auto make_room = [&] { return make_buffer<float>(mixing_room(p.D)); };
  for_each_task(parallel, p.B, make_room, [&](Buffer<float>& room, int64_t b) {
    kernels().mix_negatives_row(p.query, p.negative_keys, p.D, p.draws, b, room.get(),
                                static_cast<char*>(p.vectors) + b * S * p.D * element, p.parents + b * S * 2,
                                p.coefficients + b * S);
  });
}

}  // namespace negmine::cpu
