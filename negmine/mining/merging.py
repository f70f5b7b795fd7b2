"""Join the parts of a phase in any order. The result equals that of one process, bit for bit."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from negmine.mining.parts import Part
from negmine.mining.resume import flatten
from negmine.mining.row_lists import RowLists
from negmine.ops import sort_key
from negmine.ops.checks import Phrase, describe, refuse

OP = "merge_parts"
SUMMED = ("num_dropped", "content")  # arrays whose entries with the same number are added
SHARES = ("negatives", "candidates")  # phases of shares.py
SAME = {
    "phase_digest": "of one phase",
    "plan": "of one plan, that is, of the same inputs and arguments",
    "kernels": "computed by the same kernels and instruction set, so that scores are equal bit for bit",
}


def join_parts(parts: Sequence[Part]) -> Part:
    """Like merge_parts, but always returns a Part, even if it holds every share of a job."""
    if not isinstance(parts, (list, tuple)) or not parts or not all(isinstance(part, Part) for part in parts):
        raise refuse(OP, "parts", "a list of at least one Part", parts, TypeError)
    first = parts[0]
    is_share = first.phase in SHARES and all(part.phase == first.phase for part in parts)
    if is_share:
        _require_one_config([part.facts["config"] for part in parts])
    for name, wanted in SAME.items():
        values = [getattr(part, name) for part in parts]
        other = next((value for value in values if value != values[0]), None)
        if other is not None:
            raise refuse(OP, "parts", wanted, Phrase(f"{values[0]} and {other}"))
    if len(parts) == 1:
        return first
    tiles = np.concatenate([part.tiles for part in parts])
    tiles = tiles[np.lexsort(tiles.T[::-1])]
    if is_share:
        facts = first.facts | _joined_facts(parts)
        joined = _joined_negatives(parts) if first.phase == "negatives" else _joined_candidates(parts)
        return replace(first, tiles=tiles, arrays=joined, facts=facts)
    _require_disjoint(first.phase, tiles)
    arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in first.arrays}
    not_finite = {name: np.sort(arrays.pop(name)) for name in ("not_finite",) if name in arrays}
    by_number = np.argsort(arrays["numbers"], kind="stable")
    numbers = arrays["numbers"][by_number]
    begins = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]][: len(numbers)])  # (U,) starts of the groups
    merged = {name: _merge(name, array[by_number], begins) for name, array in arrays.items()}
    return replace(first, tiles=tiles, arrays=merged | not_finite)


def _merge(name: str, array: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Merge the rows of array (M, ...) that belong to the same group; group u starts at begins[u]. Returns (U, ...)."""
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
            raise refuse(OP, "parts", f"disjoint in phase {phase}", Phrase(" and ".join(pair)))


def _require_one_config(configs: list[dict]) -> None:
    """Raise a ValueError that names the first difference unless all parts have the same inputs and arguments."""
    first = flatten(configs[0])
    for config in configs[1:]:
        other = flatten(config)
        differing = [name for name in first | other if first.get(name) != other.get(name)]
        if differing:
            name = differing[0]
            came = Phrase(f"{name} {describe(first.get(name), 60)} and {describe(other.get(name), 60)}")
            raise refuse(OP, "parts", "of the same inputs, arguments, kernels and versions", came)


def _joined_facts(parts: Sequence[Part]) -> dict[str, Any]:
    """The shares that some parts hold together, and the sums of their counters."""
    facts = parts[0].facts
    shares = sorted(share for part in parts for share in part.facts["shares"])
    double = sorted({share for share in shares if shares.count(share) > 1})
    counts = sorted({part.facts["num_shares"] for part in parts})
    if len(counts) > 1:
        raise refuse(OP, "parts", "of equally many shares", Phrase(f"shares of {counts[0]} and of {counts[1]}"))
    if double:
        raise refuse(OP, "parts", "each share once", Phrase(f"{share_names(double, facts)} more than once"))
    skipped = {name: sum(part.facts["skipped"][name] for part in parts) for name in facts["skipped"]}
    sums = {name: sum(part.facts[name] for part in parts) for name in ("num_not_finite",) if name in facts}
    return {"shares": shares, "skipped": skipped} | sums


def _concatenated(parts: Sequence[Part], skip: Sequence[str] = ()) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for part in parts for name in part.arrays if name not in skip)
    return {name: np.concatenate([part.arrays[name] for part in parts if name in part.arrays]) for name in names}


def _joined_negatives(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """The arrays of phase "negatives", which hold the negatives of different shares of the queries."""
    joined = _concatenated(parts)
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
    return joined | {
        name: each[by_query] for name, each in joined.items() if name not in lists and "corpus" not in name
    }


def _joined_candidates(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """The arrays of phase "candidates", which hold the hardest rows of all queries among different shares of the rows."""
    joined = _concatenated(parts, ("numbers", "sort_keys"))
    by_pair = np.argsort(joined["pair_numbers"], kind="stable")
    joined |= {name: joined[name][by_pair] for name in ("pair_numbers", "pair_scores")}
    joined["content"] = joined["content"].sum(0, dtype=np.uint64, keepdims=True)
    sort_keys = torch.from_numpy(parts[0].arrays["sort_keys"])
    for part in parts[1:]:
        both = torch.cat([sort_keys, torch.from_numpy(part.arrays["sort_keys"])], 1)
        sort_keys = both.topk(sort_keys.shape[1], 1).values
    return joined | {"numbers": parts[0].arrays["numbers"], "sort_keys": sort_keys.numpy()}


def share_names(shares: Sequence[int], facts: dict) -> str:
    return ", ".join(f"{share}/{facts['num_shares']}" for share in shares)
