// mix_negatives: one warp makes one synthetic negative.
//
// Every lane draws the same parents from the counter (row, slot), so nothing is exchanged. The warp then reads both
// parents once to find the norm of their mix and once more, from cache, to write it: no vector is held, so D may be
// anything. A lane always owns the same elements and adds them in the same order, whether it loads four at a time or
// one: the bits of a result depend on its inputs alone.
//
//   query (B, D), negative_keys (K, D), hard_index (B, N) -> vectors (B, S, D), parents (B, S, 2), coefficients (B, S)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/mix_negatives.h"
#include "kernels/cuda/philox.cuh"

namespace negmine::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;
constexpr int kChunk = 4;  // consecutive elements of a row that one lane handles
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr float kSmallestNorm = 1e-12f;

struct Chunk {
  float value[kChunk];
};

// How the elements of a row lie in memory. in_quads: its chunks are aligned, and no chunk is cut short.
struct Layout {
  Storage storage;
  bool in_quads;
};

__host__ __device__ int64_t bytes_of(Storage storage) { return storage == Storage::kFloat32 ? 4 : 2; }

__device__ float widen(uint32_t bits, Storage storage) {
  return storage == Storage::kBFloat16 ? __uint_as_float(bits << 16)
                                       : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ uint32_t narrow(float value, Storage storage) {
  return storage == Storage::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16(value))
                                       : __half_as_ushort(__float2half(value));
}

// Elements d .. d + 3 of a row of D, zeros past its end.
__device__ Chunk load(const void* row, Layout layout, int64_t d, int64_t D) {
  Chunk chunk = {};
  if (layout.storage == Storage::kFloat32) {
    const float* words = static_cast<const float*>(row) + d;
    if (layout.in_quads) {
      const float4 quad = *reinterpret_cast<const float4*>(words);
      return {quad.x, quad.y, quad.z, quad.w};
    }
    for (int i = 0; i < kChunk; ++i) chunk.value[i] = d + i < D ? words[i] : 0.0f;
    return chunk;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(row) + d;
  if (layout.in_quads) {
    const uint2 quad = *reinterpret_cast<const uint2*>(halves);
    return {widen(quad.x & 0xFFFFu, layout.storage), widen(quad.x >> 16, layout.storage),
            widen(quad.y & 0xFFFFu, layout.storage), widen(quad.y >> 16, layout.storage)};
  }
  for (int i = 0; i < kChunk; ++i) chunk.value[i] = d + i < D ? widen(halves[i], layout.storage) : 0.0f;
  return chunk;
}

__device__ void store(void* row, Layout layout, int64_t d, int64_t D, const Chunk& chunk) {
  const float (&v)[kChunk] = chunk.value;
  if (layout.storage == Storage::kFloat32) {
    float* words = static_cast<float*>(row) + d;
    if (layout.in_quads) {
      *reinterpret_cast<float4*>(words) = make_float4(v[0], v[1], v[2], v[3]);
      return;
    }
    for (int i = 0; i < kChunk && d + i < D; ++i) words[i] = v[i];
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(row) + d;
  if (layout.in_quads) {
    *reinterpret_cast<uint2*>(halves) = make_uint2(narrow(v[0], layout.storage) | narrow(v[1], layout.storage) << 16,
                                                   narrow(v[2], layout.storage) | narrow(v[3], layout.storage) << 16);
    return;
  }
  for (int i = 0; i < kChunk && d + i < D; ++i) halves[i] = static_cast<uint16_t>(narrow(v[i], layout.storage));
}

// Entries of a row of N before its padding. The padding is at the end, so 32 lanes search 32 places at a time.
__device__ int64_t count_parents(const int64_t* hard_index, int64_t N, int lane) {
  int64_t low = 0;  // the count is in [low, high]
  int64_t high = N;
  while (low < high) {
    const int64_t step = (high - low + kWarp - 1) / kWarp;
    const int64_t place = low + lane * step;
    const int hits = __popc(__ballot_sync(kAllLanes, place < high && hard_index[place] >= 0));
    if (hits == 0) break;
    const int64_t last = low + (hits - 1) * step;
    low = last + 1;
    high = last + step < high ? last + step : high;
  }
  return low;
}

// In separate roundings, as the reference computes it: a fused multiply-add would draw other bits.
__device__ float interpolate(float low, float high, float fraction) {
  return __fadd_rn(low, __fmul_rn(__fsub_rn(high, low), fraction));
}

__device__ float unit(uint32_t word, const float* quantiles) {
  const uint32_t top = word >> 8;
  if (quantiles == nullptr) return static_cast<float>(top) * 0x1p-24f;
  const uint32_t cell = top >> 12;
  return interpolate(quantiles[cell], quantiles[cell + 1], static_cast<float>(top & 4095u) * 0x1p-12f);
}

struct Draw {
  int64_t first, second;  // places in the row's hard_index; first is -1 where it is the query
  float coefficient;
};

__device__ Draw draw(const MixNegativesParams& p, int64_t b, int64_t slot, int64_t count) {
  const uint64_t row = static_cast<uint64_t>(p.row_offset + b);
  const Philox random = philox4x32_10(
      {static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(slot), 0u}, p.seed, p.step);
  const float fraction = unit(random.word[2], p.quantiles);
  if (slot >= p.pairs) return {-1, below(random.word[1], count), interpolate(p.query_low, p.query_high, fraction)};
  const bool apart = p.distinct && count > 1;
  const int64_t first = below(random.word[0], count);
  int64_t second = below(random.word[1], apart ? count - 1 : count);
  if (apart && second >= first) ++second;
  return {first, second, interpolate(p.pair_low, p.pair_high, fraction)};
}

__device__ Chunk mix(float coefficient, const Chunk& first, const Chunk& second) {
  Chunk mixed;
  for (int i = 0; i < kChunk; ++i) {
    mixed.value[i] = coefficient * first.value[i] + (1.0f - coefficient) * second.value[i];
  }
  return mixed;
}

__device__ const void* row_of(const void* base, int64_t index, int64_t stride, Storage storage) {
  return static_cast<const char*>(base) + index * stride * bytes_of(storage);
}

__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    mix_negatives_kernel(MixNegativesParams p, Layout query_layout, Layout keys_layout, Layout vectors_layout) {
  const int64_t S = p.pairs + p.with_query;
  const int lane = threadIdx.x % kWarp;
  const int64_t item = blockIdx.x * static_cast<int64_t>(kWarpsPerBlock) + threadIdx.x / kWarp;  // (b, slot)
  if (item >= p.B * S) return;
  const int64_t b = item / S;
  const int64_t slot = item % S;
  const int64_t* hard_index = p.hard_index + b * p.hard_index_stride;                     // (N,)
  void* vector = static_cast<char*>(p.vectors) + item * p.D * bytes_of(p.query_storage);  // (D,)

  const int64_t count = count_parents(hard_index, p.N, lane);
  if (count == 0) {
    if (lane == 0) {
      p.parents[2 * item] = p.parents[2 * item + 1] = -1;
      p.coefficients[item] = 0.0f;
    }
    for (int64_t d = kChunk * lane; d < p.D; d += kChunk * kWarp) store(vector, vectors_layout, d, p.D, Chunk{});
    return;
  }

  const Draw drawn = draw(p, b, slot, count);
  const bool is_pair = drawn.first >= 0;
  const int64_t first_parent = is_pair ? hard_index[drawn.first] : -1;
  const int64_t second_parent = hard_index[drawn.second];
  if (lane == 0) {
    p.parents[2 * item] = first_parent;
    p.parents[2 * item + 1] = second_parent;
    p.coefficients[item] = drawn.coefficient;
  }

  const Layout first_layout = is_pair ? keys_layout : query_layout;
  const void* first = is_pair ? row_of(p.negative_keys, first_parent, p.negative_keys_stride, keys_layout.storage)
                              : row_of(p.query, b, p.query_stride, query_layout.storage);                    // (D,)
  const void* second = row_of(p.negative_keys, second_parent, p.negative_keys_stride, keys_layout.storage);  // (D,)

  float squares = 0.0f;
  for (int64_t d = kChunk * lane; d < p.D; d += kChunk * kWarp) {
    const Chunk mixed = mix(drawn.coefficient, load(first, first_layout, d, p.D), load(second, keys_layout, d, p.D));
    for (int i = 0; i < kChunk; ++i) squares += mixed.value[i] * mixed.value[i];
  }
  for (int apart = kWarp / 2; apart > 0; apart /= 2) squares += __shfl_xor_sync(kAllLanes, squares, apart);
  const float length = sqrtf(squares);
  const float norm = length < kSmallestNorm ? kSmallestNorm : length;  // NaN stays NaN

  for (int64_t d = kChunk * lane; d < p.D; d += kChunk * kWarp) {
    Chunk mixed = mix(drawn.coefficient, load(first, first_layout, d, p.D), load(second, keys_layout, d, p.D));
    for (int i = 0; i < kChunk; ++i) mixed.value[i] /= norm;
    store(vector, vectors_layout, d, p.D, mixed);
  }
}

Layout layout_of(const void* base, int64_t stride, int64_t D, Storage storage) {
  const bool aligned = reinterpret_cast<uintptr_t>(base) % (kChunk * bytes_of(storage)) == 0;
  return {storage, aligned && D % kChunk == 0 && stride % kChunk == 0};
}

}  // namespace

int mix_negatives(const MixNegativesParams& params, void* stream) {
  const int64_t items = params.B * (params.pairs + params.with_query);
  if (items == 0) return cudaSuccess;
  const Layout query = layout_of(params.query, params.query_stride, params.D, params.query_storage);
  const Layout keys =
      layout_of(params.negative_keys, params.negative_keys_stride, params.D, params.negative_keys_storage);
  const Layout vectors = layout_of(params.vectors, params.D, params.D, params.query_storage);

  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>((items + kWarpsPerBlock - 1) / kWarpsPerBlock));
  launch.blockDim = dim3(kWarp * kWarpsPerBlock);
  launch.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&launch, mix_negatives_kernel, params, query, keys, vectors);
}

}  // namespace negmine::cuda
