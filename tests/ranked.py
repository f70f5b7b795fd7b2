"""Expected ranks and counts of pools, for the tests of the CUDA backend."""

import torch

from negmine.ops import sort_key
from negmine.ops.pool import usable
from tests import cases

LAST = 2**63 - 1


def inside_of(places, lower=None, upper=None):
    """Which sort keys (B, K) are within the bounds. A bound whose score is NaN keeps nothing."""
    inside = torch.ones_like(places, dtype=torch.bool)
    for bound, sign in ((lower, 1), (upper, -1)):
        if bound is not None:
            inside &= (sign * places >= sign * bound[:, None]) & ~((bound == sort_key.NOWHERE) | (bound == LAST))[
                :, None
            ]
    return inside


def ranking(q, keys, same_label=False, lower=None, upper=None, **given):
    """Return the sort keys of each row's pool, (B, K + 1), highest first and padded with NOWHERE, and the pools' sizes (B,).

    NaN scores have no sort key, but count.
    """
    scores = q.float() @ keys.float().T  # (B, K); small integers, so exact in any order of summation
    allowed = usable(cases.pool_of(q, keys, given)._replace(same_label=same_label), q, keys)
    allowed = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed
    places = sort_key.pack(scores, torch.arange(len(keys)))
    inside = allowed & inside_of(places, lower, upper)
    if lower is not None or upper is not None:
        inside &= ~scores.isnan()
    sorted_ = places.masked_fill(~inside | scores.isnan(), sort_key.NOWHERE).sort(1, descending=True).values
    return torch.nn.functional.pad(sorted_, (0, 1), value=sort_key.NOWHERE), inside.sum(1)


def some_bounds(q, keys):
    """Bounds lower and upper (B,), with ties on both sides. Some have a NaN score, keeping nothing; some name no column."""
    table, _ = ranking(q, keys)
    upper, lower = table[:, 7].contiguous(), table[:, 130].contiguous()
    upper[0], lower[1], upper[2], lower[3] = sort_key.NOWHERE, LAST, lower[2] - 1, sort_key.NOWHERE
    upper[4] = sort_key.pack(torch.tensor(torch.inf), 0)
    return lower, upper
