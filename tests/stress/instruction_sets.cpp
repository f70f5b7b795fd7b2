// Every CPU op on every instruction set that this processor has, against the portable one: a program without torch,
// which an emulator of another processor can run. On small integers what is counted, selected or drawn is equal bit for
// bit, and sums agree to rounding. Build and run for ARM: make test-arm
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/count_negatives.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/gathered_grad_keys.h"
#include "kernels/cpu/gathered_logsumexp.h"
#include "kernels/cpu/info_nce.h"
#include "kernels/cpu/logsumexp.h"
#include "kernels/cpu/logsumexp_grad_keys.h"
#include "kernels/cpu/logsumexp_window.h"
#include "kernels/cpu/maxsim.h"
#include "kernels/cpu/mine_hardest.h"
#include "kernels/cpu/mix_logsumexp.h"
#include "kernels/cpu/mix_negatives.h"
#include "kernels/cpu/rank_thresholds.h"
#include "kernels/cpu/softplus_sum.h"
#include "kernels/cpu/softplus_sum_grad_keys.h"
#include "kernels/cpu/sort_key.h"

using namespace negmine::cpu;

namespace {

struct Case {
  int64_t B, K, D;
  Dtype query, keys;
  const char* pool;
};

const char* name_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? "fp32" : dtype == Dtype::kBFloat16 ? "bf16" : "fp16";
}

// Small integers in each storage type, all exact.
struct Stored {
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  Matrix matrix;

  Stored(int64_t rows, int64_t D, Dtype dtype, std::mt19937& random) : wide(rows * D), narrow(rows * D) {
    for (int64_t i = 0; i < rows * D; ++i) {
      const int value = static_cast<int>(random() % 5) - 2;
      wide[i] = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &wide[i], sizeof bits);
      constexpr uint16_t kHalves[] = {0xC000, 0xBC00, 0x0000, 0x3C00, 0x4000};  // -2 to 2
      narrow[i] = dtype == Dtype::kBFloat16 ? static_cast<uint16_t>(bits >> 16) : kHalves[value + 2];
    }
    matrix = {dtype == Dtype::kFloat32 ? static_cast<const void*>(wide.data()) : narrow.data(), D, dtype};
  }
};

// What an instruction set found: numbers that must be equal, and numbers that must be close.
struct Found {
  std::deque<std::pair<std::string, std::vector<int64_t>>> counted;
  std::deque<std::pair<std::string, std::vector<float>>> summed;

  int64_t* counts(const char* name, int64_t count) {
    return counted.emplace_back(name, std::vector<int64_t>(count, -7)).second.data();
  }
  float* sums(const char* name, int64_t count) {
    return summed.emplace_back(name, std::vector<float>(count, -7.0f)).second.data();
  }
};

class Calls {
 public:
  explicit Calls(const Case& given, uint32_t seed)
      : c(given),
        random(seed),
        query(c.B, c.D, c.query, random),
        keys(c.K, c.D, c.keys, random),
        guide_query(c.B, kGuide, c.keys, random),
        guide_keys(c.K, kGuide, c.query, random),
        mask(c.B * c.K),
        query_ids(c.B),
        key_ids(c.K),
        lower(c.B),
        upper(c.B),
        ranks(c.B * 2),
        hard(c.B * kHard),
        gathered(c.B * kGathered),
        lengths(c.K / kTokens),
        guide_limit(c.B),
        bias(c.K),
        pivot(c.B),
        lse(c.B),
        weight(c.B),
        cell_weight(c.B * kGathered) {
    for (uint8_t& usable : mask) usable = random() % 4 != 0;
    for (int64_t& id : query_ids) id = (static_cast<int64_t>(random() % 3) << 32) + random() % 3;
    for (int64_t& id : key_ids) id = (static_cast<int64_t>(random() % 3) << 32) + random() % 3;
    for (int64_t& bound : lower) bound = pack_sort_key(-1.0f - random() % 3, random() % c.K);
    for (int64_t& bound : upper) bound = pack_sort_key(2.0f + random() % 3, random() % c.K);
    for (int64_t b = 0; b < c.B; ++b) {
      ranks[2 * b] = random() % (c.K / 8);
      ranks[2 * b + 1] = ranks[2 * b] + random() % (b % 2 == 0 ? c.K : c.K / 16);
    }
    for (int64_t& index : hard) index = random() % c.K;
    for (int64_t b = 0; b < c.B; ++b) hard[b * kHard + kHard - 1] = -1;
    for (int64_t& index : gathered) index = static_cast<int64_t>(random() % (c.K + 3)) - 3 < 0 ? -1 : random() % c.K;
    for (int64_t& length : lengths) length = random() % (kTokens + 2);
    for (float& x : guide_limit) x = static_cast<float>(random() % 5) - 1.5f;
    for (float& x : bias) x = static_cast<float>(random() % 7) * 0.25f - 1.0f;
    for (float& x : pivot) x = static_cast<float>(random() % 5) - 1.5f;
    for (float& x : lse) x = 4.0f + static_cast<float>(random() % 5);
    for (float& x : weight) x = static_cast<float>(random() % 5) * 0.25f;
    for (float& x : cell_weight) x = static_cast<float>(random() % 5) * 0.25f - 0.5f;
    const std::string kind = c.pool;
    if (kind == "mask") pool.negative_mask = mask.data();
    if (kind == "pairs" || kind == "everything") {
      pool.negative_mask = mask.data(), pool.mask_row_stride = c.K, pool.mask_per_query = true;
    }
    if (kind == "ids" || kind == "everything") pool.query_ids = query_ids.data(), pool.negative_ids = key_ids.data();
    if (kind == "labels") pool.query_labels = query_ids.data(), pool.negative_labels = key_ids.data();
    if (kind == "labels") pool.same_label = true;
    if (kind == "bounds" || kind == "everything") pool.lower = lower.data(), pool.upper = upper.data();
    if (kind == "guide") {
      pool.guide_query = guide_query.matrix, pool.guide_keys = guide_keys.matrix;
      pool.guide_width = kGuide, pool.guide_limit = guide_limit.data();
    }
    biased = pool;
    if (kind == "everything") biased.bias = bias.data();
  }

  Found run() const {
    Found f;
    const int64_t B = c.B, K = c.K, D = c.D;
    const Parallel one = serial();
    const float scales[] = {0.21f, 0.07f, 0.3f};
    const auto sum_into = [&](const char* name, int64_t S) {
      return LogsumexpParams{.query = query.matrix,
                             .negative_keys = keys.matrix,
                             .B = B,
                             .K = K,
                             .D = D,
                             .scales = S,
                             .scale = scales,
                             .pivot = pivot.data(),
                             .pool = biased,
                             .lse = f.sums(name, S * B),
                             .mean = f.sums("mean", S * B * D),
                             .num_kept = f.counts("num_kept", B),
                             .num_above = f.counts("num_above", B)};
    };
    const auto mine_into = [&](int64_t N) {
      return MineHardestParams{.query = query.matrix,
                               .negative_keys = keys.matrix,
                               .B = B,
                               .K = K,
                               .D = D,
                               .N = N,
                               .pool = pool,
                               .scores = f.sums("scores", B * N),
                               .index = f.counts("index", B * N),
                               .num_kept = f.counts("candidates", B)};
    };
    logsumexp(sum_into("logsumexp", 1), one);
    logsumexp(sum_into("logsumexp, three scales", 3), one);
    logsumexp_mine(sum_into("logsumexp with mining", 1), mine_into(9), one);
    logsumexp_between(sum_into("logsumexp between ranks", 1), ranks.data(), f.counts("window", 2 * B), one);
    for (const int64_t N : {int64_t{1}, int64_t{20}, K + 3}) mine_hardest(mine_into(N), one);
    MineHardestParams listed = mine_into(6);
    listed.pool = Pool();  // which columns a query sees, the list says
    mine_gathered(listed, gathered.data(), kGathered, pivot.data(), one);
    rank_thresholds({.query = query.matrix,
                     .negative_keys = keys.matrix,
                     .B = B,
                     .K = K,
                     .D = D,
                     .R = 2,
                     .ranks = ranks.data(),
                     .pool = pool,
                     .sort_keys = f.counts("rank_thresholds", 2 * B)},
                    one);
    count_negatives({.query = query.matrix,
                     .negative_keys = keys.matrix,
                     .B = B,
                     .K = K,
                     .D = D,
                     .pool = pool,
                     .count = f.counts("count_negatives", B)},
                    one);
    LogsumexpGradKeysParams grad{.query = query.matrix,
                                 .negative_keys = keys.matrix,
                                 .B = B,
                                 .K = K,
                                 .D = D,
                                 .scale = scales,
                                 .lse = lse.data(),
                                 .weight = weight.data(),
                                 .pool = biased};
    grad.grad_keys = f.sums("logsumexp_grad_keys", K * D);
    logsumexp_grad_keys(grad, one);
    grad.grad_keys = nullptr;
    grad.grad_bias = f.sums("logsumexp_grad_bias", K);
    logsumexp_grad_keys(grad, one);
    const float offset = -1.5f;
    grad.grad_bias = f.sums("softplus_sum_grad_bias", K);
    softplus_sum_grad_keys(grad, &offset, one);
    grad.grad_bias = nullptr;
    grad.grad_keys = f.sums("softplus_sum_grad_keys", K * D);
    softplus_sum_grad_keys(grad, &offset, one);
    softplus_sum({.query = query.matrix,
                  .negative_keys = keys.matrix,
                  .B = B,
                  .K = K,
                  .D = D,
                  .scale = scales,
                  .offset = &offset,
                  .pool = biased,
                  .total = f.sums("softplus_sum", B),
                  .sigmoid_keys = f.sums("sigmoid_keys", B * D),
                  .sigmoid_sum = f.sums("sigmoid_sum", B),
                  .num_kept = f.counts("softplus num_kept", B)},
                 one);
    std::vector<int64_t> widths{1};
    for (const int64_t width : {D / 2, D}) {
      if (width > widths.back()) widths.push_back(width);
    }
    const int64_t W = static_cast<int64_t>(widths.size());
    LogsumexpParams prefixes = sum_into("prefix_logsumexp", W);
    prefixes.widths = widths.data();
    prefixes.pivot = nullptr, prefixes.num_above = nullptr;
    prefixes.pool.lower = prefixes.pool.upper = nullptr;
    logsumexp(prefixes, one);
    const int64_t documents = K / kTokens;
    for (const int64_t* each : {static_cast<const int64_t*>(nullptr), lengths.data()}) {
      maxsim({.query = query.matrix,
              .negative_keys = keys.matrix,
              .B = 1,
              .I = B,
              .K = documents,
              .J = kTokens,
              .D = D,
              .negative_lengths = each,
              .scores = f.sums("maxsim", documents),
              .index = f.counts("maxsim index", B * documents)},
             one);
    }
    Draws draws{.hard_index = hard.data(), .N = kHard, .pairs = 9, .with_query = 5, .seed = 7, .step = 3};
    std::vector<uint16_t> narrow(B * draws.S() * D);
    void* vectors =
        c.query == Dtype::kFloat32 ? static_cast<void*>(f.sums("vectors", B * draws.S() * D)) : narrow.data();
    mix_negatives({.query = query.matrix,
                   .negative_keys = keys.matrix,
                   .B = B,
                   .D = D,
                   .draws = draws,
                   .vectors = vectors,
                   .parents = f.counts("parents", B * draws.S() * 2),
                   .coefficients = f.sums("coefficients", B * draws.S())},
                  one);
    mix_logsumexp({.query = query.matrix,
                   .negative_keys = keys.matrix,
                   .B = B,
                   .D = D,
                   .draws = draws,
                   .scale = scales,
                   .lse = f.sums("mix_logsumexp", B),
                   .mean = f.sums("mixed mean", B * D)},
                  one);
    gathered_logsumexp({.query = query.matrix,
                        .negative_keys = keys.matrix,
                        .B = B,
                        .D = D,
                        .M = kGathered,
                        .index = gathered.data(),
                        .scale = scales,
                        .scores = f.sums("gathered scores", B * kGathered),
                        .lse = f.sums("gathered_logsumexp", B),
                        .mean = f.sums("gathered mean", B * D)},
                       one);
    gathered_grad_keys({.query = query.matrix,
                        .B = B,
                        .K = K,
                        .D = D,
                        .M = kGathered,
                        .index = gathered.data(),
                        .weight = cell_weight.data(),
                        .grad_keys = f.sums("gathered_grad_keys", K * D)},
                       one);
    for (const bool decoupled : {false, true}) {
      info_nce({.query = query.matrix,
                .negative_keys = keys.matrix,
                .B = B,
                .K = K,
                .D = D,
                .pool = biased,
                .positive_key = {keys.matrix.data, D, keys.matrix.dtype},
                .scale = scales,
                .pivot = pivot.data(),
                .decoupled = decoupled,
                .hard = decoupled ? 0 : 12,
                .skip = 2,
                .draws = draws,
                .rows = f.sums("info_nce", B),
                .d_query = f.sums("d_query", B * D),
                .d_scale = f.sums("d_scale", B),
                .weight = f.sums("weight", B),
                .lse = f.sums("info_nce lse", B),
                .total = f.sums("total", B),
                .num_kept = f.counts("info_nce num_kept", B),
                .num_above = f.counts("info_nce num_above", B),
                .mixed = f.counts("mixed", B)},
               one);
    }
    return f;
  }

 private:
  static constexpr int64_t kHard = 12, kGathered = 37, kGuide = 5, kTokens = 7;
  Case c;
  std::mt19937 random;
  Stored query, keys, guide_query, guide_keys;
  std::vector<uint8_t> mask;
  std::vector<int64_t> query_ids, key_ids, lower, upper, ranks, hard, gathered, lengths;
  std::vector<float> guide_limit, bias, pivot, lse, weight, cell_weight;
  Pool pool, biased;
};

// The largest difference of two lists in units of 1 + |value|; infinity where one has a number and the other has none.
double difference(const std::vector<float>& got, const std::vector<float>& want) {
  double most = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (got[i] == want[i] || (std::isnan(got[i]) && std::isnan(want[i]))) continue;
    const double off = std::abs(double{got[i]} - want[i]) / (1.0 + std::abs(double{want[i]}));
    most = off > most || std::isnan(off) ? (std::isnan(off) ? INFINITY : off) : most;
  }
  return most;
}

}  // namespace

int main() {
  int wrong = 0, calls = 0;
  double largest[2] = {};  // of fp32 sums, and of sums whose weights are rounded to bf16
  std::vector<Case> cases;
  const Dtype all[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
  for (const Dtype query : all) {
    for (const Dtype keys : all) {
      for (const char* pool : {"none", "mask", "pairs", "ids", "labels", "bounds", "everything", "guide"}) {
        cases.push_back({7, 301, 21, query, keys, pool});
      }
      cases.push_back({66, 700, 16, query, keys, "everything"});
      cases.push_back({20, 260, 33, query, keys, "ids"});
      cases.push_back({66, 700, 16, query, keys, "guide"});
    }
  }
  for (const Dtype dtype : all) {
    for (const int64_t D : {1, 2, 3, 4, 6, 130, 300}) cases.push_back({17, 200, D, dtype, dtype, "everything"});
    cases.push_back({12, 17000, 8, dtype, dtype, "none"});
    cases.push_back({9, 200, 600, dtype, dtype, "ids"});
  }
  for (const Case& c : cases) {
    const Calls given(c, 11);
    set_isa("portable");
    const Found want = given.run();
    for (const char* isa : {"amxbf16", "avx512bf16", "avx512", "avx2", "neonbf16", "neon"}) {
      if (!set_isa(isa)) continue;
      const Found got = given.run();
      const bool rounds = c.query == Dtype::kBFloat16 && c.keys == Dtype::kBFloat16;
      const auto report = [&](const std::string& name, double off) {
        std::printf("%s, %s by %s, B %d K %d D %d, pool %s: %s is off by %g\n", isa, name_of(c.query), name_of(c.keys),
                    static_cast<int>(c.B), static_cast<int>(c.K), static_cast<int>(c.D), c.pool, name.c_str(), off);
        ++wrong;
      };
      for (size_t i = 0; i < want.counted.size(); ++i) {
        if (got.counted[i].second != want.counted[i].second) report(want.counted[i].first, INFINITY);
      }
      for (size_t i = 0; i < want.summed.size(); ++i) {
        const std::string& name = want.summed[i].first;
        const bool weighted = name == "mean" || name == "sigmoid_keys" || name == "d_query";
        const double terms = name == "sigmoid_keys" ? static_cast<double>(c.K) : 1.0;  // a sum of as many weighted keys
        const double off = difference(got.summed[i].second, want.summed[i].second) / terms;
        double& most = largest[rounds && weighted];
        most = std::max(most, off);
        if (off > (rounds && weighted ? 0x1p-8 : 0x1p-16)) report(name, off);  // of bf16, and some 2^8 sums in fp32
      }
      ++calls;
    }
  }
  set_isa("");
  std::printf(
      "%d cases on other instruction sets: %d results differ from the portable ones; sums by up to %.1e, with bf16 "
      "weights %.1e\n",
      calls, wrong, largest[0], largest[1]);
  return wrong != 0 || calls == 0;
}
