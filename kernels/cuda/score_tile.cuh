// The one way the CUDA backend computes a score: s_bk = q_b . n_k in fp32, by tensor cores: those of a warp, or on
// sm_90a, whose binary a GPU of that kind alone takes, those of a warpgroup (score_sm90.cuh).
//
// A block keeps 128 queries in registers, 32 a warp, and streams key tiles through a ring in shared memory. D is padded
// with zeros to 16 * kSteps, a function of D alone, and a score is the chain of its kSteps products in order: the same
// bits in every pass, tile and split. Rows that are not there, and keys that a (K,) mask shuts out, are NaN, so no
// comparison ever keeps their scores and no pass pays for testing them. A pass that also sums keys asks for zeros
// there. It may have 16 queries a warp, or leave them in shared memory, where its sums take the registers: no bit
// depends on it.
//
// A piece is 16 bytes, eight elements; a slab is eight pieces of all 64 rows of a tile, 128 bytes to a row. Piece c of
// row r lies at place c ^ (r % 8) of its row in its slab: the eight rows that a fragment load reads at once are then in
// different banks, and the products of sm_90a, which read tiles themselves, know the order as a swizzle of 128 bytes.
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
constexpr int kKeys = 64;                               // of a tile
constexpr int kChunk = 32;                              // keys whose scores a warp holds at once
constexpr int kSlabRow = 128;                           // bytes of a row in a slab
constexpr uint32_t kTwoNaNs = 0x7FFF7FFFu;              // in bf16 and in fp16
constexpr uint32_t kTwoZeros = 0u;

template <int kSteps>
struct Tiles {
  static constexpr int kPieces = 2 * kSteps;           // of a row
  static constexpr int kStages = kSteps <= 8 ? 3 : 2;  // key tiles in shared memory
  static constexpr int kSlabBytes = kKeys * kSlabRow;
  static constexpr int kTileBytes = kPieces / 8 * kSlabBytes;
  static constexpr int kRing = kStages * kTileBytes;
  static constexpr int kBarriers = 64;  // bytes after the ring, of passes that give a TileMap
  // Of shared memory; queries pass through it first.
  static constexpr int kBytes = std::max(kRows * 16 * kPieces, kRing + kBarriers);
};

// Where the copies of sm_90a find the tiles of a matrix (tile_map.h); a parameter of a kernel, __grid_constant__.
struct TileMap {
  CUtensorMap map;
  bool usable;
};

// A matrix of 16-bit elements, D to a row.
struct Rows {
  const char* base;
  int64_t stride;  // from row to row, in bytes
  int64_t D;
  bool in_pieces;  // rows begin at multiples of 16 bytes and D is a multiple of 8
};

struct MappedRows : Rows {
  const TileMap& tiles;
};

// Scores that a lane holds of its warp's 16 kSixteens rows and a chunk of 32 keys. Of [m][n][i], with g = lane / 4,
// t = lane % 4: row 16 m + g + 8 (i / 2), key 8 n + 2 t + i % 2.
template <int kSixteens>
using ScoresOf = float[kSixteens][4][4];
using Scores = ScoresOf<kRowsPerWarp / 16>;

// The row of the block, of those that a lane holds: i = 2 m + half.
template <int kSixteens = kRowsPerWarp / 16>
__device__ __forceinline__ int row_of(int i) {
  return threadIdx.x / kWarp * (16 * kSixteens) + 8 * i + threadIdx.x % kWarp / 4;
}

// Where a piece lies: of one tile of rows after the other.
template <int kSteps>
__device__ __forceinline__ int offset_of(int row, int piece) {
  return row / kKeys * Tiles<kSteps>::kTileBytes + piece / 8 * Tiles<kSteps>::kSlabBytes + row % kKeys * kSlabRow +
         16 * ((piece ^ row) & 7);
}

// From a piece to the one of the same place that is `rows` rows, a multiple of 8, and `steps` steps, one of 4, further.
template <int kSteps>
__device__ constexpr int further(int rows, int steps) {
  return rows * kSlabRow + steps / 4 * Tiles<kSteps>::kSlabBytes;
}

__device__ __forceinline__ void store_piece(char* shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  *reinterpret_cast<uint4*>(shared) = make_uint4(a, b, c, d);
}

// Begins to copy kCount rows of `matrix` into a tile; find(i) is the row of the matrix that becomes row i, -1 for none,
// which becomes kAbsent.
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
    for (int i = 0; i < kTogether; ++i) source[i] = find(row + i * kRowsAtOnce);  // may read a mask: all at once
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
    for (int i = 0; i < 4 * kTogether; ++i) {  // by words of two elements
      const int64_t from = find(row + i / 4 * kRowsAtOnce), d = 8 * piece + i % 4 * 2;
      const uint16_t* element = reinterpret_cast<const uint16_t*>(matrix.base + from * matrix.stride) + d;
      uint32_t word = from < 0 ? kAbsent : 0u;
      if (from >= 0 && d < matrix.D) word = element[0];
      if (from >= 0 && d + 1 < matrix.D) word |= static_cast<uint32_t>(element[1]) << 16;
      *reinterpret_cast<uint32_t*>(tile + offset_of<kSteps>(row + i / 4 * kRowsAtOnce, piece) + i % 4 * 4) = word;
    }
  }
}

// The same for kKeys neighbouring rows, all there and in pieces.
template <int kSteps>
__device__ __forceinline__ void load_neighbours(char* tile, const Rows& matrix, int64_t first) {
  constexpr int kPieces = Tiles<kSteps>::kPieces, kRowsAtOnce = kThreads / kPieces;
  const int piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces;
  const bool present = 8 * piece < matrix.D;
  const char* from = matrix.base + (first + row) * matrix.stride + (present ? 16 * piece : 0);
  constexpr int kTurns = kRowsAtOnce % 8 == 0 ? 1 : 2;  // until r % 8 comes again, and places are a constant away
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

// The same by one thread, which leaves it to the copy engine.
template <int kSteps>
__device__ __forceinline__ void copy_tile(SharedAddress to, const TileMap& map, int tile, SharedAddress barrier) {
  if (threadIdx.x != 0) return;
  expect_bytes(barrier, Tiles<kSteps>::kTileBytes);
#pragma unroll
  for (int step = 0; step < kSteps; step += 4) {
    copy_box(to + further<kSteps>(0, step), &map.map, tile * kKeys, 16 * step, barrier);
  }
}

// The block's queries in shared memory: tile m has rows m of the warps, 16 of each after the other, which is what one
// product of a warpgroup takes. find(row) is the row of `matrix` that becomes a row of the block, -1 for none.
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

// The same from `first` on.
template <int kSteps, int kSixteens>
__device__ __forceinline__ void gather_queries(char* memory, const Rows& matrix, int64_t first, int64_t B) {
  gather_queries<kSteps, kSixteens>(memory, matrix,
                                    [&](int row) { return first + row < B ? first + row : int64_t{-1}; });
}

// Where a lane loads fragments of step 0 from, within rows that begin at a multiple of 128 bytes: of 16 keys, matrices
// 0 and 1 are of the first 8 rows and 2 and 3 of the next; of 16 queries, or of keys that are summed, 0 and 1 are of
// all rows and 2 and 3 of these again.
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

// The same of another step: a step is two pieces, whose place has its low three bits from the lane and the step.
template <int kSteps>
__device__ __forceinline__ SharedAddress at_step(SharedAddress first, int step) {
  return flipped(first, step % 4 * 32) + further<kSteps>(0, step);
}

// This warp's queries in shared memory.
template <int kSteps, int kSixteens>
struct SharedQueries {
  SharedAddress tiles;
  SharedAddress first;  // where this lane loads the fragment of step 0 from

  __device__ explicit SharedQueries(char* memory)
      : tiles(shared_address(memory)), first(tiles + threadIdx.x / kWarp * (16 * kSlabRow) + lane_of_rows<kSteps>()) {}

  // Of rows m of all warps, for products of a warpgroup.
  __device__ uint64_t descriptor(int m, int step) const {
    return descriptor_of(tiles + m * Tiles<kSteps>::kTileBytes) + advance_of(further<kSteps>(0, step), step);
  }
};

// The fragments of one step, from where the queries are.
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

// The fragments of this warp's queries, [m][step]; the shared memory is free again.
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

// Zeros in place of the elements that are not finite in kCount rows from `rows` on, a multiple of 8 within a tile, for
// a block that has its scores of them and has no product that reads them under way.
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

// Scores of the warp's queries and the 32 keys from `keys` on, a multiple of 8 within a tile.
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

// Scores of tiles first, first + stride, ... of the columns [0, count): use(column, scores, keys) for every chunk of
// 32, in order, with the chunk's keys in shared memory, and before(column), while no scores take registers.
// find(column) is the row of `keys` behind a column, -1 for none; it is asked of columns past `count` too. is_plain
// says that every column is the row of its number; such keys may come as MappedRows. A warpgroup holds the scores of
// kAtOnce chunks at once, 1 or 2; a `use` that takes ScoresOf[chunks at once] gets them so, and by a warpgroup when
// their products have begun: it waits for them. Its own products may read a tile for kLag turns more.
struct Nothing {
  __device__ void operator()(int) const {}
};

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
        __syncwarp();  // one lane of a block went its own way, and the next products want all of a warp
      }
    } else if (plain(tile)) {
      load_neighbours<kSteps>(memory + stage * kBytes, keys, tile * int64_t{kKeys});
    } else if (tile < tiles) {
      const int column = tile * kKeys;
      load_rows<kSteps, kKeys, kAbsent>(memory + stage * kBytes, keys, [&](int row) { return find(column + row); });
    }
    end_copies();  // also where there was nothing to copy: groups are counted
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
  bool odd = false;  // whether the round of the stages' barriers is
  for (int tile = first; tile < tiles; tile += stride) {
    wait_for_copies<kAhead - 1>();
    if (kMapped && tile < whole) {
      if constexpr (kMapped) wait_for_round(barriers + 8 * stage, odd);
    } else if constexpr (kHasWarpgroups) {
      show_to_products();
    }
    __syncthreads();  // the tile is there for all, and all have left the stage that is filled next
    fetch(tile + kAhead * stride, stage <= kLag ? stage + kAhead : stage - 1 - kLag);
    constexpr int kChunks = kHasWarpgroups ? kAtOnce : 1;  // more would not fit in registers
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
      __syncwarp();  // the next products want all lanes of a warp at once, wherever `use` sent them
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
