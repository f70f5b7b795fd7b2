"""The similarity measures of the worked example: hypernym depth and path similarity, compared with a search of the graph."""

from collections import deque

import numpy as np
import torch

from benchmarks.wordnet import Taxonomy

# 0 is the root. 3 is below 1 and, on a longer path, below 2 -> 4. 7 is in another tree, and 8 is alone.
EDGES = [(1, 0), (2, 0), (3, 1), (4, 2), (3, 4), (5, 3), (6, 4), (7, 9)]
SYNSETS = 10


def reached(row: int) -> dict[int, int]:
    """Return {ancestor: fewest edges to it}, including the row itself."""
    found, queue = {row: 0}, deque([row])
    while queue:
        at = queue.popleft()
        for child, parent in EDGES:
            if child == at and parent not in found:
                found[parent] = found[at] + 1
                queue.append(parent)
    return found


def longest(row: int) -> int:
    return max((longest(parent) + 1 for child, parent in EDGES if child == row), default=0)


def test_every_pair_is_the_search():
    tree = Taxonomy(torch.tensor(EDGES), SYNSETS)
    first, second = (part.ravel() for part in np.meshgrid(np.arange(SYNSETS), np.arange(SYNSETS), indexing="ij"))
    shuffled = np.random.default_rng(0).permutation(len(first))
    depth, similarity = tree.compare(first[shuffled], second[shuffled])
    for a, b, d, s in zip(first[shuffled], second[shuffled], depth, similarity, strict=True):
        ours, theirs = reached(int(a)), reached(int(b))
        common = ours.keys() & theirs.keys()
        if not common:
            assert np.isnan(d) and np.isnan(s)
            continue
        assert d == max(longest(row) for row in common)
        assert s == 1 / (1 + min(ours[row] + theirs[row] for row in common))


def test_no_pairs_give_empty_results():
    none = np.empty(0, np.int64)
    assert [len(part) for part in Taxonomy(torch.tensor(EDGES), SYNSETS).compare(none, none)] == [0, 0]
