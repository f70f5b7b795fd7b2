// round_to_codes: rows rounded to bytes with a scale for each (matrix.h), and what the rounding changed. The scan of
// codes is mine_hardest() with both matrices stored so.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"

namespace negmine::cpu {

struct RoundToCodesParams {
  Matrix vectors;  // (M, D)
  int64_t M = 0, D = 0;
  int64_t width = 0;         // D rounded up to a multiple of 4
  uint8_t* codes = nullptr;  // (M, width), 128 for elements past D
  float* scale = nullptr;    // (M,)
  float* norm = nullptr;     // (M,) of the rows
  float* error = nullptr;    // (M,) the norms of the rows less scale * (codes - 128)
};

void round_to_codes(const RoundToCodesParams& p, const Parallel& parallel);

}  // namespace negmine::cpu
