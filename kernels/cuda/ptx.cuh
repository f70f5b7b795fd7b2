// PTX instructions from sm_80 on for which CUDA C++ has no function: products of matrix fragments, loads of fragments
// from shared memory, and asynchronous copies into it. tests/emulator has a file of this name with the same functions
// for the CPU.
//
// The fragments of D (16, 8) fp32 += A (16, 16) B (16, 8) that a lane holds, with g = lane / 4 and t = lane % 4 (PTX
// ISA, "Matrix fragments for mma.m16n8k16"). A register of a or b holds two elements, the first in its lower half:
//
//     a[i]   A[g + 8 * (i % 2)][2t + 8 * (i / 2) + {0, 1}]     i in 0..3
//     b[i]   B[2t + 8 * i + {0, 1}][g]                         i in 0..1
//     d[i]   D[g + 8 * (i / 2)][2t + i % 2]                    i in 0..3
#pragma once

#include <cstdint>

#include "kernels/cuda/storage.h"

namespace negmine::cuda {

// The dynamic shared memory of the block, aligned for the swizzle of ptx_sm90.cuh.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// An address in shared memory as these instructions take it, to which a number of bytes can be added.
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The address with these bits inverted.
__device__ __forceinline__ SharedAddress flipped(SharedAddress address, uint32_t bits) { return address ^ bits; }

// d += A B.
template <Storage kStorage>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(kStorage != Storage::kFloat32);
  if constexpr (kStorage == Storage::kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Loads four matrices, each of 8 rows of 16 bytes. Lane l passes the address of row l % 8 of matrix l / 8. It gets in
// fragment[i] the 4 bytes at 4 * (l % 4) of row l / 4 of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row));
}

// The same with each matrix transposed: fragment[i] gets element l / 4 of rows 2 * (l % 4) and 2 * (l % 4) + 1.
__device__ __forceinline__ void load_transposed(uint32_t (&fragment)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row));
}

// Two numbers rounded to the storage type, in one register of a fragment.
template <Storage kStorage>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  static_assert(kStorage != Storage::kFloat32);
  uint32_t pair;
  if constexpr (kStorage == Storage::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// 2^exponent with an error of at most 2 ulp, in one instruction; 0 if the result is below 2^-126.
__device__ __forceinline__ float power_of_2(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}

// Starts to copy 16 aligned bytes, which are there after wait_for_copies(). If not `present`, writes zeros and reads
// nothing.
__device__ __forceinline__ void copy_async(SharedAddress to, const char* global, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(present ? 16 : 0)
               : "memory");
}

// Ends a group of this thread's copies: those started since the group before.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of copies of this thread except the kNewest latest.
template <int kNewest>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// If score >= cut, writes {score, index} at base + at and increases `at` by 8 bytes. It is written in PTX because the
// compiler would keep the addresses of many such writes in registers at once, and spill.
__device__ __forceinline__ void append_where_reaches(float cut, float score, int index, char* base, uint32_t& at) {
  asm volatile(
      "{\n"
      ".reg .pred reaches;\n"
      ".reg .u64 place;\n"
      "setp.ge.f32 reaches, %1, %2;\n"
      "cvt.u64.u32 place, %0;\n"
      "add.u64 place, place, %4;\n"
      "@reaches st.global.v2.b32 [place], {%5, %3};\n"
      "@reaches add.u32 %0, %0, 8;\n"
      "}"
      : "+r"(at)
      : "f"(score), "f"(cut), "r"(index), "l"(base), "r"(__float_as_uint(score))
      : "memory");
}

// The same if score reaches an odd number of cuts. The cuts descend, or are NaN, so these are the scores in the
// intervals [cut[1], cut[0]) and [cut[3], cut[2]). counted[0] counts the scores that reach cut[0], and counted[1] those
// that reach cut[2] except those in [cut[1], cut[0]).
template <int kCuts>
__device__ __forceinline__ void append_where_odd(const float (&cut)[kCuts], float score, int index, char* base,
                                                 uint32_t& at, int (&counted)[kCuts / 2]) {
  static_assert(kCuts == 2 || kCuts == 4);
  if constexpr (kCuts == 2) {
    asm volatile(
        "{\n"
        ".reg .pred odd;\n"
        ".reg .u64 place;\n"
        "setp.ge.f32 odd, %2, %3;\n"
        "@odd add.s32 %1, %1, 1;\n"
        "setp.ge.xor.f32 odd, %2, %4, odd;\n"
        "cvt.u64.u32 place, %0;\n"
        "add.u64 place, place, %6;\n"
        "@odd st.global.v2.b32 [place], {%7, %5};\n"
        "@odd add.u32 %0, %0, 8;\n"
        "}"
        : "+r"(at), "+r"(counted[0])
        : "f"(score), "f"(cut[0]), "f"(cut[1]), "r"(index), "l"(base), "r"(__float_as_uint(score))
        : "memory");
  } else {
    asm volatile(
        "{\n"
        ".reg .pred odd;\n"
        ".reg .u64 place;\n"
        "setp.ge.f32 odd, %3, %4;\n"
        "@odd add.s32 %1, %1, 1;\n"
        "setp.ge.xor.f32 odd, %3, %5, odd;\n"
        "setp.ge.xor.f32 odd, %3, %6, odd;\n"
        "@odd add.s32 %2, %2, 1;\n"
        "setp.ge.xor.f32 odd, %3, %7, odd;\n"
        "cvt.u64.u32 place, %0;\n"
        "add.u64 place, place, %9;\n"
        "@odd st.global.v2.b32 [place], {%10, %8};\n"
        "@odd add.u32 %0, %0, 8;\n"
        "}"
        : "+r"(at), "+r"(counted[0]), "+r"(counted[1])
        : "f"(score), "f"(cut[0]), "f"(cut[1]), "f"(cut[2]), "f"(cut[3]), "r"(index), "l"(base),
          "r"(__float_as_uint(score))
        : "memory");
  }
}

}  // namespace negmine::cuda
