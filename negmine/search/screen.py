"""A scan of fp32 or fp16 by way of bf16, where the processor multiplies that faster: the same answer to the bit.

    q', k'      query and row rounded to bf16;  s the kernel's score of q and k, a its score of q' and k'
    |s - a| <= |q - q'| |k| + |q'| |k - k'| + g (|q| |k| + |q'| |k'|),  g = (D + 16) 2^-23
                what rounding the vectors changes (Cauchy-Schwarz), and what any order of D additions in fp32 may lose, twice over
    reach_b     the right side with the largest |k|, |k - k'| of the chunk

The N + EXTRA columns of largest a, out of those with a <= top + reach, are scored as stored and ranked: N of them, with s <= top.
A column that was not looked at has s <= reach + the last of these a. Where that lies below the N-th score found, nothing was
missed; and as it lies below top, a column that was counted (a <= top + reach) and has s > top was looked at. The other queries,
where scores lie too close for that, are scanned as stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from negmine import cpp_ops, order
from negmine.backends import Launchers
from negmine.options import Select
from negmine.pool import Pool, bounded

LAUNCHERS = cpp_ops.launchers("CPU")
EXTRA = 48  # columns looked at beyond N: the near ties
LEAST_QUERIES, LEAST_ROWS, LEAST_DIM = 1024, 16384, 64  # below them rounding the rows costs what the products save
MOST_FAILED = 0.25  # of the queries: past it two scans cost more than one
ROUNDED_ROWS = 2048  # at a time, so that they stay in the cache
TINY = 2.0**-50  # added to each norm, whose squares may underflow
SLACK = 1.01  # for the roundings of the norms and of the bound itself


def halved(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows (M, D) fp32 or fp16 -> x' (M, D) bf16 and the norms of x and of x - x' (M,); NaN where a row holds one."""
    half = torch.empty(rows.shape, dtype=torch.bfloat16)
    norms = torch.empty(2, len(rows))
    for begin in range(0, len(rows), ROUNDED_ROWS):
        part = slice(begin, begin + ROUNDED_ROWS)
        exact = rows[part].float()
        half[part] = exact
        for norm, vectors in zip(norms, (exact, exact - half[part]), strict=True):
            norm[part] = torch.linalg.vector_norm(vectors, dim=1) + TINY
    return half, *norms


def reach_of(D: int, query_norms: tuple[Tensor, ...], key_norms: tuple[Tensor, ...]) -> Tensor:
    """The bound on |s - a| for each query and any key. A key that holds NaN has no score at all."""
    q, q_lost = query_norms
    k, k_lost = (torch.where(key_norms[0].isnan(), 0.0, norm).max() for norm in key_norms)
    q_half, k_half = q + q_lost, k + k_lost  # no less than the norms of q' and k'
    return SLACK * (q_lost * k + q_half * k_lost + (D + 16) * 2.0**-23 * (q * k + q_half * k_half))


@dataclass
class Screen:
    """What a scan remembers: how many queries were screened, and how many of them scanned again."""

    tried: int = 0
    failed: int = 0

    def pays(self, ops: Launchers | None, query: Tensor, keys: Tensor, N: int, select: Select) -> bool:
        if ops is None or ops.mine_hardest is not LAUNCHERS.get("mine_hardest"):
            return False
        wide = query.dtype == keys.dtype and keys.dtype in (torch.float32, torch.float16)
        fast = wide and cpp_ops.isa_for(torch.bfloat16, torch.bfloat16).endswith("bf16")
        large = len(query) >= LEAST_QUERIES and len(keys) >= LEAST_ROWS and query.shape[1] >= LEAST_DIM
        plain = select.min_score is None and not (select.starts_late or select.ends_early)
        return fast and large and plain and len(keys) >= 64 * N and self.failed <= MOST_FAILED * self.tried

    def __call__(
        self,
        ops: Launchers | None,
        query: Tensor,
        keys: Tensor,
        N: int,
        pool: Pool,
        select: Select,
        anchor: Tensor | None,
        want_kept: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As scan.hardest, of an unbounded pool; where `pays` says so."""
        assert ops is not None
        half_query, *query_norms = halved(query)
        half_keys, *key_norms = halved(keys)
        reach = reach_of(query.shape[1], (*query_norms,), (*key_norms,))  # (B,)
        top, wide = None, pool
        if select.has_filter:
            top = select.highest_score(torch.zeros(len(query)) if anchor is None else anchor)  # (B,)
            wide = pool._replace(upper=order.pack(top + reach, 0))
        counts = ops.mine_hardest_kept(half_query, half_keys, N + EXTRA, *wide)
        columns = counts[1].sort(1).values  # (B, N + EXTRA), -1 first
        scores, index, kept = LAUNCHERS["mine_listed"](query, keys, columns, N, top)
        all_seen, last = columns[:, 0] < 0, counts[0][:, -1] + reach  # (B,) each
        kept = counts[2] - (columns >= 0).sum(1) + kept
        failed = (~(all_seen | (last < scores[:, -1])) | ~reach.isfinite()).nonzero()[:, 0]  # (F,)
        self.tried, self.failed = self.tried + len(query), self.failed + len(failed)
        if len(failed):
            own = [None if part is None else part[failed] for part in (pool.query_ids, anchor)]
            mask = pool.negative_mask
            if mask is not None and mask.dim() == 2:
                mask = mask[failed]
            again = pool._replace(negative_mask=mask, query_ids=own[0])
            if select.has_filter:
                again = bounded(ops, query[failed], keys, again, select, own[1])
            exact = ops.mine_hardest_kept(query[failed], keys, N, *again)
            scores[failed], index[failed], kept[failed] = exact
        return scores, index, kept if want_kept else None
