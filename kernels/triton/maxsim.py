"""maxsim in Triton: for each query token the largest score with a token of a document, summed over the tokens of the query.

A program keeps a tile of query tokens, with whole queries if they fit, and processes its documents one after the other, in tiles
of tokens. Queries longer than a tile are split into parts whose sums are added in order, without atomics. The token scores
(B, I, K, J) are never stored. kernels/README.md explains the arguments and results.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import tiles
from .launch import launcher, programs_at_once, widens
from .launch import score_tile as choose_tile
from .pool import EVERYTHING
from .score import load_whole_rows, score_tile


@triton.jit(do_not_specialize=["B", "K", "documents"])
def maxsim_kernel(
    query_ptr, keys_ptr, stride_qb, stride_kk, query_lengths_ptr, lengths_ptr, scores_ptr, index_ptr, B, TOKENS, K, J, documents,
    WIDEN: tl.constexpr, D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = BLOCK_B // PART
    first = tl.program_id(0) * QUERIES
    part = tl.program_id(2)
    row = tl.arange(0, BLOCK_B)
    b = first + row // PART  # (BLOCK_B,)
    i = part * PART + row % PART
    stored = (b < B) & (i < TOKENS)
    counts = stored
    if query_lengths_ptr is not None:
        counts = stored & (i < tl.load(query_lengths_ptr + b, mask=stored, other=0))
    offs_b = b.to(tl.int64) * TOKENS + i
    query = load_whole_rows(query_ptr, offs_b, counts, stride_qb, D, BLOCK_D, WIDEN)  # (BLOCK_B, BLOCK_D)
    offs_q = first + tl.arange(0, QUERIES)
    start = tl.program_id(1) * documents
    for k in range(start, tl.minimum(start + documents, K)):
        length = J
        if lengths_ptr is not None:
            length = tl.minimum(tl.maximum(tl.load(lengths_ptr + k), 0), J).to(tl.int32)
        best = tl.full((BLOCK_B,), float("-inf"), tl.float32)
        token = tl.full((BLOCK_B,), -1, tl.int32)
        broken = tl.zeros((BLOCK_B,), tl.int32)
        for j0 in tl.range(0, length, BLOCK_K, num_stages=STAGES):
            j = j0 + tl.arange(0, BLOCK_K)
            ok = j < length
            offs_k = tl.cast(k, tl.int64) * J + j
            keys = load_whole_rows(keys_ptr, offs_k, ok, stride_kk, D, BLOCK_D, WIDEN)  # (BLOCK_K, BLOCK_D)
            s = score_tile(
                query_ptr, query, offs_b, counts, stride_qb, keys_ptr, keys, offs_k, ok, stride_kk,
                D, BLOCK_B, BLOCK_K, BLOCK_D, WIDEN,
            )  # (BLOCK_B, BLOCK_K)  # fmt: skip
            nan = (s != s) & ok[None, :]
            s = tl.where(ok[None, :] & (s == s), s, float("-inf"))
            highest = tl.max(s, 1)  # (BLOCK_B,)
            if index_ptr is not None:
                at = tl.min(tl.where(s == highest[:, None], j[None, :], 2147483647), 1)  # (BLOCK_B,) the first
                token = tl.where(highest > best, at, token)
            best = tl.maximum(best, highest)
            broken = tl.maximum(broken, tl.max(nan.to(tl.int32), 1))
        best = tl.where(broken > 0, float("nan"), best)
        total = tl.sum(tl.reshape(tl.where(counts, best, 0.0), (QUERIES, PART)), 1)  # (QUERIES,)
        total = tl.where(length == 0, float("-inf"), total)
        tl.store(scores_ptr + (part * B + offs_q).to(tl.int64) * K + k, total, mask=offs_q < B)
        if index_ptr is not None:
            token = tl.where((broken > 0) & (token < 0), 0, token)  # where all others are -inf
            found = tl.where(counts & (token >= 0), tl.cast(k, tl.int64) * J + token, -1)
            tl.store(index_ptr + offs_b * K + k, found, mask=stored)


@launcher
def maxsim(
    query: Tensor,
    negative_keys: Tensor,
    query_lengths: Tensor | None,
    negative_lengths: Tensor | None,
    want_index: bool,
) -> tuple[Tensor, Tensor]:
    """scores (B, K) fp32, index (B or 0, I, K) int64."""
    (B, tokens, D), (K, J, _) = query.shape, negative_keys.shape
    q, keys = query.reshape(B * tokens, D), negative_keys.reshape(K * J, D)
    tile = choose_tile(q, keys, EVERYTHING)
    part = min(tile.BLOCK_B, tiles.next_power_of_2(tokens))
    parts = -(-tokens // part)
    scores = query.new_empty(parts, B, K, dtype=torch.float32)
    index = query.new_empty(B if want_index else 0, tokens, K, dtype=torch.int64)
    if B and K:
        rows = -(-B // (tile.BLOCK_B // part))
        at_once = programs_at_once(query.device, tile)
        documents = -(-K // max(1, min(K, at_once // (rows * parts))))
        maxsim_kernel[(rows, -(-K // documents), parts)](
            q, keys, q.stride(0), keys.stride(0), query_lengths, negative_lengths, scores, index if want_index else None,
            B, tokens, K, J, documents,
            widens(q, keys), D, tile.BLOCK_B, min(tile.BLOCK_K, max(16, tiles.next_power_of_2(J))), tile.BLOCK_D,
            part, tile.num_stages, num_warps=tile.num_warps,
        )  # fmt: skip
    return scores[0] if parts == 1 else scores.sum(0), index
