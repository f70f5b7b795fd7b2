// The parents and the coefficients of synthetic negatives: see draws.h.
#include "kernels/cpu/draws.h"

namespace negmine::cpu {
namespace {

int64_t umulhi(uint32_t u, int64_t n) { return static_cast<int64_t>((u * static_cast<uint64_t>(n)) >> 32); }

// Contraction to a fused multiply-add would round once, but the reference rounds twice.
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

void draw(const Draws& draws, int64_t b, int64_t slot, int64_t count, int64_t n_b, const uint32_t* const words[3],
          const Drawn& out) {
  const int64_t* hard = draws.hard_index + b * draws.N;
  const bool skip_first = draws.distinct && n_b > 1;
  for (int64_t i = 0; i < count; ++i) {
    const bool pair = slot + i < draws.pairs;
    const int64_t first = umulhi(words[0][i], n_b);
    int64_t second = umulhi(words[1][i], pair && skip_first ? n_b - 1 : n_b);
    if (pair && skip_first && second >= first) ++second;
    out.first[i] = pair ? hard[first] : -1;
    out.second[i] = hard[second];
    const uint32_t bits = words[2][i] >> 8;
    float fraction = static_cast<float>(bits) * 0x1p-24f;
    if (draws.quantiles != nullptr) {
      const float* q = draws.quantiles + (bits >> 12);
      fraction = interpolate(q[0], q[1] - q[0], static_cast<float>(bits & 4095) * 0x1p-12f);
    }
    const float low = static_cast<float>(pair ? draws.pair_low : draws.query_low);
    const float high = static_cast<float>(pair ? draws.pair_high : draws.query_high);
    out.coefficient[i] = interpolate(low, high - low, fraction);
  }
}

}  // namespace negmine::cpu
