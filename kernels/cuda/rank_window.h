// The bounds of a rank window, from the sort keys of its first and last rank, for a sum over the columns between them.
//
//   ranks, sort_keys (B, 2)    the first and the last; sort_keys as rank_thresholds finds them
//   pool_lower (B,)            the bound that the pool has, or null; sort_keys have it above them
//   lower, upper (B,)          bounds of the window
//
// An empty window, whose last rank is below its first or whose first rank has no sort key, gets INT64_MIN for both sort
// keys and for upper, which keeps nothing. A last rank past the end of the pool bounds nothing.
#pragma once

#include <cstdint>

namespace negmine::cuda {

constexpr int64_t kLowestSortKey = -0x7F800001LL * (1LL << 32);  // -inf at the last index: no column is below it

struct RankWindowParams {
  int64_t B;

  // Inputs.
  const int64_t* ranks;       // (B, 2)
  const int64_t* pool_lower;  // (B,), or null

  // Changed.
  int64_t* sort_keys;  // (B, 2)

  // Outputs.
  int64_t* lower;  // (B,)
  int64_t* upper;  // (B,)
};

// Enqueues the kernel on the current device; stream is a cudaStream_t. Returns a cudaError_t.
int rank_window(const RankWindowParams& params, void* stream);

}  // namespace negmine::cuda
