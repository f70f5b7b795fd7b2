"""A miner for the losses of pytorch-metric-learning, and its CrossBatchMemory with a MoCoQueue.

    from negmine.adapters.pytorch_metric_learning import NegmineMiner, CrossBatchMemory

pytorch-metric-learning itself is not imported; its losses take what the miner returns. The length of index tuples is the number
of pairs, so the miner synchronises with the host. A loss of negmine inside CrossBatchMemory needs no index tuples.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negmine.collectives import Ranks
from negmine.losses import SupConLoss
from negmine.losses.mined_pairs import MultiSimilarityLoss
from negmine.losses.schedules import ScheduledLoss, refuse_recomputation
from negmine.losses.triplet import TripletLoss
from negmine.losses.triplet_mining import check_rule, mine_triplets
from negmine.ops import checks
from negmine.ops.vectors import widened
from negmine.queues.moco import MoCoQueue

CLASS_OF_MINUS_ONE = -(2**62)  # a label of -1 is a class in pytorch-metric-learning and unknown in negmine


def _classes(labels: Tensor) -> Tensor:
    """Labels for negmine, where -1 is replaced, because it would mean unknown."""
    return labels.masked_fill(labels == -1, CLASS_OF_MINUS_ONE) if isinstance(labels, Tensor) else labels


LABEL_LOSSES = (TripletLoss, MultiSimilarityLoss, SupConLoss)


def require_labels(op: str, name: str, labels: Any, rows: Tensor) -> None:
    """Raise an error unless labels are whole numbers, one per row."""
    checks.require_tensor(op, name, labels, rows)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != rows.shape[:1]:
        raise checks.refuse(op, name, f"an integer tensor of shape ({len(rows)},)", labels)


class NegmineMiner(ScheduledLoss):
    """A miner for the losses of pytorch-metric-learning: miner(embeddings, labels, ref_emb=None, ref_labels=None) -> (a1, p,
    a2, n).

        BatchEasyHardMiner(pos_strategy, neg_strategy)   positive and negative by the same names; "hard" negatives are
                                                         "hardest", "easy" ones "easiest"
        BatchHardMiner                                   positive="hard", negative="hardest"
        MultiSimilarityMiner(epsilon)                    both "multi_similarity", margin=epsilon, max_positives, num_negatives
        TripletMarginMiner(margin, "semihard")           positive="all", negative="semihard_band", distance="euclidean",
                                                         triplets=True, max_positives, num_negatives

    Parameters
    ----------
    positive, negative, margin, distance, max_positives, num_negatives : optional
        As in `negmine.losses.mine_triplets`.
    normalize_embeddings : bool
        Normalise the embeddings first, as pytorch-metric-learning's distances do.
    triplets : bool
        Return (a, p, n) with one entry per triplet. This is needed if negatives depend on the positive and there are several.
    seed : int
        Seed of the random numbers.
    backend : str, optional
        As in `info_nce`.

    Notes
    -----
    Without ref_emb the batch is its own reference, and no sample is its own positive. Anchors without a triplet are left
    out.

    Examples
    --------
    >>> from negmine.adapters.pytorch_metric_learning import NegmineMiner
    >>> embeddings, labels = torch.randn(8, 16), torch.arange(8) % 2
    >>> a1, p, a2, n = NegmineMiner("easy", "semihard")(embeddings, labels)
    >>> bool((labels[a1] == labels[p]).all()), bool((labels[a2] != labels[n]).all())
    (True, True)
    """

    def __init__(
        self,
        positive: str = "easy",
        negative: str = "semihard",
        *,
        margin: float = 0.2,
        distance: str = "cosine",
        max_positives: int | None = None,
        num_negatives: int = 1,
        normalize_embeddings: bool = True,
        triplets: bool = False,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        op = "NegmineMiner"
        check_rule(op, positive, negative, margin, distance, max_positives, num_negatives)
        checks.require_bool(op, "normalize_embeddings", normalize_embeddings)
        checks.require_bool(op, "triplets", triplets)
        checks.require_draw(op, seed, 0, 0)
        self.triplets, self.normalize_embeddings = triplets, normalize_embeddings
        self.options: dict[str, Any] = {
            "positive": positive,
            "negative": negative,
            "margin": margin,
            "distance": distance,
            "max_positives": max_positives,
            "num_negatives": num_negatives,
            "seed": seed,
            "backend": backend,
        }

    @torch.no_grad()
    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Index tuples of embeddings (B, D) with labels (B,) int64, among ref_emb (K, D) with ref_labels (K,) or the batch."""
        op = "NegmineMiner"
        if (ref_emb is None) != (ref_labels is None):
            given, missing = ("ref_emb", "ref_labels") if ref_labels is None else ("ref_labels", "ref_emb")
            raise checks.refuse(op, missing, f"given together with {given}", None)
        checks.require_vectors(op, "embeddings", embeddings, "(B, D)", (2,))
        require_labels(op, "labels", labels, embeddings)
        query = self._normalized(embeddings)
        masks: dict[str, Any] = {}
        if ref_emb is None or ref_emb is embeddings:
            own = torch.arange(len(query), device=query.device)
            keys, ref_labels, masks = query, labels, {"query_ids": own, "key_ids": own}
        else:
            checks.require_vectors(op, "ref_emb", ref_emb, "(K, D)", (2,), embeddings)
            require_labels(op, "ref_labels", ref_labels, ref_emb)
            keys = self._normalized(ref_emb)
        assert ref_labels is not None
        labels, ref_labels = _classes(labels), _classes(ref_labels)
        found = mine_triplets(
            query, keys, labels, ref_labels, step=self.count(None, embeddings), **self.options, **masks
        )
        return found.compact() if self.triplets else found.pairs()

    def _normalized(self, embeddings: Tensor) -> Tensor:
        return F.normalize(widened(embeddings), dim=1) if self.normalize_embeddings else embeddings


class DistributedLossWrapper(nn.Module):
    """pytorch-metric-learning's DistributedLossWrapper around the `CrossBatchMemory` of this module.

    A call gathers the rows of all ranks in rank order, stores them on every rank, and returns the loss of all rows times the
    number of ranks. Because DistributedDataParallel averages gradients, the model then gets the gradient of the loss of all
    rows. On each rank, only its own rows have a gradient. If one rank raises an error, all ranks do.

    Parameters
    ----------
    loss : CrossBatchMemory
        The CrossBatchMemory of this module.
    efficient : bool
        Must be False, as in pytorch-metric-learning with a memory.

    Examples
    --------
    >>> from negmine.adapters.pytorch_metric_learning import CrossBatchMemory, DistributedLossWrapper
    >>> memory = CrossBatchMemory(negmine.SupConLoss(), embedding_size=16)
    >>> wrapper = DistributedLossWrapper(memory)
    """

    def __init__(self, loss: nn.Module, efficient: bool = False) -> None:
        super().__init__()
        op = "DistributedLossWrapper"
        if not isinstance(loss, CrossBatchMemory):
            raise checks.refuse(op, "loss", "a CrossBatchMemory of this module", checks.kind_of(loss), TypeError)
        if efficient:
            raise checks.refuse(op, "efficient", "False with a CrossBatchMemory", efficient)
        self.loss = loss

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None, enqueue_mask: Tensor | None = None
    ) -> Any:
        """The loss of all ranks times their number. The arguments are those of `CrossBatchMemory`, for this rank's rows."""
        op, ranks = "DistributedLossWrapper", Ranks()
        if ranks.size == 1:
            return self.loss(embeddings, labels, indices_tuple, enqueue_mask)
        device = embeddings.device if isinstance(embeddings, Tensor) else None
        with ranks.agreement(op, device) as call:
            checks.require_vectors(op, "embeddings", embeddings, "(B, D)", (2,), self.loss.memory.queue)
            for name, given in (("labels", labels), ("enqueue_mask", enqueue_mask)):
                if name == "labels" or given is not None:
                    checks.require_tensor(op, name, given, embeddings)
                    if given is not None and given.shape != embeddings.shape[:1]:
                        raise checks.refuse(op, name, f"of shape ({len(embeddings)},)", given)
            call.facts = {"embeddings": embeddings.dtype, "labels": labels.dtype, "has mask": enqueue_mask is not None}
            call.counters = {"seen": self.loss.seen}
            call.count = len(embeddings)
        first = sum(call.counts[: ranks.rank])
        rows = ranks.gather_rows(embeddings.detach(), call.counts)
        rows = torch.cat([rows[:first], embeddings, rows[first + len(embeddings) :]])
        labels = ranks.gather_rows(labels, call.counts)
        mask = None if enqueue_mask is None else ranks.gather_rows(enqueue_mask, call.counts)
        with ranks.agreement(f"{op}, after gathering", device):
            return self.loss(rows, labels, indices_tuple, mask) * ranks.size


class CrossBatchMemory(nn.Module):
    """pytorch-metric-learning's CrossBatchMemory: a loss against the last embeddings.

    Call it with embeddings (B, D), labels (B,), and perhaps enqueue_mask (B,) bool: the rows that are stored; the others
    are the anchors. In train mode it stores the batch, and then returns the loss of its rows against the memory. A row is
    never its own positive.

    Parameters
    ----------
    loss : nn.Module
        A loss of negmine over labels (TripletLoss, SupConLoss, MultiSimilarityLoss), which needs no index tuples and does
        not synchronise; or a loss of pytorch-metric-learning.
    embedding_size, memory_size : int
        The width and the number of the stored embeddings.
    miner : nn.Module, optional
        Only for a loss of pytorch-metric-learning; None gives all pairs.

    Notes
    -----
    `memory` is the MoCoQueue, empty at first, with labels and ids. All of it is in state_dict, where
    pytorch-metric-learning's pointer and filled flag are not. Embeddings are stored as given: normalise them for cosine
    scores. An indices_tuple raises an error, because the pairs come from the miner.

    References
    ----------
    Wang et al. 2020 (arXiv 1912.06798).

    Examples
    --------
    >>> from negmine.adapters.pytorch_metric_learning import CrossBatchMemory
    >>> memory = CrossBatchMemory(negmine.MultiSimilarityLoss(), embedding_size=16, memory_size=100)
    >>> loss = memory(F.normalize(torch.randn(8, 16), dim=1), torch.arange(8) % 2)
    """

    seen: Tensor

    def __init__(
        self, loss: nn.Module, embedding_size: int, memory_size: int = 1024, miner: nn.Module | None = None
    ) -> None:
        super().__init__()
        op = "CrossBatchMemory"
        if not isinstance(loss, nn.Module):
            raise checks.refuse(op, "loss", "a loss module", loss, TypeError)
        if isinstance(loss, ScheduledLoss) and not isinstance(loss, LABEL_LOSSES):
            wanted = "a TripletLoss, SupConLoss or MultiSimilarityLoss, or a loss of pytorch-metric-learning"
            raise checks.refuse(op, "loss", wanted, checks.kind_of(loss), TypeError)
        if miner is not None and isinstance(loss, LABEL_LOSSES):
            raise checks.refuse(
                op, "miner", "None with a negmine loss, which has its own mining", checks.kind_of(miner)
            )
        self.loss, self.miner = loss, miner
        self.memory = MoCoQueue(embedding_size, memory_size, with_ids=True, with_labels=True, random_init=False)
        # The number of rows stored so far, which is the id of the next row.
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def reset_queue(self) -> None:
        """Remove all stored embeddings."""
        self.memory.reset()
        self.seen.zero_()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any = None,
        enqueue_mask: Tensor | None = None,
    ) -> Any:
        """The loss of embeddings (B, D) with labels (B,) int64 against the memory. indices_tuple must be None."""
        op = "CrossBatchMemory"
        checks.require_vectors(op, "embeddings", embeddings, "(B, D)", (2,), self.memory.queue)
        require_labels(op, "labels", labels, embeddings)
        if indices_tuple is not None:
            raise checks.refuse(
                op, "indices_tuple", "None: the pairs come from the miner", checks.kind_of(indices_tuple)
            )
        refuse_recomputation(op)
        stored, stored_labels = embeddings, labels
        if enqueue_mask is not None:
            checks.require_tensor(op, "enqueue_mask", enqueue_mask, embeddings)
            if enqueue_mask.dtype != torch.bool or enqueue_mask.shape != labels.shape:
                raise checks.refuse(op, "enqueue_mask", f"a bool tensor of shape {tuple(labels.shape)}", enqueue_mask)
            stored, stored_labels = embeddings[enqueue_mask], labels[enqueue_mask]
            embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask]
        own = torch.full_like(labels, -1)  # an anchor that is not stored gets an id that no row has
        if self.training:
            ids = torch.arange(len(stored), device=embeddings.device) + self.seen
            self.memory.enqueue(stored, ids, stored_labels)
            self.seen.add_(len(stored))
            own = ids if enqueue_mask is None else own
        if isinstance(self.loss, LABEL_LOSSES):
            memory, memory_ids, memory_labels, _ = self.memory.stored_columns()
            valid = torch.arange(len(memory), device=memory.device) < self.memory.queue_len  # (K,)
            masks = {"query_ids": own, "key_ids": memory_ids, "key_mask": valid}
            assert memory_labels is not None
            return self.loss(embeddings, memory, _classes(labels), _classes(memory_labels), **masks)
        memory, memory_labels, memory_ids = self.memory.keys, self.memory.labels, self.memory.ids
        assert memory_labels is not None and memory_ids is not None
        if self.miner is not None:
            indices = self.miner(embeddings, labels, memory.to(embeddings.dtype), memory_labels)
        else:
            same = labels[:, None] == memory_labels  # (B, K)
            indices = (*same.nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True))
        anchor, positive, *rest = indices
        other = own[anchor] != memory_ids[positive]
        rest = [t[other] for t in rest] if len(rest) == 1 else rest  # of a removed triplet, remove the negative too
        indices = (anchor[other], positive[other], *rest)
        return self.loss(embeddings, labels, indices, memory.to(embeddings.dtype), memory_labels)
