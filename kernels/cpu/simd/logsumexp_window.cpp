// Sums over the columns of sort keys: the exponentials of their scores, and their rows weighted by these.
#include "kernels/cpu/simd/convert.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/cpu/sort_key.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

template <Dtype kStored>
NEGMINE_INLINE float element(const char* row, int64_t d) {
  if constexpr (kStored == Dtype::kFloat32) return reinterpret_cast<const float*>(row)[d];
  const uint16_t half = reinterpret_cast<const uint16_t*>(row)[d];
  return kStored == Dtype::kBFloat16 ? float_of(static_cast<uint32_t>(half) << 16) : from_half(half);
}

// Elements [d, d + kVec * kWidth) of mean += x (count) times rows (count), summed from zero.
template <Dtype kStored, int kVec>
NEGMINE_INLINE void add_columns(const char* const* rows, const float* x, int64_t count, int64_t d, float* mean) {
  V acc[kVec];
  for (int v = 0; v < kVec; ++v) acc[v] = all(0.0f);
  for (int64_t s = 0; s < count; ++s) {
    for (int v = 0; v < kVec; ++v) acc[v] = fma(all(x[s]), load_as<kStored>(rows[s], d + v * kWidth), acc[v]);
  }
  for (int v = 0; v < kVec; ++v) store(mean + d + v * kWidth, load(mean + d + v * kWidth) + acc[v]);
}

template <Dtype kStored>
void add_rows(const char* const* rows, const float* x, int64_t count, int64_t D, float* mean) {
  constexpr int kTogether = 8;  // vectors of the mean in registers
  int64_t d = 0;
  for (; d + kTogether * kWidth <= D; d += kTogether * kWidth) {
    add_columns<kStored, kTogether>(rows, x, count, d, mean);
  }
  for (; d + kWidth <= D; d += kWidth) add_columns<kStored, 1>(rows, x, count, d, mean);
  for (; d < D; ++d) {
    float sum = 0.0f;
    for (int64_t s = 0; s < count; ++s) sum += x[s] * element<kStored>(rows[s], d);
    mean[d] += sum;
  }
}

}  // namespace

float logsumexp_window_row(const Matrix& negative_keys, int64_t D, const int64_t* keys, int64_t size, int64_t ahead,
                           float scale, const float* bias, float shift, float* mean) {
  const int64_t row_bytes = D * element_bytes(negative_keys.dtype);
  const auto row_at = [&](int64_t i) {
    const int64_t stride = negative_keys.row_stride * element_bytes(negative_keys.dtype);
    return static_cast<const char*>(negative_keys.data) + sort_key_index(keys[i]) * stride;
  };
  const auto fetch = [&](int64_t i) {
    const char* row = row_at(i);
    for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  };
  float total = 0.0f;
  int64_t fetched = size;
  for (int64_t i = 0; i < size; i += kRowChunk) {
    alignas(64) float x[kRowChunk] = {}, offset[kRowChunk] = {};  // (kRowChunk)
    const int64_t count = size - i < kRowChunk ? size - i : kRowChunk;
    for (int64_t s = 0; s < count; ++s) {
      x[s] = sort_key_score(keys[i + s]);
      offset[s] = (bias == nullptr ? 0.0f : bias[sort_key_index(keys[i + s])]) - shift;
    }
    for (int64_t s = 0; s < kRowChunk; s += kWidth) store(x + s, exp(fma(load(x + s), all(scale), load(offset + s))));
    float chunk_total = 0.0f;
    for (int64_t s = 0; s < count; ++s) chunk_total += x[s];
    total += chunk_total;
    if (mean == nullptr) continue;
    const char* rows[kRowChunk];  // (kRowChunk)
    for (int64_t s = 0; s < count; ++s) {
      rows[s] = row_at(i + s);
      if (fetched < size + ahead) fetch(fetched++);
    }
    switch (negative_keys.dtype) {
      case Dtype::kFloat32:
        add_rows<Dtype::kFloat32>(rows, x, count, D, mean);
        break;
      case Dtype::kBFloat16:
        add_rows<Dtype::kBFloat16>(rows, x, count, D, mean);
        break;
      default:
        add_rows<Dtype::kFloat16>(rows, x, count, D, mean);
    }
  }
  for (; mean != nullptr && fetched < size + ahead; ++fetched) fetch(fetched);
  return total;
}

}  // namespace negmine::cpu::NEGMINE_SIMD
