// info_nce calls logsumexp and mix_logsumexp. The mean of the negatives is written to the array of the gradient, and
// each row is then completed in place.
//
//     x = scale q . positive,   gap = lse - x,   row = log(1 + exp(gap)),   share = sigmoid(gap)
//     d row / d q = scale share (mean - positive),   d row / d scale = share q . (mean - positive)
//
// Decoupled: row = gap, share = 1. Numbers of a row are computed in double, sums over D in fp32.
#include "kernels/cpu/info_nce.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cpu/logsumexp.h"
#include "kernels/cpu/logsumexp_window.h"
#include "kernels/cpu/mix_logsumexp.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {
namespace {

constexpr int64_t kRowsPerTask = 64;

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) return float_of(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);  // inf, NaN
  const float wide = float_of(magnitude << 13) * 0x1p112f;  // the exponent is 112 too small; also corrects subnormals
  return sign != 0 ? -wide : wide;
}

// Row `row` of m as fp32: a pointer to it if it is stored as fp32, else converted into out (D).
const float* widen_row(const Matrix& m, int64_t row, int64_t D, float* out) {
  if (m.dtype == Dtype::kFloat32) return static_cast<const float*>(m.data) + row * m.row_stride;
  const uint16_t* in = static_cast<const uint16_t*>(m.data) + row * m.row_stride;
  for (int64_t d = 0; d < D; ++d) {
    out[d] = m.dtype == Dtype::kBFloat16 ? float_of(static_cast<uint32_t>(in[d]) << 16) : from_half(in[d]);
  }
  return out;
}

// The synthetic negatives of a call.
struct Mixed {
  Buffer<float> lse, mean;     // (B,), (B, D) where a gradient is wanted
  Buffer<int64_t> hard_index;  // (B, N)
};

// The sum has 16 chains, so that the compiler can vectorise it.
float dot(const float* a, const float* b, int64_t D) {
  constexpr int64_t kChains = 16;
  float sums[kChains] = {};
  int64_t d = 0;
  for (; d + kChains <= D; d += kChains) {
    for (int64_t i = 0; i < kChains; ++i) sums[i] += a[d + i] * b[d + i];
  }
  for (int64_t i = 0; d + i < D; ++i) sums[i] += a[d + i] * b[d + i];
  for (int64_t half = kChains / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

LogsumexpParams sum_of(const InfoNceParams& p) {
  return {.query = p.query,
          .negative_keys = p.negative_keys,
          .B = p.B,
          .K = p.K,
          .D = p.D,
          .scale = p.scale,
          .pivot = p.pivot,
          .pool = p.pool,
          .lse = p.lse,
          .mean = p.d_query,
          .num_kept = p.num_kept,
          .num_above = p.num_above};
}

// Sums and mines the pool in one pass, and mixes the mined columns.
Mixed sum_and_mix(const InfoNceParams& p, const Parallel& parallel) {
  const int64_t mined = std::min(p.skip + p.hard, std::max(p.K, p.skip + 1)), hard = mined - p.skip;
  const auto scores = make_buffer<float>(p.B * mined);
  const auto index = make_buffer<int64_t>(p.B * mined);
  logsumexp_mine(sum_of(p),
                 {.query = p.query,
                  .negative_keys = p.negative_keys,
                  .B = p.B,
                  .K = p.K,
                  .D = p.D,
                  .N = mined,
                  .pool = p.pool,
                  .scores = scores.get(),
                  .index = index.get()},
                 parallel);
  Mixed made{make_buffer<float>(p.B), make_buffer<float>(p.d_query == nullptr ? 0 : p.B * p.D),
             make_buffer<int64_t>(p.B * hard)};
  for (int64_t b = 0; b < p.B; ++b) std::copy_n(&index[b * mined + p.skip], hard, &made.hard_index[b * hard]);
  MixLogsumexpParams mix{.query = p.query,
                         .negative_keys = p.negative_keys,
                         .B = p.B,
                         .D = p.D,
                         .draws = p.draws,
                         .scale = p.scale,
                         .lse = made.lse.get(),
                         .mean = p.d_query == nullptr ? nullptr : made.mean.get()};
  mix.draws.hard_index = made.hard_index.get();
  mix.draws.N = hard;
  mix_logsumexp(mix, parallel);
  for (int64_t b = 0; b < p.B; ++b) p.mixed[b] = made.hard_index[b * hard] >= 0 ? p.draws.S() : 0;
  return made;
}

// Adds the synthetic negatives of row b to lse and, if it is wanted, mean (D).
void join(const Mixed& made, int64_t b, int64_t D, float* lse, float* mean) {
  const double real = *lse, synthetic = made.lse[b];
  const double top = real > synthetic || std::isnan(real) ? real : synthetic;  // std::max would lose a NaN
  const double shift = std::isinf(top) ? 0.0 : top;
  const double own = std::exp(real - shift), other = std::exp(synthetic - shift), both = own + other;
  *lse = static_cast<float>(shift + std::log(both));
  if (mean == nullptr) return;
  const float keep = both == 0.0 ? 0.0f : static_cast<float>(own / both);
  const float add = both == 0.0 ? 0.0f : static_cast<float>(other / both);
  const float* of_mixed = &made.mean[b * D];  // (D)
  for (int64_t d = 0; d < D; ++d) mean[d] = keep * mean[d] + add * of_mixed[d];
}

// Computes row b from lse and mean (in d_query) of all its negatives. room (2, D).
void finish(const InfoNceParams& p, int64_t b, float* room) {
  const float* query = widen_row(p.query, b, p.D, room);                  // (D)
  const float* positive = widen_row(p.positive_key, b, p.D, room + p.D);  // (D)
  const double scale = *p.scale, score = dot(query, positive, p.D), x = score * scale, lse = p.lse[b];
  const double gap = lse - x;
  const bool some = p.num_kept[b] > 0 || p.mixed[b] > 0;
  double share, row, total;
  if (p.decoupled) {
    row = some ? gap : 0.0 * x;
    share = some ? 1.0 : 0.0;
    total = lse;
  } else {
    const double e = std::exp(-std::abs(gap)), excess = std::log1p(e);
    row = (gap > 0.0 ? gap : 0.0) + excess;
    share = (gap > 0.0 ? 1.0 : e) / (1.0 + e);
    total = (gap > 0.0 ? lse : x) + excess;
  }
  p.rows[b] = static_cast<float>(row);
  p.weight[b] = static_cast<float>(scale * share);
  p.total[b] = static_cast<float>(total);
  if (p.d_query == nullptr) return;
  float* mean = p.d_query + b * p.D;  // (D), until it is the gradient
  p.d_scale[b] = static_cast<float>(share * (static_cast<double>(dot(query, mean, p.D)) - score));
  const float weight = p.weight[b];
  for (int64_t d = 0; d < p.D; ++d) mean[d] = weight * (mean[d] - positive[d]);
}

}  // namespace

void info_nce(const InfoNceParams& p, const Parallel& parallel) {
  std::fill_n(p.mixed, p.B, 0);
  Mixed made;
  if (p.mixes()) {
    made = sum_and_mix(p, parallel);
  } else if (p.ranks != nullptr) {
    logsumexp_between(sum_of(p), p.ranks, p.sort_keys, parallel);
  } else {
    logsumexp(sum_of(p), parallel);
  }
  const auto make_room = [&] { return make_buffer<float>(2 * p.D); };
  for_each_task(parallel, ceil_div(p.B, kRowsPerTask), make_room, [&](Buffer<float>& room, int64_t task) {
    for (int64_t b = task * kRowsPerTask; b < std::min(p.B, (task + 1) * kRowsPerTask); ++b) {
      float* mean = p.d_query == nullptr ? nullptr : p.d_query + b * p.D;
      if (p.mixed[b] > 0) join(made, b, p.D, p.lse + b, mean);
      finish(p, b, room.get());
    }
  });
}

}  // namespace negmine::cpu
