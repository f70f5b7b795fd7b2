"""Compute the figures of the report: bins of difficulty, sampled ranks, consistency, overlap and rank correlation.

edges     (bins + 1,) fractions of a query's pool of M rows, 0 = hardest, 1 = easiest; bin i has the ranks
          [floor(e_i M), floor(e_i+1 M))
ranks     (B, bins * samples) the sampled ranks, padded with -1
"""

import math

import numpy as np
import torch
from torch import Tensor

from negmine.ops import philox

EDGES = (0.0, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999, 1.0)  # narrow bins at both tails


def rank_bounds(edges: tuple[float, ...], size: Tensor) -> Tensor:
    """size (B,) int64, the size of each pool -> (B, bins + 1) int64: the first rank of each bin, and the end of the last."""
    return (size[:, None] * torch.tensor(edges, dtype=torch.float64, device="cpu")).floor().long()


def sampled_ranks(bounds: Tensor, samples: int, queries: Tensor, seed: int) -> Tensor:
    """bounds (B, bins + 1), queries (B,) global numbers -> (B, bins * samples) distinct ranks of each bin, ascending, then -1.

    A bin with at most `samples` ranks is taken completely. A larger bin is divided into `samples` strata of equal width, and
    one rank is drawn from each. The random number depends on (query, bin, stratum), not on the batch.
    """
    first, width = bounds[:, :-1, None], bounds.diff(dim=1)[:, :, None]  # (B, bins, 1) each
    bins = width.shape[1]
    word = philox.words(queries, torch.arange(bins * samples, device="cpu"), philox.STREAM_SAMPLE, seed, 0)[0]
    stratum = torch.arange(samples, device="cpu")  # (samples,)
    begin, end = stratum * width // samples, (stratum + 1) * width // samples  # (B, bins, samples) each
    drawn = first + begin + philox.below(word.view(-1, bins, samples), end - begin)
    every = torch.where(stratum < width, first + stratum, -1)
    return torch.where(width > samples, drawn, every).flatten(1)


def bin_means(values: np.ndarray, bins: int) -> np.ndarray:
    """values (B, bins * samples), NaN = no value -> (B, bins) means without NaN; NaN for a bin without values."""
    values = values.reshape(len(values), bins, -1)
    known = np.isfinite(values)
    counts = known.sum(2)
    sums = np.where(known, values, 0.0).sum(2)
    return np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def over_queries(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values (Q, bins), NaN = no value -> mean and standard error (bins,) over queries; NaN for too few values."""
    known = np.isfinite(values)
    n = known.sum(0)
    kept = np.where(known, values, 0.0)
    mean = np.divide(kept.sum(0), n, out=np.full(len(n), np.nan), where=n > 0)
    squares = np.where(known, (values - mean) ** 2, 0.0).sum(0)
    error = np.sqrt(np.divide(squares, n * (n - 1.0), out=np.full(len(n), np.nan), where=n > 1))
    return mean, error


def variance_ratio(counts: np.ndarray, draws: float, chance: float) -> float:
    """Var(c) / (Q a (1 - a)): 1 if each of Q queries chooses a share a of the rows independently, more if they agree."""
    expected = draws * chance * (1.0 - chance)
    return float(counts.astype(np.float64).var() / expected) if expected else math.nan


def binomial(draws: int, chance: float, most: int) -> np.ndarray:
    """(most + 1,) float64: probabilities of 0, ..., most successes in `draws` trials of probability `chance`."""
    if chance <= 0.0 or chance >= 1.0:
        certain = 0 if chance <= 0.0 else draws
        return (np.arange(most + 1) == certain).astype(np.float64)
    k = np.arange(min(most, draws) + 1)
    log_factorial = np.array([math.lgamma(n + 1.0) for n in range(draws + 1)])
    log_p = log_factorial[draws] - log_factorial[k] - log_factorial[draws - k]
    log_p = log_p + k * math.log(chance) + (draws - k) * math.log1p(-chance)
    return np.pad(np.exp(log_p), (0, most + 1 - len(k)))


def shared(first: Tensor, second: Tensor) -> Tensor:
    """first, second (B, N) int64, without repetitions in a row except of -1 -> (B,) int64: how many numbers are in both."""
    both = torch.cat([first, second], 1).sort(1).values
    return ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(1)


def average_ranks(values: Tensor) -> Tensor:
    """values (B, S) -> (B, S) float64 ascending ranks; equal values get the mean of their ranks."""
    ordered = values.sort(1).values
    values = values.contiguous()
    low, high = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (low + high - 1).double() / 2


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """first, second (B, S) -> (B,) float64: the rank correlation; NaN if one of them is constant."""
    x, y = (ranks - ranks.mean(1, keepdim=True) for ranks in (average_ranks(first), average_ranks(second)))
    return (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()
