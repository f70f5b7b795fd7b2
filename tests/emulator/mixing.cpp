// C functions with which ctypes calls kernels/cuda/mix_negatives.cu and mix_logsumexp.cu. Mixing is a ctypes.Structure.
#include "kernels/cuda/mix_logsumexp.cu"
#include "kernels/cuda/mix_negatives.cu"

using namespace negmine::cuda;

extern "C" int emulated_mix_negatives(const Mixing* mixing, void* vectors, int64_t* parents, float* coefficients) {
  return mix_negatives({*mixing, vectors, parents, coefficients}, nullptr);
}

extern "C" int emulated_mix_logsumexp(const Mixing* mixing, const float* scale, bool want_mean, bool backwards,
                                      float* lse, float* mean) {
  emulator::backwards = backwards;
  return mix_logsumexp({*mixing, scale, want_mean, lse, mean}, nullptr);
}
