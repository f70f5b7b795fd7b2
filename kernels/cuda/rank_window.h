// The pool bounds that restrict a sum to the columns between two ranks, computed from the sort keys of these ranks.
//
//   ranks (B, 2)         the first and the last rank of each query
//   sort_keys (B, 2)     their sort keys, as found by rank_thresholds
//   pool_lower (B,)      the lower bound of the pool, or null
//   lower, upper (B,)    the bounds of the window
//
// A window is empty if its last rank is below its first, or if its first rank has no sort key. Then both sort keys and
// upper become INT64_MIN, a bound that no column satisfies. If the last rank is past the end of the pool, the window
// extends to the end of the pool.
#pragma once

#include <cstdint>

namespace negmine::cuda {

constexpr int64_t kLowestSortKey = -0x7F800001LL * (1LL << 32);  // of a score of -inf with the highest index

struct RankWindowParams {
  int64_t B;

  // Inputs.
  const int64_t* ranks;       // (B, 2)
  const int64_t* pool_lower;  // (B,), or null

  // Input and output.
  int64_t* sort_keys;  // (B, 2)

  // Outputs.
  int64_t* lower;  // (B,)
  int64_t* upper;  // (B,)
};

// Enqueues the kernel on the current device; stream is a cudaStream_t. Returns a cudaError_t.
int rank_window(const RankWindowParams& params, void* stream);

}  // namespace negmine::cuda
