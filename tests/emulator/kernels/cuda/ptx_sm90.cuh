// kernels/cuda/ptx_sm90.cuh on the CPU. A product is computed when it is waited for, of what its descriptor then finds
// in shared memory, and must find what it found when it began; until then its result is NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

constexpr uint32_t kWindow = 1024;  // where the shared memory of a block begins

inline uint32_t window_address(SharedAddress shared) {
  return kWindow + static_cast<uint32_t>(shared - emulator::shared.get());
}

inline void show_to_products() { emulator::hide(false); }

struct Product {
  float (*left)[4], (*right)[4];
  bool adds, follows;  // on its own result
  float before[2][4][4];
  emulator::Offers<uint32_t[4]> a;
  uint64_t b;
  std::vector<uint32_t> found;
  Storage storage;
};

struct Products {
  std::vector<Product> begun;
  bool may_begin = false;
};

// By thread; and what the four warps of a warpgroup began, which must be the same products in the same order.
inline std::map<unsigned, Products> products;
inline std::map<unsigned, std::vector<uint64_t>> began;
inline std::map<unsigned, size_t> began_by;

inline void forget_products() {
  for (const auto& [thread, own] : products) {
    if (!own.begun.empty()) emulator::fail("a block ends before its products were waited for");
  }
  products.clear(), began.clear(), began_by.clear();
}

// Of the rows of B that this lane multiplies, 8 j + 2t + {0, 1}, all 16 elements, in words of two.
inline std::vector<uint32_t> find_keys(uint64_t b) {
  constexpr uint64_t kKnown = 0x3FFF | uint64_t{0x3FFF} << 16 | uint64_t{0x3FFF} << 32 | uint64_t{1} << 62;
  if (b & ~kKnown || b >> 62 != 1) emulator::fail("a matrix descriptor is not one of a swizzle of 128 bytes");
  const uint32_t start = (b & 0x3FFF) << 4, eight_rows = (b >> 32 & 0x3FFF) << 4;
  std::vector<uint32_t> words;
  for (unsigned j = 0; j < 16; ++j) {
    const unsigned row = 8 * (j / 2) + 2 * (emulator::lane() % 4) + j % 2;
    for (unsigned word = 0; word < 8; ++word) {
      uint32_t address = start + row / 8 * eight_rows + row % 8 * 128 + 4 * word;
      address ^= (address >> 7 & 7) << 4;
      if (address < kWindow || address + 4 > kWindow + emulator::shared_bytes) {
        emulator::fail("a matrix descriptor leads out of shared memory");
      }
      uint32_t found;
      std::memcpy(&found, emulator::shared.get() + (address - kWindow), 4);
      words.push_back(found);
    }
  }
  return words;
}

inline void begin_products() {
  emulator::at_end_of_block = forget_products;
  products[emulator::current].may_begin = true;
}

template <Storage kStorage, bool kAdds>
void multiply_later(float (&left)[4][4], float (&right)[4][4], const uint32_t (&a)[4], uint64_t b) {
  struct Fragment {
    uint32_t a[4];
  };
  const auto lanes = emulator::exchange(Fragment{{a[0], a[1], a[2], a[3]}});
  Products& own = products[emulator::current];
  if (!own.may_begin) emulator::fail("a product begins without begin_products");
  if (emulator::hidden > 0) emulator::fail("a product reads what was written without show_to_products");
  auto& of_group = began[emulator::current / 128];
  const size_t place = began_by[emulator::current]++;
  if (place == of_group.size()) of_group.push_back(b);
  if (of_group[place] != b) emulator::fail("the warps of a warpgroup begin different products");

  Product product = {left, right, kAdds, false, {}, {}, b, find_keys(b), kStorage};
  for (const Product& earlier : own.begun) product.follows |= earlier.left == left;
  std::memcpy(product.before[0], left, sizeof left);
  std::memcpy(product.before[1], right, sizeof right);
  for (unsigned lane = 0; lane < emulator::kWarp; ++lane) std::memcpy(product.a.of[lane], lanes[lane].a, sizeof a);
  own.begun.push_back(product);
  std::fill_n(&left[0][0], 16, NAN);
  std::fill_n(&right[0][0], 16, NAN);
}

inline void wait_for_products(float (&d)[2][2][4][4]) {
  __syncwarp();
  Products& own = products[emulator::current];
  for (const Product& product : own.begun) {
    if (find_keys(product.b) != product.found) emulator::fail("shared memory changed under a product");
    const unsigned g = emulator::lane() / 4;
    for (int half = 0; half < 2; ++half) {
      float (*result)[4] = half ? product.right : product.left;
      if (&result[0][0] < &d[0][0][0][0] || &result[0][0] >= &d[0][0][0][0] + 64) {
        emulator::fail("the result of a product is not waited for");
      }
      if (!product.follows) std::memcpy(result, product.before[half], sizeof product.before[half]);
      for (unsigned n = 0; n < 4; ++n) {
        for (unsigned i = 0; i < 4; ++i) {
          float sum = product.adds ? result[n][i] : 0.0f;
          const uint32_t* key = &product.found[8 * (8 * half + 2 * n + i % 2)];
          for (unsigned k = 0; k < 16; ++k) {
            const uint32_t of_a = product.a[g * 4 + k / 2 % 4][i / 2 + k / 8 * 2];
            sum += half_of(of_a, k % 2, product.storage) * half_of(key[k / 2], k % 2, product.storage);
          }
          result[n][i] = sum;
        }
      }
    }
  }
  own = {};
}

}  // namespace negmine::cuda
