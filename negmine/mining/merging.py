"""merge_parts: merges the parts of a mining job. The order does not matter: the result equals that of one process bit for bit."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from negmine.mining.parts import Part, unpack_ids
from negmine.mining.result import MiningResult
from negmine.mining.resume import flatten
from negmine.mining.row_lists import RowLists
from negmine.ops import sort_key
from negmine.ops.checks import describe, refuse

OP = "merge_parts"
SUMMED = ("num_dropped", "content")  # arrays whose entries for the same number are added
SAME = {
    "phase_digest": "of one phase",
    "plan": "of one plan, that is, of the same inputs and arguments",
    "kernels": "computed by the same kernels and instruction set, for scores to compare bit for bit",
}


def merge_parts(parts: Sequence[Part]) -> Part | MiningResult:
    """Merge several parts of one phase into one part.

    Parts may be merged in any order, and merged parts may be merged again. The result is always the same, bit for bit.

    Parameters
    ----------
    parts : list of Part
        Parts of the same plan and phase, computed by the same kernels. No two may cover the same query and row.

    Returns
    -------
    Part or MiningResult
        The merged part. In phase "negatives", the MiningResult once the parts cover every share of the queries.

    Raises
    ------
    ValueError, TypeError
        If the parts do not belong together or overlap.

    Examples
    --------
    >>> corpus = torch.randn(50, 16)
    >>> def engine(plan, phase, queries):
    ...     high = negmine.mining.mine_part(plan, phase, queries, corpus[30:], 30)
    ...     low = negmine.mining.mine_part(plan, phase, queries, corpus[:30], 0)
    ...     return negmine.mining.merge_parts([high, low])
    >>> split = negmine.mine_hard_negatives(corpus[:5], corpus, list(range(5)), num_negatives=2, engine=engine)
    >>> whole = negmine.mine_hard_negatives(corpus[:5], corpus, list(range(5)), num_negatives=2)
    >>> bool((split.indices == whole.indices).all())
    True
    """
    merged = join_parts(parts)
    is_whole = merged.phase == "negatives" and len(merged.facts["shares"]) == merged.facts["num_shares"]
    return result_of(merged) if is_whole else merged


def join_parts(parts: Sequence[Part]) -> Part:
    """Like merge_parts, but always returns a Part, even if it holds the negatives of all queries."""
    if not isinstance(parts, (list, tuple)) or not parts or not all(isinstance(part, Part) for part in parts):
        raise refuse(OP, "parts", "a list of one Part or more", parts, TypeError)
    first = parts[0]
    if all(part.phase == "negatives" for part in parts):
        _require_one_config([part.facts["config"] for part in parts])
    for name, wanted in SAME.items():
        values = [getattr(part, name) for part in parts]
        other = next((value for value in values if value != values[0]), None)
        if other is not None:
            raise refuse(OP, "parts", wanted, f"{values[0]} and {other}")
    if len(parts) == 1:
        return first
    tiles = np.concatenate([part.tiles for part in parts])
    tiles = tiles[np.lexsort(tiles.T[::-1])]
    if first.phase == "negatives":
        return _join_shares(parts, tiles)
    _require_disjoint(first.phase, tiles)
    arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in first.arrays}
    by_number = np.argsort(arrays["numbers"], kind="stable")
    numbers = arrays["numbers"][by_number]
    begins = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]][: len(numbers)])  # (U,) starts of the groups
    merged = {name: _merge(name, array[by_number], begins) for name, array in arrays.items()}
    return replace(first, tiles=tiles, arrays=merged)


def _merge(name: str, array: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Merge the rows of array (M, ...) that have the same number: group u starts at begins[u]. Returns (U, ...)."""
    if len(begins) == len(array):
        return array
    if name in SUMMED:
        return np.add.reduceat(array, begins)
    if name != "sort_keys":
        return array[begins]
    sizes = np.diff(np.r_[begins, len(array)])  # (U,)
    of_number = np.repeat(np.arange(len(begins)), sizes)  # (M,)
    together = np.full((len(begins), int(sizes.max()), array.shape[1]), sort_key.NOWHERE)  # (U, most, depth)
    together[of_number, np.arange(len(array)) - begins[of_number]] = array
    return torch.from_numpy(together.reshape(len(begins), -1)).topk(array.shape[1], 1).values.numpy()


def _require_disjoint(phase: str, tiles: np.ndarray) -> None:
    """Raise ValueError if two of the tiles (T, 4) share a query and a row."""
    tiles = tiles[(tiles[:, 0] < tiles[:, 1]) & (tiles[:, 2] < tiles[:, 3])]
    for i, (begin, end, low, high) in enumerate(tiles.tolist()):
        later = tiles[i + 1 :]
        twice = later[(later[:, 0] < end) & (begin < later[:, 1]) & (later[:, 2] < high) & (low < later[:, 3])]
        if len(twice):
            pair = [f"queries {a} to {b} with rows {c} to {d}" for a, b, c, d in ([begin, end, low, high], twice[0])]
            raise refuse(OP, "parts", f"disjoint in phase {phase}", " and ".join(pair))


def _require_one_config(configs: list[dict]) -> None:
    """Raise a ValueError that names the first difference unless all parts have the same inputs and arguments."""
    first = flatten(configs[0])
    for config in configs[1:]:
        other = flatten(config)
        differing = [name for name in first | other if first.get(name) != other.get(name)]
        if differing:
            name = differing[0]
            came = f"{name} {describe(first.get(name), 60)} and {describe(other.get(name), 60)}"
            raise refuse(OP, "parts", "of the same inputs, arguments, kernels and versions", came)


def _join_shares(parts: Sequence[Part], tiles: np.ndarray) -> Part:
    """Merge parts of phase "negatives", which hold the negatives of different shares of the queries."""
    facts = parts[0].facts
    shares = sorted(share for part in parts for share in part.facts["shares"])
    double = sorted({share for share in shares if shares.count(share) > 1})
    if double:
        raise refuse(OP, "parts", "each share of the queries once", f"{share_names(double, facts)} more than once")
    counts = sorted({part.facts["num_shares"] for part in parts})
    if len(counts) > 1:
        raise refuse(OP, "parts", "of equally many shares of the queries", f"shares of {counts[0]} and of {counts[1]}")
    names = dict.fromkeys(name for part in parts for name in part.arrays)
    joined = {name: np.concatenate([part.arrays[name] for part in parts if name in part.arrays]) for name in names}
    by_query = np.argsort(joined["numbers"], kind="stable")
    lists = {
        "positives_rows": "positives_sizes",
        "positive_pair_scores": "positives_sizes",
        "query_ids_bytes": "query_ids_sizes",
    }
    for name, sizes in lists.items():
        if name in joined:
            starts = np.r_[0, np.cumsum(joined[sizes])]
            joined[name] = joined[name][RowLists(starts, np.arange(starts[-1])).take(by_query).rows]
    joined |= {name: array[by_query] for name, array in joined.items() if name not in lists and "corpus" not in name}
    skipped = {name: sum(part.facts["skipped"][name] for part in parts) for name in facts["skipped"]}
    return replace(parts[0], tiles=tiles, arrays=joined, facts=facts | {"shares": shares, "skipped": skipped})


def result_of(part: Part) -> MiningResult:
    """The MiningResult of a part that holds the negatives of all queries. It has no texts."""
    arrays, Q = part.arrays, len(part.arrays["numbers"])
    positives = RowLists(np.r_[0, np.cumsum(arrays["positives_sizes"])], arrays["positives_rows"])
    query_rows = arrays["query_rows"]
    return MiningResult(
        arrays["indices"],
        arrays["scores"],
        arrays["positive_scores"],
        (arrays["indices"] >= 0).sum(1),
        positives,
        part.facts["skipped"],
        part.facts["config"],
        arrays["positive_pair_scores"],
        query_ids=unpack_ids("query_ids", arrays),
        corpus_ids=unpack_ids("corpus_ids", arrays),
        query_rows=None if (query_rows == np.arange(Q)).all() else query_rows,
    )


def share_names(shares: Sequence[int], facts: dict) -> str:
    return ", ".join(f"{share}/{facts['num_shares']}" for share in shares)
