// The parents and the coefficient of one synthetic negative: see draws.h.
#include "kernels/cpu/draws.h"

#include "kernels/cpu/philox.h"

namespace negmine::cpu {
namespace {

int64_t umulhi(uint32_t u, int64_t n) { return static_cast<int64_t>((u * static_cast<uint64_t>(n)) >> 32); }

// Contraction would round once where the reference rounds twice.
__attribute__((optimize("fp-contract=off"))) float interpolate(float low, float span, float fraction) {
  const float step = span * fraction;
  return low + step;
}

}  // namespace

int64_t count_hard(const Draws& draws, int64_t b) {
  const int64_t* row = draws.hard_index + b * draws.N;
  int64_t n_b = 0;
  for (int64_t n = 0; n < draws.N; ++n) n_b += row[n] != -1;
  return n_b;
}

Draw draw(const Draws& draws, int64_t b, int64_t slot, int64_t n_b) {
  const uint64_t row = static_cast<uint64_t>(draws.row_offset + b);
  const Philox u =
      philox4x32_10({{static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(slot), 0}},
                    draws.seed, draws.step);
  const int64_t* hard = draws.hard_index + b * draws.N;
  const bool pair = slot < draws.pairs;
  Draw out;
  if (pair) {
    const int64_t first = umulhi(u.word[0], n_b);
    const bool skip_first = draws.distinct && n_b > 1;
    int64_t second = umulhi(u.word[1], skip_first ? n_b - 1 : n_b);
    if (skip_first && second >= first) ++second;
    out.first = hard[first];
    out.second = hard[second];
  } else {
    out.first = -1;
    out.second = hard[umulhi(u.word[1], n_b)];
  }
  const uint32_t bits = u.word[2] >> 8;
  float fraction = static_cast<float>(bits) * 0x1p-24f;
  if (draws.quantiles != nullptr) {
    const float* q = draws.quantiles + (bits >> 12);
    fraction = interpolate(q[0], q[1] - q[0], static_cast<float>(bits & 4095) * 0x1p-12f);
  }
  const float low = static_cast<float>(pair ? draws.pair_low : draws.query_low);
  const float high = static_cast<float>(pair ? draws.pair_high : draws.query_high);
  out.coefficient = interpolate(low, high - low, fraction);
  return out;
}

}  // namespace negmine::cpu
