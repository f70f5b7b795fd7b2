// The tasks of round_to_codes: ranges of rows.
#include "kernels/cpu/codes.h"

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {

void round_to_codes(const RoundToCodesParams& p, const Parallel& parallel) {
  constexpr int64_t kTaskRows = 256;
  const auto make_room = [&] { return make_buffer<float>(room_for_codes(p.D)); };
  for_each_task(parallel, ceil_div(p.M, kTaskRows), make_room, [&](Buffer<float>& room, int64_t index) {
    for (int64_t row = index * kTaskRows; row < std::min(p.M, (index + 1) * kTaskRows); ++row) {
      kernels().round_to_codes_row(p.vectors, row, p.D, room.get(), p.codes + row * p.width, p.scale + row,
                                   p.norm + row, p.error + row);
    }
  });
}

}  // namespace negmine::cpu
