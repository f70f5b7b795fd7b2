// The arguments that several ops share: the pool and the draws of kernels/README.md. Each has two structs, one with the
// arguments as torch passes them and one with the checked tensors. The order of the arguments is that of POOL and DRAWS
// in negmine/ops/registry.py.
#pragma once
#include "csrc/torch/boxing.h"
#include "csrc/torch/checks.h"

namespace negmine {

struct PoolArguments {
  static constexpr uint64_t kArguments = 13;

  PoolArguments() = default;
  explicit PoolArguments(ArgumentStack& stack)
      : negative_mask(stack.take<checks::OptionalTensor>()),
        query_ids(stack.take<checks::OptionalTensor>()),
        negative_ids(stack.take<checks::OptionalTensor>()),
        query_labels(stack.take<checks::OptionalTensor>()),
        negative_labels(stack.take<checks::OptionalTensor>()),
        lower(stack.take<checks::OptionalTensor>()),
        upper(stack.take<checks::OptionalTensor>()),
        num_rows(stack.take<checks::OptionalTensor>()),
        bias(stack.take<checks::OptionalTensor>()),
        guide_query(stack.take<checks::OptionalTensor>()),
        guide_keys(stack.take<checks::OptionalTensor>()),
        guide_limit(stack.take<checks::OptionalTensor>()),
        same_label(stack.take<bool>()) {}

  checks::OptionalTensor negative_mask, query_ids, negative_ids, query_labels, negative_labels, lower, upper, num_rows;
  checks::OptionalTensor bias, guide_query, guide_keys, guide_limit;
  bool same_label = false;
};

struct DrawArguments {
  static constexpr uint64_t kArguments = 11;

  explicit DrawArguments(ArgumentStack& stack)
      : pairs(stack.take<int64_t>()),
        with_query(stack.take<int64_t>()),
        pair_low(stack.take<double>()),
        pair_high(stack.take<double>()),
        query_low(stack.take<double>()),
        query_high(stack.take<double>()),
        distinct(stack.take<bool>()),
        quantiles(stack.take<checks::OptionalTensor>()),
        seed(stack.take<int64_t>()),
        step(stack.take<checks::OptionalTensor>()),
        row_offset(stack.take<checks::OptionalTensor>()) {}

  int64_t S() const { return pairs + with_query; }

  int64_t pairs, with_query;
  double pair_low, pair_high, query_low, query_high;
  bool distinct;
  checks::OptionalTensor quantiles;
  int64_t seed;
  checks::OptionalTensor step, row_offset;
};

// The checked tensors of a pool. They keep the memory alive that a kernel reads.
struct PoolTensors {
  PoolTensors(const char* op, const checks::Tensor& query, const checks::Tensor& negative_keys,
              const PoolArguments& given)
      : same_label(given.same_label) {
    using checks::require;
    using checks::ScalarType;
    const int64_t B = query.size(0), K = negative_keys.size(0);
    require(K <= INT64_C(0xFFFFFFFF), op, ": negative_keys must have fewer than 2^32 rows, got ", K, ".");
    require(given.query_ids.has_value() == given.negative_ids.has_value(), op,
            ": query_ids and negative_ids go together, got one of them.");
    require(given.query_labels.has_value() == given.negative_labels.has_value(), op,
            ": query_labels and negative_labels go together, got one of them.");
    require(given.query_labels.has_value() || !same_label, op,
            ": same_label needs query_labels and negative_labels, got none.");
    if (given.negative_mask.has_value()) {
      const checks::Tensor& mask = *given.negative_mask;
      const bool shared = mask.dim() == 1 && mask.size(0) == K;
      const bool own = mask.dim() == 2 && mask.size(0) == B && mask.size(1) == K;
      require(shared || own, op, ": negative_mask must be (K,) = (", K, ",) or (B, K) = (", B, ", ", K, "), got ",
              checks::Shape{mask}, ".");
      require(mask.scalar_type() == ScalarType::Bool, op, ": negative_mask must be bool, got ",
              checks::dtype_text(mask.scalar_type()), ".");
      require(checks::same_device(mask, query), op,
              ": negative_mask must be on the device of query, it is on another.");
      negative_mask = checks::dense_rows(mask);
    }
    query_ids = checks::vector(op, "query_ids", given.query_ids, ScalarType::Long, B, query);
    negative_ids = checks::vector(op, "negative_ids", given.negative_ids, ScalarType::Long, K, query);
    query_labels = checks::vector(op, "query_labels", given.query_labels, ScalarType::Long, B, query);
    negative_labels = checks::vector(op, "negative_labels", given.negative_labels, ScalarType::Long, K, query);
    lower = checks::vector(op, "lower", given.lower, ScalarType::Long, B, query);
    upper = checks::vector(op, "upper", given.upper, ScalarType::Long, B, query);
    num_rows = checks::scalar(op, "num_rows", given.num_rows, ScalarType::Long, query);
    bias = checks::vector(op, "bias", given.bias, ScalarType::Float, K, query);
    const bool guided = given.guide_limit.has_value();
    require(guided == given.guide_query.has_value() && guided == given.guide_keys.has_value(), op,
            ": guide_query, guide_keys and guide_limit go together, got only some of them.");
    if (!guided) return;
    guide_query = checks::matrix(op, "guide_query", *given.guide_query, "(B, G)");
    guide_keys = checks::matrix(op, "guide_keys", *given.guide_keys, "(K, G)");
    guide_limit = checks::vector(op, "guide_limit", given.guide_limit, ScalarType::Float, B, query);
    require(guide_query->size(0) == B && guide_keys->size(0) == K && guide_query->size(1) == guide_keys->size(1), op,
            ": guide_query and guide_keys must be (B, G) and (K, G) with B = ", B, " and K = ", K, ", got ",
            checks::Shape{*guide_query}, " and ", checks::Shape{*guide_keys}, ".");
    require(checks::same_device(*guide_query, query) && checks::same_device(*guide_keys, query), op,
            ": guide_query and guide_keys must be on the device of query, one is on another.");
  }

  checks::OptionalTensor negative_mask, query_ids, negative_ids, query_labels, negative_labels, lower, upper, num_rows;
  checks::OptionalTensor bias, guide_query, guide_keys, guide_limit;
  bool same_label;
};

// The checked tensors of draws. They keep the memory alive that a kernel reads.
struct DrawTensors {
  DrawTensors(const char* op, const checks::Tensor& query, const DrawArguments& given)
      : quantiles(checks::vector(op, "quantiles", given.quantiles, checks::ScalarType::Float, 4097, query)),
        step(checks::scalar(op, "step", given.step, checks::ScalarType::Long, query)),
        row_offset(checks::scalar(op, "row_offset", given.row_offset, checks::ScalarType::Long, query)) {
    checks::require(given.pairs >= 0 && given.with_query >= 0, op, ": pairs and with_query must not be negative, got ",
                    given.pairs, " and ", given.with_query, ".");
    constexpr int64_t kMost = int64_t{1} << 30;  // kernels count slots in 32 bits
    checks::require(given.pairs <= kMost && given.with_query <= kMost, op,
                    ": pairs and with_query must be at most 2^30 each, got ", given.pairs, " and ", given.with_query,
                    ".");
  }

  checks::OptionalTensor quantiles, step, row_offset;
};

}  // namespace negmine
