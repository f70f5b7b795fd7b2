// The pool of each query: the optional arrays of kernels/README.md, section "Pool". A null pointer is an absent array.
#pragma once

#include <cstdint>

namespace negmine::cuda {

struct Pool {
  const uint8_t* key_mask;         // (K,), nonzero = usable; other rows of keys are never read
  const uint8_t* pair_mask;        // (B, K), nonzero = usable
  int64_t pair_mask_stride;        // from row to row, in elements
  const int64_t* query_ids;        // (B,)
  const int64_t* negative_ids;     // (K,)
  const int64_t* query_labels;     // (B,)
  const int64_t* negative_labels;  // (K,)
  bool same_label;                 // true: keep equal labels instead of dropping them
  const int64_t* lower;            // (B,) sort keys, keep those >= lower
  const int64_t* upper;            // (B,) sort keys, keep those <= upper
  const int64_t* num_rows;         // one number, how many rows of keys are valid; the others are never read

  // Whether pools may differ between queries, so that each (query, column) pair must be checked.
  bool by_pair() const { return pair_mask || query_ids || query_labels || lower || upper; }
};

}  // namespace negmine::cuda
