// Code that the CPU operators share. It fills the structs of kernels/cpu from tensors, and lets the kernels use torch's
// parallel_for.
#pragma once
#include <torch/csrc/stable/library.h>

#include "csrc/torch/arguments.h"
#include "csrc/torch/checks.h"
#include "kernels/cpu/draws.h"
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/pool.h"

namespace negmine {

template <class T>
T* output(checks::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// torch's threads, or only the calling thread if the number of multiplications is so small that starting the other
// threads would take longer.
inline cpu::Parallel torch_threads(double products) {
  constexpr double kMinProducts = 1 << 18;
  if (products < kMinProducts) return cpu::serial();
  const auto run = [](int64_t begin, int64_t end, int64_t grain, cpu::Parallel::Callback callback, void* context) {
    torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { callback(from, to, context); });
  };
  return {run, static_cast<int64_t>(torch::stable::get_num_threads())};
}

inline cpu::Matrix matrix_of(const checks::Tensor& t) {
  using checks::ScalarType;
  const ScalarType dtype = t.scalar_type();
  return {t.data_ptr(), t.stride(0),
          dtype == ScalarType::Float      ? cpu::Dtype::kFloat32
          : dtype == ScalarType::BFloat16 ? cpu::Dtype::kBFloat16
          : dtype == ScalarType::Byte     ? cpu::Dtype::kCodes
                                          : cpu::Dtype::kFloat16};
}

inline cpu::Pool pool_of(const PoolTensors& t) {
  using checks::longs;
  cpu::Pool pool;
  if (t.negative_mask.has_value()) {
    pool.negative_mask = static_cast<const uint8_t*>(t.negative_mask->data_ptr());
    pool.mask_per_query = t.negative_mask->dim() == 2;
    pool.mask_row_stride = pool.mask_per_query ? t.negative_mask->stride(0) : 0;
  }
  pool.query_ids = longs(t.query_ids);
  pool.negative_ids = longs(t.negative_ids);
  pool.query_labels = longs(t.query_labels);
  pool.negative_labels = longs(t.negative_labels);
  pool.same_label = t.same_label;
  pool.lower = longs(t.lower);
  pool.upper = longs(t.upper);
  pool.bias = checks::floats(t.bias);
  if (t.guide_limit.has_value()) {
    pool.guide_query = matrix_of(*t.guide_query);
    pool.guide_keys = matrix_of(*t.guide_keys);
    pool.guide_width = t.guide_query->size(1);
    pool.guide_limit = checks::floats(t.guide_limit);
  }
  return pool;
}

// The draws of a call. The caller sets hard_index and N.
inline cpu::Draws draws_of(const DrawArguments& given, const DrawTensors& tensors) {
  using checks::longs;
  return {.pairs = given.pairs,
          .with_query = given.with_query,
          .pair_low = given.pair_low,
          .pair_high = given.pair_high,
          .query_low = given.query_low,
          .query_high = given.query_high,
          .distinct = given.distinct,
          .quantiles = checks::floats(tensors.quantiles),
          .seed = static_cast<uint32_t>(given.seed),
          .step = static_cast<uint32_t>(tensors.step.has_value() ? *longs(tensors.step) : 0),
          .row_offset = tensors.row_offset.has_value() ? *longs(tensors.row_offset) : 0};
}

// The checked query (B, D), negative_keys (rows, D) and pool of one call.
struct Scored {
  checks::Tensor query, negative_keys;
  PoolTensors pool;
  int64_t B, rows, D;
  int64_t K;  // the number of valid rows, num_rows; the kernels read only these first rows

  Scored(const char* op, const checks::Tensor& q, const checks::Tensor& keys, const PoolArguments& given)
      : query(checks::matrix(op, "query", q, "(B, D)")),
        negative_keys(checks::matrix(op, "negative_keys", keys, "(K, D)")),
        pool(op, query, negative_keys, given),
        B(query.size(0)),
        rows(negative_keys.size(0)),
        D(query.size(1)),
        K(rows) {
    checks::same_width(op, query, negative_keys);
    if (pool.num_rows.has_value()) K = std::clamp<int64_t>(*checks::longs(pool.num_rows), 0, rows);
  }

  // A params struct of any op over the queue, with the members filled that all of these ops have.
  template <class Params>
  Params params() const {
    Params p;
    p.query = matrix_of(query);
    p.negative_keys = matrix_of(negative_keys);
    p.B = B, p.K = K, p.D = D;
    p.pool = pool_of(pool);
    return p;
  }

  // The threads for an op that multiplies each query with K + more_rows rows.
  cpu::Parallel threads(int64_t more_rows = 0) const {
    return torch_threads(static_cast<double>(B) * static_cast<double>(K + more_rows) * static_cast<double>(D));
  }
};

}  // namespace negmine
