// kernels/cuda/ptx_sm90.cuh for the CPU. A product is computed when it is waited for. Its operands in shared memory and
// registers must not have changed since it was started, and until then its result is NaN. The boxes of a round arrive
// when a thread waits for the end of the round; until then their places hold NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <type_traits>
#include <utility>
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
  std::vector<float (*)[4]> results;  // of each chunk
  bool adds, follows;                 // on its own result
  std::vector<float> before;
  std::vector<uint32_t> left;   // of rows 16 w + g + {0, 8}, all 16 elements in words of two
  uint64_t left_described, b;   // 0: it is in registers
  bool transposed;              // b describes rows of the sum's terms
  std::vector<uint32_t> right;  // of rows, or if transposed columns, 8 j + 2t + {0, 1}
  const uint32_t* registers;    // of the left, if they are
  uint32_t of_registers[4] = {};
  Storage storage;
};

struct Products {
  std::vector<std::vector<Product>> groups{{}};  // the last is open
  bool may_begin = false;
};

// The products of each thread; and those that the warps of each warpgroup started, which must be the same in the same
// order.
inline std::map<unsigned, Products> products;
inline std::map<unsigned, std::vector<std::pair<uint64_t, uint64_t>>> began;
inline std::map<unsigned, size_t> began_by;

inline void forget_products() {
  for (const auto& [thread, own] : products) {
    if (own.groups.size() > 1 || !own.groups[0].empty())
      emulator::fail("a block ends before its products were waited for");
  }
  products.clear(), began.clear(), began_by.clear();
}

// A decoded matrix descriptor, with offsets in bytes. Only canonical layouts with a swizzle of 128 bytes are allowed,
// which begin where the pattern of 8 rows of 128 bytes begins.
struct Described {
  uint32_t start, leading, stride;

  explicit Described(uint64_t bits)
      : start((bits & 0x3FFF) << 4), leading((bits >> 16 & 0x3FFF) << 4), stride((bits >> 32 & 0x3FFF) << 4) {
    constexpr uint64_t kKnown = 0x3FFF | uint64_t{0x3FFF} << 16 | uint64_t{0x3FFF} << 32 | uint64_t{1} << 62;
    if (bits & ~kKnown || bits >> 62 != 1) emulator::fail("a matrix descriptor is not one of a swizzle of 128 bytes");
    if (start & 0x380) emulator::fail("a matrix descriptor begins within the pattern of its swizzle");
  }

  // The element at this offset from the start, before the swizzle.
  uint16_t element(uint32_t offset) const {
    uint32_t address = start + offset;
    address ^= (address >> 7 & 7) << 4;
    if (address < kWindow || address + 2 > kWindow + emulator::shared_bytes) {
      emulator::fail("a matrix descriptor leads out of shared memory");
    }
    uint16_t bits;
    std::memcpy(&bits, emulator::shared.get() + (address - kWindow), 2);
    return bits;
  }
};

// Appends all 16 elements of a row, two in each word: K-major, ((8, m), (T, 2k)) : ((8 T, SBO), (1, T)).
inline void find_row(std::vector<uint32_t>& words, const Described& matrix, unsigned row) {
  if (matrix.leading != 16) emulator::fail("a matrix descriptor has a leading offset that is not used");
  const uint32_t first = row / 8 * matrix.stride + row % 8 * 128;
  for (unsigned k = 0; k < 16; k += 2) {
    words.push_back(matrix.element(first + 2 * k) | uint32_t{matrix.element(first + 2 * k + 2)} << 16);
  }
}

// The same for a column: MN-major, ((T, 8, m), (8, k)) : ((1, T, LBO), (8 T, SBO)).
inline void find_column(std::vector<uint32_t>& words, const Described& matrix, unsigned column) {
  const bool whole = matrix.start % 1024 == 0 && matrix.stride % 1024 == 0 && matrix.leading % 1024 == 0;
  if (!whole || matrix.stride == 0 || matrix.leading == 0) {
    emulator::fail("a descriptor of rows is not one of whole patterns of its swizzle");
  }
  const auto offset = [&](unsigned k) {
    return column % 64 * 2 + column / 64 * matrix.leading + k % 8 * 128 + k / 8 * matrix.stride;
  };
  for (unsigned k = 0; k < 16; k += 2) {
    words.push_back(matrix.element(offset(k)) | uint32_t{matrix.element(offset(k + 1))} << 16);
  }
}

inline std::vector<uint32_t> find_left(uint64_t described) {
  std::vector<uint32_t> words;
  const unsigned row = emulator::current % 128 / 32 * 16 + emulator::lane() / 4;
  for (unsigned half = 0; half < 2; ++half) find_row(words, Described(described), row + 8 * half);
  return words;
}

inline std::vector<uint32_t> find_right(uint64_t described, size_t chunks, bool transposed) {
  std::vector<uint32_t> words;
  for (unsigned j = 0; j < 8 * chunks; ++j) {
    const auto find = transposed ? find_column : find_row;
    find(words, Described(described), 8 * (j / 2) + 2 * (emulator::lane() % 4) + j % 2);
  }
  return words;
}

struct Box {
  SharedAddress to;
  const CUtensorMap* map;
  int row, column;
};

struct Barrier {
  unsigned round = 0;
  int64_t expected = -1;  // bytes of this round; -1: not known yet
  std::vector<Box> boxes{};
};

inline std::map<SharedAddress, Barrier> barriers;
inline int64_t boxes = 0;  // copied so far

inline Barrier& barrier_at(SharedAddress place) {
  const auto found = barriers.find(place);
  if (found == barriers.end()) emulator::fail("a barrier is used that was not started");
  return found->second;
}

inline void forget_barriers() {
  if (!barriers.empty()) emulator::fail("a block ends before its barriers");
}

inline void start_barrier(SharedAddress place) {
  emulator::at_end_of_block.insert(forget_barriers);
  if (reinterpret_cast<uintptr_t>(place) % 8 != 0) emulator::fail("a barrier is not aligned to 8 bytes");
  if (window_address(place) + 8 > kWindow + emulator::shared_bytes) emulator::fail("a barrier is not in shared memory");
  if (!barriers.emplace(place, Barrier()).second) emulator::fail("a barrier is started that was not ended");
}

inline void end_barrier(SharedAddress place) {
  if (barrier_at(place).expected >= 0) emulator::fail("a barrier ends within a round");
  barriers.erase(place);
}

inline void expect_bytes(SharedAddress place, int bytes) {
  Barrier& barrier = barrier_at(place);
  if (barrier.expected >= 0) emulator::fail("a round of a barrier begins within another");
  barrier.expected = bytes;
}

inline size_t bytes_of(const CUtensorMap& map) { return size_t{2} * map.box_width * map.box_height; }

inline void copy_box(SharedAddress to, const CUtensorMap* map, int row, int column, SharedAddress place) {
  if (window_address(to) % 1024 != 0) emulator::fail("a box is not copied to where its swizzle begins");
  if (emulator::hidden > 0) emulator::fail("a box is copied over what was written without show_to_products");
  if (window_address(to) + bytes_of(*map) > kWindow + emulator::shared_bytes) {
    emulator::fail("a box does not fit in shared memory");
  }
  barrier_at(place).boxes.push_back({to, map, row, column});
  ++boxes;
  std::memset(to, 0xFF, bytes_of(*map));
}

inline void arrive(const Box& box) {
  const CUtensorMap& map = *box.map;
  for (unsigned r = 0; r < map.box_height; ++r) {
    for (unsigned c = 0; c < map.box_width; ++c) {
      const uint64_t row = box.row + r, column = box.column + c;
      uint16_t element = 0;
      if (row < map.height && column < map.width) std::memcpy(&element, map.base + row * map.stride + 2 * column, 2);
      uint32_t address = window_address(box.to) + 128 * r + 2 * c;
      address ^= (address >> 7 & 7) << 4;
      std::memcpy(emulator::shared.get() + (address - kWindow), &element, 2);
    }
  }
}

// Fibers run in order, so a thread waits after the round has begun, or would wait for ever.
inline void wait_for_round(SharedAddress place, bool odd) {
  Barrier& barrier = barrier_at(place);
  if (barrier.round % 2 != odd) return;
  int64_t bytes = 0;
  for (const Box& box : barrier.boxes) bytes += bytes_of(*box.map);
  if (bytes != barrier.expected) emulator::fail("a round of a barrier does not get the bytes it expects: a deadlock");
  for (const Box& box : barrier.boxes) arrive(box);
  barrier = {barrier.round + 1};
}

inline void begin_products() {
  emulator::at_end_of_block.insert(forget_products);
  products[emulator::current].may_begin = true;
}

template <int kChunks, int kSixteens, int kCount>
void begin_sums(float (&)[kChunks][kSixteens][4][4], int, uint32_t (&)[kCount][4]) {
  begin_products();
}

template <Storage kStorage, int kChunks, int kSixteens, class A>
void begin_product(float (&d)[kChunks][kSixteens][4][4], int m, const A& a, uint64_t b, bool adds, bool transposed) {
  Product product = {{},      adds, false,   {}, {}, 0, b, transposed, find_right(b, kChunks, transposed),
                     nullptr, {},   kStorage};
  if constexpr (std::is_integral_v<A>) {
    __syncwarp();
    product.left_described = a;
    product.left = find_left(a);
  } else {
    struct Fragment {
      uint32_t a[4];
    };
    product.registers = a;
    std::copy_n(a, 4, product.of_registers);
    const auto lanes = emulator::exchange(Fragment{{a[0], a[1], a[2], a[3]}});
    for (unsigned word = 0; word < 16; ++word) {  // elements 2 (word % 8) and the next of row g + 8 (word / 8)
      product.left.push_back(lanes[emulator::lane() / 4 * 4 + word % 4].a[word / 8 + word % 8 / 4 * 2]);
    }
  }
  Products& own = products[emulator::current];
  if (!own.may_begin) emulator::fail("a product begins without begin_products");
  if (emulator::hidden > 0) emulator::fail("a product reads what was written without show_to_products");
  auto& of_group = began[emulator::current / 128];
  const size_t place = began_by[emulator::current]++;
  if (place == of_group.size()) of_group.emplace_back(product.left_described, b);
  if (of_group[place] != std::pair(product.left_described, b)) {
    emulator::fail("the warps of a warpgroup begin different products");
  }
  for (const auto& group : own.groups) {
    for (const Product& earlier : group) product.follows |= earlier.results[0] == d[0][m];
  }
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    product.results.push_back(d[chunk][m]);
    product.before.insert(product.before.end(), &d[chunk][m][0][0], &d[chunk][m][0][0] + 16);
    std::fill_n(&d[chunk][m][0][0], 16, NAN);
  }
  own.groups.back().push_back(product);
}

template <Storage kStorage, bool kAdds, int kChunks, int kSixteens, class A>
void multiply_later(float (&d)[kChunks][kSixteens][4][4], int m, const A& a, uint64_t b) {
  begin_product<kStorage>(d, m, a, b, kAdds, false);
}

template <Storage kStorage, int kChunks, int kSixteens>
void add_rows_later(float (&d)[kChunks][kSixteens][4][4], int m, const uint32_t (&a)[4], uint64_t b) {
  begin_product<kStorage>(d, m, a, b, true, true);
}

inline void compute(const Product& product) {
  for (size_t chunk = 0; chunk < product.results.size(); ++chunk) {
    float* result = &product.results[chunk][0][0];
    if (!product.follows) std::copy_n(&product.before[16 * chunk], 16, result);
    for (unsigned at = 0; at < 16; ++at) {
      const unsigned n = at / 4, i = at % 4;
      const uint32_t *left = &product.left[i / 2 * 8], *right = &product.right[8 * (8 * chunk + 2 * n + i % 2)];
      float sum = product.adds ? result[at] : 0.0f;
      for (unsigned k = 0; k < 16; ++k) {
        sum += half_of(left[k / 2], k % 2, product.storage) * half_of(right[k / 2], k % 2, product.storage);
      }
      result[at] = sum;
    }
  }
}

inline void end_products() { products[emulator::current].groups.emplace_back(); }

// Waits for all groups that have ended except the newest ones. named(result): whether the caller waits for this result.
template <class Named>
void wait_for_groups(size_t newest, Named named) {
  __syncwarp();
  products[emulator::current].may_begin = false;
  auto& groups = products[emulator::current].groups;
  if (!groups.back().empty()) emulator::fail("products are waited for before their group has ended");
  while (groups.size() > newest + 1) {
    for (const Product& product : groups.front()) {
      for (const auto result : product.results) {
        if (!named(&result[0][0])) emulator::fail("the result of a product is not waited for");
      }
      const bool same = (product.left_described == 0 || find_left(product.left_described) == product.left) &&
                        find_right(product.b, product.results.size(), product.transposed) == product.right;
      if (!same) emulator::fail("shared memory changed under a product");
      if (product.registers && !std::equal(product.of_registers, product.of_registers + 4, product.registers)) {
        emulator::fail("registers of a product changed before it was waited for");
      }
      compute(product);
    }
    groups.erase(groups.begin());
  }
}

template <int kNewest, int kChunks, int kSixteens>
void wait_for_products(float (&d)[kChunks][kSixteens][4][4], int m) {
  wait_for_groups(kNewest, [&](const float* result) {
    bool is = false;
    for (int chunk = 0; chunk < kChunks; ++chunk) is |= result == &d[chunk][m][0][0];
    return is;
  });
}

template <int kChunks, int kSixteens>
void wait_for_products(float (&d)[kChunks][kSixteens][4][4]) {
  const float* first = &d[0][0][0][0];
  wait_for_groups(0, [&](const float* result) { return result >= first && result < first + sizeof d / sizeof(float); });
}

}  // namespace negmine::cuda
