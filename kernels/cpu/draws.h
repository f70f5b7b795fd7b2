// The random draws of synthetic negatives: kernels/README.md, section "Draws".
//
// Slots [0, pairs) mix two of a query's hard negatives, slots [pairs, pairs + with_query) mix the query with one. A
// draw depends only on (seed, step, row_offset + b, slot). draw() is compiled once, without fused multiply-add, so that
// the coefficients have the same bits on every instruction set and in the PyTorch reference.
#pragma once
#include <cstdint>

namespace negmine::cpu {

struct Draws {
  const int64_t* hard_index = nullptr;  // (B, N) mining order, -1 padded at the end
  int64_t N = 0;
  int64_t pairs = 0, with_query = 0;
  double pair_low = 0, pair_high = 1, query_low = 0, query_high = 1;
  bool distinct = true;
  const float* quantiles = nullptr;  // (4097,) or absent
  uint32_t seed = 0, step = 0;
  int64_t row_offset = 0;

  int64_t S() const { return pairs + with_query; }
};

// Draws as separate arrays instead of an array of structs, so that they can be written by vector instructions.
struct Drawn {
  int64_t *first, *second;  // rows of the queue; first = -1: the query itself
  float* coefficient;       // of the first parent
};

// n_b: the number of entries in query b's row of hard_index that are not -1.
int64_t count_hard(const Draws& draws, int64_t b);

// Slots [slot, slot + count) of query b, n_b > 0. words (3, count): the random words of kernels/cpu/philox.h for the
// row row_offset + b and these slots, with the key (seed, step).
void draw(const Draws& draws, int64_t b, int64_t slot, int64_t count, int64_t n_b, const uint32_t* const words[3],
          const Drawn& out);

}  // namespace negmine::cpu
