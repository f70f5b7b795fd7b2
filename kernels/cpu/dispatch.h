// The choice of the instruction set. By default it is the fastest for this processor and for the storage types of
// queries and keys. The choice does not depend on the op, so that passes which compare scores compute the same bits. A
// new instruction set needs a line in the table in dispatch.cpp and another compilation of simd/.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/simd/kernels.h"

namespace negmine::cpu {

const Kernels& kernels(Dtype query, Dtype keys);
inline const Kernels& kernels(const Block& block) { return kernels(block.query.dtype, block.negative_keys.dtype); }

// The kernels that multiply codes; null if this processor has no instruction for it or another set is forced.
const Kernels* code_kernels();

// For functions whose results have the same bits on every instruction set.
inline const Kernels& kernels() { return kernels(Dtype::kFloat32, Dtype::kFloat32); }

// Tests and benchmarks force one of "amxbf16", "avx512bf16", "avx512", "avx2", "portable", on ARM "neonbf16", "neon",
// "portable"; "" is the default choice. Returns false, without a change, if this processor or build does not have it.
bool set_isa(const char* name);
const char* isa();  // the forced one, or ""

// The instruction set for storage types by name, "float32", "bfloat16" or "float16"; null for another name. For
// "uint8", codes: "avx512vnni", or "" if this processor does not multiply them.
const char* isa_for(const char* query, const char* keys);

}  // namespace negmine::cpu
