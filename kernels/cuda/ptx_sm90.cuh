// Instructions that only sm_90a has: products by a warpgroup, four warps, whose second factor lies in shared memory and
// whose result arrives later. tests/emulator has a file of this name that does the same on a CPU.
//
// A product is D (64, 64) fp32 += A (64, 16) times the transpose of B (64, 16). Warp w of the warpgroup holds rows 16 w
// to 16 w + 15 of A and of D, of A as in ptx.cuh. Of D, with g = lane / 4 and t = lane % 4 (PTX ISA, "Register
// fragments for wgmma.mma_async.m64nNk16"), here in two halves of 32 columns:
//
//     d[half][n][i]   D[g + 8 * (i / 2)][32 * half + 8n + 2t + i % 2]
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

// Where this is false nothing below is compiled to code. The whole program must agree, so nobody else asks.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

// An address in the window of shared memory.
__device__ __forceinline__ uint32_t window_address(SharedAddress shared) { return shared; }

// What this thread wrote to shared memory is what the products and copies of this file find there, once a barrier has
// been passed.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product that reads or writes registers which other instructions have written or read.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

#define NEGMINE_HALF(access, d)                                                                             \
  access(d[0][0]), access(d[0][1]), access(d[0][2]), access(d[0][3]), access(d[1][0]), access(d[1][1]),     \
      access(d[1][2]), access(d[1][3]), access(d[2][0]), access(d[2][1]), access(d[2][2]), access(d[2][3]), \
      access(d[3][0]), access(d[3][1]), access(d[3][2]), access(d[3][3])
#define NEGMINE_PRODUCT(types, adds, access)                                                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." types                                                     \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "     \
               "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, " adds ", 1, 1, 0;" \
               : NEGMINE_HALF(access, left), NEGMINE_HALF(access, right)                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// Begins D += A B^T, or, unless kAdds, D = A B^T. b describes B: see descriptor_of. Nothing may touch D before
// wait_for_products, nor change what b describes.
template <Storage kStorage, bool kAdds>
__device__ __forceinline__ void multiply_later(float (&left)[4][4], float (&right)[4][4], const uint32_t (&a)[4],
                                               uint64_t b) {
  static_assert(kStorage != Storage::kFloat32);
  if constexpr (kStorage == Storage::kBFloat16) {
    if constexpr (kAdds) {
      NEGMINE_PRODUCT("bf16.bf16", "1", "+f");
    } else {
      NEGMINE_PRODUCT("bf16.bf16", "0", "=f");
    }
  } else {
    if constexpr (kAdds) {
      NEGMINE_PRODUCT("f16.f16", "1", "+f");
    } else {
      NEGMINE_PRODUCT("f16.f16", "0", "=f");
    }
  }
}

// Waits for all products that have begun; d are all their results: named here so that no read of them comes earlier.
__device__ __forceinline__ void wait_for_products(float (&d)[2][2][4][4]) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;"
               : NEGMINE_HALF("+f", d[0][0]), NEGMINE_HALF("+f", d[0][1]), NEGMINE_HALF("+f", d[1][0]),
                 NEGMINE_HALF("+f", d[1][1])::"memory");
}

#undef NEGMINE_PRODUCT
#undef NEGMINE_HALF

}  // namespace negmine::cuda
