// mix_negatives: one warp makes one synthetic negative.
//
// Every lane draws the same parents from the counter (row, slot), so the lanes need not communicate. The warp then
// reads both parents once to compute the norm of their mix, and again, from cache, to write it. No vector is kept in
// registers, so D is not limited.
//
//   query (B, D), negative_keys (K, D), hard_index (B, N) -> vectors (B, S, D), parents (B, S, 2), coefficients (B, S)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/mix_negatives.h"
#include "kernels/cuda/mixing.cuh"

namespace negmine::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;

__device__ uint32_t narrow(float value, Storage storage) {
  return storage == Storage::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16(value))
                                       : __half_as_ushort(__float2half(value));
}

__device__ void store(void* row, Layout layout, int64_t d, int64_t D, const Chunk& chunk) {
  const float (&v)[kElements] = chunk.value;
  if (layout.storage == Storage::kFloat32) {
    float* words = static_cast<float*>(row) + d;
    if (layout.in_quads) {
      *reinterpret_cast<float4*>(words) = make_float4(v[0], v[1], v[2], v[3]);
      return;
    }
    for (int i = 0; i < kElements && d + i < D; ++i) words[i] = v[i];
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(row) + d;
  if (layout.in_quads) {
    *reinterpret_cast<uint2*>(halves) = make_uint2(narrow(v[0], layout.storage) | narrow(v[1], layout.storage) << 16,
                                                   narrow(v[2], layout.storage) | narrow(v[3], layout.storage) << 16);
    return;
  }
  for (int i = 0; i < kElements && d + i < D; ++i) halves[i] = static_cast<uint16_t>(narrow(v[i], layout.storage));
}

__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    mix_negatives_kernel(MixNegativesParams out, Layouts layouts, Layout vectors_layout) {
  const Mixing& p = out.mixing;
  const int64_t S = p.pairs + p.with_query;
  const int lane = threadIdx.x % kWarp;
  const int64_t item = blockIdx.x * static_cast<int64_t>(kWarpsPerBlock) + threadIdx.x / kWarp;  // (b, slot)
  if (item >= p.B * S) return;
  const int64_t b = item / S;
  const int64_t slot = item % S;
  const int64_t* hard_index = p.hard_index + b * p.hard_index_stride;                       // (N,)
  void* vector = static_cast<char*>(out.vectors) + item * p.D * bytes_of(p.query_storage);  // (D,)

  const int64_t count = count_parents(hard_index, p.N, lane);
  if (count == 0) {
    if (lane == 0) {
      out.parents[2 * item] = out.parents[2 * item + 1] = -1;
      out.coefficients[item] = 0.0f;
    }
    for (int64_t d = kElements * lane; d < p.D; d += kPass) store(vector, vectors_layout, d, p.D, Chunk{});
    return;
  }

  const Parents drawn = draw(p, b, slot, hard_index, count);
  if (lane == 0) {
    out.parents[2 * item] = drawn.first;
    out.parents[2 * item + 1] = drawn.second;
    out.coefficients[item] = drawn.coefficient;
  }

  const Row first = drawn.first < 0 ? query_at(p, layouts.query, b) : key_at(p, layouts.keys, drawn.first);  // (D,)
  const Row second = key_at(p, layouts.keys, drawn.second);                                                  // (D,)

  float squares = 0.0f;
  for (int64_t d = kElements * lane; d < p.D; d += kPass) {
    const Chunk mixed = mix(drawn.coefficient, load(first, d, p.D), load(second, d, p.D));
    for (int i = 0; i < kElements; ++i) squares += mixed.value[i] * mixed.value[i];
  }
  const float norm = norm_of(over_warp(squares));

  for (int64_t d = kElements * lane; d < p.D; d += kPass) {
    Chunk mixed = mix(drawn.coefficient, load(first, d, p.D), load(second, d, p.D));
    for (int i = 0; i < kElements; ++i) mixed.value[i] /= norm;
    store(vector, vectors_layout, d, p.D, mixed);
  }
}

}  // namespace

int mix_negatives(const MixNegativesParams& params, void* stream) {
  const Mixing& p = params.mixing;
  const int64_t items = p.B * (p.pairs + p.with_query);
  if (items == 0) return cudaSuccess;
  const Layout vectors = layout_of(params.vectors, p.D, p.D, p.query_storage);

  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>((items + kWarpsPerBlock - 1) / kWarpsPerBlock));
  launch.blockDim = dim3(kWarp * kWarpsPerBlock);
  launch.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&launch, mix_negatives_kernel, params, layouts_of(p), vectors);
}

}  // namespace negmine::cuda
