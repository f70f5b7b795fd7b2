"""A faster scan: products of rounded vectors find candidates, which are rescored. The result equals that of a scan, bit for bit.

fp32 and fp16 vectors are rounded to bf16 where the processor multiplies bf16 faster than fp32. Where it does not, and multiplies
bytes (AVX512-VNNI), vectors of any storage are rounded to bytes with a scale for each row.

    q', k'      the query and the row, rounded
    s, a        the kernel's scores: s of q and k, a of q' and k'
    |s - a| <= |q - q'| |k| + |q'| |k - k'| + g (|q| |k| + |q'| |k'|),  g = (D + 16) 2^-23
                the effect of rounding the vectors (Cauchy-Schwarz), plus twice the error of D fp32 additions in any order
    bound_b     the right side with the largest |k| and |k - k'| of the chunk
    max_score   the largest score that the filters keep

The candidates are the M columns with the largest a among those with a <= max_score + bound. Let t be the N-th largest a of the
candidates with a <= max_score - bound, which all pass: the N-th hardest column has s >= t - bound, so that candidates with
a < t - 2 bound are not rescored. The scores s of the other candidates are computed from the original vectors, and the N hardest
with s <= max_score are returned. Every column that is no candidate has s <= bound + the smallest a of the candidates. If that is
less than the N-th score found, no column was missed. It is then also less than max_score, so every column with
a <= max_score + bound and s > max_score is a candidate, and the count of kept rows is exact as well. For all other queries, the
original vectors are scanned.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from negmine.ops import compiled, sort_key
from negmine.ops.backends import KERNEL_DTYPES, Kernels
from negmine.ops.pool import Pool
from negmine.ops.windows import bounded
from negmine.options import Select

CPU_OPS = {} if compiled.CPU_REFUSAL else compiled.functions("negmine_cpu", "CPU")
MIN_QUERIES, MIN_ROWS, MIN_DIM = 1024, 16384, 64  # below these, rounding the rows takes as long as it saves
MAX_RESCANNED = 0.25  # share of the queries; above it the two scans take longer than one
ROUNDED_ROWS = 2048  # at a time, so that they stay in the cache
TINY = 2.0**-50  # added to each norm, because its squares may underflow
SLACK = 1.01  # for the rounding errors of the norms and of the bound itself


@dataclass(frozen=True)
class Rounded:
    """Rounded vectors, as the op that multiplies them takes them, and the norms of the vectors and of what rounding changed."""

    arguments: tuple[Tensor, ...]
    norm: Tensor  # (M,), NaN where a vector holds NaN
    error: Tensor  # (M,)


def round_to_bf16(vectors: Tensor) -> Rounded:
    """vectors (M, D) fp32 or fp16."""
    half = torch.empty(vectors.shape, dtype=torch.bfloat16, device="cpu")
    norms = torch.empty(2, len(vectors), device="cpu")
    for begin in range(0, len(vectors), ROUNDED_ROWS):
        part = slice(begin, begin + ROUNDED_ROWS)
        exact = vectors[part].float()
        half[part] = exact
        for norm, some in zip(norms, (exact, exact - half[part]), strict=True):
            norm[part] = torch.linalg.vector_norm(some, dim=1) + TINY
    return Rounded((half,), *norms)


def round_to_codes(vectors: Tensor) -> Rounded:
    """vectors (M, D) of any storage."""
    codes, scale, norms = CPU_OPS["round_to_codes"](vectors)
    return Rounded((codes, scale), *(norms + TINY))


def mine_bf16(query: Rounded, keys: Rounded, M: int, pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    return CPU_OPS["mine_hardest"](*query.arguments, *keys.arguments, M, True, *pool)


def mine_codes(query: Rounded, keys: Rounded, M: int, pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    return CPU_OPS["mine_hardest_codes"](*query.arguments, *keys.arguments, M, *pool)


@dataclass(frozen=True)
class Rounding:
    """One way of rounding: what it takes, and how many candidates beyond N it needs."""

    dtypes: tuple[torch.dtype, ...]
    round: Callable[[Tensor], Rounded]
    mine: Callable[[Rounded, Rounded, int, Pool], tuple[Tensor, Tensor, Tensor]]
    extra: int  # more than 0, because many scores may be nearly equal


BF16 = Rounding((torch.float32, torch.float16), round_to_bf16, mine_bf16, 48)
CODES = Rounding(KERNEL_DTYPES, round_to_codes, mine_codes, 200)


def fastest() -> Rounding | None:
    """The rounding whose products are faster than fp32's on this processor."""
    if compiled.isa_for(torch.bfloat16, torch.bfloat16).endswith("bf16"):
        return BF16
    return CODES if compiled.isa_for(torch.uint8, torch.uint8) else None


def error_bound(D: int, query: Rounded, keys: Rounded) -> Tensor:
    """The bound on |s - a| for each query and any key; keys that hold NaN have no score and are left out."""
    k, k_error = (torch.where(keys.norm.isnan(), 0.0, norm).max() for norm in (keys.norm, keys.error))
    q_rounded, k_rounded = query.norm + query.error, k + k_error  # no less than the norms of q' and k'
    return SLACK * (
        query.error * k + q_rounded * k_error + (D + 16) * 2.0**-23 * (query.norm * k + q_rounded * k_rounded)
    )


@dataclass
class Prefilter:
    """Finds the hardest rows by candidates; counts the queries it served, and how many of them were scanned again."""

    num_queries: int = 0
    num_rescanned: int = 0

    def is_faster(self, ops: Kernels | None, query: Tensor, keys: Tensor, N: int, select: Select) -> bool:
        if ops is None or ops.mine_hardest is not CPU_OPS.get("mine_hardest"):
            return False
        rounding = fastest()
        fits = rounding is not None and query.dtype == keys.dtype and keys.dtype in rounding.dtypes
        large = len(query) >= MIN_QUERIES and len(keys) >= MIN_ROWS and query.shape[1] >= MIN_DIM
        plain = select.min_score is None and not (select.starts_late or select.ends_early)
        return (
            fits and large and plain and len(keys) >= 64 * N and self.num_rescanned <= MAX_RESCANNED * self.num_queries
        )

    def __call__(
        self,
        ops: Kernels | None,
        query: Tensor,
        keys: Tensor,
        N: int,
        pool: Pool,
        select: Select,
        anchor: Tensor | None,
        want_num_kept: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The result of scan.hardest_rows. For pools without bounds, where `is_faster` is true."""
        rounding = fastest()
        assert ops is not None and rounding is not None
        rounded_query, rounded_keys = rounding.round(query), rounding.round(keys)
        bound = error_bound(query.shape[1], rounded_query, rounded_keys)  # (B,)
        max_score, candidate_pool = None, pool
        if select.has_filter:
            max_score = select.highest_score(
                torch.zeros(len(query), device="cpu") if anchor is None else anchor
            )  # (B,)
            candidate_pool = pool._replace(upper=sort_key.pack(max_score + bound, 0))
        approximate, index, num_kept = rounding.mine(rounded_query, rounded_keys, N + rounding.extra, candidate_pool)
        # The scores descend: first come the columns that may not pass the filters, then those that certainly pass.
        highest_sure = torch.full_like(bound, torch.inf) if max_score is None else max_score - bound
        last = (
            (approximate > highest_sure[:, None]).sum(1, keepdim=True) + N - 1
        )  # (B, 1), place of the N-th of the latter
        known = approximate.gather(1, last.clamp_max(approximate.shape[1] - 1))
        least = torch.where(last < approximate.shape[1], known - 2 * bound[:, None], -torch.inf)  # (B, 1)
        columns = torch.where(approximate >= least, index, -1).sort(1).values  # (B, M), -1 first
        scores, found, kept = CPU_OPS["mine_gathered"](query, keys, columns, N, max_score)
        num_kept = num_kept - (columns >= 0).sum(1) + kept
        complete, highest_missed = index[:, -1] < 0, approximate[:, -1] + bound  # (B,) each
        undecided = (~(complete | (highest_missed < scores[:, -1])) | ~bound.isfinite()).nonzero()[:, 0]  # (U,)
        self.num_queries, self.num_rescanned = self.num_queries + len(query), self.num_rescanned + len(undecided)
        if len(undecided):
            query_ids, anchor = (None if part is None else part[undecided] for part in (pool.query_ids, anchor))
            mask = pool.negative_mask
            if mask is not None and mask.dim() == 2:
                mask = mask[undecided]
            pool = pool._replace(negative_mask=mask, query_ids=query_ids)
            if select.has_filter:
                pool = bounded(ops, query[undecided], keys, pool, select, anchor)
            exact = ops.mine_hardest(query[undecided], keys, N, True, *pool)
            scores[undecided], found[undecided], num_kept[undecided] = exact
        return scores, found, num_kept if want_num_kept else None
