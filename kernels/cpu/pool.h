// The pool: the optional arrays of kernels/README.md, section "Pool". A null pointer is an absent array.
//
// Columns are removed by masks (negative_mask, equal ids, equal labels, a guide) and by bounds (lower, upper). A guide
// is a second score, guide_query . guide_keys, which hides a column if it is above the query's limit. Bounds are sort
// keys (sort_key.h), so a window is exact even if scores tie. The bias is added to logits that are summed, but does not
// affect ranks, filters and mining.
#pragma once
#include <cstdint>

#include "kernels/cpu/matrix.h"

namespace negmine::cpu {

struct Pool {
  const uint8_t* negative_mask = nullptr;    // (K,) or (B, K), nonzero = usable
  int64_t mask_row_stride = 0;               // of a (B, K) mask, in elements
  bool mask_per_query = false;               // true: negative_mask is (B, K)
  const int64_t* query_ids = nullptr;        // (B,)
  const int64_t* negative_ids = nullptr;     // (K,)
  const int64_t* query_labels = nullptr;     // (B,)
  const int64_t* negative_labels = nullptr;  // (K,)
  bool same_label = false;                   // true: keep equal labels instead of dropping them
  const int64_t* lower = nullptr;            // (B,) sort keys, keep those >= lower
  const int64_t* upper = nullptr;            // (B,) sort keys, keep those <= upper
  const float* bias = nullptr;               // (K,) added to scale * score
  Matrix guide_query, guide_keys;            // (B, G), (K, G)
  int64_t guide_width = 0;                   // G
  const float* guide_limit = nullptr;        // (B,)

  bool bounded() const { return lower != nullptr || upper != nullptr; }
  bool guided() const { return guide_limit != nullptr; }
};

}  // namespace negmine::cpu
