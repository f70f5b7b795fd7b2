"""A faster scan with the same results, bit for bit: products of rounded vectors find candidates, whose exact scores then decide.

If the processor multiplies bf16 faster than fp32, vectors in fp32 and fp16 are rounded to bf16. If it does not, but multiplies
bytes (AVX512-VNNI), vectors of any dtype are rounded to bytes with a scale for each row.

    q', k'      the rounded query and row
    s, a        scores as the kernels compute them: s from q and k, a from q' and k'
    |s - a| <= |q - q'| |k| + |q'| |k - k'| + g (|q| |k| + |q'| |k'|),  g = (D + 16) 2^-23
                the effect of rounding the vectors (Cauchy-Schwarz), plus twice the error of D fp32 additions in any order
    bound       the right side, with the largest |k| and |k - k'| of the chunk
    max_score   the largest score that the filters keep

1. The candidates of a query are the M columns with the largest a among those with a <= max_score + bound. No other column can
   pass the filters.
2. Candidates with a <= max_score - bound certainly pass the filters. Let t be the N-th largest a of these. At least N columns
   with s >= t - bound pass, so candidates with a < t - 2 bound are not among the N hardest. The scores s of the other candidates
   are computed from the original vectors, and the N hardest with s <= max_score are the result.
3. A column that is not a candidate, but has a <= max_score + bound, has s <= bound + the smallest a of the candidates. If that is
   less than the N-th score of the result, no column was missed. It is then less than max_score, too, so all these columns pass
   the filters, and the number of columns that pass is also exact. Otherwise, the original vectors are scanned for this query.
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
MIN_QUERIES, MIN_ROWS, MIN_DIM = 1024, 16384, 64  # below these, rounding the rows takes as much time as it saves
MAX_RESCANNED = 0.25  # fraction of the queries; if more are scanned again, the two scans take longer than one
ROUNDED_ROWS = 2048  # rows that are rounded at a time, so that they stay in the cache
TINY = 2.0**-50  # added to each norm, because the squares in it may underflow
SLACK = 1.01  # for the rounding errors of the norms and of the bound itself


@dataclass(frozen=True)
class Rounded:
    """Rounded vectors, as arguments of the op that multiplies them, and norms."""

    arguments: tuple[Tensor, ...]
    norm: Tensor  # (M,) of the original vectors; NaN if a vector contains NaN
    error: Tensor  # (M,) of the difference between the original and the rounded vectors


def round_to_bf16(vectors: Tensor) -> Rounded:
    """vectors (M, D) fp32 or fp16."""
    rounded = torch.empty(vectors.shape, dtype=torch.bfloat16, device="cpu")
    norms = torch.empty(2, len(vectors), device="cpu")
    for begin in range(0, len(vectors), ROUNDED_ROWS):
        rows = slice(begin, begin + ROUNDED_ROWS)
        exact = vectors[rows].float()
        rounded[rows] = exact
        for norm, values in zip(norms, (exact, exact - rounded[rows]), strict=True):
            norm[rows] = torch.linalg.vector_norm(values, dim=1) + TINY
    return Rounded((rounded,), *norms)


def round_to_codes(vectors: Tensor) -> Rounded:
    """vectors (M, D) fp32, bf16 or fp16."""
    codes, scale, norms = CPU_OPS["round_to_codes"](vectors)
    return Rounded((codes, scale), *(norms + TINY))


def mine_bf16(query: Rounded, keys: Rounded, M: int, pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    return CPU_OPS["mine_hardest"](*query.arguments, *keys.arguments, M, True, *pool)


def mine_codes(query: Rounded, keys: Rounded, M: int, pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    return CPU_OPS["mine_hardest_codes"](*query.arguments, *keys.arguments, M, *pool)


@dataclass(frozen=True)
class Rounding:
    """One way of rounding, and the op that multiplies the rounded vectors."""

    dtypes: tuple[torch.dtype, ...]
    round: Callable[[Tensor], Rounded]
    mine: Callable[[Rounded, Rounded, int, Pool], tuple[Tensor, Tensor, Tensor]]
    extra: int  # number of candidates beyond N, because scores close to the N-th may change their order


BF16 = Rounding((torch.float32, torch.float16), round_to_bf16, mine_bf16, 48)
CODES = Rounding(KERNEL_DTYPES, round_to_codes, mine_codes, 200)


def fastest() -> Rounding | None:
    """The rounding whose products are faster than those of fp32 on this processor, if there is one."""
    if compiled.isa_for(torch.bfloat16, torch.bfloat16).endswith("bf16"):
        return BF16
    return CODES if compiled.isa_for(torch.uint8, torch.uint8) else None


def error_bound(D: int, query: Rounded, keys: Rounded) -> Tensor:
    """A bound on |s - a| for each query and every key. Keys that contain NaN have no score and are ignored."""
    k, k_error = (torch.where(keys.norm.isnan(), 0.0, norm).max() for norm in (keys.norm, keys.error))
    q_rounded, k_rounded = query.norm + query.error, k + k_error  # upper bounds of the norms of q' and k'
    return SLACK * (
        query.error * k + q_rounded * k_error + (D + 16) * 2.0**-23 * (query.norm * k + q_rounded * k_rounded)
    )


@dataclass
class Prefilter:
    """Finds the hardest rows by candidates. It counts all queries, and those that had to be scanned again."""

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
        """The result of scan.hardest_rows. Call it only if `is_faster` is true, with pools without bounds."""
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
        # In descending order, the candidates that may not pass the filters come before those that certainly pass.
        passes_below = torch.full_like(bound, torch.inf) if max_score is None else max_score - bound
        num_doubtful = (approximate > passes_below[:, None]).sum(1, keepdim=True)  # (B, 1)
        nth = num_doubtful + N - 1  # (B, 1): the place of t
        t = approximate.gather(1, nth.clamp_max(approximate.shape[1] - 1))
        lowest = torch.where(nth < approximate.shape[1], t - 2 * bound[:, None], -torch.inf)  # (B, 1)
        columns = torch.where(approximate >= lowest, index, -1).sort(1).values  # (B, M), -1 first
        scores, found, num_passed = CPU_OPS["mine_gathered"](query, keys, columns, N, max_score)
        num_kept = num_kept - (columns >= 0).sum(1) + num_passed
        complete, highest_missed = index[:, -1] < 0, approximate[:, -1] + bound  # (B,) each
        undecided = (~(complete | (highest_missed < scores[:, -1])) | ~bound.isfinite()).nonzero()[:, 0]  # (U,)
        self.num_queries, self.num_rescanned = self.num_queries + len(query), self.num_rescanned + len(undecided)
        if len(undecided):
            query_ids, anchor = (None if x is None else x[undecided] for x in (pool.query_ids, anchor))
            mask = pool.negative_mask
            if mask is not None and mask.dim() == 2:
                mask = mask[undecided]
            pool = pool._replace(negative_mask=mask, query_ids=query_ids)
            if select.has_filter:
                pool = bounded(ops, query[undecided], keys, pool, select, anchor)
            exact = ops.mine_hardest(query[undecided], keys, N, True, *pool)
            scores[undecided], found[undecided], num_kept[undecided] = exact
        return scores, found, num_kept if want_num_kept else None
