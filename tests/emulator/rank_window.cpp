// A C function with which ctypes calls kernels/cuda/rank_window.cu: the arguments in the order of its params struct.
#include "kernels/cuda/rank_window.cu"

using namespace negmine::cuda;

extern "C" int emulated_rank_window(int64_t B, const int64_t* ranks, const int64_t* pool_lower, int64_t* sort_keys,
                                    int64_t* lower, int64_t* upper) {
  return rank_window({B, ranks, pool_lower, sort_keys, lower, upper}, nullptr);
}
