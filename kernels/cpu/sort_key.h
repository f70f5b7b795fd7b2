// The sort key of a column as one int64: by score, then by index with the lower index first; larger = harder.
//
//     sort_key = (ordered(score) << 32) | (0xFFFFFFFF - index)
//
// The rule is stated in kernels/README.md; negmine/ops/sort_key.py is the same in PyTorch. Functions are static so that
// a copy compiled for one instruction set can never be linked into code for another.
#pragma once
#include <cstdint>
#include <cstring>

namespace negmine::cpu {

constexpr int64_t kNowhere = INT64_MIN;  // the sort key past the end of a pool

static inline int64_t pack_sort_key(float score, int64_t index) {
  const float positive_zero = score + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &positive_zero, sizeof bits);
  const int32_t ordered = bits < 0 ? bits ^ 0x7FFFFFFF : bits;
  const uint64_t high = static_cast<uint64_t>(static_cast<uint32_t>(ordered)) << 32;
  return static_cast<int64_t>(high | (0xFFFFFFFFull - static_cast<uint64_t>(index)));
}

static inline float sort_key_score(int64_t sort_key) {
  const int32_t ordered = static_cast<int32_t>(sort_key >> 32);
  const int32_t bits = ordered < 0 ? ordered ^ 0x7FFFFFFF : ordered;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

static inline int64_t sort_key_index(int64_t sort_key) {
  return static_cast<int64_t>(0xFFFFFFFFull - (static_cast<uint64_t>(sort_key) & 0xFFFFFFFFull));
}

}  // namespace negmine::cpu
