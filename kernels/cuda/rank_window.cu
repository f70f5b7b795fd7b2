// rank_window: one thread for each query.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/rank_window.h"

namespace negmine::cuda {
namespace {

constexpr int kWindowThreads = 128;
constexpr int64_t kNone = INT64_MIN;

__global__ void __launch_bounds__(kWindowThreads) rank_window_kernel(RankWindowParams p) {
  const int64_t b = blockIdx.x * int64_t{kWindowThreads} + threadIdx.x;
  if (b >= p.B) return;
  int64_t first = p.sort_keys[2 * b], last = p.sort_keys[2 * b + 1];
  if (p.ranks[2 * b + 1] < p.ranks[2 * b] || first == kNone) first = last = kNone;
  p.sort_keys[2 * b] = first;
  p.sort_keys[2 * b + 1] = last;
  int64_t lower = last > kLowestSortKey ? last : kLowestSortKey;
  if (p.pool_lower && p.pool_lower[b] > lower) lower = p.pool_lower[b];
  p.lower[b] = lower;
  p.upper[b] = first;
}

}  // namespace

int rank_window(const RankWindowParams& params, void* stream) {
  if (params.B == 0) return cudaSuccess;
  const dim3 blocks(static_cast<unsigned>((params.B + kWindowThreads - 1) / kWindowThreads));
  return launch(rank_window_kernel, blocks, kWindowThreads, 0, stream, params);
}

}  // namespace negmine::cuda
