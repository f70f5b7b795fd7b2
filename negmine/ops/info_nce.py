"""The op info_nce, a whole step of the InfoNCE loss, and the autograd function over it."""

from negmine.ops.registry import declare

INFO_NCE = declare(
    "info_nce(query: vectors[B, D], positive_key: vectors[B, D], negative_keys: vectors[K, D], scale: fp32[], pivot?: fp32[B], "
    "want_gradient: bool, decoupled: bool, ranks?: int64[B, 2], hard: int, skip: int, *draws, *pool) "
    "-> rows: fp32[B], d_query: fp32[B if want_gradient else 0, D], d_scale: fp32[B if want_gradient else 0], weight: fp32[B], "
    "lse: fp32[B], total: fp32[B], num_kept: int64[B], num_above: int64[B], num_mixed: int64[B], "
    "sort_keys: int64[B, 0 if ranks is None else 2]",
    """x_b = scale * q_b . positive_b. The negatives are those of the pool, between two of its ranks where `ranks` is given, as
    in logsumexp; and, where hard > 0 and pairs + with_query > 0, the synthetic ones that mix_logsumexp draws from ranks
    [skip, skip + hard) of the pool. ranks and hard > 0 do not go together.
    lse_b = log-sum-exp of scale * s over all of them; num_kept, num_above, sort_keys as in logsumexp; num_mixed_b = pairs +
    with_query where the query has a parent to mix, else 0.
    rows_b = log(1 + exp(lse_b - x_b)), or lse_b - x_b where decoupled; 0, without gradient, where there is no negative.
    d_query, d_scale: of rows_b by q_b and by scale.
    weight_b = scale * d rows_b / d lse_b: what logsumexp_grad_keys takes; the positive's gradient is -weight_b q_b.
    total_b = log(exp(x_b) + exp(lse_b)), or lse_b where decoupled; x_b where there is no negative.""",
)
