// The only code of the CUDA backend that computes scores: s_bk = q_b . n_k in fp32, with the tensor cores. Each warp
// multiplies with mma.sync. In code compiled for sm_90a, which runs only on GPUs of compute capability 9.0, each
// warpgroup multiplies with wgmma (score_sm90.cuh).
//
// A block keeps 128 queries in registers, 32 for each warp, and streams tiles of keys through a ring buffer in shared
// memory. D is padded with zeros to 16 * kSteps, which depends only on D, and a score is the result of kSteps products
// in a fixed order, so it has the same bits in every pass, tile and split. Rows past the end, and keys that a (K,) mask
// hides, are filled with NaN. No comparison accepts the NaN scores, so passes need no test for them. A pass that also
// sums keys fills them with zeros instead. Because its sums need registers, such a pass may have only 16 queries for
// each warp, or leave them in shared memory; no score depends on this.
//
// A piece is 16 bytes, which is eight elements. A slab is eight pieces of all 64 rows of a tile, so 128 bytes of each
// row. Piece c of row r is at place c ^ (r % 8) of its row in its slab. The eight rows that a load of a fragment reads
// at once are then in different banks. wgmma and TMA call this order a swizzle of 128 bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/score_sm90.cuh"
#include "kernels/cuda/storage.h"
#include "kernels/cuda/warp.cuh"

namespace negmine::cuda {

constexpr int kThreads = 128;
constexpr int kRowsPerWarp = 32;
constexpr int kRows = kThreads / kWarp * kRowsPerWarp;  // queries of a block
constexpr int kKeys = 64;                               // keys of a tile
constexpr int kChunk = 32;                              // keys whose scores a warp holds at once
constexpr int kSlabRow = 128;                           // bytes of a row in a slab
constexpr uint32_t kTwoNaNs = 0x7FFF7FFFu;              // in bf16 and in fp16
constexpr uint32_t kTwoZeros = 0u;

template <int kSteps>
struct Tiles {
  static constexpr int kPieces = 2 * kSteps;           // pieces of a row
  static constexpr int kStages = kSteps <= 8 ? 3 : 2;  // key tiles in shared memory
  static constexpr int kSlabBytes = kKeys * kSlabRow;
  static constexpr int kTileBytes = kPieces / 8 * kSlabBytes;
  static constexpr int kRing = kStages * kTileBytes;
  static constexpr int kBarriers = 64;  // bytes for barriers after the ring, used with a TileMap
  // The shared memory, in bytes. Before the ring uses it, queries are loaded through it.
  static constexpr int kBytes = std::max(kRows * 16 * kPieces, kRing + kBarriers);
};

// The tensor map of a matrix for TMA (tile_map.h). It must be a __grid_constant__ parameter of the kernel.
struct TileMap {
  CUtensorMap map;
  bool usable;
};

// A matrix of rows with D elements of 16 bits.
struct Rows {
  const char* base;
  int64_t stride;  // from row to row, in bytes
  int64_t D;
  bool in_pieces;  // rows begin at multiples of 16 bytes, and D is a multiple of 8
};

struct MappedRows : Rows {
  const TileMap& tiles;
};

// The scores that a lane holds of the 16 kSixteens rows of its warp and a chunk of 32 keys. With g = lane / 4 and
// t = lane % 4, score [m][n][i] is that of row 16 m + g + 8 (i / 2) of the warp and key 8 n + 2 t + i % 2 of the chunk.
template <int kSixteens>
using ScoresOf = float[kSixteens][4][4];
using Scores = ScoresOf<kRowsPerWarp / 16>;

// The i-th of the rows of the block of which a lane holds scores; i = 2 m and 2 m + 1 are in the m-th 16 of its warp.
template <int kSixteens = kRowsPerWarp / 16>
__device__ __forceinline__ int row_of(int i) {
  return threadIdx.x / kWarp * (16 * kSixteens) + 8 * i + threadIdx.x % kWarp / 4;
}

// The byte offset of a piece of a row, where tiles of kKeys rows follow each other.
template <int kSteps>
__device__ __forceinline__ int offset_of(int row, int piece) {
  return row / kKeys * Tiles<kSteps>::kTileBytes + piece / 8 * Tiles<kSteps>::kSlabBytes + row % kKeys * kSlabRow +
         16 * ((piece ^ row) & 7);
}

// The byte offset from a piece to that `rows` rows and `steps` steps further. rows is a multiple of 8 and steps of 4,
// so that both have the same place in their rows.
template <int kSteps>
__device__ constexpr int further(int rows, int steps) {
  return rows * kSlabRow + steps / 4 * Tiles<kSteps>::kSlabBytes;
}

__device__ __forceinline__ void store_piece(char* shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  *reinterpret_cast<uint4*>(shared) = make_uint4(a, b, c, d);
}

// Starts to copy kCount rows of `matrix` into a tile. Row i of the tile is row find(i) of the matrix, or filled with
// kAbsent if find(i) is -1.
template <int kSteps, int kCount, uint32_t kAbsent = kTwoNaNs, class Find>
__device__ __forceinline__ void load_rows(char* tile, const Rows& matrix, Find find) {
  constexpr int kPieces = Tiles<kSteps>::kPieces, kRowsAtOnce = kThreads / kPieces, kTogether = 4;
  static_assert(kThreads % kPieces == 0 && kCount % (kRowsAtOnce * kTogether) == 0);
  const int piece = threadIdx.x % kPieces;
  const bool present = 8 * piece < matrix.D;
#pragma unroll 1
  for (int row = threadIdx.x / kPieces; row < kCount; row += kRowsAtOnce * kTogether) {
    int64_t source[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) source[i] = find(row + i * kRowsAtOnce);  // may read a mask: the loads overlap
    if (matrix.in_pieces) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        char* place = tile + offset_of<kSteps>(row + i * kRowsAtOnce, piece);
        if (source[i] < 0) {
          store_piece(place, kAbsent, kAbsent, kAbsent, kAbsent);
        } else {
          copy_async(shared_address(place), matrix.base + source[i] * matrix.stride + (present ? 16 * piece : 0),
                     present);
        }
      }
      continue;
    }
#pragma unroll 1
    for (int i = 0; i < 4 * kTogether; ++i) {  // words of two elements
      const int64_t from = find(row + i / 4 * kRowsAtOnce), d = 8 * piece + i % 4 * 2;
      const uint16_t* element = reinterpret_cast<const uint16_t*>(matrix.base + from * matrix.stride) + d;
      uint32_t word = from < 0 ? kAbsent : 0u;
      if (from >= 0 && d < matrix.D) word = element[0];
      if (from >= 0 && d + 1 < matrix.D) word |= static_cast<uint32_t>(element[1]) << 16;
      *reinterpret_cast<uint32_t*>(tile + offset_of<kSteps>(row + i / 4 * kRowsAtOnce, piece) + i % 4 * 4) = word;
    }
  }
}

// The same for kKeys consecutive rows, none of them past the end, of a matrix that is in_pieces.
template <int kSteps>
__device__ __forceinline__ void load_neighbours(char* tile, const Rows& matrix, int64_t first) {
  constexpr int kPieces = Tiles<kSteps>::kPieces, kRowsAtOnce = kThreads / kPieces;
  const int piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces;
  const bool present = 8 * piece < matrix.D;
  const char* from = matrix.base + (first + row) * matrix.stride + (present ? 16 * piece : 0);
  constexpr int kTurns =
      kRowsAtOnce % 8 == 0 ? 1 : 2;  // period of r % 8; addresses this far apart differ by a constant
  static_assert(kTurns * kRowsAtOnce % 8 == 0);
  SharedAddress to[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) to[i] = shared_address(tile) + offset_of<kSteps>(row + i * kRowsAtOnce, piece);
#pragma unroll
  for (int i = 0; i < kKeys / kRowsAtOnce; ++i) {
    copy_async(to[i % kTurns] + further<kSteps>(i / kTurns * kTurns * kRowsAtOnce, 0), from, present);
    from += kRowsAtOnce * matrix.stride;
  }
}

// The same with TMA: one thread starts the copies.
template <int kSteps>
__device__ __forceinline__ void copy_tile(SharedAddress to, const TileMap& map, int tile, SharedAddress barrier) {
  if (threadIdx.x != 0) return;
  expect_bytes(barrier, Tiles<kSteps>::kTileBytes);
#pragma unroll
  for (int step = 0; step < kSteps; step += 4) {
    copy_box(to + further<kSteps>(0, step), &map.map, tile * kKeys, 16 * step, barrier);
  }
}

// Loads the block's queries into shared memory. Tile m holds the m-th 16 rows of each warp, warp after warp, which are
// the rows of one product of a warpgroup. Row i of the block is row find(i) of `matrix`, or NaN if find(i) is -1.
template <int kSteps, int kSixteens, class Find>
__device__ __forceinline__ void gather_queries(char* memory, const Rows& matrix, Find find) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(16 * kWarps == kKeys);
  __syncthreads();
  load_rows<kSteps, 16 * kWarps * kSixteens>(memory, matrix, [&](int place) {
    return find(place % kKeys / 16 * (16 * kSixteens) + place / kKeys * 16 + place % 16);
  });
  end_copies();
  wait_for_copies<0>();
  __syncthreads();
}

// The same for consecutive rows from `first` on; B is the number of rows of the matrix.
template <int kSteps, int kSixteens>
__device__ __forceinline__ void gather_queries(char* memory, const Rows& matrix, int64_t first, int64_t B) {
  gather_queries<kSteps, kSixteens>(memory, matrix,
                                    [&](int row) { return first + row < B ? first + row : int64_t{-1}; });
}

// The offset from which a lane loads its part of a fragment of step 0 (load_matrices), relative to the first of 16
// rows. For keys, matrices 0 and 1 are the two pieces of the first 8 rows, and 2 and 3 those of the next 8. For
// queries, and for keys that are summed, matrices 0 and 1 are the first piece of the 16 rows, and 2 and 3 the second
// piece.
template <int kSteps>
__device__ __forceinline__ int lane_of_keys() {
  const int lane = threadIdx.x % kWarp;
  return offset_of<kSteps>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

template <int kSteps>
__device__ __forceinline__ int lane_of_rows() {
  const int lane = threadIdx.x % kWarp;
  return offset_of<kSteps>(lane % 16, lane / 16);
}

// The same address for another step, which is two pieces further. Places of pieces are an exclusive or with the row, so
// only bits of the address change.
template <int kSteps>
__device__ __forceinline__ SharedAddress at_step(SharedAddress first, int step) {
  return flipped(first, step % 4 * 32) + further<kSteps>(0, step);
}

// This warp's queries in shared memory.
template <int kSteps, int kSixteens>
struct SharedQueries {
  SharedAddress tiles;
  SharedAddress first;  // from which this lane loads its part of the fragment of step 0

  __device__ explicit SharedQueries(char* memory)
      : tiles(shared_address(memory)), first(tiles + threadIdx.x / kWarp * (16 * kSlabRow) + lane_of_rows<kSteps>()) {}

  // The descriptor of the m-th 16 rows of all warps, for a product of a warpgroup.
  __device__ uint64_t descriptor(int m, int step) const {
    return descriptor_of(tiles + m * Tiles<kSteps>::kTileBytes) + advance_of(further<kSteps>(0, step), step);
  }
};

// Gets the fragments of one step of queries, which are in shared memory or in registers.
template <int kSteps, int kSixteens>
__device__ __forceinline__ void take(uint32_t (&fragments)[kSixteens][4], const SharedQueries<kSteps, kSixteens>& query,
                                     int step) {
#pragma unroll
  for (int m = 0; m < kSixteens; ++m) {
    load_matrices(fragments[m], at_step<kSteps>(query.first, step) + m * Tiles<kSteps>::kTileBytes);
  }
}

template <int kSteps, int kSixteens>
__device__ __forceinline__ void take(uint32_t (&fragments)[kSixteens][4], const uint32_t (&query)[kSixteens][kSteps][4],
                                     int step) {
#pragma unroll
  for (int m = 0; m < kSixteens; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragments[m][i] = query[m][step][i];
  }
}

// Loads the fragments [m][step] of this warp's queries. Afterwards the shared memory is free for other use.
template <int kSteps, int kSixteens>
__device__ __forceinline__ void load_queries(uint32_t (&query)[kSixteens][kSteps][4], char* memory, const Rows& matrix,
                                             int64_t first, int64_t B) {
  gather_queries<kSteps, kSixteens>(memory, matrix, first, B);
  const SharedQueries<kSteps, kSixteens> shared(memory);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t fragments[kSixteens][4];
    take(fragments, shared, step);
#pragma unroll
    for (int m = 0; m < kSixteens; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) query[m][step][i] = fragments[m][i];
    }
  }
  __syncthreads();
}

// Replaces elements that are not finite by zeros, in kCount rows of a tile from the address `rows` on, which is that of
// a row whose number is a multiple of 8. The block must have its scores of these rows, and no product that reads them
// may be in progress.
template <Storage kStorage, int kSteps, int kCount>
__device__ __forceinline__ void make_finite(SharedAddress rows) {
  constexpr uint32_t kExponent = kStorage == Storage::kBFloat16 ? 0x7F80u : 0x7C00u;
  constexpr int kWords = kSlabRow / 4;  // of two elements
  char* first = shared_memory() + (rows - shared_address(shared_memory()));
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kCount * kWords * (kSteps / 4); i += kThreads) {
    char* at = first + i / (kCount * kWords) * Tiles<kSteps>::kSlabBytes + i % (kCount * kWords) * 4;
    uint32_t word = *reinterpret_cast<uint32_t*>(at);
    if ((word & kExponent) == kExponent) word &= 0xFFFF0000u;
    if ((word >> 16 & kExponent) == kExponent) word &= 0xFFFFu;
    *reinterpret_cast<uint32_t*>(at) = word;
  }
  if constexpr (kHasWarpgroups) show_to_products();
  __syncthreads();
}

// Computes the scores of the warp's queries and 32 keys with mma.sync. `keys` is the address of the first key, whose
// row in the tile is a multiple of 8.
template <Storage kStorage, int kSteps, int kSixteens, class Queries>
__device__ __forceinline__ void score(ScoresOf<kSixteens>& s, const Queries& query, SharedAddress keys, int lane) {
#pragma unroll
  for (int m = 0; m < kSixteens; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t own[kSixteens][4], key[2][4];
    take(own, query, step);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      load_matrices(key[pair], at_step<kSteps>(keys + lane, step) + further<kSteps>(16 * pair, 0));
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int m = 0; m < kSixteens; ++m) {
        multiply<kStorage>(s[m][n], own[m], key[n / 2][n % 2 * 2], key[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

struct Nothing {
  __device__ void operator()(int) const {}
};

// Computes scores of the columns [0, count), of which it takes tiles first, first + stride, and so on. For every chunk
// of 32 columns in order, it calls before(column), while no scores take up registers, and then use(column, scores,
// keys), where keys is the address of the chunk's keys in shared memory.
//
// find(column) is the row of `keys` for a column, or -1 for none. It is also called for columns past `count`. is_plain:
// every column is the row with the same number. Only then `keys` may be MappedRows.
//
// A warpgroup computes the scores of kAtOnce chunks (1 or 2) at once. If `use` takes ScoresOf[number of chunks], it is
// called once for all of them. In a warpgroup their products are then still in progress, and `use` must wait for them.
// Products that `use` starts may read the tile during the following kLag tiles.

template <Storage kStorage, int kSteps, int kSixteens = kRowsPerWarp / 16, uint32_t kAbsent = kTwoNaNs, int kAtOnce = 2,
          int kLag = 0, class Queries, class Keys, class Find, class Use, class Before = Nothing>
__device__ __forceinline__ void stream(const Queries& query, char* memory, const Keys& keys, int first, int stride,
                                       int count, bool is_plain, Find find, Use use, Before before = {}) {
  constexpr int kAhead = Tiles<kSteps>::kStages - 1, kStages = kAhead + 1 + kLag, kBytes = Tiles<kSteps>::kTileBytes;
  const int tiles = count / kKeys + (count % kKeys != 0), full = count / kKeys;
  [[maybe_unused]] const int neighbours = is_plain && keys.in_pieces ? full : 0;  // tiles of neighbouring rows
  constexpr bool kMapped = kHasWarpgroups && std::is_same_v<Keys, MappedRows>;
  int whole = 0;  // tiles that are copied as such
  if constexpr (kMapped) whole = keys.tiles.usable ? neighbours : 0;
  [[maybe_unused]] const SharedAddress barriers = shared_address(memory) + kStages * kBytes;  // one of each stage
  const auto plain = [&](int tile) {  // a register or three instructions: which of them there is room for
    return kMapped ? tile < neighbours : is_plain && keys.in_pieces && tile < full;
  };
  const auto fetch = [&](int tile, int stage) {
    if (kMapped && tile < whole) {
      if constexpr (kMapped) {
        copy_tile<kSteps>(shared_address(memory) + stage * kBytes, keys.tiles, tile, barriers + 8 * stage);
        __syncwarp();  // one lane diverged, and products need all lanes of a warp
      }
    } else if (plain(tile)) {
      load_neighbours<kSteps>(memory + stage * kBytes, keys, tile * int64_t{kKeys});
    } else if (tile < tiles) {
      const int column = tile * kKeys;
      load_rows<kSteps, kKeys, kAbsent>(memory + stage * kBytes, keys, [&](int row) { return find(column + row); });
    }
    end_copies();  // also if nothing was copied, because wait_for_copies() counts groups
  };
  [[maybe_unused]] const int lane = lane_of_keys<kSteps>();
  if constexpr (kMapped) {
    for (int i = 0; i < kStages && whole > 0 && threadIdx.x == 0; ++i) start_barrier(barriers + 8 * i);
  }
  if constexpr (kHasWarpgroups) show_to_products();
  __syncthreads();
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) fetch(first + ahead * stride, ahead);
  int stage = 0;
  bool odd = false;  // whether the current round of the stages' barriers is odd
  for (int tile = first; tile < tiles; tile += stride) {
    wait_for_copies<kAhead - 1>();
    if (kMapped && tile < whole) {
      if constexpr (kMapped) wait_for_round(barriers + 8 * stage, odd);
    } else if constexpr (kHasWarpgroups) {
      show_to_products();
    }
    __syncthreads();  // the tile has arrived for all, and nobody reads the stage that is filled next
    fetch(tile + kAhead * stride, stage <= kLag ? stage + kAhead : stage - 1 - kLag);
    constexpr int kChunks = kHasWarpgroups ? kAtOnce : 1;  // mma.sync has no registers for two
#pragma unroll 1
    for (int chunk = 0; chunk < kKeys; chunk += kChunks * kChunk) {
      before(tile * kKeys + chunk);
      ScoresOf<kSixteens> s[kChunks];
      const SharedAddress chunk_keys = shared_address(memory) + (stage * kBytes + further<kSteps>(chunk, 0));
      if constexpr (kHasWarpgroups) {
        begin_scores<kStorage, kSteps>(s, query, chunk_keys, Tiles<kSteps>::kSlabBytes);
      } else {
        score<kStorage, kSteps, kSixteens>(s[0], query, chunk_keys, lane);
      }
      if constexpr (std::is_invocable_v<Use, int, decltype(s)&, SharedAddress>) {
        use(tile * kKeys + chunk, s, chunk_keys);
      } else {
        if constexpr (kHasWarpgroups) wait_for_products(s);
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          use(tile * kKeys + chunk + i * kChunk, s[i], chunk_keys + further<kSteps>(i * kChunk, 0));
        }
      }
      __syncwarp();  // `use` may diverge, and products need all lanes of a warp
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
    odd ^= stage == 0;
  }
  wait_for_copies<0>();
  if constexpr (kMapped) {
    __syncthreads();
    for (int i = 0; i < kStages && whole > 0 && threadIdx.x == 0; ++i) end_barrier(barriers + 8 * i);
  }
}

}  // namespace negmine::cuda
