// PTX instructions of sm_90a: asynchronous products by a warpgroup (four warps) whose right factor is in shared memory
// (wgmma), and asynchronous copies of boxes of a matrix, whose arrival is signalled by a barrier in shared memory
// (TMA). tests/emulator has a file of this name with the same functions for the CPU.
//
// A product is D (64, 32 kChunks) fp32 += A (64, 16) times the transpose of B (32 kChunks, 16). Warp w of the warpgroup
// holds rows 16 w to 16 w + 15 of D and, if A is in registers, of A, in fragments as in ptx.cuh. With g = lane / 4 and
// t = lane % 4 (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16"), d[chunk][m][n][i] is the element
//
//     D[g + 8 * (i / 2)][32 * chunk + 8n + 2t + i % 2]
//
// of the warp's rows. A sum of rows is D (64, 32 kChunks) fp32 += A (64, 16) B (16, 32 kChunks), with A in registers
// and the same fragments. B is 16 rows of a matrix in shared memory, which the tensor cores transpose when they read
// them.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;  // then no function below is called
#endif

// The address within the shared memory window, as matrix descriptors hold it.
__device__ __forceinline__ uint32_t window_address(SharedAddress shared) { return shared; }

// A proxy fence. After it and a barrier, products read what this thread wrote to shared memory before, and copies of
// boxes do not overwrite what this thread reads before.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Initialises a barrier (8 bytes of shared memory) for copies that one thread starts. Its rounds are numbered from 0.
__device__ __forceinline__ void start_barrier(SharedAddress barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Afterwards the memory of the barrier may be used for something else.
__device__ __forceinline__ void end_barrier(SharedAddress barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// The current round of the barrier is to end when this number of bytes has arrived.
__device__ __forceinline__ void expect_bytes(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Starts to copy the box at (row, column); elements outside the matrix become zeros. Products can read it after the
// round of the barrier has ended.
__device__ __forceinline__ void copy_box(SharedAddress to, const CUtensorMap* map, int row, int column,
                                         SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Waits until the round has ended; `odd`: whether its number is odd.
__device__ __forceinline__ void wait_for_round(SharedAddress barrier, bool odd) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}" ::"r"(barrier),
      "r"(static_cast<uint32_t>(odd))
      : "memory");
}

// A fence that is needed before the first product that uses registers which other instructions have used.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

#define NEGMINE_BLOCK(access, d)                                                                            \
  access(d[0][0]), access(d[0][1]), access(d[0][2]), access(d[0][3]), access(d[1][0]), access(d[1][1]),     \
      access(d[1][2]), access(d[1][3]), access(d[2][0]), access(d[2][1]), access(d[2][2]), access(d[2][3]), \
      access(d[3][0]), access(d[3][1]), access(d[3][2]), access(d[3][3])
#define NEGMINE_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NEGMINE_32 NEGMINE_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NEGMINE_64                                                                                         \
  NEGMINE_32                                                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NEGMINE_128                                                                                          \
  NEGMINE_64                                                                                                 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "   \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
  "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, "   \
  "%121, %122, %123, %124, %125, %126, %127"
#define NEGMINE_PRODUCT(kind, results, factors, adds, transposes, ...)                                             \
  asm volatile("wgmma.mma_async.sync.aligned." kind " {" results "}, " factors ", " adds ", 1, 1, " transposes ";" \
               : __VA_ARGS__)
// By the number of chunks and the place of A, whose operands follow those of D.
#define NEGMINE_PRODUCTS(types, adds, access)                                                                         \
  if constexpr (kChunks == 1 && kInRegisters) {                                                                       \
    NEGMINE_PRODUCT("m64n32k16.f32." types, NEGMINE_16, "{%16, %17, %18, %19}, %20", adds, "0",                       \
                    NEGMINE_BLOCK(access, d[0][m]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));             \
  } else if constexpr (kChunks == 1) {                                                                                \
    NEGMINE_PRODUCT("m64n32k16.f32." types, NEGMINE_16, "%16, %17", adds, "0, 0",                                     \
                    NEGMINE_BLOCK(access, d[0][m]) : "l"(a), "l"(b));                                                 \
  } else if constexpr (kInRegisters) {                                                                                \
    NEGMINE_PRODUCT("m64n64k16.f32." types, NEGMINE_32, "{%32, %33, %34, %35}, %36", adds, "0",                       \
                    NEGMINE_BLOCK(access, d[0][m]), NEGMINE_BLOCK(access, d[1][m]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), \
                    "r"(a[3]), "l"(b));                                                                               \
  } else {                                                                                                            \
    NEGMINE_PRODUCT("m64n64k16.f32." types, NEGMINE_32, "%32, %33", adds, "0, 0", NEGMINE_BLOCK(access, d[0][m]),     \
                    NEGMINE_BLOCK(access, d[1][m]) : "l"(a), "l"(b));                                                 \
  }

// Starts D += A B^T, or D = A B^T if not kAdds, for D = d[.][m]. A is a fragment in registers, or like B a matrix
// descriptor (descriptor_of). Until wait_for_products(), D must not be accessed, and the memory of A and B must not
// change.
template <Storage kStorage, bool kAdds, int kChunks, int kSixteens, class A>
__device__ __forceinline__ void multiply_later(float (&d)[kChunks][kSixteens][4][4], int m, const A& a, uint64_t b) {
  static_assert(kStorage != Storage::kFloat32 && (kChunks == 1 || kChunks == 2));
  constexpr bool kInRegisters = !std::is_integral_v<A>;
  if constexpr (kStorage == Storage::kBFloat16 && kAdds) {
    NEGMINE_PRODUCTS("bf16.bf16", "1", "+f")
  } else if constexpr (kStorage == Storage::kBFloat16) {
    NEGMINE_PRODUCTS("bf16.bf16", "0", "=f")
  } else if constexpr (kAdds) {
    NEGMINE_PRODUCTS("f16.f16", "1", "+f")
  } else {
    NEGMINE_PRODUCTS("f16.f16", "0", "=f")
  }
}

#define NEGMINE_TWO(c) NEGMINE_BLOCK("+f", d[c][m]), NEGMINE_BLOCK("+f", d[c + 1][m])
#define NEGMINE_SUM(types)                                                                                            \
  if constexpr (kChunks == 2) {                                                                                       \
    NEGMINE_PRODUCT("m64n64k16.f32." types, NEGMINE_32, "{%32, %33, %34, %35}, %36", "1", "1",                        \
                    NEGMINE_TWO(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                             \
  } else if constexpr (kChunks == 4) {                                                                                \
    NEGMINE_PRODUCT("m64n128k16.f32." types, NEGMINE_64, "{%64, %65, %66, %67}, %68", "1", "1", NEGMINE_TWO(0),       \
                    NEGMINE_TWO(2) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                             \
  } else {                                                                                                            \
    NEGMINE_PRODUCT("m64n256k16.f32." types, NEGMINE_128, "{%128, %129, %130, %131}, %132", "1", "1", NEGMINE_TWO(0), \
                    NEGMINE_TWO(2), NEGMINE_TWO(4), NEGMINE_TWO(6) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),      \
                    "l"(b));                                                                                          \
  }

// Starts D += A B, where B is a rows_descriptor. Until wait_for_products(), D must not be accessed, and neither A nor
// the memory of B may change.
template <Storage kStorage, int kChunks, int kSixteens>
__device__ __forceinline__ void add_rows_later(float (&d)[kChunks][kSixteens][4][4], int m, const uint32_t (&a)[4],
                                               uint64_t b) {
  static_assert(kStorage != Storage::kFloat32 && (kChunks == 2 || kChunks == 4 || kChunks == 8));
  if constexpr (kStorage == Storage::kBFloat16) {
    NEGMINE_SUM("bf16.bf16")
  } else {
    NEGMINE_SUM("f16.f16")
  }
}

// begin_products() before sums of rows. Their d[.][m] and a are operands here, so that the compiler does not move
// writes to them past the fence.
template <int kChunks, int kSixteens, int kCount>
__device__ __forceinline__ void begin_sums(float (&d)[kChunks][kSixteens][4][4], int m, uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) asm volatile("" : NEGMINE_BLOCK("+f", d[chunk][m])::"memory");
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3])::"memory");
  begin_products();
}

// Ends a group of products: those started since the group before.
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all products except those of the kNewest latest groups. The results d[.][m] are operands here, so that the
// compiler does not move reads of them before the wait.
template <int kNewest, int kChunks, int kSixteens>
__device__ __forceinline__ void wait_for_products(float (&d)[kChunks][kSixteens][4][4], int m) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewest) : "memory");
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) asm volatile("" : NEGMINE_BLOCK("+f", d[chunk][m])::"memory");
}

// Waits for all products, whose results are d.
template <int kChunks, int kSixteens>
__device__ __forceinline__ void wait_for_products(float (&d)[kChunks][kSixteens][4][4]) {
  wait_for_products<0>(d, 0);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
    for (int m = 1; m < kSixteens; ++m) asm volatile("" : NEGMINE_BLOCK("+f", d[chunk][m])::"memory");
  }
}

#undef NEGMINE_SUM
#undef NEGMINE_TWO
#undef NEGMINE_PRODUCTS
#undef NEGMINE_PRODUCT
#undef NEGMINE_128
#undef NEGMINE_64
#undef NEGMINE_32
#undef NEGMINE_16
#undef NEGMINE_BLOCK

}  // namespace negmine::cuda
