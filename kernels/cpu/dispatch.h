// Which instruction set runs. By default the fastest for this processor and for the storage of queries and keys: all
// ops that score a queue ask by storage alone, so that passes which compare scores compute the same bits. A further
// instruction set is one more line of the table in dispatch.cpp and one more compilation of simd/.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/simd/kernels.h"

namespace negmine::cpu {

const Kernels& kernels(Dtype query, Dtype keys);
inline const Kernels& kernels(const Block& block) { return kernels(block.query.dtype, block.negative_keys.dtype); }

// What multiplies codes, or null where this processor has no instruction for it or another set is forced.
const Kernels* code_kernels();

// For functions whose result is the same bits on every instruction set.
inline const Kernels& kernels() { return kernels(Dtype::kFloat32, Dtype::kFloat32); }

// Tests and benchmarks force one of "amxbf16", "avx512bf16", "avx512", "avx2", "portable", on ARM "neonbf16", "neon",
// "portable"; "" is the default choice. False, and no change, where this processor or build lacks it.
bool set_isa(const char* name);
const char* isa();  // the forced one, or ""

// What runs for storage by name, "float32", "bfloat16" or "float16"; null where there is no such name. For "uint8",
// codes: "avx512vnni", or "" where nothing multiplies them.
const char* isa_for(const char* query, const char* keys);

}  // namespace negmine::cpu
