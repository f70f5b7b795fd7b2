// Every schema of the library `negmine`: the signatures of kernels/README.md as torch spells them.
#include <torch/csrc/stable/library.h>

#define POOL_SCHEMA                                                                                                 \
  "Tensor? negative_mask, Tensor? query_ids, Tensor? negative_ids, Tensor? query_labels, Tensor? negative_labels, " \
  "Tensor? lower, Tensor? upper, bool same_label=False"
#define DRAW_SCHEMA                                                                                                \
  "int pairs, int with_query, float pair_low, float pair_high, float query_low, float query_high, bool distinct, " \
  "Tensor? quantiles, int seed, int step, int row_offset"

STABLE_TORCH_LIBRARY(negmine, m) {
  m.def("logsumexp(Tensor query, Tensor negative_keys, Tensor scale, Tensor? pivot, bool want_mean, " POOL_SCHEMA
        ") -> (Tensor lse, Tensor mean, Tensor kept, Tensor above)");
  m.def("logsumexp_pair(Tensor query, Tensor negative_keys, Tensor scale, Tensor? pivot, bool want_mean, " POOL_SCHEMA
        ") -> (Tensor lse, Tensor mean, Tensor kept, Tensor above)");
  m.def("logsumexp_grad_keys(Tensor query, Tensor negative_keys, Tensor scale, Tensor lse, Tensor weight, " POOL_SCHEMA
        ") -> Tensor");
  m.def("softplus_sum(Tensor query, Tensor negative_keys, Tensor scale, Tensor bias, bool want_pull, " POOL_SCHEMA
        ") -> (Tensor total, Tensor pull, Tensor mass, Tensor kept)");
  m.def(
      "logsumexp_mine(Tensor query, Tensor negative_keys, int N, Tensor scale, Tensor? pivot, bool "
      "want_mean, " POOL_SCHEMA
      ") -> (Tensor lse, Tensor mean, Tensor kept, Tensor above, Tensor scores, Tensor index)");
  m.def(
      "logsumexp_window(Tensor query, Tensor negative_keys, Tensor ranks, Tensor scale, Tensor? pivot, bool "
      "want_mean, " POOL_SCHEMA ") -> (Tensor lse, Tensor mean, Tensor kept, Tensor above, Tensor places)");
  m.def(
      "softplus_sum_grad_keys(Tensor query, Tensor negative_keys, Tensor scale, Tensor bias, Tensor "
      "weight, " POOL_SCHEMA ") -> Tensor");
  m.def("mine_hardest(Tensor query, Tensor negative_keys, int N, " POOL_SCHEMA ") -> (Tensor scores, Tensor index)");
  m.def("mine_hardest_kept(Tensor query, Tensor negative_keys, int N, " POOL_SCHEMA
        ") -> (Tensor scores, Tensor index, Tensor kept)");
  m.def(
      "mine_listed(Tensor query, Tensor negative_keys, Tensor index, int N, Tensor? most) -> "
      "(Tensor scores, Tensor index, Tensor kept)");
  m.def("rank_thresholds(Tensor query, Tensor negative_keys, Tensor ranks, " POOL_SCHEMA ") -> Tensor");
  m.def("count_negatives(Tensor query, Tensor negative_keys, " POOL_SCHEMA ") -> Tensor");
  m.def("mix_negatives(Tensor query, Tensor negative_keys, Tensor hard_index, " DRAW_SCHEMA
        ") -> (Tensor vectors, Tensor parents, Tensor coefficients)");
  m.def(
      "mix_logsumexp(Tensor query, Tensor negative_keys, Tensor hard_index, Tensor scale, bool want_mean, " DRAW_SCHEMA
      ") -> (Tensor lse, Tensor mean)");
  m.def(
      "listed_logsumexp(Tensor query, Tensor negative_keys, Tensor index, Tensor scale, bool want_mean) -> "
      "(Tensor scores, Tensor lse, Tensor mean)");
  m.def("listed_grad_keys(Tensor query, Tensor index, Tensor weight, SymInt K) -> Tensor");
}
