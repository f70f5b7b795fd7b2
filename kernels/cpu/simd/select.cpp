// Offers the places of a range of the queue to a Selection: one vector comparison turns most columns away.
//
// A lane's bound is the score of the worst key it would keep, so what passes is a superset of what is kept; exactness,
// ties included, comes from the packed orders when a full buffer is pruned.
#include "kernels/cpu/order.h"
#include "kernels/cpu/simd/score.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

NEGMINE_INLINE void offer(const Selection& selection, int64_t lane, int64_t order) {
  int64_t& size = selection.size[lane];
  selection.keys[lane * selection.capacity + size] = selection.lowest ? ~order : order;
  if (++size == selection.capacity) prune(selection, lane);
}

}  // namespace

void select_range(const Block& block, const Workspace& w, const Selection& selection) {
  begin_block(block, w);
  const int vectors = vectors_of(block);
  const VI sign = all(selection.lowest ? INT32_MIN : 0);
  for (int64_t k = block.k_begin; k < block.k_end;) {
    const int64_t count = load_chunk(block, w, &k, true);
    score_chunk(block, w, count);
    apply_masks(block, w, count);
    if (block.pool.bounded()) apply_bounds(block, w, count);
    for (int v = 0; v < vectors; ++v) {
      const int64_t first_lane = v * kWidth;
      const V ceiling = load(selection.ceiling + first_lane);
      VI places = all(0), over = all(0);
      for (int64_t j = 0; j < count; ++j) {
        const float* cell = w.tile + j * kLanes + first_lane;
        const V score = load(cell);
        places -= score == score;
        const V signed_score = (V)((VI)score ^ sign);
        over -= signed_score > ceiling;
        uint32_t passed = bits_ge(signed_score, load(selection.bound + first_lane)) & bits_ge(ceiling, signed_score);
        for (; passed != 0; passed &= passed - 1) {
          const int lane = __builtin_ctz(passed);
          offer(selection, first_lane + lane, pack_order(cell[lane], w.index[j]));
        }
      }
      for (int i = 0; i < kWidth; ++i) {
        selection.places[first_lane + i] += places[i];
        selection.over[first_lane + i] += over[i];
      }
    }
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
