// What the ops over synthetic negatives are given: normalised mixes of two of a query's N hard negatives or of the
// query and one of them. Meaning and draws: kernels/README.md.
//
//   query (B, D), negative_keys (K, D)    fp32, bf16 or fp16; any row stride, in elements; D contiguous
//   hard_index (B, N)                     mining order; entries are in [0, K), -1 padded at the end
#pragma once

#include <cstdint>

#include "kernels/cuda/storage.h"

namespace negmine::cuda {

struct Mixing {
  int64_t B, N, D;
  const void* query;             // (B, D)
  const void* negative_keys;     // (K, D)
  const int64_t* hard_index;     // (B, N)
  int64_t query_stride;          // from row to row, in elements
  int64_t negative_keys_stride;  // from row to row, in elements
  int64_t hard_index_stride;     // from row to row, in elements
  Storage query_storage;
  Storage negative_keys_storage;

  // Draws: slots [0, pairs) mix two negatives, slots [pairs, pairs + with_query) mix the query with one.
  int64_t pairs, with_query;
  float pair_low, pair_high;    // range of the coefficient of the first parent
  float query_low, query_high;  // the same where the query is the first parent
  bool distinct;                // the two parents of a pair differ where they can
  const float* quantiles;       // (4097,) of the coefficient's distribution, or null: uniform
  uint32_t seed;
  const int64_t* step;        // one number, of which the low 32 bits count; null: 0
  const int64_t* row_offset;  // one number, the global row of query 0; null: 0
};

}  // namespace negmine::cuda
