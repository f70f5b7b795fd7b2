// Philox4x32-10, a counter-based generator: four random words are a function of four counter words and two key words,
// so a draw does not depend on the launch, the batch split or the backend. kernels/README.md defines the counter and
// the key. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (the Random123 constants).
#pragma once

#include <cstdint>

namespace negmine::cuda {

struct Philox {
  uint32_t word[4];
};

__device__ inline Philox philox4x32_10(Philox counter, uint32_t seed, uint32_t step) {
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c[0]) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
    counter = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ seed, static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ step, static_cast<uint32_t>(p0)};
    seed += 0x9E3779B9u;
    step += 0xBB67AE85u;
  }
  return counter;
}

// Maps a random word to an integer in [0, bound), or to 0 if bound is 0.
__device__ inline int64_t below(uint32_t word, int64_t bound) {
  return static_cast<int64_t>((word * static_cast<uint64_t>(bound)) >> 32);
}

}  // namespace negmine::cuda
