"""Explain why the negatives of another miner differ from those of negmine, for each query, by scores in float64.

same         both have the same rows in the same order
ties         rows or their order differ only where scores are equal up to rounding
threshold    a row that only one of them keeps has a score at the threshold of the margin, up to rounding
window       the other miner has fewer negatives, because it takes its window before it filters
fewer        both have fewer negatives, because no more rows of the corpus pass the filters
unexplained  anything else; no query may be in this class
"""

import numpy as np
import torch

REASONS = ("same", "ties", "threshold", "window", "fewer", "unexplained")
ROUNDING = 2.0**-20  # of an inner product of unit rows in fp32, summed in any order
AT_ONCE = 512  # queries that are processed at a time


def pair_scores(queries: np.ndarray, corpus: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """rows (Q, n), -1 = none -> scores (Q, n) float64, -inf for none."""
    out = np.full(rows.shape, -np.inf)
    for slot, numbers in enumerate(rows.T):
        for begin in range(0, len(queries), AT_ONCE):
            part = slice(begin, begin + AT_ONCE)
            pairs = queries[part].astype(np.float64), corpus[numbers[part]].astype(np.float64)
            out[part, slot] = np.einsum("qd,qd->q", *pairs)
    return np.where(rows >= 0, out, -np.inf)


def reachable(queries: np.ndarray, corpus: np.ndarray, scores: np.ndarray, window: int) -> np.ndarray:
    """scores (Q,) -> (Q,) bool: whether at most `window` rows have this score or more, so that the other miner saw them."""
    rows = torch.from_numpy(corpus)
    found = []
    for begin in range(0, len(queries), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        least = torch.from_numpy(scores[part] - ROUNDING)[:, None]  # (B, 1)
        found.append((torch.from_numpy(queries[part]) @ rows.T >= least).sum(1) <= window)
    return torch.cat(found).numpy() if found else np.zeros(0, bool)


def explain(
    ours: np.ndarray,
    theirs: np.ndarray,
    queries: np.ndarray,
    corpus: np.ndarray,
    positives: np.ndarray,
    margin: float,
    window: int,
) -> dict[str, int]:
    """ours, theirs (Q, n) rows -> how many queries differ for each of REASONS.

    The rows of a query without a result are -1. margin: the relative margin below the score of the positive. window: how many
    rows the other miner looks at, including the positive.
    """
    scores, others = (pair_scores(queries, corpus, rows) for rows in (ours, theirs))  # (Q, n) each
    positive = pair_scores(queries, corpus, positives[:, None])  # (Q, 1)
    top = positive - np.abs(positive) * margin  # (Q, 1)
    with np.errstate(invalid="ignore"):  # -inf less -inf
        equal = (np.abs(scores - others) <= ROUNDING).all(1)
    border = ((np.abs(scores - top) <= ROUNDING) | (np.abs(others - top) <= ROUNDING)).any(1)
    full, gave_up = (ours >= 0).all(1), (theirs < 0).all(1)
    beyond = np.zeros(len(ours), bool)
    asked = np.flatnonzero(full & gave_up)
    beyond[asked] = ~reachable(queries[asked], corpus, scores[asked, -1], window)
    reasons = [(ours == theirs).all(1) & full, equal & full, border & ~gave_up, beyond, gave_up & ~full]
    first = np.select(reasons, range(len(reasons)), len(reasons))  # (Q,)
    return {name: int((first == number).sum()) for number, name in enumerate(REASONS)}
