"""The ops over a queue whose rows are spread over ranks: same names and signatures as a backend's, the same answers.

    gather    every rank sees the queries of all of them, (B, D), with their masks and bounds
    run       its backend's op on the rows that it holds
    return    each query's W partial results go to the rank that owns the query, which merges them in rank order

Log-sum-exps merge as log-sum-exps and softmax means by their weights; counts add up; places (negmine/order.py) hold global
indices on the way, so that selections merge exactly, ties included, and the windows of negmine/pool.py are global windows.
Nothing of size (B, K) exists, and no row of the queue travels.
"""

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from negmine import order
from negmine.backends import Launchers, in_two, one_by_one
from negmine.pool import Pool
from negmine.queue import gather

AT_ONCE = 1024  # places of a shard that rank_thresholds looks at in one round


class Ranks:
    """The ranks that make one call together, and the number of queries that each brings."""

    def __init__(
        self, op: str, group: Any, queue: Tensor, call: str, count: int | None, want_mean: bool = False
    ) -> None:
        """call: what all ranks must say alike. count: own queries, None where this rank refused its input."""
        together = dist.is_available() and dist.is_initialized()
        self.group, self.queue = group, queue
        self.world = dist.get_world_size(group) if together else 1
        self.rank = dist.get_rank(group) if together else 0
        mine = torch.tensor([-1 if count is None else count, want_mean, zlib.crc32(call.encode())], device=queue.device)
        table = (gather(mine[None], group, [1] * self.world) if self.world > 1 else mine[None]).tolist()  # (W, 3)
        refused = [rank for rank, row in enumerate(table) if row[0] < 0]
        if refused and count is not None:
            raise ValueError(f"{op}: the ranks must call it together, but rank {refused[0]} refused its input")
        if len({row[2] for row in table}) > 1 and count is not None:
            odd = next(rank for rank, row in enumerate(table) if row[2] != table[0][2])
            raise ValueError(
                f"{op}: the ranks must give the same options, dtypes and kinds of masks, "
                f"but rank {odd} gives others than rank 0; this is rank {self.rank} with {call}"
            )
        self.counts = [row[0] for row in table]
        self.want_mean = any(row[1] for row in table)

    def all_rows(self, rows: Tensor) -> Tensor:
        """Own rows (b, ...) -> those of every rank (B, ...)."""
        return gather(rows, self.group, self.counts) if self.world > 1 else rows

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


def upper_in_shard(places: Tensor, first: int) -> Tensor:
    """Upper bounds by global index -> by the index within a shard that begins at `first`.

    A bound whose index lies before the shard is the end of its score's ties there: the carry into the score says just that,
    except past +inf. A bound whose score is NaN keeps nothing and stays.
    """
    return torch.where(places > order.TOP, places, (places + first).clamp_max(order.TOP))


def to_queue(places: Tensor, first: int) -> Tensor:
    """Places by the index within a shard -> places by global index."""
    return torch.where(places == order.NOWHERE, places, places - first)


class Shards:
    """negmine.backends.Launchers of one call: `ops` on this rank's rows, merged over the ranks."""

    info_nce = logsumexp_window = None

    def __init__(self, ops: Launchers, ranks: Ranks, query: Tensor, K: int, first: int) -> None:
        self.ops, self.ranks, self.K, self.first = ops, ranks, K, first
        self.query = ranks.all_rows(query)  # (B, D)
        self.logsumexp_pair = in_two(self.logsumexp)
        self.logsumexp_mine = one_by_one(self.logsumexp, self.mine_hardest)

    def rows(self, negative_keys: Tensor) -> int:
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
        self, query: Tensor, negative_keys: Tensor, scale: Tensor, pivot: Tensor | None, want_mean: bool, *pool: Any
    ) -> tuple[Tensor, ...]:
        everyones = None if pivot is None else self.ranks.all_rows(pivot)  # (B,)
        made = self.ops.logsumexp(self.query, negative_keys, scale, everyones, self.ranks.want_mean, *self._pool(pool))
        lse, kept, above = (self.ranks.parts(part) for part in (made[0], made[2], made[3]))  # (W, b) each
        merged = lse.logsumexp(0)  # (b,)
        mean = query.new_zeros(0, query.shape[1], dtype=torch.float32)
        if self.ranks.want_mean:
            means = self.ranks.parts(made[1])  # (W, b, D)
            weight = (lse - merged).exp().masked_fill(merged == -torch.inf, 0.0)  # (W, b)
            mean = (weight[:, :, None] * means).sum(0) if want_mean else mean
        return merged, mean, kept.sum(0), above.sum(0)

    def count_negatives(self, query: Tensor, negative_keys: Tensor, *pool: Any) -> Tensor:
        return self._counts(negative_keys, self._pool(pool)).sum(0)

    def _counts(self, negative_keys: Tensor, pool: Pool) -> Tensor:
        """(W, b) int64: columns of each shard in the pool of own queries."""
        if pool.is_everything:
            held = torch.full((len(self.query),), len(negative_keys), dtype=torch.int64, device=self.query.device)
            return self.ranks.parts(held)
        return self.ranks.parts(self.ops.count_negatives(self.query, negative_keys, *pool))

    def _hardest(self, negative_keys: Tensor, N: int, pool: Pool) -> Tensor:
        """(W, b, N) int64: the N highest places of each shard for own queries."""
        scores, index = self.ops.mine_hardest(self.query, negative_keys, N, *pool)
        places = order.pack(scores, index + self.first).masked_fill(index < 0, order.NOWHERE)  # (B, N)
        return self.ranks.parts(places)

    def mine_hardest(self, query: Tensor, negative_keys: Tensor, N: int, *pool: Any) -> tuple[Tensor, Tensor]:
        places = self._hardest(negative_keys, N, self._pool(pool)).transpose(0, 1).flatten(1)  # (b, W * N)
        return order.unpack(places.topk(N, dim=1, sorted=True).values)

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
        cut = torch.full_like(ranks, order.TOP)  # (b, R) inclusive
        found = torch.full_like(ranks, order.NOWHERE)  # (b, R)
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
                reached = to_queue(self.ops.rank_thresholds(self.query, negative_keys, asked, *own), self.first)
                target = self.ranks.parts(reached).amax(0)  # (b, R)
                lower = self.ranks.all_rows(target)  # (B, R)
                bounds = (self._pool(pool, lower=lower[:, r].contiguous()) for r in range(R))
                passed = torch.stack([self._counts(negative_keys, bound) for bound in bounds], 2)  # (W, b, R)
                fits = (target != order.NOWHERE) & (passed.sum(0) <= ranks)  # (b, R)
                a = torch.where(fits, passed, a)
                cut = torch.where(fits, target - 1, cut)
                end = torch.where(fits | (target == order.NOWHERE), end, passed)
            upper = self.ranks.all_rows(cut)  # (B, R)
            for r in range(R):
                bound = self._pool(pool, upper=upper[:, r].contiguous())
                shown = self._hardest(negative_keys, at_once, bound)  # (W, b, at_once)
                merged = shown.transpose(0, 1).flatten(1).sort(1, descending=True).values  # (b, W * at_once)
                last = shown[:, :, -1].amax(0)  # (b,) NOWHERE where the shards showed all they have
                missing = ranks[:, r] - a[:, :, r].sum(0)  # (b,)
                place = merged.gather(1, missing.clamp(0, merged.shape[1] - 1)[:, None])[:, 0]
                settled = (last == order.NOWHERE) | ((missing < merged.shape[1]) & (place >= last))
                found[:, r] = torch.where(alive[:, r] & settled, place, found[:, r])
                alive[:, r] &= ~settled
                a[:, :, r] += (shown >= last[:, None]).sum(2)
                cut[:, r] = last - 1
