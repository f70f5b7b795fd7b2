// The arguments of the ops over synthetic negatives. A synthetic negative is the normalised mix of two of a query's N
// hard negatives, or of the query and one of them; kernels/README.md, section "Draws", says how it is drawn.
//
//   query (B, D), negative_keys (K, D)    fp32, bf16 or fp16; any row stride, in elements; D contiguous
//   hard_index (B, N)                     rows of negative_keys in mining order, then -1 to the end
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

  // Slots [0, pairs) mix two negatives, slots [pairs, pairs + with_query) mix the query with one.
  int64_t pairs, with_query;
  float pair_low, pair_high;    // range of the coefficient of the first parent
  float query_low, query_high;  // the same if the first parent is the query
  bool distinct;                // the two parents of a pair differ, unless there is only one negative
  const float* quantiles;       // (4097,) of the distribution of the coefficient; null: uniform
  uint32_t seed;
  const int64_t* step;        // one number, of which the low 32 bits are used; null: 0
  const int64_t* row_offset;  // one number, the row number of query 0 in the global batch; null: 0
};

}  // namespace negmine::cuda
