// Scores on sm_90a: the tensor cores read the keys, and also the queries if they are in shared memory, directly from
// there.
//
// Product m of a warpgroup takes the m-th 16 rows of each of its four warps, so that the fragments of queries and
// scores are those of score_tile.cuh. A score is the same sequence of products whether 32 or 64 keys are multiplied at
// once. The same tile of keys can also be a factor of a weighted sum of keys.
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

// The descriptor of 16 such rows that are summed, so that they are transposed: each key has a row of 64 elements in
// each slab. By the PTX ISA, "Canonical layouts", MN-major with a swizzle of 128 bytes, and by make_gmma_desc of
// CUTLASS, the layout is ((T, 8, m), (8, k)) : ((1, T, LBO), (8 T, SBO)) with T = 8 elements of 16 bits. So, before the
// swizzle, element d of a key is at the byte
//
//     2 (d % 64) + d / 64 * LBO + key % 8 * 128 + key / 8 * SBO
//
// where the leading offset LBO is the distance between slabs, and the stride offset SBO is that between 8 rows and the
// next 8.
__device__ __forceinline__ uint64_t rows_descriptor(SharedAddress rows, int slab_bytes) {
  return descriptor_of(rows, slab_bytes);
}

// The difference between the descriptor of 16 keys and that of the next 16.
constexpr uint64_t kSixteenRows = 16 * 128 >> 4;

// The difference between the descriptors of step 0 and of another step, which is 32 bytes of a row in a slab that is
// slab_offset bytes further.
__device__ __forceinline__ uint64_t advance_of(int slab_offset, int step) { return (slab_offset + step % 4 * 32) >> 4; }

// Starts to compute the scores s[chunk][m][n][i] of kChunks times 32 keys of a tile, with one group of products for
// each m in order. `keys` is the address of the first key, whose row in the tile is a multiple of 32.
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
