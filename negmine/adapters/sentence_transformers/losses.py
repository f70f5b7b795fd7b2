"""The contrastive losses of sentence-transformers 6.2 with the same signatures, without (B, K) score matrices.

    from negmine.adapters.sentence_transformers import MultipleNegativesRankingLoss

Values and gradients agree with those of sentence-transformers up to rounding. Scores and gradients are summed in fp32, also under
autocast. The differences are:

similarity_fct          MultipleNegativesRankingLoss and its cached form accept cos_sim and dot_score of sentence-transformers,
                        recognised by name. Any other function raises an error, because it would need the score matrix.
columns                 Each column is embedded by a separate forward pass. sentence-transformers joins columns of equal shape
                        into one pass, which differs only in the dropout masks.
GISTEmbedLoss           It accepts any number of columns of negatives, like CachedGISTEmbedLoss. In sentence-transformers it
                        accepts one.
cached losses           The loss of all embeddings is computed by one fused call instead of in mini-batches. Features must be
                        padded; packed sequences and images raise an error. show_progress_bar has no effect.
gather_across_devices   The ranks may have batches of different sizes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negmine.adapters.sentence_transformers.gradient_cache import (
    Features,
    Part,
    cuts,
    differentiable,
    embed,
    part_of,
)
from negmine.collectives import Ranks
from negmine.losses.gathered import gathered
from negmine.losses.info_nce import info_nce
from negmine.ops import checks
from negmine.ops.vectors import score_of_positive, widened
from negmine.options import Guide, Negatives
from negmine.selection import logsumexp

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")
SIMILARITIES = ("cos_sim", "dot_score")
NO_ID = -1  # the id of a key that is a negative for every row


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(widened(rows), dim=1)


def _columns(op: str, sentence_features: Iterable[Features]) -> list[Features]:
    made = [dict(features) for features in sentence_features]
    if len(made) < 2:
        raise checks.refuse(op, "sentence_features", "at least two columns: anchors and positives", len(made))
    return made


def _own_rows(rows: Tensor, gather: bool) -> Tensor:
    """The positions (B,) of this rank's rows among the rows of all ranks."""
    own = torch.arange(len(rows), device=rows.device)
    if not gather:
        return own
    counts = gathered(torch.full((1,), len(rows), device=rows.device))  # (ranks,)
    return own + counts[: Ranks().rank].sum()


def _without_id(ids: Tensor, columns: Sequence[Tensor]) -> Tensor:
    return torch.full((sum(map(len, columns)),), NO_ID, device=ids.device)


def _with_share_of_gradient(rows: Tensor, share: float) -> Tensor:
    return rows * share + rows.detach() * (1 - share)


class MultipleNegativesRankingLoss(nn.Module):
    """The MultipleNegativesRankingLoss of sentence-transformers: InfoNCE over a batch of anchors, positives and hard negatives.

        loss = mean over i of -x_ii + log(sum of exp(x) over the candidates of row i),   x = scale * similarity

    `loss(sentence_features, labels=None)` takes a list of features, one dict each for anchors, positives and any number of
    columns of negatives. The labels are not used.

    Parameters
    ----------
    model : Module
        A SentenceTransformer, or any module that maps features to a dict with the embeddings as "sentence_embedding".
    scale : float
        The inverse of the temperature.
    similarity_fct : callable, optional
        cos_sim or dot_score of sentence_transformers.util. The default is cos_sim.
    gather_across_devices : bool
        Use the documents and anchors of all ranks as candidates, with gradient.
    directions : tuple of str
        Which candidates are used: "query_to_doc" (anchor i against all positives and negatives; required), "query_to_query"
        (anchor i against the other anchors), "doc_to_query" (positive i against all anchors) and "doc_to_doc" (positive i against
        the documents of other rows).
    partition_mode : str
        "joint" sums all directions in one denominator. "per_direction" takes the mean of the losses of "query_to_doc" and
        "doc_to_query".
    hardness_mode : str, optional
        The candidates whose logits are increased: "in_batch_negatives" (documents of other rows), "hard_negatives" (those of the
        same row) or "all_negatives".
    hardness_strength : float
        Their logits are increased by hardness_strength * similarity, which has no gradient.
    backend : str, optional
        As in `info_nce`.

    Notes
    -----
    Source: sentence-transformers 6.2.

    Examples
    --------
    >>> from negmine.adapters.sentence_transformers import MultipleNegativesRankingLoss
    >>> words = torch.nn.EmbeddingBag(100, 16)  # in place of a SentenceTransformer
    >>> def model(features):
    ...     return {"sentence_embedding": words(features["input_ids"])}
    >>> anchors, positives = ({"input_ids": torch.randint(100, (8, 5))} for _ in range(2))
    >>> loss = MultipleNegativesRankingLoss(model)([anchors, positives])
    >>> loss.backward()
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        checks.require_number(op, "scale", scale, above=0)
        checks.require_bool(op, "gather_across_devices", gather_across_devices)
        if getattr(similarity_fct, "__name__", "cos_sim" if similarity_fct is None else "") not in SIMILARITIES:
            wanted = "cos_sim or dot_score of sentence_transformers.util, or None"
            raise checks.refuse(op, "similarity_fct", wanted, similarity_fct)
        named = isinstance(directions, (list, tuple)) and set(directions) <= set(DIRECTIONS)
        if not named or "query_to_doc" not in directions:
            wanted = f"a tuple of {', '.join(map(repr, DIRECTIONS))} that holds 'query_to_doc'"
            raise checks.refuse(op, "directions", wanted, directions)
        checks.require_choice(op, "partition_mode", partition_mode, ("joint", "per_direction"))
        if partition_mode == "per_direction" and not set(directions) <= {"query_to_doc", "doc_to_query"}:
            wanted = "'joint' with 'query_to_query' or 'doc_to_doc', which do not hold the positive"
            raise checks.refuse(op, "partition_mode", wanted, partition_mode)
        if hardness_mode is not None:
            checks.require_choice(op, "hardness_mode", hardness_mode, HARDNESS_MODES)
        checks.require_number(op, "hardness_strength", hardness_strength, least=0)
        self.model, self.scale, self.similarity_fct = model, scale, similarity_fct
        self.gather_across_devices, self.directions = gather_across_devices, tuple(directions)
        self.partition_mode, self.hardness_mode = partition_mode, hardness_mode
        self.hardness_strength, self.backend = hardness_strength, backend

    @property
    def temperature(self) -> float:
        """1 / scale."""
        return 1.0 / self.scale

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that sentence-transformers writes into a model card."""
        names = ("scale", "gather_across_devices", "directions", "partition_mode", "hardness_mode", "hardness_strength")
        config = {name: getattr(self, name) for name in names}
        return config | {"similarity_fct": getattr(self.similarity_fct, "__name__", "cos_sim")}

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss () of the features of the anchors, the positives and each column of negatives."""
        features = _columns(type(self).__name__, sentence_features)
        return self.compute_loss_from_embeddings([self.model(column)["sentence_embedding"] for column in features])

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of a list of embeddings, (B, D) each: of anchors, positives and each column of negatives."""
        uses_cosine = getattr(self.similarity_fct, "__name__", "cos_sim") == "cos_sim"
        query, *docs = [_unit(rows) if uses_cosine else widened(rows) for rows in embeddings]
        positive, *negatives = docs
        queries, every = query, docs
        own = _own_rows(query, self.gather_across_devices)  # (B,)
        if self.gather_across_devices:
            every = [gathered(column) for column in docs]
            if {"query_to_query", "doc_to_query"} & set(self.directions):
                queries = gathered(query)
        ids = torch.arange(len(every[0]), device=query.device)  # (W,)
        options: dict[str, Any] = {"temperature": self.temperature, "query_ids": own, "backend": self.backend}
        rows = self._of_queries(query, positive, negatives, queries, every, ids, options)
        if not {"doc_to_query", "doc_to_doc"} & set(self.directions):
            return rows.mean()
        # The candidates of positive i, whose own positive is anchor i. With "doc_to_query", the sum also includes anchor i.
        keys, key_ids = [], []
        if "doc_to_query" in self.directions:
            keys, key_ids = [queries], [ids]
        if "doc_to_doc" in self.directions:
            keys, key_ids = [*keys, *every], [*key_ids, ids.repeat(len(every))]
        pool = Negatives(torch.cat(keys), ids=torch.cat(key_ids))
        if "doc_to_query" in self.directions:
            back = info_nce(positive, query, pool, reduction="none", **options)  # (B,)
        else:
            back = logsumexp(positive, pool, **options) - score_of_positive(query, positive) * self.scale
        if self.partition_mode == "per_direction":
            return ((rows + back) / 2).mean()
        return torch.logaddexp(rows, back).mean()

    def _of_queries(
        self, query: Tensor, positive: Tensor, negatives: list[Tensor], queries: Tensor, every: list[Tensor],
        ids: Tensor, options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """(B,): the log of the sum over the candidates of each anchor, minus the logit of its positive."""
        mode = self.hardness_mode if self.hardness_strength > 0 else None
        keys = torch.cat(every)
        everything = Negatives(keys, ids=torch.cat([ids, _without_id(ids, every[1:])]))
        others = Negatives(keys, ids=ids.repeat(len(every)))  # the documents of other rows
        mine = []  # the hard negatives of the same row
        if negatives:
            mine = [Negatives(torch.stack(negatives, 1), ids=_without_id(ids, negatives).view(len(query), -1))]
        pools, harder = {
            None: ([everything], []),
            "all_negatives": ([], [everything]),
            "in_batch_negatives": (mine, [others]),
            "hard_negatives": ([others], mine),
        }[mode]
        if "query_to_query" in self.directions:
            pools = [*pools, Negatives(queries, ids=ids)]
        rows = query.new_zeros(len(query))
        if pools:
            rows = info_nce(query, positive, pools, reduction="none", **options)
        if not harder:
            return rows
        # These logits are (scale + strength) * s, with the gradient of scale * s.
        top = self.scale + self.hardness_strength
        share = self.scale / top
        pool = Negatives(_with_share_of_gradient(harder[0].keys, share), ids=harder[0].ids)
        lse = logsumexp(_with_share_of_gradient(query, share), pool, **options | {"temperature": 1 / top})  # (B,)
        return torch.logaddexp(rows, lse - score_of_positive(query, positive) * self.scale)


class _Cached(nn.Module):
    """The common part of the losses with gradient caching."""

    uses_gradient_cache = True  # tells sentence-transformers' MatryoshkaLoss to wrap calculate_loss
    model: Any
    calculate_loss: Callable[..., Tensor]

    def _set_mini_batches(
        self, mini_batch_size: int, mini_batch_num_tokens: int | None, show_progress_bar: bool
    ) -> None:
        op = type(self).__name__
        checks.require_count(op, "mini_batch_size", mini_batch_size)
        if mini_batch_num_tokens is not None:
            checks.require_count(op, "mini_batch_num_tokens", mini_batch_num_tokens)
        checks.require_bool(op, "show_progress_bar", show_progress_bar)
        self.mini_batch_size, self.mini_batch_num_tokens = mini_batch_size, mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def get_config_dict(self) -> dict[str, Any]:
        sizes = {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return super().get_config_dict() | sizes  # type: ignore[misc]  # of the loss that it is mixed into

    def _ranges(self, features: list[Features]) -> list[list[tuple[int, int]]]:
        op = type(self).__name__
        return [cuts(op, column, self.mini_batch_size, self.mini_batch_num_tokens) for column in features]

    def _differentiated(self, columns: list[list[Part]], *more: Any) -> Tensor:
        rows = [[part.rows for part in column] for column in columns]
        if not torch.is_grad_enabled():
            return self.calculate_loss(rows, *more)
        loss = self.calculate_loss(rows, *more, with_backward=True)
        return differentiable(loss, self.model, columns)


def _finished(loss: Tensor, with_backward: bool) -> Tensor:
    if with_backward:
        loss.backward()
    return loss.detach() if with_backward else loss


class CachedMultipleNegativesRankingLoss(_Cached, MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss with gradient caching, which keeps the activations of one mini-batch at a time.

    Each text is embedded twice: once without a graph, and once with a graph when backward is called.

    Parameters
    ----------
    model, scale, similarity_fct : optional
        As in `MultipleNegativesRankingLoss`.
    mini_batch_size : int
        How many texts the model embeds at a time.
    mini_batch_num_tokens : int, optional
        Fill mini-batches up to this number of tokens instead.
    gather_across_devices, directions, partition_mode : optional
        As in `MultipleNegativesRankingLoss`.
    show_progress_bar : bool
        Accepted for compatibility. It has no effect.
    hardness_mode, hardness_strength, backend : optional
        As in `MultipleNegativesRankingLoss`.

    Notes
    -----
    Source: Gao et al. 2021, arXiv 2101.06983, and sentence-transformers 6.2.

    Examples
    --------
    >>> from negmine.adapters.sentence_transformers import CachedMultipleNegativesRankingLoss
    >>> words = torch.nn.EmbeddingBag(100, 16)  # in place of a SentenceTransformer
    >>> def model(features):
    ...     return {"sentence_embedding": words(features["input_ids"])}
    >>> anchors, positives = ({"input_ids": torch.randint(100, (8, 5))} for _ in range(2))
    >>> loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)([anchors, positives])
    >>> loss.backward()
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        show_progress_bar: bool = False,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        backend: str | None = None,
    ) -> None:
        options = (gather_across_devices, directions, partition_mode, hardness_mode, hardness_strength)
        super().__init__(model, scale, similarity_fct, *options, backend=backend)
        self._set_mini_batches(mini_batch_size, mini_batch_num_tokens, show_progress_bar)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss () of the features of the anchors, the positives and each column of negatives."""
        features = _columns(type(self).__name__, sentence_features)
        ranges = self._ranges(features)
        columns = [embed(self.model, *column) for column in zip(features, ranges, strict=True)]
        return self._differentiated(columns, labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the embeddings of the mini-batches of each column."""
        return _finished(self.compute_loss_from_embeddings([torch.cat(rows) for rows in reps]), with_backward)


class GISTEmbedLoss(nn.Module):
    """The GISTEmbedLoss of sentence-transformers: InfoNCE over a batch from which a guide model removes false negatives.

        loss = mean over i of -x_ii + log(sum of exp(x) over the candidates that are kept),   x = cosine / temperature

    The candidates of anchor i are the other positives, all negatives and, with contrast_anchors, all anchors. With
    contrast_positives, positive i is also compared with all positives. A candidate is removed if its cosine by the guide is above
    a limit: the guide's cosine of anchor i and positive i, minus `margin`.

    `loss(sentence_features, labels=None)` takes a list of features, one dict each for anchors, positives and any number of
    columns of negatives. The labels are not used.

    Parameters
    ----------
    model : Module
        A SentenceTransformer, or a similar module with the attributes `tokenizer` and `max_seq_length`.
    guide : Module
        The guide model, of the same kind. If its vocabulary differs or its max_seq_length is smaller, texts are decoded by the
        model's tokenizer and encoded by guide.preprocess.
    temperature : float
        The cosines are divided by it.
    margin_strategy : str
        "absolute", or "relative": then the margin is multiplied by the absolute value of the guide's cosine of anchor i and
        positive i.
    margin : float
        The margin in the limit. A larger margin removes more candidates.
    contrast_anchors, contrast_positives : bool
        Whether anchors are also compared with anchors, and positives with positives.
    gather_across_devices : bool
        Whether to use the positives and negatives of all ranks as candidates, with gradients across ranks.
    backend : str, optional
        As in `info_nce`.

    Notes
    -----
    Anchor i is also compared with itself, and positive i with itself. The guide removes these candidates, unless its cosine of
    anchor i and positive i is 1. Source: Solatorio 2024, arXiv 2402.16829, and sentence-transformers 6.2.

    Examples
    --------
    >>> import types
    >>> from negmine.adapters.sentence_transformers import GISTEmbedLoss
    >>> class Model(torch.nn.Module):  # in place of a SentenceTransformer
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.words, self.max_seq_length = torch.nn.EmbeddingBag(100, 16), 5
    ...         self.tokenizer = types.SimpleNamespace(get_vocab=dict)
    ...     def forward(self, features):
    ...         return {"sentence_embedding": self.words(features["input_ids"])}
    >>> anchors, positives = ({"input_ids": torch.randint(100, (8, 5))} for _ in range(2))
    >>> loss = GISTEmbedLoss(Model(), guide=Model())([anchors, positives])
    >>> loss.backward()
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        temperature: float = 0.01,
        margin_strategy: str = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        checks.require_number(op, "temperature", temperature, above=0)
        checks.require_choice(op, "margin_strategy", margin_strategy, ("absolute", "relative"))
        checks.require_number(op, "margin", margin)
        flags = {"contrast_anchors": contrast_anchors, "contrast_positives": contrast_positives}
        for name, flag in (flags | {"gather_across_devices": gather_across_devices}).items():
            checks.require_bool(op, name, flag)
        for name, given in (("model", model), ("guide", guide)):
            if not hasattr(getattr(given, "tokenizer", None), "get_vocab"):
                raise checks.refuse(op, name, "a module with a tokenizer of transformers", checks.kind_of(given))
        self.model, self.guide, self.temperature = model, guide, temperature
        self.margin_strategy, self.margin = margin_strategy, margin
        self.contrast_anchors, self.contrast_positives = contrast_anchors, contrast_positives
        self.gather_across_devices, self.backend = gather_across_devices, backend
        self.must_retokenize = (
            model.tokenizer.get_vocab() != guide.tokenizer.get_vocab() or guide.max_seq_length < model.max_seq_length
        )
        self.tokenizer = model.tokenizer  # kept here because the model may be wrapped later

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that sentence-transformers writes into a model card."""
        names = ("guide", "temperature", "margin_strategy", "margin", "contrast_anchors", "contrast_positives")
        return {name: getattr(self, name) for name in (*names, "gather_across_devices")}

    @torch.no_grad()
    def _guided(self, features: Features) -> Tensor:
        """The guide's normalized embeddings (B, G). A model writes into features, so call this before the model."""
        features = dict(features)
        if self.must_retokenize:
            texts = self.tokenizer.batch_decode(features["input_ids"], skip_special_tokens=True)
            encoded = (getattr(self.guide, "preprocess", None) or self.guide.tokenize)(texts)
            device = next(self.guide.parameters()).device
            features = {
                name: value.to(device) if isinstance(value, Tensor) else value for name, value in encoded.items()
            }
        return _unit(self.guide(features)["sentence_embedding"])

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss () of the features of the anchors, the positives and each column of negatives."""
        features = _columns(type(self).__name__, sentence_features)
        guides = [self._guided(column) for column in features]
        return self._loss([self.model(column)["sentence_embedding"] for column in features], guides)

    def _loss(self, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
        """The loss of the embeddings (B, D) and guides (B, G) of anchors, positives and each column of negatives."""
        anchor, *docs = map(_unit, embeddings)
        anchor_guide, *doc_guides = guides
        positive, positive_guide = docs[0], doc_guides[0]
        own = _own_rows(anchor, self.gather_across_devices)  # (B,)
        if self.gather_across_devices:
            docs, doc_guides = ([gathered(rows) for rows in columns] for columns in (docs, doc_guides))
        options: dict[str, Any] = {"temperature": self.temperature, "backend": self.backend}
        margins: dict[str, Any] = {"margin": self.margin, "relative": self.margin_strategy == "relative"}
        keys, key_guides = [*docs], [*doc_guides]
        if self.contrast_anchors:
            keys, key_guides = [*keys, anchor], [*key_guides, anchor_guide]
        guide = Guide(anchor_guide, positive_guide, torch.cat(key_guides), **margins)
        ids = torch.arange(len(docs[0]), device=anchor.device)
        pool = Negatives(torch.cat(keys), ids=torch.cat([ids, _without_id(ids, keys[1:])]), guide=guide)
        rows = info_nce(anchor, positive, pool, query_ids=own, reduction="none", **options)  # (B,)
        if self.contrast_positives:
            # Guide compares scores with that of a query and its positive. One more dimension makes that score equal `limit`.
            limit = (anchor_guide * positive_guide).sum(1, keepdim=True)  # (B, 1)
            query = torch.cat([positive_guide, limit], 1)  # (B, G + 1)
            guide = Guide(
                query,
                F.pad(torch.zeros_like(positive_guide), (0, 1), value=1.0),
                F.pad(doc_guides[0], (0, 1)),
                **margins,
            )
            lse = logsumexp(positive, Negatives(docs[0], guide=guide), **options)  # (B,)
            rows = torch.logaddexp(rows, lse - score_of_positive(anchor, positive) / self.temperature)
        return rows.mean()


class CachedGISTEmbedLoss(_Cached, GISTEmbedLoss):
    """GISTEmbedLoss with gradient caching, which keeps the activations of one mini-batch at a time.

    The model embeds each text twice: once without a graph, and once with a graph when backward is called. The guide embeds each
    text once.

    Parameters
    ----------
    model, guide, temperature : optional
        As in `GISTEmbedLoss`.
    mini_batch_size : int
        How many texts a model embeds at a time.
    mini_batch_num_tokens : int, optional
        Fill mini-batches up to this number of tokens instead.
    show_progress_bar : bool
        Accepted for compatibility. It has no effect.
    margin_strategy, margin, contrast_anchors, contrast_positives, gather_across_devices, backend : optional
        As in `GISTEmbedLoss`.

    Notes
    -----
    Source: Gao et al. 2021, arXiv 2101.06983, and sentence-transformers 6.2.

    Examples
    --------
    >>> import types
    >>> from negmine.adapters.sentence_transformers import CachedGISTEmbedLoss
    >>> class Model(torch.nn.Module):  # in place of a SentenceTransformer
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.words, self.max_seq_length = torch.nn.EmbeddingBag(100, 16), 5
    ...         self.tokenizer = types.SimpleNamespace(get_vocab=dict)
    ...     def forward(self, features):
    ...         return {"sentence_embedding": self.words(features["input_ids"])}
    >>> anchors, positives = ({"input_ids": torch.randint(100, (8, 5))} for _ in range(2))
    >>> loss = CachedGISTEmbedLoss(Model(), guide=Model(), mini_batch_size=4)([anchors, positives])
    >>> loss.backward()
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        temperature: float = 0.01,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        margin_strategy: str = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        options = (margin_strategy, margin, contrast_anchors, contrast_positives, gather_across_devices)
        super().__init__(model, guide, temperature, *options, backend=backend)
        self._set_mini_batches(mini_batch_size, mini_batch_num_tokens, show_progress_bar)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss () of the features of the anchors, the positives and each column of negatives."""
        features = _columns(type(self).__name__, sentence_features)
        guides, columns = [], []
        for column, ranges in zip(features, self._ranges(features), strict=True):
            guides.append([self._guided(part_of(column, *range_)) for range_ in ranges])
            columns.append(embed(self.model, column, ranges))
        return self._differentiated(columns, guides)

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the embeddings, by the model and by the guide, of the mini-batches of each column."""
        return _finished(
            self._loss(*([torch.cat(rows) for rows in part] for part in (reps, reps_guided))), with_backward
        )
