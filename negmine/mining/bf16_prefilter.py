"""A faster scan of fp32 or fp16 vectors on processors with fast bf16 products: bf16 scores find candidates, which are rescored.

The result equals that of a scan of the original vectors, bit for bit.

    q', k'      the query and the row, rounded to bf16
    s, a        the kernel's scores: s of q and k, a of q' and k'
    |s - a| <= |q - q'| |k| + |q'| |k - k'| + g (|q| |k| + |q'| |k'|),  g = (D + 16) 2^-23
                the effect of rounding the vectors (Cauchy-Schwarz), plus twice the error of D fp32 additions in any order
    bound_b     the right side with the largest |k| and |k - k'| of the chunk
    max_score   the largest score that the filters keep

The candidates are the N + EXTRA columns with the largest a among those with a <= max_score + bound. Their scores s are computed
from the original vectors, and the N hardest with s <= max_score are returned. Every other column has s <= bound + the smallest a
of the candidates. If that is less than the N-th score found, no column was missed. It is then also less than max_score, so every
column with a <= max_score + bound and s > max_score is a candidate, and the count of kept rows is exact as well. For all other
queries, the original vectors are scanned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from negmine.ops import compiled, sort_key
from negmine.ops.backends import Kernels
from negmine.ops.pool import Pool
from negmine.ops.windows import bounded
from negmine.options import Select

CPU_OPS = {} if compiled.CPU_REFUSAL else compiled.functions("negmine_cpu", "CPU")
EXTRA = 48  # candidates beyond N, because scores may be nearly equal
MIN_QUERIES, MIN_ROWS, MIN_DIM = 1024, 16384, 64  # below these, rounding the rows takes as long as it saves
MAX_RESCANNED = 0.25  # share of the queries; above it the two scans take longer than one
ROUNDED_ROWS = 2048  # at a time, so that they stay in the cache
TINY = 2.0**-50  # added to each norm, because its squares may underflow
SLACK = 1.01  # for the rounding errors of the norms and of the bound itself


def round_to_bf16(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows (M, D) fp32 or fp16 -> x' (M, D) bf16 and the norms of x and of x - x' (M,); NaN where a row holds one."""
    half = torch.empty(rows.shape, dtype=torch.bfloat16, device="cpu")
    norms = torch.empty(2, len(rows), device="cpu")
    for begin in range(0, len(rows), ROUNDED_ROWS):
        part = slice(begin, begin + ROUNDED_ROWS)
        exact = rows[part].float()
        half[part] = exact
        for norm, vectors in zip(norms, (exact, exact - half[part]), strict=True):
            norm[part] = torch.linalg.vector_norm(vectors, dim=1) + TINY
    return half, *norms


def error_bound(D: int, query_norms: tuple[Tensor, ...], key_norms: tuple[Tensor, ...]) -> Tensor:
    """The bound on |s - a| for each query and any key; keys that hold NaN have no score and are left out."""
    q, q_error = query_norms
    k, k_error = (torch.where(key_norms[0].isnan(), 0.0, norm).max() for norm in key_norms)
    q_half, k_half = q + q_error, k + k_error  # no less than the norms of q' and k'
    return SLACK * (q_error * k + q_half * k_error + (D + 16) * 2.0**-23 * (q * k + q_half * k_half))


@dataclass
class Bf16Prefilter:
    """Finds the hardest rows by bf16 candidates; counts the queries it served, and how many of them were scanned again."""

    num_queries: int = 0
    num_rescanned: int = 0

    def is_faster(self, ops: Kernels | None, query: Tensor, keys: Tensor, N: int, select: Select) -> bool:
        if ops is None or ops.mine_hardest is not CPU_OPS.get("mine_hardest"):
            return False
        wide = query.dtype == keys.dtype and keys.dtype in (torch.float32, torch.float16)
        fast = wide and compiled.isa_for(torch.bfloat16, torch.bfloat16).endswith("bf16")
        large = len(query) >= MIN_QUERIES and len(keys) >= MIN_ROWS and query.shape[1] >= MIN_DIM
        plain = select.min_score is None and not (select.starts_late or select.ends_early)
        return (
            fast and large and plain and len(keys) >= 64 * N and self.num_rescanned <= MAX_RESCANNED * self.num_queries
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
        assert ops is not None
        half_query, *query_norms = round_to_bf16(query)
        half_keys, *key_norms = round_to_bf16(keys)
        bound = error_bound(query.shape[1], (*query_norms,), (*key_norms,))  # (B,)
        max_score, candidate_pool = None, pool
        if select.has_filter:
            max_score = select.highest_score(
                torch.zeros(len(query), device="cpu") if anchor is None else anchor
            )  # (B,)
            candidate_pool = pool._replace(upper=sort_key.pack(max_score + bound, 0))
        approximate = ops.mine_hardest(half_query, half_keys, N + EXTRA, True, *candidate_pool)
        columns = approximate[1].sort(1).values  # (B, N + EXTRA), -1 first
        scores, index, num_kept = CPU_OPS["mine_gathered"](query, keys, columns, N, max_score)
        complete, highest_missed = columns[:, 0] < 0, approximate[0][:, -1] + bound  # (B,) each
        num_kept = approximate[2] - (columns >= 0).sum(1) + num_kept
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
            scores[undecided], index[undecided], num_kept[undecided] = exact
        return scores, index, num_kept if want_num_kept else None
