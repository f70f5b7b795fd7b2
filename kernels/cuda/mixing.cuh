// Makes a synthetic negative inside a kernel: draws the parents and the coefficient from the counter (row, slot), and
// mixes the elements of the parents. Each lane always has the same elements and adds them in the same order, whether it
// loads four elements at a time or one. So the bits of a result depend only on the inputs.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/mixing.h"
#include "kernels/cuda/philox.cuh"
#include "kernels/cuda/warp.cuh"

namespace negmine::cuda {

constexpr int kElements = 4;              // consecutive elements of a row that one lane handles: a chunk
constexpr int kPass = kElements * kWarp;  // elements that a warp handles at once
constexpr float kSmallestNorm = 1e-12f;

struct Chunk {
  float value[kElements];
};

// The storage of the elements of a row. in_quads: all chunks are aligned and complete, so each is loaded at once.
struct Layout {
  Storage storage;
  bool in_quads;
};

struct Row {
  const void* base;
  Layout layout;
};

__host__ __device__ inline int64_t bytes_of(Storage storage) { return storage == Storage::kFloat32 ? 4 : 2; }

__device__ inline float widen(uint32_t bits, Storage storage) {
  return storage == Storage::kBFloat16 ? __uint_as_float(bits << 16)
                                       : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ inline float element_of(const void* row, Storage storage, int64_t d) {
  if (storage == Storage::kFloat32) return static_cast<const float*>(row)[d];
  return widen(static_cast<const uint16_t*>(row)[d], storage);
}

// Elements d to d + 3 of a row of D elements, with zeros past its end.
__device__ inline Chunk load(const Row& row, int64_t d, int64_t D) {
  const Layout layout = row.layout;
  Chunk chunk = {};
  if (layout.storage == Storage::kFloat32) {
    const float* words = static_cast<const float*>(row.base) + d;
    if (layout.in_quads) {
      const float4 quad = *reinterpret_cast<const float4*>(words);
      return {quad.x, quad.y, quad.z, quad.w};
    }
    for (int i = 0; i < kElements; ++i) chunk.value[i] = d + i < D ? words[i] : 0.0f;
    return chunk;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(row.base) + d;
  if (layout.in_quads) {
    const uint2 quad = *reinterpret_cast<const uint2*>(halves);
    return {widen(quad.x & 0xFFFFu, layout.storage), widen(quad.x >> 16, layout.storage),
            widen(quad.y & 0xFFFFu, layout.storage), widen(quad.y >> 16, layout.storage)};
  }
  for (int i = 0; i < kElements; ++i) chunk.value[i] = d + i < D ? widen(halves[i], layout.storage) : 0.0f;
  return chunk;
}

// The number of entries of a row of hard_index before its padding. The padding is at the end, so the lanes search for
// its begin, each at one of 32 entries at a time.
__device__ inline int64_t count_parents(const int64_t* hard_index, int64_t N, int lane) {
  int64_t low = 0;  // the count is in [low, high]
  int64_t high = N;
  while (low < high) {
    const int64_t step = (high - low + kWarp - 1) / kWarp;
    const int64_t entry = low + lane * step;
    const int hits = __popc(__ballot_sync(kAllLanes, entry < high && hard_index[entry] >= 0));
    if (hits == 0) break;
    const int64_t last = low + (hits - 1) * step;
    low = last + 1;
    high = last + step < high ? last + step : high;
  }
  return low;
}

// Each operation is rounded, as in the reference. A fused multiply-add would give a different coefficient.
__device__ inline float interpolate(float low, float high, float fraction) {
  return __fadd_rn(low, __fmul_rn(__fsub_rn(high, low), fraction));
}

// The number in [0, 1) that a random word stands for; if there are quantiles, of their distribution.
__device__ inline float unit(uint32_t word, const float* quantiles) {
  const uint32_t top = word >> 8;
  if (quantiles == nullptr) return static_cast<float>(top) * 0x1p-24f;
  const uint32_t cell = top >> 12;
  return interpolate(quantiles[cell], quantiles[cell + 1], static_cast<float>(top & 4095u) * 0x1p-12f);
}

struct Parents {
  int64_t first, second;  // rows of the queue; first is -1 if the first parent is the query
  float coefficient;      // of the first parent
};

// The value of an optional number on the device; 0 if null.
__device__ __forceinline__ int64_t number_at(const int64_t* number) { return number ? *number : 0; }

// Draws the parents for a slot of query b. hard_index: the query's row, with `count` entries before the padding, at
// least one.
__device__ inline Parents draw(const Mixing& p, int64_t b, int64_t slot, const int64_t* hard_index, int64_t count) {
  const uint64_t row = static_cast<uint64_t>(number_at(p.row_offset) + b);
  const auto step = static_cast<uint32_t>(number_at(p.step));
  const Philox random = philox4x32_10(
      {static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(slot), 0u}, p.seed, step);
  const float fraction = unit(random.word[2], p.quantiles);
  if (slot >= p.pairs) {
    return {-1, hard_index[below(random.word[1], count)], interpolate(p.query_low, p.query_high, fraction)};
  }
  const bool apart = p.distinct && count > 1;
  const int64_t first = below(random.word[0], count);
  int64_t second = below(random.word[1], apart ? count - 1 : count);
  if (apart && second >= first) ++second;
  return {hard_index[first], hard_index[second], interpolate(p.pair_low, p.pair_high, fraction)};
}

__device__ inline Chunk mix(float coefficient, const Chunk& first, const Chunk& second) {
  Chunk mixed;
  for (int i = 0; i < kElements; ++i) {
    mixed.value[i] = coefficient * first.value[i] + (1.0f - coefficient) * second.value[i];
  }
  return mixed;
}

__device__ inline float norm_of(float squares) {
  const float length = sqrtf(squares);
  return length < kSmallestNorm ? kSmallestNorm : length;  // NaN stays NaN
}

struct Layouts {
  Layout query, keys;
};

__device__ inline Row query_at(const Mixing& p, Layout layout, int64_t b) {
  return {static_cast<const char*>(p.query) + b * p.query_stride * bytes_of(layout.storage), layout};
}

__device__ inline Row key_at(const Mixing& p, Layout layout, int64_t index) {
  return {static_cast<const char*>(p.negative_keys) + index * p.negative_keys_stride * bytes_of(layout.storage),
          layout};
}

inline Layout layout_of(const void* base, int64_t stride, int64_t D, Storage storage) {
  const bool aligned = reinterpret_cast<uintptr_t>(base) % (kElements * bytes_of(storage)) == 0;
  return {storage, aligned && D % kElements == 0 && stride % kElements == 0};
}

inline Layouts layouts_of(const Mixing& p) {
  return {layout_of(p.query, p.query_stride, p.D, p.query_storage),
          layout_of(p.negative_keys, p.negative_keys_stride, p.D, p.negative_keys_storage)};
}

}  // namespace negmine::cuda
