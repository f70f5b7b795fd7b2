"""Translates `Select` into arguments of kernels: score filters and rank windows become bounds, samples become lists of columns.

A bound is a sort key (negmine/ops/sort_key.py), so a window is exact even if scores tie: of the columns whose score equals that
of a bound, the index decides which are kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from negmine.ops import philox, sort_key
from negmine.ops.backends import Kernels
from negmine.ops.pool import Pool, narrow
from negmine.options import Select


class Draw(NamedTuple):
    """The arguments that determine random draws: seed, step and the global index of the first query.

    step and row_offset may be () int64 tensors.
    """

    seed: int = 0
    step: int | Tensor = 0
    row_offset: int | Tensor = 0

    def of_pool(self, number: int) -> "Draw":
        """The draws of one of several pools: the number of the pool is put into the high bits of the row."""
        return self._replace(row_offset=self.row_offset + (number << 48)) if number else self

    def rows(self, query: Tensor) -> Tensor:
        """(B,) int64: the global index of each query."""
        return torch.arange(len(query), device=query.device) + self.row_offset

    def on_device(self, query: Tensor) -> tuple[int, Tensor | None, Tensor | None]:
        """seed, and step and row_offset as kernels take them: () int64 tensors on the device of query, or None for 0."""
        return self.seed, _on_device(self.step, query), _on_device(self.row_offset, query)


def _on_device(value: int | Tensor, query: Tensor) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.to(query.device)
    if isinstance(value, int) and value == 0 and not torch.compiler.is_compiling():
        return None
    return torch.full((), value, dtype=torch.int64, device=query.device)


def apply_filters(query: Tensor, pool: Pool, select: Select, positive_score: Tensor | None) -> Pool:
    """Narrow the pool by the score filters of `select`. positive_score (B,) is needed if `select` has a margin."""
    B = query.shape[0]
    if select.min_score is not None:
        least = torch.zeros(B, dtype=torch.float32, device=query.device) + select.min_score
        pool = pool._replace(lower=sort_key.pack(least, sort_key.LAST_INDEX))
    if select.has_margin or select.max_score is not None:
        anchor = query.new_zeros(B, dtype=torch.float32) if positive_score is None else positive_score
        pool = pool._replace(upper=sort_key.pack(select.highest_score(anchor), 0))
    return pool


def pool_size(kernels: Kernels, query: Tensor, negative_keys: Tensor, pool: Pool) -> Tensor | int:
    """The number of columns in each query's pool: (B,) int64, or one int if every row of the queue is in every pool."""
    if pool.is_everything:
        return kernels.queue_size(negative_keys)
    if pool._replace(num_rows=None).is_everything and not torch.compiler.is_compiling():
        assert pool.num_rows is not None
        return pool.num_rows.expand(len(query))
    return kernels.count_negatives(query, negative_keys, *pool)


def window_ranks(
    kernels: Kernels, query: Tensor, negative_keys: Tensor, pool: Pool, select: Select
) -> tuple[Tensor | int, Tensor | int]:
    """The ranks [first, end) of a filtered pool that `select` keeps, (B,) int64 each or one int for all rows."""
    # Only fractions need the exact size of the pool. Integer ranks may lie past its end, where there are no columns.
    if select.needs_pool_size:
        return select.window(pool_size(kernels, query, negative_keys, pool))
    return select.window(kernels.queue_size(negative_keys))


def stack_ranks(ranks: list[Tensor | int], query: Tensor) -> Tensor:
    """Stack R ranks, each (B,) or one int for all rows, into (B, R) int64."""
    if all(isinstance(rank, int) for rank in ranks) and not torch.compiler.is_compiling():
        stacked = torch.empty(len(query), len(ranks), dtype=torch.int64, device=query.device)
        for column, rank in enumerate(ranks):
            stacked[:, column] = rank
        return stacked
    each = [
        rank.expand(len(query))
        if isinstance(rank, Tensor)
        else torch.full((len(query),), rank, dtype=torch.int64, device=query.device)
        for rank in ranks
    ]
    return torch.stack(each, 1)


def ranks_to_sum(
    kernels: Kernels, query: Tensor, negative_keys: Tensor, pool: Pool, select: Select, positive_score: Tensor | None
) -> tuple[Pool, Tensor | None]:
    """The arguments of the op logsumexp for `select`: the filtered pool, and its first and last rank (B, 2) or None."""
    pool = apply_filters(query, pool, select, positive_score)
    if not (select.starts_late or select.ends_early):
        return _without_nan(query, pool, select), None
    first, end = window_ranks(kernels, query, negative_keys, pool, select)
    return pool, stack_ranks([first, end - 1], query)


def bounded(
    kernels: Kernels, query: Tensor, negative_keys: Tensor, pool: Pool, select: Select, positive_score: Tensor | None
) -> Pool:
    """Narrow the pool to the columns that `select` keeps: its filters and its rank window become two bounds for each row.

    positive_score (B,) is needed if `select` has a margin.
    """
    pool = apply_filters(query, pool, select, positive_score)
    if not (select.starts_late or select.ends_early):
        return _without_nan(query, pool, select)
    first, end = window_ranks(kernels, query, negative_keys, pool, select)
    wanted = stack_ranks([first] * select.starts_late + [end - 1] * select.ends_early, query)
    keys = kernels.rank_thresholds(query, negative_keys, wanted, *pool)  # (B, 1 or 2)
    return narrow(pool, keys[:, 0] if select.starts_late else None, keys[:, -1] if select.ends_early else None)


def _without_nan(query: Tensor, pool: Pool, select: Select) -> Pool:
    """A filtered pool for a window that keeps all ranks: a lower bound removes NaN scores, which have no rank."""
    if select.has_filter:
        return pool
    return pool._replace(lower=torch.full((len(query),), sort_key.BOTTOM, device=query.device))


def sample(kernels: Kernels, query: Tensor, negative_keys: Tensor, window: Pool, select: Select, draw: Draw) -> Tensor:
    """Draw select.sample columns from a pool that `bounded` returned: sort keys (B, sample) int64, NOWHERE if it has too few."""
    count = kernels.count_negatives(query, negative_keys, *window)  # (B,)
    most, size = select.widest(negative_keys.shape[-2]), select.sample or 0
    ranks = philox.sample(count, most, size, select.replace, draw.rows(query), draw.seed, draw.step)  # (B, sample)
    return kernels.rank_thresholds(query, negative_keys, ranks, *window)


def mixing_draws(mix: Any, query: Tensor, draw: Draw) -> tuple:
    """The draw arguments that every mixing kernel takes, in the order of kernels/README.md."""
    table = mix.quantiles  # (4097,) or None
    if table is not None and table.device != query.device:
        table = table.to(query.device) if torch.compiler.is_compiling() else _table_on_device(table, query.device)
    ranges = (*mix.pair_range, *mix.query_range)
    return (mix.pairs, mix.with_query, *ranges, mix.distinct, table, *draw.on_device(query))


_tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}


def _table_on_device(table: Tensor, device: torch.device) -> Tensor:
    """The table on the device, copied once: a copy from pageable memory synchronises and cannot be captured in a CUDA graph."""
    key = id(table), device
    if key not in _tables:
        _tables[key] = table, table.to(device)
    return _tables[key][1]
