// kernels/cuda/ptx.cuh for the CPU: each function does, lane by lane, what its instruction is documented to do. Copies
// arrive as late as possible, when they are waited for, so that a missing wait is noticed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels/cuda/storage.h"

namespace negmine::cuda {

inline char* shared_memory() { return emulator::shared.get(); }

using SharedAddress = char*;

inline SharedAddress shared_address(void* shared) { return static_cast<char*>(shared); }

inline SharedAddress flipped(SharedAddress address, uint32_t bits) {
  return reinterpret_cast<SharedAddress>(reinterpret_cast<uintptr_t>(address) ^ bits);
}

inline float half_of(uint32_t word, int half, Storage storage) {
  const auto bits = static_cast<unsigned short>(word >> (16 * half));
  return storage == Storage::kBFloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                       : __half2float(__ushort_as_half(bits));
}

inline int64_t terms = 0;  // number of terms that products have added so far

// d[i] at D[g + 8 * (i / 2)][2t + i % 2] += the sum over k of A[.][k] B[k][.], in the order of k.
template <Storage kStorage>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Registers {
    uint32_t a[4], b[2];
  };
  const auto lanes = emulator::exchange(Registers{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned g = emulator::lane() / 4, t = emulator::lane() % 4;
  terms += 4 * 16;
  for (int i = 0; i < 4; ++i) {
    const unsigned row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned pair = k / 2 % 4, half = k % 2;  // the lane of its group that holds k, and the half of the word
      const uint32_t of_a = lanes[row % 8 * 4 + pair].a[row / 8 + k / 8 * 2];
      const uint32_t of_b = lanes[column * 4 + pair].b[k / 8];
      d[i] += half_of(of_a, half, kStorage) * half_of(of_b, half, kStorage);
    }
  }
}

inline void load_matrices(uint32_t (&fragment)[4], SharedAddress row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("a matrix row is not aligned to 16 bytes");
  const auto rows = emulator::exchange(row);
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&fragment[i], rows[8 * i + emulator::lane() / 4] + 4 * (emulator::lane() % 4), 4);
  }
}

inline void load_transposed(uint32_t (&fragment)[4], SharedAddress row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("a matrix row is not aligned to 16 bytes");
  const auto rows = emulator::exchange(row);
  const unsigned g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      std::memcpy(reinterpret_cast<char*>(&fragment[i]) + 2 * half, rows[8 * i + 2 * t + half] + 2 * g, 2);
    }
  }
}

template <Storage kStorage>
uint32_t pair_of(float low, float high) {
  const auto bits = [](float value) -> uint32_t {
    return kStorage == Storage::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16(value))
                                          : __half_as_ushort(__float2half(value));
  };
  return bits(high) << 16 | bits(low);
}

inline float power_of_2(float exponent) { return std::exp2(exponent); }

inline void copy_async(SharedAddress to, const char* global, bool present) {
  const uintptr_t places = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(global);
  if (places % 16 != 0) emulator::fail("a copy of 16 bytes is not aligned to 16 bytes");
  emulator::fibers[emulator::current].groups.back().push_back({to, present ? global : nullptr});
  std::memset(to, 0xFF, 16);  // NaN until it arrives
}

inline void end_copies() { emulator::fibers[emulator::current].groups.emplace_back(); }

template <int kNewest>
void wait_for_copies() {
  auto& groups = emulator::fibers[emulator::current].groups;
  while (groups.size() > kNewest + 1) {
    if (!groups.front().empty()) emulator::hide(true);
    for (const emulator::Copy& copy : groups.front()) {
      if (copy.global) {
        std::memcpy(copy.shared, copy.global, 16);
      } else {
        std::memset(copy.shared, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

inline void append_where_reaches(float cut, float score, int index, char* base, uint32_t& at) {
  if (!(score >= cut)) return;
  *reinterpret_cast<uint2*>(base + at) = make_uint2(__float_as_uint(score), static_cast<uint32_t>(index));
  at += 8;
}

template <int kCuts>
void append_where_odd(const float (&cut)[kCuts], float score, int index, char* base, uint32_t& at,
                      int (&counted)[kCuts / 2]) {
  bool odd = false;
  for (int i = 0; i < kCuts; ++i) {
    odd ^= score >= cut[i];
    if (i % 2 == 0) counted[i / 2] += odd;
  }
  append_where_reaches(odd ? score : NAN, score, index, base, at);
}

}  // namespace negmine::cuda
