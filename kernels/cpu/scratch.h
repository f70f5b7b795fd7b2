// The memory one thread works in: every array of a Workspace, cut from one aligned allocation, and room an op asks for
// besides.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "kernels/cpu/dispatch.h"

namespace negmine::cpu {

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(size_t bytes)
      : sentence_("negmine: out of memory: a thread's working memory takes " + std::to_string(bytes) + " bytes") {}
  const char* what() const noexcept override { return sentence_.c_str(); }

 private:
  std::string sentence_;
};

// Blocks that this thread has freed, to be used again: a small call would otherwise spend its time in malloc. A few of
// each power of two of bytes up to kMost, so a thread keeps at most 4 MiB.
class SpareBlocks {
 public:
  static constexpr size_t kMost = size_t{1} << 20;

  // Bytes that a block has for so many asked for: 64 or more.
  static size_t bytes_of(size_t asked) {
    return asked > kMost ? (asked + 63) / 64 * 64 : std::bit_ceil(std::max<size_t>(asked, 64));
  }

  void* take(size_t bytes) {
    if (bytes > kMost) return nullptr;
    for (void*& block : blocks_[std::bit_width(bytes)]) {
      if (block != nullptr) return std::exchange(block, nullptr);
    }
    return nullptr;
  }

  // False where there is no room.
  bool keep(void* spare, size_t bytes) {
    if (bytes > kMost) return false;
    for (void*& block : blocks_[std::bit_width(bytes)]) {
      if (block != nullptr) continue;
      block = spare;
      return true;
    }
    return false;
  }

  ~SpareBlocks() {
    for (auto& blocks : blocks_) {
      for (void* block : blocks) std::free(block);
    }
  }

  static SpareBlocks& of_this_thread() {
    static thread_local SpareBlocks spare;
    return spare;
  }

 private:
  void* blocks_[std::bit_width(kMost) + 1][2] = {};
};

struct Free {
  size_t bytes = 0;

  void operator()(void* block) const {
#if !defined(__SANITIZE_ADDRESS__)  // which is to see every block freed
    if (SpareBlocks::of_this_thread().keep(block, bytes)) return;
#endif
    std::free(block);
  }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> make_buffer(int64_t count) {
  size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T);
  void* block = nullptr;
#if !defined(__SANITIZE_ADDRESS__)
  bytes = SpareBlocks::bytes_of(bytes);
  block = SpareBlocks::of_this_thread().take(bytes);
#else
  bytes = (bytes + 63) / 64 * 64;
#endif
  if (block == nullptr) block = std::aligned_alloc(64, bytes);
  if (block == nullptr) throw OutOfMemory(bytes);
  return Buffer<T>(static_cast<T*>(block), Free{bytes});
}

class Scratch {
 public:
  Scratch(const Matrix& negative_keys, int64_t D) {
    constexpr int64_t kTile = 16;  // D is rounded up to whole tiles in what tiles read (simd/tiles.h)
    const int64_t widened = negative_keys.dtype == Dtype::kFloat32 ? 0 : kChunk * (D + kTile);
    const int64_t parts = kernels().splits ? 3 * room_for_part(std::max(D, kLanes)) : 0;
    const int64_t weights = kernels().splits ? 3 * room_for_part(kChunk) * kLanes : 0;
    floats_ = make_buffer<float>((D + kTile + parts) * kLanes + weights + (2 * kLanes + parts) * kChunk + widened + D +
                                 std::max(D, kLanes));
    words_ = make_buffer<int32_t>(kLaneWords * kLanes + kChunk + kLanes);
    index_ = make_buffer<int64_t>(kChunk);
    rows_ = make_buffer<const float*>(kChunk + 6);
    padded_ = make_buffer<uint16_t>(negative_keys.dtype == Dtype::kBFloat16 && D % 2 != 0 ? kChunk * (D + 1) : 0);
    float* p = floats_.get();
    workspace.q_t = p;
    workspace.query_parts = p += (D + kTile) * kLanes;
    workspace.key_parts = p += parts * kLanes;
    workspace.weight_parts = p += parts * kChunk;
    workspace.tile = p += weights;
    workspace.scores = p += kChunk * kLanes;
    workspace.widened = p += kChunk * kLanes;
    workspace.row = p += widened;
    workspace.zeros = p += D;
    workspace.rows = rows_.get();
    workspace.padded = padded_.get();
    workspace.index = index_.get();
    workspace.lane_words = words_.get();
    workspace.in_parts = words_.get() + kLaneWords * kLanes;
  }

  Workspace workspace;

 private:
  Buffer<float> floats_;
  Buffer<int32_t> words_;
  Buffer<int64_t> index_;
  Buffer<const float*> rows_;
  Buffer<uint16_t> padded_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace negmine::cpu
