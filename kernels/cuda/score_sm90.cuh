// The scores of a whole key tile on sm_90a: queries from registers, keys read by the tensor cores from the tile itself.
//
// The (64, 64) products of one warpgroup stand for its 128 queries twice: rows 16 w to 16 w + 15 of product m are rows
// 32 w + 16 m to 32 w + 16 m + 15 of the block, so fragments of queries and of scores are those of score_tile.cuh.
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx_sm90.cuh"

namespace negmine::cuda {

// Rows of 128 bytes, pieces of 16 in the order c ^ (r % 8), at a multiple of 1024: what the PTX ISA's matrix descriptor
// calls a swizzle of 128 bytes. 8 rows after 8 rows, 1024 bytes further; the offset from slab to slab is not asked for.
__device__ __forceinline__ uint64_t descriptor_of(SharedAddress tile) {
  constexpr uint64_t kEightRows = 8 * 128, kSwizzle128 = 1;
  return (window_address(tile) & 0x3FFFF) >> 4 | uint64_t{1} << 16 | kEightRows >> 4 << 32 | kSwizzle128 << 62;
}

// s[half][m][n][i]: Scores of each half of the tile's 64 keys.
template <Storage kStorage, int kSteps>
__device__ __forceinline__ void score_tile(float (&s)[2][2][4][4], const uint32_t (&query)[2][kSteps][4],
                                           SharedAddress tile, int slab_bytes) {
  const uint64_t keys = descriptor_of(tile);
  begin_products();
#pragma unroll
  for (int m = 0; m < 2; ++m) multiply_later<kStorage, false>(s[0][m], s[1][m], query[m][0], keys);
#pragma unroll
  for (int step = 1; step < kSteps; ++step) {
    const uint64_t further = (step / 4 * slab_bytes + step % 4 * 32) >> 4;
#pragma unroll
    for (int m = 0; m < 2; ++m) multiply_later<kStorage, true>(s[0][m], s[1][m], query[m][step], keys + further);
  }
  wait_for_products(s);
}

}  // namespace negmine::cuda
