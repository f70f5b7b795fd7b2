// The tasks of maxsim: each task processes some documents, in a loop over the tokens of all queries, so that sums need
// no atomics and do not depend on the number of tasks.
#include "kernels/cpu/maxsim.h"

#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {
namespace {

constexpr int64_t kTaskTokens = 1024;    // of documents: they stay in the second-level cache while queries pass
constexpr int64_t kTaskDocuments = 128;  // at most

int64_t length_of(const int64_t* lengths, int64_t row, int64_t most) {
  return lengths == nullptr ? most : std::clamp<int64_t>(lengths[row], 0, most);
}

// The tokens of queries without padding: their row numbers in (B I), and their vectors.
struct Tokens {
  explicit Tokens(const MaxsimParams& p) : vectors(p.query) {
    place.reserve(static_cast<size_t>(p.B * p.I));
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t length = length_of(p.query_lengths, b, p.I);
      for (int64_t i = 0; i < length; ++i) place.push_back(b * p.I + i);
    }
    if (count() == p.B * p.I) return;
    const int64_t element = element_bytes(p.query.dtype);
    copied = make_buffer<char>(count() * p.D * element);
    for (int64_t at = 0; at < count(); ++at) {
      const char* from = static_cast<const char*>(p.query.data) + place[at] * p.query.row_stride * element;
      std::memcpy(copied.get() + at * p.D * element, from, static_cast<size_t>(p.D * element));
    }
    vectors.data = copied.get();
    vectors.row_stride = p.D;
  }

  int64_t count() const { return static_cast<int64_t>(place.size()); }

  std::vector<int64_t> place;  // (count)
  Matrix vectors;              // (count, D)
  Buffer<char> copied;
};

// A mask (K, J) of the tokens of documents that are not padding; empty if there is no padding.
std::vector<uint8_t> present(const MaxsimParams& p) {
  std::vector<uint8_t> mask;
  if (p.negative_lengths == nullptr) return mask;
  mask.resize(static_cast<size_t>(p.K * p.J));
  for (int64_t k = 0; k < p.K; ++k) {
    std::fill_n(mask.begin() + k * p.J, length_of(p.negative_lengths, k, p.J), uint8_t{1});
  }
  return mask;
}

}  // namespace

void maxsim(const MaxsimParams& p, const Parallel& parallel) {
  const Tokens tokens(p);
  const std::vector<uint8_t> mask = present(p);
  const int64_t wanted = ceil_div(p.K, 4 * std::max<int64_t>(parallel.threads, 1));
  const int64_t most = std::clamp<int64_t>(kTaskTokens / std::max<int64_t>(p.J, 1), 1, kTaskDocuments);
  const int64_t documents = std::clamp<int64_t>(wanted, 1, most);
  struct Task {
    Scratch scratch;
    Buffer<float> best;     // (documents, kLanes)
    Buffer<int32_t> token;  // (documents, kLanes)
  };
  const auto make_task = [&] {
    return Task{Scratch(tokens.vectors, p.negative_keys, p.D, Pool()), make_buffer<float>(documents * kLanes),
                make_buffer<int32_t>(documents * kLanes)};
  };
  for_each_task(parallel, ceil_div(p.K, documents), make_task, [&](Task& task, int64_t number) {
    const int64_t first = number * documents, count = std::min(documents, p.K - first);
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t k = first; k < first + count; ++k) {
        const bool empty = length_of(p.negative_lengths, k, p.J) == 0;
        p.scores[b * p.K + k] = empty ? -std::numeric_limits<float>::infinity() : 0.0f;
      }
    }
    for (int64_t row = 0; row < p.B * p.I && p.index != nullptr && p.query_lengths != nullptr; ++row) {
      std::fill_n(p.index + row * p.K + first, count, int64_t{-1});
    }
    Block block{.query = tokens.vectors, .negative_keys = p.negative_keys, .D = p.D};
    block.pool.negative_mask = mask.empty() ? nullptr : mask.data();
    block.k_begin = first * p.J;
    block.k_end = (first + count) * p.J;
    for (; block.first_query < tokens.count(); block.first_query += kLanes) {
      block.lanes = std::min(kLanes, tokens.count() - block.first_query);
      kernels(block).maxsim_range(block, task.scratch.workspace(), p.J, task.best.get(), task.token.get());
      for (int64_t lane = 0; lane < block.lanes; ++lane) {
        const int64_t place = tokens.place[block.first_query + lane];
        float* scores = p.scores + place / p.I * p.K + first;
        for (int64_t k = 0; k < count; ++k) scores[k] += task.best[k * kLanes + lane];
        if (p.index == nullptr) continue;
        int64_t* index = p.index + place * p.K + first;
        for (int64_t k = 0; k < count; ++k) {
          const int64_t token = task.token[k * kLanes + lane];
          index[k] = token < 0 ? -1 : (first + k) * p.J + token;
        }
      }
    }
  });
}

}  // namespace negmine::cpu
