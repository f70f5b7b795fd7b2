"""The op mix_negatives: the vectors of synthetic negatives."""

from negmine.ops.registry import declare

MIX_NEGATIVES = declare(
    "mix_negatives(query: vectors[B, D], negative_keys: vectors[K, D], hard_index: int64[B, N], *draws) "
    "-> vectors: query[B, pairs + with_query, D], parents: int64[B, pairs + with_query, 2], "
    "coefficients: fp32[B, pairs + with_query]",
    """The S = pairs + with_query synthetic negatives of each query, drawn as the section "Draws" says.""",
)
