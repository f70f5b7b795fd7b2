// Which instruction set runs: the best the processor has, chosen once. A further one is one more line of the table in
// dispatch.cpp and one more compilation of simd/.
#pragma once
#include "kernels/cpu/simd/kernels.h"

namespace negmine::cpu {

const Kernels& kernels();

const char* isa();               // "amxbf16", "avx512bf16", "avx512", "avx2", "portable"
bool set_isa(const char* name);  // for tests; false, and no change, where this processor or build lacks it

}  // namespace negmine::cpu
