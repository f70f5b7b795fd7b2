// The memory of one thread: all arrays of a Workspace in one aligned allocation, and additional buffers of an op.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

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

// A cache of freed allocations of this thread, because malloc would dominate the time of small calls. It has a few
// allocations of each power of two up to kMost bytes, at most 4 MiB for each thread.
class SpareBlocks {
 public:
  static constexpr size_t kMost = size_t{1} << 20;

  // The size of the allocation for a number of requested bytes, at least 64.
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

  // Returns false if there is no room.
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
#if !defined(__SANITIZE_ADDRESS__)  // the address sanitizer must see every block freed
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

// Workspaces of `blocks` blocks that are processed together for a range of the queue.
class Scratch {
 public:
  Scratch(const Matrix& query, const Matrix& negative_keys, int64_t D, const Pool& pool, int64_t blocks = 1)
      : Scratch(kernels(query.dtype, negative_keys.dtype).splits, query, negative_keys, D, blocks) {
    if (!pool.guided()) return;
    guide_.reset(new Scratch(kernels(query.dtype, negative_keys.dtype).splits, pool.guide_query, pool.guide_keys,
                             pool.guide_width, blocks));
    for (int64_t i = 0; i < blocks; ++i) {
      guide_->workspaces[i].index = workspaces[i].index;
      workspaces[i].guide = &guide_->workspaces[i];
    }
  }

  const Workspace& workspace() const { return workspaces[0]; }

  std::vector<Workspace> workspaces;

 private:
  // tiles: whether the kernels multiply in parts.
  Scratch(bool tiles, const Matrix& query, const Matrix& negative_keys, int64_t D, int64_t blocks)
      : workspaces(blocks) {
    const bool pairs = query.dtype == Dtype::kBFloat16 && negative_keys.dtype == Dtype::kBFloat16;
    constexpr int64_t kTile = 16;  // D is rounded up to whole tiles in what tiles read (simd/tiles.h)
    const int64_t part = tiles ? 3 * room_for_part(pairs ? kLanes : std::max(D, kLanes)) : 0;
    const int64_t turned = !tiles ? 0 : (pairs ? 1 : 3) * room_for_part(kChunk) * room_for_mean(D);
    const int64_t weight_parts = tiles && !pairs ? 3 * room_for_part(kChunk) * kLanes : 0;
    const bool in_place = negative_keys.dtype == Dtype::kFloat32 || negative_keys.dtype == Dtype::kCodes;
    const int64_t widened = in_place ? 0 : kChunk * (D + kTile);
    Room room;
    const auto lay_out = [&] {
      Workspace chunk;
      room.begin();
      room.take(chunk.tile, kChunk * kLanes);
      room.take(chunk.scores, kChunk * kLanes);
      for (float*& weights : chunk.weights) room.take(weights, kChunk / 2 * kLanes);
      room.take(chunk.rows, kChunk + 6);
      room.take(chunk.mean_rows, kChunk);
      room.take(chunk.index, kChunk);
      room.take(chunk.widened, widened);
      room.take(chunk.key_parts, kChunk * part);
      room.take(chunk.turned, turned);
      room.take(chunk.weight_parts, weight_parts);
      room.take(chunk.rows_in_parts, kChunk);
      room.take(chunk.padded, negative_keys.dtype == Dtype::kBFloat16 ? kChunk * room_for_mean(D) : 0);
      room.take(chunk.row, D);
      room.take(chunk.zeros, std::max(D, kLanes));
      for (Workspace& workspace : workspaces) {
        workspace = chunk;
        room.take(workspace.q_t, (D + kTile) * kLanes);
        room.take(workspace.query_parts, part * kLanes);
        room.take(workspace.lanes_in_parts, kLanes);
        room.take(workspace.lane_words, kLaneWords * kLanes);
        room.take(workspace.id_filter, kFilterWords);
        room.take(workspace.label_filter, kFilterWords);
      }
    };
    lay_out();  // only measures the size
    memory_ = make_buffer<char>(room.size);
    room.memory = memory_.get();
    lay_out();
  }

  // Consecutive arrays, each aligned to cache lines.
  struct Room {
    char* memory = nullptr;
    int64_t size = 0;

    void begin() { size = 0; }

    template <class T>
    void take(T*& array, int64_t count) {
      array = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + size);
      size += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    }
  };

  Buffer<char> memory_;
  std::unique_ptr<Scratch> guide_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace negmine::cpu
