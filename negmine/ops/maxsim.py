"""The op maxsim: scores of queries and documents that are matrices of token vectors."""

from negmine.ops.registry import declare

MAXSIM = declare(
    "maxsim(query: vectors[B, I, D], negative_keys: vectors[K, J, D], query_lengths?: int64[B], negative_lengths?: int64[K], "
    "want_index: bool) -> scores: fp32[B, K], index: int64[B if want_index else 0, I, K]",
    """scores_bk = sum over the first query_lengths_b tokens i of query b of the largest s_ij = q_bi . n_kj over the first
    negative_lengths_k tokens j of document k; -inf if the document has no tokens. Lengths of None mean that all tokens are used.
    Tokens past the length are never read. index_bik = k J + j is the row, in the (K J, D) tokens of all documents, of the first
    token j with the largest score; -1 if token i is past the length or no score is above -inf. A NaN score makes the sum NaN.""",
)
