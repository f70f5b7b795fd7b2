"""The ops over a queue whose rows are distributed over ranks. Names, signatures and results are those of the ops of a backend.

    gather    every rank receives the queries of all ranks, (B, D), with their masks and bounds
    run       every rank runs the op of its backend on the rows that it stores (its shard)
    return    the W partial results of each query are sent to the rank that owns the query, which merges them in rank order

Log-sum-exps are merged by a log-sum-exp, means by a weighted mean, and counts by a sum. Sort keys (negmine/ops/sort_key.py) are
exchanged with global indices, so that selections are merged exactly, ties included, and a rank window is one of the whole queue.
Nothing of size (B, K) is stored, and no row of the queue is sent.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from negmine.collectives import Ranks
from negmine.ops import sort_key
from negmine.ops.backends import Kernels
from negmine.ops.pool import Pool, narrow

AT_ONCE = 1024  # how many columns of a shard rank_thresholds merges in one round


class Merging:
    """The communication of one call.

    counts: the number of queries of each rank. want_mean: whether some rank needs the means of logsumexp.
    """

    def __init__(self, ranks: Ranks, counts: list[int], want_mean: bool) -> None:
        self.ranks, self.counts, self.want_mean = ranks, counts, want_mean
        self.rank, self.world, self.group = ranks.rank, ranks.size, ranks.group

    def all_rows(self, rows: Tensor) -> Tensor:
        """Gather the rows (b, ...) of this rank and of all other ranks into (B, ...)."""
        return self.ranks.gather_rows(rows, self.counts)

    def parts(self, partial: Tensor) -> Tensor:
        """Exchange this shard's results for all queries (B, ...) for the results of all shards for own queries (W, b, ...)."""
        own = self.counts[self.rank]
        shape = (self.world, own, *partial.shape[1:])
        if self.world == 1:
            return partial.reshape(shape)
        out = partial.new_empty(self.world * own, *partial.shape[1:])
        dist.all_to_all_single(out, partial.contiguous(), [own] * self.world, self.counts, group=self.group)
        return out.reshape(shape)

    def any(self, *flags: Tensor) -> list[bool]:
        """For each flag, whether any of its elements is True on any rank. Synchronises with the device."""
        reduced = torch.stack([flag.any() for flag in flags]).int()
        if self.world > 1:
            dist.all_reduce(reduced, dist.ReduceOp.MAX, group=self.group)
        return [bool(r) for r in reduced.tolist()]


def upper_in_shard(keys: Tensor, first: int) -> Tensor:
    """Convert upper bounds with global indices to upper bounds with indices within a shard that begins at `first`.

    If the index of a bound is before the shard, all columns of the shard with the bound's score are inside. Adding `first` then
    carries into the score, which expresses this, except past +inf, hence the clamp. A bound whose score is NaN keeps nothing and
    is unchanged.
    """
    return torch.where(keys > sort_key.TOP, keys, (keys + first).clamp_max(sort_key.TOP))


def to_queue(keys: Tensor, first: int) -> Tensor:
    """Convert sort keys with indices within a shard that begins at `first` to sort keys with global indices."""
    return torch.where(keys == sort_key.NOWHERE, keys, keys - first)


class ShardedKernels(Kernels):
    """The kernels of one call: `shard` has the kernels for this rank's rows, and the results are merged over the ranks."""

    def __init__(self, shard: Kernels, ranks: Merging, query: Tensor, K: int, first: int) -> None:
        super().__init__()
        self.shard, self.ranks, self.K, self.first = shard, ranks, K, first
        self.query = ranks.all_rows(query)  # (B, D)

    def queue_size(self, negative_keys: Tensor) -> int:
        return self.K

    def _pool(self, pool: tuple, lower: Tensor | None = None, upper: Tensor | None = None) -> Pool:
        """The pool of the queries of all ranks on this shard, narrowed by additional bounds (B,)."""
        own = Pool(*pool)
        tags: dict[str, Any] = {
            name: self.ranks.all_rows(getattr(own, name))
            for name in ("query_ids", "query_labels", "lower", "upper")
            if getattr(own, name) is not None
        }
        if lower is not None:
            tags["lower"] = torch.maximum(tags["lower"], lower) if "lower" in tags else lower
        if upper is not None:
            tags["upper"] = torch.minimum(tags["upper"], upper) if "upper" in tags else upper
        if "upper" in tags:
            tags["upper"] = upper_in_shard(tags["upper"], self.first)
        if "lower" in tags:
            # A carry past +inf gives a NaN bound, which keeps nothing, as it should here.
            tags["lower"] = tags["lower"] + self.first
        return own._replace(**tags)

    def logsumexp(
        self, query: Tensor, negative_keys: Tensor, scales: Tensor, pivot: Tensor | None, want_mean: bool, N: int,
        ranks: Tensor | None, *pool: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        empty_index = query.new_empty(len(query), 0, dtype=torch.int64)
        scores, index, sort_keys = empty_index.float(), empty_index, empty_index
        if N:
            scores, index, _ = self.mine_hardest(query, negative_keys, N, False, *pool)
        if ranks is not None:
            sort_keys = self.rank_thresholds(query, negative_keys, ranks, *pool)  # (b, 2)
            empty = (ranks[:, 1] < ranks[:, 0]) | (sort_keys[:, 0] == sort_key.NOWHERE)  # (b,)
            sort_keys = sort_keys.masked_fill(empty[:, None], sort_key.NOWHERE)
            pool = narrow(Pool(*pool), *sort_keys.unbind(1))
        all_pivots = None if pivot is None else self.ranks.all_rows(pivot)  # (B,)
        shard_pool = self._pool(pool)
        lse, mean, num_kept, num_above, *_ = self.shard.logsumexp(
            self.query, negative_keys, scales, all_pivots, self.ranks.want_mean, 0, None, *shard_pool
        )
        parts = self.ranks.parts(lse.T).permute(2, 0, 1)  # (S, W, b)
        merged = parts.logsumexp(1)  # (S, b)
        out = query.new_zeros(len(scales), 0, query.shape[1], dtype=torch.float32)
        if self.ranks.want_mean:
            means = self.ranks.parts(mean.transpose(0, 1)).permute(2, 0, 1, 3)  # (S, W, b, D)
            weight = (parts - merged[:, None]).exp().masked_fill(merged[:, None] == -torch.inf, 0.0)  # (S, W, b)
            out = (weight[..., None] * means).sum(1) if want_mean else out
        counts = (self.ranks.parts(count).sum(0) for count in (num_kept, num_above))  # (b,) each
        return merged, out, *counts, scores, index, sort_keys

    def count_negatives(self, query: Tensor, negative_keys: Tensor, *pool: Any) -> Tensor:
        return self._counts(negative_keys, self._pool(pool)).sum(0)

    def _counts(self, negative_keys: Tensor, pool: Pool) -> Tensor:
        """(W, b) int64: the number of columns of each shard in the pools of own queries."""
        if pool.is_everything:
            held = torch.full((len(self.query),), len(negative_keys), dtype=torch.int64, device=self.query.device)
            return self.ranks.parts(held)
        return self.ranks.parts(self.shard.count_negatives(self.query, negative_keys, *pool))

    def _hardest(self, negative_keys: Tensor, N: int, pool: Pool) -> Tensor:
        """(W, b, N) int64: the N highest sort keys of each shard for own queries."""
        scores, index, _ = self.shard.mine_hardest(self.query, negative_keys, N, False, *pool)
        keys = sort_key.pack(scores, index + self.first).masked_fill(index < 0, sort_key.NOWHERE)  # (B, N)
        return self.ranks.parts(keys)

    def mine_hardest(
        self, query: Tensor, negative_keys: Tensor, N: int, want_count: bool, *pool: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys = self._hardest(negative_keys, N, self._pool(pool)).transpose(0, 1).flatten(1)  # (b, W * N)
        scores, index = sort_key.unpack(keys.topk(N, dim=1, sorted=True).values)
        return scores, index, index.new_empty(0)  # no caller of sharded kernels uses the count

    def rank_thresholds(self, query: Tensor, negative_keys: Tensor, ranks: Tensor, *pool: Any) -> Tensor:
        """The sort keys at R ranks of own queries, found exactly in a few rounds of communication.

        For each rank, `skipped` (W, b, R) counts the columns of each shard above a sort key `cut`. Their sum never exceeds the
        rank, so the wanted column is the one at rank `missing` = rank - sum of skipped among the columns at or below the cut.

        A round has two steps. The first is taken only if some `missing` is large. Each shard returns the sort key at the rank
        where its share of the missing columns should end. `target`, the highest of these keys, becomes the new cut if no more
        columns than the rank are at or above it. Otherwise the wanted column is at or above `target`, and `end`, the number of
        columns of each shard that may still be counted, is reduced. In the second step, the next AT_ONCE columns of every
        shard below the cut are merged. A rank is settled if no shard can have another column above the one found; otherwise
        the cut moves below the merged columns. So every round settles a rank, moves its cut or reduces `end`.
        """
        R, at_once = ranks.shape[1], min(AT_ONCE, self.K)
        own_pool = self._pool(pool)
        end = self._counts(negative_keys, own_pool)[:, :, None].repeat(1, 1, R)  # (W, b, R)
        skipped = torch.zeros_like(end)
        cut = torch.full_like(ranks, sort_key.TOP)  # (b, R) inclusive
        found = torch.full_like(ranks, sort_key.NOWHERE)  # (b, R)
        unsettled = (ranks >= 0) & (ranks < end.sum(0))  # (b, R)
        while True:
            missing = ranks - skipped.sum(0)  # (b, R)
            any_unsettled, any_far = self.ranks.any(unsettled, unsettled & (missing >= at_once))
            if not any_unsettled:
                return found
            if any_far:
                share = missing.double() / (end - skipped).sum(0).clamp_min(1) * (end - skipped)  # (W, b, R)
                steps = (share.floor().long() - 1).masked_fill(~unsettled, -1)
                shares = torch.where(steps >= 0, skipped + steps, -1).permute(1, 0, 2)  # (b, W, R)
                asked = self.ranks.all_rows(shares.contiguous())[:, self.ranks.rank].contiguous()  # (B, R)
                reached = to_queue(self.shard.rank_thresholds(self.query, negative_keys, asked, *own_pool), self.first)
                target = self.ranks.parts(reached).amax(0)  # (b, R)
                lower = self.ranks.all_rows(target)  # (B, R)
                bounds = (self._pool(pool, lower=lower[:, r].contiguous()) for r in range(R))
                passed = torch.stack([self._counts(negative_keys, bound) for bound in bounds], 2)  # (W, b, R)
                advances = (target != sort_key.NOWHERE) & (passed.sum(0) <= ranks)  # (b, R)
                skipped = torch.where(advances, passed, skipped)
                cut = torch.where(advances, target - 1, cut)
                end = torch.where(advances | (target == sort_key.NOWHERE), end, passed)
            upper = self.ranks.all_rows(cut)  # (B, R)
            for r in range(R):
                bound = self._pool(pool, upper=upper[:, r].contiguous())
                candidates = self._hardest(negative_keys, at_once, bound)  # (W, b, at_once)
                merged = candidates.transpose(0, 1).flatten(1).sort(1, descending=True).values  # (b, W * at_once)
                last = candidates[:, :, -1].amax(0)  # (b,) NOWHERE if every shard has returned all its columns
                missing = ranks[:, r] - skipped[:, :, r].sum(0)  # (b,)
                key = merged.gather(1, missing.clamp(0, merged.shape[1] - 1)[:, None])[:, 0]
                settled = (last == sort_key.NOWHERE) | ((missing < merged.shape[1]) & (key >= last))
                found[:, r] = torch.where(unsettled[:, r] & settled, key, found[:, r])
                unsettled[:, r] &= ~settled
                skipped[:, :, r] += (candidates >= last[:, None]).sum(2)
                cut[:, r] = last - 1
