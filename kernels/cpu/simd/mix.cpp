// Synthetic negatives of one query, h = m / max(||m||, 1e-12) with m = c first + (1 - c) second, in fp32. They are
// written to memory, or their log-sum-exp and mean are computed from a few at a time, so that (S, D) is never stored.
#include "kernels/cpu/philox.h"
#include "kernels/cpu/simd/convert.h"
#include "kernels/cpu/simd/running.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

constexpr int64_t kAhead = 8;             // draws between asking for rows and reading them
constexpr int64_t kRing = 2 * kRowChunk;  // draws that are known

// Some synthetic negatives of a query before they are normalised.
struct Mixes {
  const float* row[kRowChunk];           // (kRowChunk) of `pitch`, zeros from D on
  alignas(64) float length[kRowChunk];   // (kRowChunk) at least 1e-12
  alignas(64) float product[kRowChunk];  // (kRowChunk) products with the query
};

// The state of the computation for one query. room (kRowChunk + 3, D rounded up to vectors).
struct Mixer {
  const Matrix& negative_keys;
  const Draws& draws;
  int64_t D, b, n_b, pitch;
  float *q, *first, *second, *rows;  // q (pitch), first, second (pitch): parents that cannot be read in place
  int64_t first_row[kRing], second_row[kRing];  // draws of two chunks: slot s at s % kRing
  float coefficient[kRing];

  static Mixer begin(const Matrix& query, const Matrix& negative_keys, int64_t D, const Draws& draws, int64_t b,
                     float* room) {
    const int64_t pitch = (D + kWidth - 1) / kWidth * kWidth;
    for (int64_t i = 0; i < 3 * pitch; ++i) room[i] = 0.0f;
    const float* q = widen_row(query, b, D, room);
    if (q != room) std::memcpy(room, q, static_cast<size_t>(D) * sizeof(float));
    Mixer mixer{.negative_keys = negative_keys,
                .draws = draws,
                .D = D,
                .b = b,
                .n_b = count_hard(draws, b),
                .pitch = pitch,
                .q = room,
                .first = room + pitch,
                .second = room + 2 * pitch,
                .rows = room + 3 * pitch};
    for (int64_t s = 0; s < kAhead; ++s) mixer.ask(s);
    return mixer;
  }

  // Prefetches the rows that slot s mixes, because the processor cannot predict their random addresses. For the first
  // slot of a chunk, the parents of the whole chunk are drawn.
  void ask(int64_t s) {
    const int64_t i = s % kRing, left = draws.S() - s;
    if (left <= 0 || n_b == 0) return;
    if (i % kRowChunk == 0) {
      uint32_t word[3][kRowChunk];
      philox4x32_10(static_cast<uint64_t>(draws.row_offset + b), static_cast<uint32_t>(s), draws.seed, draws.step,
                    word);
      const uint32_t* const words[] = {word[0], word[1], word[2]};
      draw(draws, b, s, left < kRowChunk ? left : kRowChunk, n_b, words,
           {first_row + i, second_row + i, coefficient + i});
    }
    const int64_t first = first_row[i], second = second_row[i];
    const int64_t element = negative_keys.dtype == Dtype::kFloat32 ? 4 : 2;
    const char* data = static_cast<const char*>(negative_keys.data);
    for (int64_t byte = 0; byte < D * element; byte += 64) {
      if (first >= 0) __builtin_prefetch(data + first * negative_keys.row_stride * element + byte);
      __builtin_prefetch(data + second * negative_keys.row_stride * element + byte);
    }
  }

  const void* in_place(int64_t row) const {
    const int64_t element = negative_keys.dtype == Dtype::kFloat32 ? 4 : 2;
    return static_cast<const char*>(negative_keys.data) + row * negative_keys.row_stride * element;
  }

  // row (pitch) = c * a + (1 - c) * b, and for each lane its part of the squared length and of the product with the
  // query.
  template <Dtype kFirst, Dtype kSecond>
  void mix(const void* a, const void* b, float c, float* row, float* squares, float* products) const {
    const V share = all(c), rest = all(1.0f - c);
    V square = all(0.0f), product = all(0.0f);
    for (int64_t d = 0; d < pitch; d += kWidth) {
      const V m = fma(share, load_as<kFirst>(a, d), rest * load_as<kSecond>(b, d));
      store(row + d, m);
      square = fma(m, m, square);
      product = fma(load(q + d), m, product);
    }
    store(squares, square);
    store(products, product);
  }

  template <Dtype kStored>
  void mix_drawn(int64_t i, float* row, float* squares, float* products) {
    constexpr Dtype kWide = Dtype::kFloat32;
    const int64_t a = first_row[i], b = second_row[i];
    const float c = coefficient[i];
    if (pitch != D) {
      mix<kWide, kWide>(a < 0 ? q : copy(a, first), copy(b, second), c, row, squares, products);
    } else if (a < 0) {
      mix<kWide, kStored>(q, in_place(b), c, row, squares, products);
    } else {
      mix<kStored, kStored>(in_place(a), in_place(b), c, row, squares, products);
    }
  }

  const float* copy(int64_t row, float* out) const {
    const float* widened = widen_row(negative_keys, row, D, out);
    if (widened != out) std::memcpy(out, widened, static_cast<size_t>(D) * sizeof(float));
    return out;
  }

  // Slots [s0, s0 + count).
  template <Dtype kStored>
  void fill(int64_t s0, int64_t count, Mixes& mixes) {
    float squares[kRowChunk][kWidth] = {},
          products[kRowChunk][kWidth] = {};  // summed over lanes below, kWidth at a time
    for (int64_t s = 0; s < count; ++s) {
      ask(s0 + s + kAhead);
      float* row = rows + s * pitch;
      mixes.row[s] = row;
      mix_drawn<kStored>((s0 + s) % kRing, row, squares[s], products[s]);
    }
    for (int64_t s = 0; s < count; s += kWidth) {
      const V length = root(sums(squares + s));
      store(mixes.length + s, length < 1e-12f ? all(1e-12f) : length);
      store(mixes.product + s, sums(products + s));
    }
  }

  static V sums(const float (*parts)[kWidth]) {
    V x[kWidth];  // (kWidth sums, kWidth parts)
    for (int i = 0; i < kWidth; ++i) x[i] = load(parts[i]);
    transpose(x);
    for (int half = kWidth / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) x[i] += x[i + half];
    }
    return x[0];
  }

  void next(int64_t s0, int64_t count, Mixes& mixes) {
    switch (negative_keys.dtype) {
      case Dtype::kFloat32:
        return fill<Dtype::kFloat32>(s0, count, mixes);
      case Dtype::kBFloat16:
        return fill<Dtype::kBFloat16>(s0, count, mixes);
      default:
        return fill<Dtype::kFloat16>(s0, count, mixes);
    }
  }
};

}  // namespace

void mix_negatives_row(const Matrix& query, const Matrix& negative_keys, int64_t D, const Draws& draws, int64_t b,
                       float* room, void* vectors, int64_t* parents, float* coefficients) {
  const int64_t S = draws.S(), row_bytes = D * (query.dtype == Dtype::kFloat32 ? 4 : 2);
  if (S == 0) return;  // vectors may be null then
  Mixer mixer = Mixer::begin(query, negative_keys, D, draws, b, room);
  if (mixer.n_b == 0) {
    std::memset(vectors, 0, static_cast<size_t>(S * row_bytes));
    for (int64_t s = 0; s < S; ++s) {
      parents[2 * s] = parents[2 * s + 1] = -1;
      coefficients[s] = 0.0f;
    }
    return;
  }
  Mixes mixes;
  for (int64_t s0 = 0; s0 < S; s0 += kRowChunk) {
    const int64_t count = S - s0 < kRowChunk ? S - s0 : kRowChunk;
    mixer.next(s0, count, mixes);
    for (int64_t s = 0; s < count; ++s) {
      const int64_t i = (s0 + s) % kRing;
      parents[2 * (s0 + s)] = mixer.first_row[i];
      parents[2 * (s0 + s) + 1] = mixer.second_row[i];
      coefficients[s0 + s] = mixer.coefficient[i];
      float* h = mixer.rows + s * mixer.pitch;
      for (int64_t d = 0; d < D; ++d) h[d] /= mixes.length[s];
      narrow_row(h, D, query.dtype, static_cast<char*>(vectors) + (s0 + s) * row_bytes);
    }
  }
}

void mix_logsumexp_row(const Matrix& query, const Matrix& negative_keys, int64_t D, const Draws& draws, int64_t b,
                       float scale, float* room, float* lse, float* mean) {
  RunningLogsumexp state = RunningLogsumexp::begin(mean, D);
  Mixer mixer = Mixer::begin(query, negative_keys, D, draws, b, room);
  Mixes mixes;
  for (int64_t s0 = 0, S = draws.S(); s0 < S && mixer.n_b > 0; s0 += kRowChunk) {
    const int64_t count = S - s0 < kRowChunk ? S - s0 : kRowChunk;
    mixer.next(s0, count, mixes);
    float factor[kRowChunk];  // (kRowChunk) 1 / length
    for (int64_t s = 0; s < count; ++s) {
      factor[s] = 1.0f / mixes.length[s];
      mixes.product[s] = scale * (mixes.product[s] * factor[s]);
    }
    state.add(mixes.product, mixes.row, factor, count);
  }
  *lse = state.end();
}

}  // namespace negmine::cpu::NEGMINE_SIMD
