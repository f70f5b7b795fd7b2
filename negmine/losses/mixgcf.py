"""MixGCF: the positive is mixed into the hardest of some random negatives, in each layer of a graph network."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from negmine.losses.methods import Logits, reduced
from negmine.ops import checks, philox
from negmine.ops.accumulate import each_widened
from negmine.ops.backends import choose
from negmine.ops.column_lists import flat_rows, gather_rows
from negmine.ops.negatives import check_negatives
from negmine.ops.pool import Pool, pool_of_lists, usable
from negmine.ops.vectors import promoted, widened
from negmine.ops.windows import Draw


def mixgcf(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Any,
    *,
    candidates: int = 64,
    layers: int = 1,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    query_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    row_offset: int | Tensor = 0,
    backend: str | None = None,
) -> Tensor:
    """MixGCF (Huang et al. 2021, KDD; huangtinglin/MixGCF modules/LightGCN.py): one synthetic negative h for each query.

        loss = log(1 + exp((q . h - q . k) / T)),   h_l = a_l k_l + (1 - a_l) n_l in each layer l,   a_l uniform in [0, 1)
        n_l: of the candidates' vectors of layer l, the one with the largest q_l . n_l

    A vector of D numbers consists of `layers` parts of D / layers numbers, the embeddings of the layers of a graph network. All
    mixes of a layer have the same a_l, so the hardest mix is that of the hardest candidate. The candidates are drawn for each
    query with replacement from all keys, and those that the masks hide do not count: a query that is left with none has loss 0.
    n_l is chosen without gradient; gradients flow to the query, the positive key and negatives that require grad, as in the
    public code. A bias of the negatives is not used. The vectors of the candidates (B, candidates, D) are gathered, and no
    kernel is needed, so `backend` changes nothing.
    """
    op = "mixgcf"
    candidates = checks.require_count(op, "candidates", candidates)
    layers = checks.require_count(op, "layers", layers)
    temperature = checks.require_temperature(op, temperature)
    draw = Draw(*checks.require_draw(op, seed, step, row_offset))
    keys, pool = check_negatives(op, query, positive_key, negative_keys, query_ids, query_labels, own_keys=True)
    checks.require_positive(op, positive_key, query)
    B, width = len(query), query.shape[1] // layers
    if width * layers != query.shape[1]:
        raise checks.refuse(op, "layers", f"a divisor of query's D = {query.shape[1]}", layers)
    query, positive_key, keys = promoted(query, positive_key, keys)
    if backend is not None:
        choose(op, (), backend, (query, keys))  # refuses what no backend is called
    query, positive_key, keys = each_widened(query, positive_key, keys)
    q, positive = (widened(vectors).reshape(B, layers, width) for vectors in (query, positive_key))
    index = _drawn(query, keys, pool, candidates, draw).sort(dim=1).values  # (B, N)
    matrix, rows = flat_rows(keys, index)  # (.., D), (B, N) ascending: of equal scores, the lower index is chosen
    vectors = gather_rows(matrix.detach(), rows, q.dtype).view(B, candidates, layers, width)
    scores = (q.detach()[:, None] * vectors).sum(3)  # (B, N, layers)
    absent = (rows < 0) | scores.sum(2).isnan()  # (B, N)
    scores = scores.masked_fill(absent[..., None], -torch.inf)
    hardest = rows.masked_fill(absent, -1).gather(1, scores.argmax(1))  # (B, layers)
    layer = torch.arange(layers, device=q.device)  # (layers,)
    parts = torch.where(hardest < 0, -1, hardest * layers + layer)  # (B, layers) rows of the parts of the keys
    negative = gather_rows(matrix.reshape(-1, width), parts, q.dtype)  # (B, layers, width)
    word = philox.words(draw.rows(query), layer, philox.STREAM_PARTNER, draw.seed, draw.step)[0]  # (B, layers)
    share = philox.unit(word, None).to(q.dtype)[..., None]  # (B, layers, 1) of the positive
    gap = ((1 - share) * q * (negative - positive)).sum((1, 2)) / temperature  # (B,) (q . h - q . k) / T
    return reduced(op, F.softplus(gap), Logits(gap, gap, hardest[:, 0] >= 0), reduction)


def _drawn(query: Tensor, keys: Tensor, pool: Pool, count: int, draw: Draw) -> Tensor:
    """Numbers of keys (B, count) int64, drawn with replacement; -1 for those that the masks hide."""
    slots = torch.arange(count, device=query.device)  # (count,)
    word = philox.words(draw.rows(query), slots, philox.STREAM_SAMPLE, draw.seed, draw.step)[0]  # (B, count)
    K = keys.shape[-2]
    if not K:
        return torch.full_like(word, -1)
    index = (word * (K if pool.num_rows is None else pool.num_rows)) >> 32  # (B, count)
    allowed = usable(pool_of_lists(pool, index), query, index[..., None])
    return index if allowed is None else index.masked_fill(~allowed, -1)
