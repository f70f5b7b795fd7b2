"""The ops over a queue whose rows are spread over ranks: same names and signatures as a backend's, the same answers.

    gather    every rank sees the queries of all of them, (B, D), with their masks and bounds
    run       its backend's op on the rows that it holds
    return    each query's W partial results go to the rank that owns the query, which merges them in rank order

Log-sum-exps merge as log-sum-exps and softmax means by their weights; counts add up; sort keys (negmine/ops/sort_key.py) hold
global indices on the way, so that selections merge exactly, ties included, and windows by rank are windows of the whole queue.
Nothing of size (B, K) exists, and no row of the queue travels.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from negmine.collectives import Ranks
from negmine.ops import sort_key
from negmine.ops.backends import Kernels
from negmine.ops.pool import Pool, narrow

AT_ONCE = 1024  # columns of a shard that rank_thresholds looks at in one round


class Merging:
    """What the ranks of one call send each other. counts: queries of each rank; want_mean: some rank needs softmax means."""

    def __init__(self, ranks: Ranks, counts: list[int], want_mean: bool) -> None:
        self.ranks, self.counts, self.want_mean = ranks, counts, want_mean
        self.rank, self.world, self.group = ranks.rank, ranks.size, ranks.group

    def all_rows(self, rows: Tensor) -> Tensor:
        """Own rows (b, ...) -> those of every rank (B, ...)."""
        return self.ranks.gather_rows(rows, self.counts)

    def parts(self, partial: Tensor) -> Tensor:
        """This shard's partial results of all queries (B, ...) -> those of every shard for own queries (W, b, ...)."""
        own = self.counts[self.rank]
        shape = (self.world, own, *partial.shape[1:])
        if self.world == 1:
            return partial.reshape(shape)
        out = partial.new_empty(self.world * own, *partial.shape[1:])
        dist.all_to_all_single(out, partial.contiguous(), [own] * self.world, self.counts, group=self.group)
        return out.reshape(shape)

    def any(self, *flags: Tensor) -> list[bool]:
        """Which flag is raised on some rank; waits for the device."""
        raised = torch.stack([flag.any() for flag in flags]).int()
        if self.world > 1:
            dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.group)
        return [bool(r) for r in raised.tolist()]


def upper_in_shard(keys: Tensor, first: int) -> Tensor:
    """Upper bounds by global index -> by the index within a shard that begins at `first`.

    A bound whose index lies before the shard is the end of its score's ties there: the carry into the score says just that,
    except past +inf. A bound whose score is NaN keeps nothing and stays.
    """
    return torch.where(keys > sort_key.TOP, keys, (keys + first).clamp_max(sort_key.TOP))


def to_queue(keys: Tensor, first: int) -> Tensor:
    """Sort keys by the index within a shard -> sort keys by global index."""
    return torch.where(keys == sort_key.NOWHERE, keys, keys - first)


class ShardedKernels(Kernels):
    """The kernels of one call: `shard` runs on this rank's rows, and the results are merged over the ranks."""

    def __init__(self, shard: Kernels, ranks: Merging, query: Tensor, K: int, first: int) -> None:
        super().__init__()
        self.shard, self.ranks, self.K, self.first = shard, ranks, K, first
        self.query = ranks.all_rows(query)  # (B, D)

    def queue_size(self, negative_keys: Tensor) -> int:
        return self.K

    def _pool(self, pool: tuple, lower: Tensor | None = None, upper: Tensor | None = None) -> Pool:
        """The pool of all queries on this shard, narrowed by further bounds (B,)."""
        mine = Pool(*pool)
        tags: dict[str, Any] = {
            name: self.ranks.all_rows(getattr(mine, name))
            for name in ("query_ids", "query_labels", "lower", "upper")
            if getattr(mine, name) is not None
        }
        if lower is not None:
            tags["lower"] = torch.maximum(tags["lower"], lower) if "lower" in tags else lower
        if upper is not None:
            tags["upper"] = torch.minimum(tags["upper"], upper) if "upper" in tags else upper
        if "upper" in tags:
            tags["upper"] = upper_in_shard(tags["upper"], self.first)
        if "lower" in tags:
            tags["lower"] = tags["lower"] + self.first  # a carry past +inf is a NaN, which keeps nothing: right here
        return mine._replace(**tags)

    def logsumexp(
        self, query: Tensor, negative_keys: Tensor, scales: Tensor, pivot: Tensor | None, want_mean: bool, N: int,
        ranks: Tensor | None, *pool: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        none = query.new_empty(len(query), 0, dtype=torch.int64)
        scores, index, sort_keys = none.float(), none, none
        if N:
            scores, index, _ = self.mine_hardest(query, negative_keys, N, False, *pool)
        if ranks is not None:
            found = self.rank_thresholds(query, negative_keys, ranks, *pool)  # (b, 2)
            empty = (ranks[:, 1] < ranks[:, 0]) | (found[:, 0] == sort_key.NOWHERE)  # (b,)
            sort_keys = found.masked_fill(empty[:, None], sort_key.NOWHERE)
            pool = narrow(Pool(*pool), *sort_keys.unbind(1))
        of_all = None if pivot is None else self.ranks.all_rows(pivot)  # (B,)
        own_pool = self._pool(pool)
        lse, mean, num_kept, num_above, *_ = self.shard.logsumexp(
            self.query, negative_keys, scales, of_all, self.ranks.want_mean, 0, None, *own_pool
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
        """(W, b) int64: columns of each shard in the pool of own queries."""
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
        return scores, index, index.new_empty(0)  # nothing over shards asks for the count

    def rank_thresholds(self, query: Tensor, negative_keys: Tensor, ranks: Tensor, *pool: Any) -> Tensor:
        """Exact selection over the shards, R ranks of own queries at once, in a few rounds.

        Before a cut, all places are counted: a (W, b, R), no more than the rank. A jump asks every shard for the place where its
        share of the ranks still missing should end, and moves the cut to the highest answer unless too many reach it, which
        then narrows what is left. Then the AT_ONCE next places of every shard are merged: a rank is settled where no shard can
        hold an unseen place above it. Every round settles a rank, moves its cut or narrows what is left.
        """
        R, at_once = ranks.shape[1], min(AT_ONCE, self.K)
        own = self._pool(pool)
        end = self._counts(negative_keys, own)[:, :, None].repeat(1, 1, R)  # (W, b, R)
        a = torch.zeros_like(end)
        cut = torch.full_like(ranks, sort_key.TOP)  # (b, R) inclusive
        found = torch.full_like(ranks, sort_key.NOWHERE)  # (b, R)
        alive = (ranks >= 0) & (ranks < end.sum(0))  # (b, R)
        while True:
            missing = ranks - a.sum(0)  # (b, R)
            going, deep = self.ranks.any(alive, alive & (missing >= at_once))
            if not going:
                return found
            if deep:
                share = missing.double() / (end - a).sum(0).clamp_min(1) * (end - a)  # (W, b, R)
                steps = (share.floor().long() - 1).masked_fill(~alive, -1)
                at = torch.where(steps >= 0, a + steps, -1).permute(1, 0, 2)  # (b, W, R)
                asked = self.ranks.all_rows(at.contiguous())[:, self.ranks.rank].contiguous()  # (B, R)
                reached = to_queue(self.shard.rank_thresholds(self.query, negative_keys, asked, *own), self.first)
                target = self.ranks.parts(reached).amax(0)  # (b, R)
                lower = self.ranks.all_rows(target)  # (B, R)
                bounds = (self._pool(pool, lower=lower[:, r].contiguous()) for r in range(R))
                passed = torch.stack([self._counts(negative_keys, bound) for bound in bounds], 2)  # (W, b, R)
                fits = (target != sort_key.NOWHERE) & (passed.sum(0) <= ranks)  # (b, R)
                a = torch.where(fits, passed, a)
                cut = torch.where(fits, target - 1, cut)
                end = torch.where(fits | (target == sort_key.NOWHERE), end, passed)
            upper = self.ranks.all_rows(cut)  # (B, R)
            for r in range(R):
                bound = self._pool(pool, upper=upper[:, r].contiguous())
                shown = self._hardest(negative_keys, at_once, bound)  # (W, b, at_once)
                merged = shown.transpose(0, 1).flatten(1).sort(1, descending=True).values  # (b, W * at_once)
                last = shown[:, :, -1].amax(0)  # (b,) NOWHERE where the shards showed all they have
                missing = ranks[:, r] - a[:, :, r].sum(0)  # (b,)
                place = merged.gather(1, missing.clamp(0, merged.shape[1] - 1)[:, None])[:, 0]
                settled = (last == sort_key.NOWHERE) | ((missing < merged.shape[1]) & (place >= last))
                found[:, r] = torch.where(alive[:, r] & settled, place, found[:, r])
                alive[:, r] &= ~settled
                a[:, :, r] += (shown >= last[:, None]).sum(2)
                cut[:, r] = last - 1
