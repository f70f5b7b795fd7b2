// Scores on sm_90a: keys, and queries where they are left in shared memory, are read by the tensor cores themselves.
//
// Product m of a warpgroup takes rows m of its four warps, 16 of each, so that fragments of queries and of scores are
// those of score_tile.cuh. A score is the same chain of products whether it comes with 32 keys or with 64. The same
// tile of keys may be what weights of those queries sum.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/ptx_sm90.cuh"

namespace negmine::cuda {

// Rows of 128 bytes, pieces of 16 in the order c ^ (r % 8), at a multiple of 1024: what the PTX ISA's matrix descriptor
// calls a swizzle of 128 bytes. 8 rows after 8 rows are 1024 bytes further; its other offset is not asked for.
__device__ __forceinline__ uint64_t descriptor_of(SharedAddress rows, uint32_t other_offset = 16) {
  constexpr uint64_t kEightRows = 8 * 128, kSwizzle128 = 1;
  return (window_address(rows) & 0x3FFFF) >> 4 | uint64_t{other_offset >> 4} << 16 | kEightRows >> 4 << 32 |
         kSwizzle128 << 62;
}

// The same rows where these are the terms of a sum: 16 keys, each a row of 64 dims in each of the slabs. PTX ISA, part
// "Canonical layouts", MN-major, swizzle of 128 bytes: ((T, 8, m), (8, k)) : ((1, T, LBO), (8 T, SBO)) with T = 8 of
// our elements, which CUTLASS (cute, make_gmma_desc) says as well. So element (dim, key), before the swizzle, is
//
//     2 (dim % 64) + dim / 64 * LBO + key % 8 * 128 + key / 8 * SBO
//
// bytes on, and a slab's distance is the leading offset, eight rows' distance, as ever, the other.
__device__ __forceinline__ uint64_t rows_descriptor(SharedAddress rows, int slab_bytes) {
  return descriptor_of(rows, slab_bytes);
}

// What to add to it for the next 16 keys.
constexpr uint64_t kSixteenRows = 16 * 128 >> 4;

// What to add to a descriptor for a step whose slab is slab_offset bytes further: a step is 32 bytes of a row.
__device__ __forceinline__ uint64_t advance_of(int slab_offset, int step) { return (slab_offset + step % 4 * 32) >> 4; }

// Begins s[chunk][m][n][i], scores of each 32 keys from `keys` on, a multiple of 32 within a tile: a group of products
// for each m, in order.
template <Storage kStorage, int kSteps, int kChunks, int kSixteens, class Queries>
__device__ __forceinline__ void begin_scores(float (&s)[kChunks][kSixteens][4][4], const Queries& query,
                                             SharedAddress keys, int slab_bytes) {
  const uint64_t first = descriptor_of(keys);
  const auto multiply_step = [&](auto adds, int m, int step) {
    const uint64_t b = first + advance_of(step / 4 * slab_bytes, step);
    if constexpr (std::is_array_v<Queries>) {
      multiply_later<kStorage, decltype(adds)::value>(s, m, query[m][step], b);
    } else {
      multiply_later<kStorage, decltype(adds)::value>(s, m, query.descriptor(m, step), b);
    }
  };
  begin_products();
#pragma unroll
  for (int m = 0; m < kSixteens; ++m) {
    multiply_step(std::false_type(), m, 0);
#pragma unroll
    for (int step = 1; step < kSteps; ++step) multiply_step(std::true_type(), m, step);
    end_products();
  }
}

}  // namespace negmine::cuda
