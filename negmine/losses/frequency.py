"""FrequencyEstimator: estimates the frequency of each item in a stream of batches, for the logQ correction."""

import torch
from torch import Tensor, nn

from negmine.ops import checks, philox


class FrequencyEstimator(nn.Module):
    """Estimates the probability that a batch contains an item, from the batches seen so far, for the logQ correction.

        at step t, for each item y of the batch:  B[h(y)] = (1 - alpha) B[h(y)] + alpha (t - A[h(y)]),   A[h(y)] = t
        probability of y = 1 / B[h(y)], at most 1

    A[h] is the last step at which an item of bucket h occurred, and B[h] is the mean interval between such steps.

    Parameters
    ----------
    num_buckets : int
        The number of buckets of the hash functions h.
    alpha : float
        The learning rate, in (0, 1]. Use a larger value if the frequencies change over time.
    num_hashes : int
        The number of hash functions. Items in the same bucket seem more frequent than they are. With several hash functions,
        the longest interval is used.
    initial_interval : float
        The interval of a bucket that has not occurred yet.
    seed : int
        The seed of the hash functions.

    Raises
    ------
    ValueError, TypeError
        If an argument has a wrong type, shape, dtype, device or value.

    Notes
    -----
    The state is in buffers: last_step and interval, (num_hashes, num_buckets + 1), and step (). `update` does not
    synchronise. An id of -1 is unknown: it is not counted, and its log probability is 0. An item that occurs twice in a batch
    is counted once.

    References
    ----------
    Yi et al. 2019 (RecSys), algorithm 2.

    Examples
    --------
    >>> frequency = negmine.losses.FrequencyEstimator(num_buckets=1000)
    >>> items = torch.tensor([3, 5, 3, -1])
    >>> log_q = frequency(items)  # counts the batch, and returns the estimates
    >>> log_q.shape
    torch.Size([4])
    """

    last_step: Tensor
    interval: Tensor
    step: Tensor

    def __init__(
        self,
        num_buckets: int = 1 << 20,
        *,
        alpha: float = 0.01,
        num_hashes: int = 1,
        initial_interval: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        op = "FrequencyEstimator"
        checks.require_count(op, "num_buckets", num_buckets)
        checks.require_count(op, "num_hashes", num_hashes)
        checks.require_number(op, "alpha", alpha, above=0)
        if alpha > 1:
            raise checks.refuse(op, "alpha", "a number in (0, 1]", alpha)
        checks.require_number(op, "initial_interval", initial_interval, least=0)
        checks.require_draw(op, seed, 0, 0)
        self.num_buckets, self.num_hashes, self.alpha, self.seed = num_buckets, num_hashes, alpha, seed
        shape = num_hashes, num_buckets + 1  # the last bucket is for unknown ids
        self.register_buffer("last_step", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("interval", torch.full(shape, float(initial_interval), dtype=torch.float32))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def buckets(self, ids: Tensor) -> Tensor:
        """The bucket (num_hashes, n) of each of ids (n,) under each hash function."""
        checks.require_tensor("FrequencyEstimator", "ids", ids, self.interval)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() != 1:
            raise checks.refuse("FrequencyEstimator", "ids", "an integer tensor of shape (n,)", ids)
        number = torch.arange(self.num_hashes, device=ids.device)
        word = philox.words(ids.long(), number, philox.STREAM_HASH, self.seed, 0)[0]  # (n, num_hashes)
        bucket = philox.below(word, torch.full_like(word, self.num_buckets))
        return bucket.masked_fill((ids == -1)[:, None], self.num_buckets).T

    @torch.no_grad()
    def update(self, ids: Tensor) -> None:
        """Count the items of one batch, given by their integer ids (n,)."""
        bucket = self.buckets(ids)  # (num_hashes, n)
        self.step += 1
        passed = (self.step - self.last_step.gather(1, bucket)).to(self.interval.dtype)
        # Ids in the same bucket write the same number, so their order does not matter.
        self.interval.scatter_(1, bucket, torch.lerp(self.interval.gather(1, bucket), passed, self.alpha))
        self.last_step.scatter_(1, bucket, self.step.expand_as(bucket).contiguous())

    @torch.no_grad()
    def log_probability(self, ids: Tensor) -> Tensor:
        """(n,) fp32: the log of the probability that a batch contains each of the integer ids (n,). It has no gradient."""
        interval = self.interval.gather(1, self.buckets(ids)).amax(0)  # (n,)
        return -interval.clamp_min(1.0).log().masked_fill(ids == -1, 0.0)

    def forward(self, ids: Tensor) -> Tensor:
        """The `log_probability` (n,) of integer ids (n,). In training mode, they are counted first by `update`."""
        if self.training:
            self.update(ids)
        return self.log_probability(ids)

    def extra_repr(self) -> str:
        return f"num_buckets={self.num_buckets}, alpha={self.alpha}, num_hashes={self.num_hashes}"
