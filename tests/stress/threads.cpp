// The CPU kernels on a pool of std::threads, called by several callers at once on the same inputs, each result
// compared bit for bit with a serial run: for gcc's thread sanitizer, which sees every hand-over here. (Under torch the
// threads are OpenMP's, which is not instrumented, and every hand-over looks like a race.) Build and run: make threads
//
// argv[1] = rounds. argv[2] = "race": the callers share one output, which the sanitizer must report.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/count_negatives.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/info_nce.h"
#include "kernels/cpu/logsumexp.h"
#include "kernels/cpu/logsumexp_grad_keys.h"
#include "kernels/cpu/logsumexp_window.h"
#include "kernels/cpu/mine_hardest.h"
#include "kernels/cpu/mix_logsumexp.h"
#include "kernels/cpu/mix_negatives.h"
#include "kernels/cpu/rank_thresholds.h"
#include "kernels/cpu/softplus_sum.h"
#include "kernels/cpu/sort_key.h"

using namespace negmine::cpu;

namespace {

constexpr int64_t kThreads = 4, kCallers = 3;
constexpr int64_t kB = 37, kK = 17000, kD = 12, kN = 20, kR = 2, kPairs = 9, kWithQuery = 4, kS = kPairs + kWithQuery;

// Each worker takes one index of [begin, end) as OpenMP's would, with no more order than start and join give.
void run_on_threads(int64_t begin, int64_t end, int64_t, Parallel::Callback callback, void* context) {
  std::vector<std::thread> workers;
  for (int64_t i = begin + 1; i < end; ++i) workers.emplace_back(callback, i, i + 1, context);
  callback(begin, begin + 1, context);
  for (std::thread& worker : workers) worker.join();
}

// What every caller reads and none writes.
struct Inputs {
  std::vector<float> query = std::vector<float>(kB * kD), keys = std::vector<float>(kK * kD);
  std::vector<uint16_t> keys_bf16 = std::vector<uint16_t>(kK * kD);
  std::vector<uint8_t> mask = std::vector<uint8_t>(kB * kK);
  std::vector<int64_t> query_ids = std::vector<int64_t>(kB), negative_ids = std::vector<int64_t>(kK);
  std::vector<int64_t> lower = std::vector<int64_t>(kB), ranks = std::vector<int64_t>(kB * kR);
  std::vector<int64_t> hard = std::vector<int64_t>(kB * kN);
  std::vector<float> lse = std::vector<float>(kB), weight = std::vector<float>(kB, 0.5f);
  float scale = 3.0f;

  explicit Inputs(uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (float& x : query) x = normal(random) * 0.3f;
    for (int64_t i = 0; i < kK * kD; ++i) {
      keys[i] = normal(random) * 0.3f;
      uint32_t bits;
      std::memcpy(&bits, &keys[i], sizeof bits);
      keys_bf16[i] = static_cast<uint16_t>(bits >> 16);
    }
    for (uint8_t& usable : mask) usable = random() % 10 != 0;
    for (int64_t& id : query_ids) id = random() % 5;
    for (int64_t& id : negative_ids) id = random() % 5;
    for (int64_t& bound : lower) bound = pack_sort_key(-0.2f, 700);
    for (int64_t& rank : ranks) rank = random() % (kK + 10);
    for (int64_t& index : hard) index = random() % kK;
    for (float& x : lse) x = normal(random) + 8.0f;
  }
};

using Bytes = std::vector<char>;

template <class T>
T* room(std::vector<Bytes>& outputs, int64_t count) {
  outputs.emplace_back(count * sizeof(T));
  return reinterpret_cast<T*>(outputs.back().data());
}

// Every op once into fresh outputs.
std::vector<Bytes> run_all(const Inputs& in, const Parallel& parallel, int kind) {
  std::vector<Bytes> out;
  out.reserve(64);
  const Matrix query{in.query.data(), kD, Dtype::kFloat32};
  const Matrix keys =
      kind % 2 ? Matrix{in.keys_bf16.data(), kD, Dtype::kBFloat16} : Matrix{in.keys.data(), kD, Dtype::kFloat32};
  Pool pool;
  if (kind >= 2) {
    pool = {.negative_mask = in.mask.data(),
            .mask_row_stride = kK,
            .mask_per_query = true,
            .query_ids = in.query_ids.data(),
            .negative_ids = in.negative_ids.data(),
            .lower = in.lower.data()};
  }
  const Draws draws{.hard_index = in.hard.data(), .N = kN, .pairs = kPairs, .with_query = kWithQuery, .seed = 7};

  logsumexp({.query = query,
             .negative_keys = keys,
             .B = kB,
             .K = kK,
             .D = kD,
             .scale = &in.scale,
             .pivot = in.lse.data(),
             .pool = pool,
             .lse = room<float>(out, kB),
             .mean = room<float>(out, kB * kD),
             .num_kept = room<int64_t>(out, kB),
             .num_above = room<int64_t>(out, kB)},
            parallel);
  const float scales[] = {in.scale, 0.5f * in.scale};
  logsumexp({.query = query,
             .negative_keys = keys,
             .B = kB,
             .K = kK,
             .D = kD,
             .scales = 2,
             .scale = scales,
             .pivot = in.lse.data(),
             .pool = pool,
             .lse = room<float>(out, 2 * kB),
             .mean = room<float>(out, 2 * kB * kD),
             .num_kept = room<int64_t>(out, kB),
             .num_above = room<int64_t>(out, kB)},
            parallel);
  logsumexp_grad_keys({.query = query,
                       .negative_keys = keys,
                       .B = kB,
                       .K = kK,
                       .D = kD,
                       .scale = &in.scale,
                       .lse = in.lse.data(),
                       .weight = in.weight.data(),
                       .pool = pool,
                       .grad_keys = room<float>(out, kK * kD)},
                      parallel);
  mine_hardest({.query = query,
                .negative_keys = keys,
                .B = kB,
                .K = kK,
                .D = kD,
                .N = kN,
                .pool = pool,
                .scores = room<float>(out, kB * kN),
                .index = room<int64_t>(out, kB * kN)},
               parallel);
  logsumexp_mine({.query = query,
                  .negative_keys = keys,
                  .B = kB,
                  .K = kK,
                  .D = kD,
                  .scale = &in.scale,
                  .pivot = in.lse.data(),
                  .pool = pool,
                  .lse = room<float>(out, kB),
                  .mean = room<float>(out, kB * kD),
                  .num_kept = room<int64_t>(out, kB),
                  .num_above = room<int64_t>(out, kB)},
                 {.query = query,
                  .negative_keys = keys,
                  .B = kB,
                  .K = kK,
                  .D = kD,
                  .N = kN,
                  .pool = pool,
                  .scores = room<float>(out, kB * kN),
                  .index = room<int64_t>(out, kB * kN)},
                 parallel);
  logsumexp_window({.query = query,
                    .negative_keys = keys,
                    .B = kB,
                    .K = kK,
                    .D = kD,
                    .scale = &in.scale,
                    .pivot = in.lse.data(),
                    .pool = pool,
                    .lse = room<float>(out, kB),
                    .mean = room<float>(out, kB * kD),
                    .num_kept = room<int64_t>(out, kB),
                    .num_above = room<int64_t>(out, kB)},
                   in.ranks.data(), room<int64_t>(out, kB * 2), parallel);
  info_nce({.query = query,
            .negative_keys = keys,
            .B = kB,
            .K = kK,
            .D = kD,
            .pool = pool,
            .positive_key = query,
            .scale = &in.scale,
            .pivot = in.lse.data(),
            .hard = kN,
            .draws = draws,
            .rows = room<float>(out, kB),
            .d_query = room<float>(out, kB * kD),
            .d_scale = room<float>(out, kB),
            .weight = room<float>(out, kB),
            .lse = room<float>(out, kB),
            .total = room<float>(out, kB),
            .num_kept = room<int64_t>(out, kB),
            .num_above = room<int64_t>(out, kB),
            .mixed = room<int64_t>(out, kB)},
           parallel);
  rank_thresholds({.query = query,
                   .negative_keys = keys,
                   .B = kB,
                   .K = kK,
                   .D = kD,
                   .R = kR,
                   .ranks = in.ranks.data(),
                   .pool = pool,
                   .sort_keys = room<int64_t>(out, kB * kR)},
                  parallel);
  count_negatives(
      {.query = query, .negative_keys = keys, .B = kB, .K = kK, .D = kD, .pool = pool, .count = room<int64_t>(out, kB)},
      parallel);
  softplus_sum({.query = query,
                .negative_keys = keys,
                .B = kB,
                .K = kK,
                .D = kD,
                .scale = &in.scale,
                .offset = in.weight.data(),
                .pool = pool,
                .total = room<float>(out, kB),
                .sigmoid_keys = room<float>(out, kB * kD),
                .sigmoid_sum = room<float>(out, kB),
                .num_kept = room<int64_t>(out, kB)},
               parallel);
  mix_negatives({.query = query,
                 .negative_keys = keys,
                 .B = kB,
                 .D = kD,
                 .draws = draws,
                 .vectors = room<float>(out, kB * kS * kD),
                 .parents = room<int64_t>(out, kB * kS * 2),
                 .coefficients = room<float>(out, kB * kS)},
                parallel);
  mix_logsumexp({.query = query,
                 .negative_keys = keys,
                 .B = kB,
                 .D = kD,
                 .draws = draws,
                 .scale = &in.scale,
                 .lse = room<float>(out, kB),
                 .mean = room<float>(out, kB * kD)},
                parallel);
  return out;
}

// Two kernels that write one output: what the sanitizer is there to see.
void race(const Inputs& in) {
  std::vector<int64_t> shared(kB);
  const auto count = [&] {
    count_negatives({.query = {in.query.data(), kD, Dtype::kFloat32},
                     .negative_keys = {in.keys.data(), kD, Dtype::kFloat32},
                     .B = kB,
                     .K = kK,
                     .D = kD,
                     .pool = {.lower = in.lower.data()},
                     .count = shared.data()},
                    serial());
  };
  std::thread other(count);
  count();
  other.join();
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 3;
  if (argc > 2 && std::string(argv[2]) == "race") {
    race(Inputs(0));
    return 0;
  }
  std::atomic<int> wrong{0};
  int64_t calls = 0;
  for (int round = 0; round < rounds; ++round) {
    const Inputs in(static_cast<uint32_t>(round));
    for (const char* isa : {"portable", "avx2", "avx512", "neon"}) {
      if (!set_isa(isa)) continue;
      for (int kind = 0; kind < 4; ++kind) {
        const std::vector<Bytes> want = run_all(in, serial(), kind);
        std::vector<std::thread> callers;
        for (int64_t caller = 0; caller < kCallers; ++caller) {
          callers.emplace_back([&] { wrong += run_all(in, {run_on_threads, kThreads}, kind) != want; });
        }
        for (std::thread& caller : callers) caller.join();
        calls += 8 * kCallers;
      }
    }
  }
  std::printf("%lld calls on %lld threads each, by %lld callers at once: %d wrong\n", static_cast<long long>(calls),
              static_cast<long long>(kThreads), static_cast<long long>(kCallers), wrong.load());
  return wrong.load() != 0;
}
