// Sorts the entries (b, m) by key with a counting sort, which keeps their order, and sums those of each key. A task
// computes a range of keys. Every row of the result is computed by one task in a fixed order, so it is deterministic.
#include "kernels/cpu/gathered_grad_keys.h"

#include <algorithm>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {
namespace {

constexpr int64_t kKeysPerTask = 256;

}  // namespace

void gathered_grad_keys(const GatheredGradKeysParams& p, const Parallel& parallel) {
  const int64_t cells = p.B * p.M;
  std::vector<int64_t> begin(static_cast<size_t>(p.K) + 2);  // cells of key k: [begin[k], begin[k + 1])
  for (int64_t cell = 0; cell < cells; ++cell) {
    if (p.index[cell] >= 0) ++begin[p.index[cell] + 2];
  }
  for (int64_t k = 1; k <= p.K; ++k) begin[k + 1] += begin[k];
  const auto sorted = make_buffer<int64_t>(begin[p.K + 1]);
  for (int64_t cell = 0; cell < cells; ++cell) {
    if (p.index[cell] >= 0) sorted[begin[p.index[cell] + 1]++] = cell;  // begin moves on to its final place
  }
  const auto make_room = [&] { return make_buffer<float>(p.D); };  // (D)
  for_each_task(parallel, ceil_div(p.K, kKeysPerTask), make_room, [&](Buffer<float>& room, int64_t task) {
    for (int64_t k = task * kKeysPerTask; k < std::min(p.K, (task + 1) * kKeysPerTask); ++k) {
      kernels().gathered_grad_keys_row(p.query, p.D, sorted.get() + begin[k], begin[k + 1] - begin[k], p.M, p.weight,
                                       room.get(), p.grad_keys + k * p.D);
    }
  });
}

}  // namespace negmine::cpu
