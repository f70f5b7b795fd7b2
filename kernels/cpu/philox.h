// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//
// Four 32-bit words from a 128-bit counter and a 64-bit key. Zero counter and key give 6627e8d5 e169c58d bc57ac4c
// 9b00dbd8.
#pragma once
#include <cstdint>

namespace negmine::cpu {

// The first three random words of the counters (row low, row high, slot, 0) for kCount slots from `first` on. Each
// round is a loop over all of them, which compilers vectorise.
template <int kCount>
static inline void philox4x32_10(uint64_t row, uint32_t first, uint32_t key0, uint32_t key1,
                                 uint32_t (&word)[3][kCount]) {
  uint32_t (&c0)[kCount] = word[0], (&c1)[kCount] = word[1], (&c2)[kCount] = word[2];
  uint32_t c3[kCount];
  for (int i = 0; i < kCount; ++i) {
    c0[i] = static_cast<uint32_t>(row);
    c1[i] = static_cast<uint32_t>(row >> 32);
    c2[i] = first + static_cast<uint32_t>(i);
    c3[i] = 0;
  }
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCount; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0[i];
      const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ key0;
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ key1;
      c1[i] = static_cast<uint32_t>(p1);
      c3[i] = static_cast<uint32_t>(p0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace negmine::cpu
