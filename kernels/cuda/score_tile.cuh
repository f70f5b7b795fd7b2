// The one way the CUDA backend computes a score: s_bk = q_b . n_k in fp32, by tensor cores.
//
// A block keeps 128 queries in registers, 32 a warp, and streams key tiles through a ring in shared memory. D is padded
// with zeros to 16 * kSteps, a function of D alone, and a score is the chain of its kSteps products in order: the same
// bits in every pass, tile and split. Rows that are not there, and keys that a (K,) mask shuts out, are NaN, so no
// comparison ever keeps their scores and no pass pays for testing them. A pass that also sums keys asks for zeros
// there. It may have 16 queries a warp, or leave them in shared memory, where its sums take the registers: no bit
// depends on it.
//
// A piece is 16 bytes, eight elements. Piece c of row r lies at place c ^ (r % 8): the eight rows that a fragment load
// reads at once are then in different banks.
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kRowsPerWarp = 32;
constexpr int kRows = kThreads / kWarp * kRowsPerWarp;  // queries of a block
constexpr int kKeys = 64;                               // of a tile
constexpr int kChunk = 32;                              // keys whose scores a warp holds at once
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr uint32_t kTwoNaNs = 0x7FFF7FFFu;  // in bf16 and in fp16
constexpr uint32_t kTwoZeros = 0u;

template <int kSteps>
struct Tiles {
  static constexpr int kPieces = 2 * kSteps;           // of a row
  static constexpr int kStages = kSteps <= 8 ? 3 : 2;  // key tiles in shared memory
  static constexpr int kTileBytes = kKeys * 16 * kPieces;
  static constexpr int kRowsHeld = kRows > kStages* kKeys ? kRows : kStages * kKeys;
  static constexpr int kBytes = kRowsHeld * 16 * kPieces;  // of shared memory; queries pass through it first
};

// A matrix of 16-bit elements, D to a row.
struct Rows {
  const char* base;
  int64_t stride;  // from row to row, in bytes
  int64_t D;
  bool in_pieces;  // rows begin at multiples of 16 bytes and D is a multiple of 8
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

template <int kSteps>
__device__ __forceinline__ int offset_of(int row, int piece) {
  return 16 * (row * Tiles<kSteps>::kPieces + (piece ^ (row & 7)));
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
#pragma unroll
  for (int i = 0; i < kKeys / kRowsAtOnce; ++i) {
    copy_async(shared_address(tile) + offset_of<kSteps>(row + i * kRowsAtOnce, piece), from, present);
    from += kRowsAtOnce * matrix.stride;
  }
}

// The block's queries, from `first` on, in shared memory.
template <int kSteps, int kSixteens>
__device__ __forceinline__ void gather_queries(char* memory, const Rows& matrix, int64_t first, int64_t B) {
  const auto find = [&](int row) { return first + row < B ? first + row : int64_t{-1}; };
  __syncthreads();
  load_rows<kSteps, kThreads / kWarp * 16 * kSixteens>(memory, matrix, find);
  end_copies();
  wait_for_copies<0>();
  __syncthreads();
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
__device__ __forceinline__ SharedAddress at_step(SharedAddress first, int step) {
  return flipped(first, step % 4 * 32) + step / 4 * 128;
}

// This warp's queries in shared memory.
template <int kSteps, int kSixteens>
struct SharedQueries {
  SharedAddress first;  // where this lane loads the fragment of step 0 from

  __device__ explicit SharedQueries(char* memory)
      : first(shared_address(memory) + threadIdx.x / kWarp * (16 * kSixteens * 16 * Tiles<kSteps>::kPieces) +
              lane_of_rows<kSteps>()) {}
};

// The fragments of one step, from where the queries are.
template <int kSteps, int kSixteens>
__device__ __forceinline__ void take(uint32_t (&fragments)[kSixteens][4], const SharedQueries<kSteps, kSixteens>& query,
                                     int step) {
#pragma unroll
  for (int m = 0; m < kSixteens; ++m) {
    load_matrices(fragments[m], at_step(query.first, step) + 16 * m * 16 * Tiles<kSteps>::kPieces);
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

// Scores of the warp's queries and the 32 keys from `keys` on, a multiple of 8 within a tile.
template <Storage kStorage, int kSteps, int kSixteens, class Queries>
__device__ __forceinline__ void score(ScoresOf<kSixteens>& s, const Queries& query, SharedAddress keys, int lane) {
  constexpr int kRowBytes = 16 * Tiles<kSteps>::kPieces;
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
      load_matrices(key[pair], at_step(keys + lane, step) + 16 * pair * kRowBytes);
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
// says that every column is the row of its number.
struct Nothing {
  __device__ void operator()(int) const {}
};

template <Storage kStorage, int kSteps, int kSixteens = kRowsPerWarp / 16, uint32_t kAbsent = kTwoNaNs, class Queries,
          class Find, class Use, class Before = Nothing>
__device__ __forceinline__ void stream(const Queries& query, char* memory, const Rows& keys, int first, int stride,
                                       int count, bool is_plain, Find find, Use use, Before before = {}) {
  constexpr int kStages = Tiles<kSteps>::kStages, kBytes = Tiles<kSteps>::kTileBytes;
  const int tiles = count / kKeys + (count % kKeys != 0), plain = is_plain && keys.in_pieces ? count / kKeys : 0;
  const auto fetch = [&](int tile, int stage) {
    if (tile < plain) {
      load_neighbours<kSteps>(memory + stage * kBytes, keys, tile * int64_t{kKeys});
    } else if (tile < tiles) {
      const int column = tile * kKeys;
      load_rows<kSteps, kKeys, kAbsent>(memory + stage * kBytes, keys, [&](int row) { return find(column + row); });
    }
    end_copies();  // also where there was nothing to copy: groups are counted
  };
  const int lane = lane_of_keys<kSteps>();
  __syncthreads();
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) fetch(first + ahead * stride, ahead);
  int stage = 0;
  for (int tile = first; tile < tiles; tile += stride) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the tile is there for all, and all have left the stage that is filled next
    const int free = stage == 0 ? kStages - 1 : stage - 1;
    fetch(tile + (kStages - 1) * stride, free);
#pragma unroll 1  // two chunks at once would not fit in registers
    for (int chunk = 0; chunk < kKeys; chunk += kChunk) {
      before(tile * kKeys + chunk);
      ScoresOf<kSixteens> s;
      const SharedAddress chunk_keys = shared_address(memory) + (stage * kBytes + chunk * 16 * Tiles<kSteps>::kPieces);
      score<kStorage, kSteps, kSixteens>(s, query, chunk_keys, lane);
      use(tile * kKeys + chunk, s, chunk_keys);
      __syncwarp();  // the next products want all lanes of a warp at once, wherever `use` sent them
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  wait_for_copies<0>();
}

}  // namespace negmine::cuda
