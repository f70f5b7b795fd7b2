"""The losses of losses/methods.py, siglip and synco against their published formulas, in float64, on every backend."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import negmine
from negmine import Negatives, Select, recipes, reference
from negmine.losses import methods
from negmine.losses.mixgcf import mixgcf
from negmine.losses.synco import COUNTS, PAPER, synco, synco_vectors
from negmine.ops import philox
from negmine.recipes import Kinds
from tests import compare
from tests.cases import dense_mask, masks, negatives, tags, unit
from tests.conftest import device_of, interpreted
from tests.test_kernels import gradients

B, K, D = 5, 90, 6
OUT = -torch.inf
SMALL = Kinds(20, 5, 6, 7, 3, 4, 5, sigma=0.3, delta=0.2, eta=0.1)


def nce(x_pos, x):
    return -torch.cat([x_pos[:, None], x], 1).log_softmax(1)[:, 0]


def hardness_added(s_pos, s, T, keep, alpha):
    return nce(s_pos / T, (s / T + alpha * s.detach()).masked_fill(~keep, OUT))


def decoupled_weighted(s_pos, s, T, keep, sigma):
    w = torch.tensor(
        [2 - len(s) * float((p / sigma).exp() / (s_pos.detach() / sigma).exp().sum()) for p in s_pos.detach()]
    )
    return (s / T).masked_fill(~keep, OUT).exp().sum(1).log() - w.to(s) * s_pos / T


def rince(s_pos, s, T, keep, r, lam):
    pos, neg = (s_pos / T).exp(), ((s / T).exp() * keep).sum(1)
    return -(pos**r) / r + (lam * (pos + neg)) ** r / r


def ifm(s_pos, s, T, keep, epsilon, alpha):
    moved = nce((s_pos - epsilon) / T, ((s + epsilon) / T).masked_fill(~keep, OUT))
    return (nce(s_pos / T, (s / T).masked_fill(~keep, OUT)) + alpha * moved) / (1 + alpha)


def dual_temperature(s_pos, s, T, keep, temperature_ratio):
    near, far = (nce(s_pos / t, (s / t).masked_fill(~keep, OUT)) for t in (T, T * temperature_ratio))
    return ((1 - (-far).exp()) / (1 - (-near).exp())).detach() * near


CASES = {
    "hardness_added": (hardness_added, 0.1, {"alpha": 9.0}),
    "decoupled_weighted": (decoupled_weighted, 0.1, {"sigma": 0.5}),
    "rince": (rince, 0.5, {"r": 0.5, "lam": 0.01}),
    "ifm": (ifm, 0.2, {"epsilon": 0.1, "alpha": 1.0}),
    "dual_temperature": (dual_temperature, 0.1, {"temperature_ratio": 10.0}),
}


def inputs(dtype=torch.float32, device="cpu"):
    return [unit(n, D, dtype=dtype, device=device, seed=i) for i, n in enumerate((B, B, K))]


def leaves_of(vectors, T, cast):
    leaves = [v.to(cast).detach().requires_grad_() for v in vectors]
    wide = torch.promote_types(cast, torch.float32)
    return leaves, torch.tensor(T, dtype=wide, device=vectors[0].device).requires_grad_()


def agree(name, ours, dense, T, vectors, condition):
    """Compare ours(leaves, T) of a backend with dense(leaves, T) in float64: loss rows, and all gradients."""
    outputs = []
    for function, cast in ((ours, vectors[0].dtype), (dense, torch.float64), (dense, vectors[0].dtype)):
        leaves, temperature = leaves_of(vectors, T, cast)
        rows = function(leaves, temperature)
        outputs.append([rows, *gradients(rows, [*leaves, temperature])])
    for part, k, t, p in zip(("rows", "d_query", "d_positive", "d_keys", "d_T"), *outputs, strict=True):
        # A difference of a term of the positive and a term of the negatives.
        terms = outputs[1][2] if part == "d_query" else None
        compare.rounded(f"{name} {part}", k, t, p, condition, terms)


@pytest.mark.parametrize("kind", ["none", "everything", "sampled"])
@pytest.mark.parametrize("name", CASES)
def test_method_is_its_formula(any_backend, name, kind):
    formula, T, options = CASES[name]
    device = device_of(any_backend)
    for dtype in (torch.float32, torch.bfloat16):
        if dtype != torch.float32 and (any_backend == "reference" or interpreted(any_backend)):
            continue  # the reference computes in fp32, as does the interpreter
        vectors = inputs(dtype, device)
        if kind == "sampled":
            given = {}
            call = {"select": Select(2, 0.5, sample=9), "seed": 4, "step": 2, "row_offset": 7}
            scores = reference.scores_of(vectors[0].float(), vectors[2].float())
            keep = reference.multiplicity(scores, None, call["select"], None, 4, 2, 7) > 0
        else:
            given = masks(kind, B, K, device)
            call = tags(given)
            keep = dense_mask(vectors[0], vectors[2], given)
            keep = torch.ones(B, K, dtype=torch.bool, device=device) if keep is None else keep

        def ours(leaves, T, given=given, call=call):
            keywords = {**options, **call, "reduction": "none", "backend": any_backend}
            return getattr(methods, name)(*leaves[:2], negatives(leaves[2], given), temperature=T, **keywords)

        def dense(leaves, T, keep=keep):
            q, pos, keys = leaves
            return formula((q * pos).sum(1), q @ keys.T, T, keep, **options)

        agree(name, ours, dense, T, vectors, 1 / T + options.get("alpha", 0) + 10)


@pytest.mark.parametrize("loss", [synco, negmine.siglip, methods.rince], ids=lambda f: f.__name__)
def test_a_sample_of_everything_is_everything(any_backend, loss):
    vectors = inputs(device=device_of(any_backend))
    given = {"reduction": "none", "backend": any_backend} | ({"kinds": SMALL} if loss is synco else {})
    results = []
    for select in (None, Select(sample=K)):
        leaves = [v.clone().requires_grad_() for v in vectors]
        rows = loss(*leaves, select=select, **given)
        results.append([rows, *gradients(rows, leaves)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_i_mix_is_its_formula(any_backend):
    device = device_of(any_backend)
    vectors = inputs(device=device)
    share, partner = torch.rand(B, device=device), torch.randperm(B).to(device)

    def ours(leaves, T):
        keywords = {"share": share, "partner": partner, "reduction": "none", "backend": any_backend}
        return methods.i_mix(*leaves, temperature=T, **keywords)

    def dense(leaves, T):
        q, batch, keys = leaves
        columns = -(q @ torch.cat([batch, keys]).T / T).log_softmax(1)  # (B, B + K)
        own, other = columns[range(B), range(B)], columns[range(B), partner]
        lam = share.to(q.dtype)
        return lam * own + (1 - lam) * other

    agree("i_mix", ours, dense, 0.2, vectors, 10.0)


@pytest.mark.parametrize("kind", ["none", "everything"])
def test_un_mix_is_its_formula(any_backend, kind):
    """Row by row: the mixed queries of the row and of the mirrored row, each with the positive and the masks of the row."""
    device = device_of(any_backend)
    vectors, given = inputs(device=device), masks(kind, B, K, device)
    keep = dense_mask(vectors[0], vectors[2], given)
    keep = torch.ones(B, K, dtype=torch.bool, device=device) if keep is None else keep

    def mixed(leaves):
        return 0.6 * leaves[0] + 0.4 * leaves[1].roll(1, 0)

    def ours(leaves, T):
        keywords = {"mixed_query": mixed(leaves), "share": 0.3, "reduction": "none", "backend": any_backend}
        return methods.un_mix(*leaves[:2], negatives(leaves[2], given), temperature=T, **keywords, **tags(given))

    def dense(leaves, T):
        q, pos, keys = leaves
        rows = []
        for b in range(B):
            terms = [
                (1.0, q[b]),
                (0.3, mixed(leaves)[b]),
                (0.7, mixed(leaves)[B - 1 - b]),
            ]
            columns = [torch.cat([pos[b : b + 1], keys[keep[b]]]) @ v / T for _, v in terms]  # the positive first
            rows.append(sum(w * (x.logsumexp(0) - x[0]) for (w, _), x in zip(terms, columns, strict=True)))
        return torch.stack(rows)

    agree("un_mix", ours, dense, 0.2, vectors, 10.0)


@pytest.mark.parametrize("kind", ["none", "everything"])
def test_adco_has_a_temperature_for_each_gradient(any_backend, kind):
    """The loss and the gradients of query and positive use T; that of the memory, through its normalization, uses T_m."""
    device = device_of(any_backend)
    (q, pos, keys), given = inputs(device=device), masks(kind, B, K, device)
    memory = keys * torch.linspace(0.5, 2, K, device=device)[:, None]
    T, T_m = 0.2, 0.1
    leaves = [v.clone().requires_grad_() for v in (q, pos, memory)]
    unit_rows = negatives(F.normalize(leaves[2], dim=1), given)
    options = {"temperature": T, "memory_temperature": T_m, "backend": any_backend}
    loss = methods.adco(leaves[0], leaves[1], unit_rows, **options, **tags(given))
    got = [loss.detach(), *torch.autograd.grad(loss, leaves)]

    keep = dense_mask(q, keys, given)
    keep = torch.ones(B, K, dtype=torch.bool, device=device) if keep is None else keep

    def written_out(dtype):
        q_, pos_, W = (v.to(dtype) for v in (q, pos, memory))
        d = W / W.norm(dim=1, keepdim=True)
        value, d_q, d_pos, g = 0.0, torch.zeros_like(q_), torch.zeros_like(q_), torch.zeros_like(W)
        for b in range(B):
            for scale, of_memory in ((T, False), (T_m, True)):
                x = torch.cat([pos_[b : b + 1], d]) @ q_[b] / scale
                p = x.masked_fill(~torch.cat([keep[b, :1] | True, keep[b]]), OUT).softmax(0)  # (1 + K,)
                if of_memory:
                    along = d @ q_[b]  # the gradient of a unit vector has no part along it
                    g += p[1:, None] * (q_[b] - along[:, None] * d) / W.norm(dim=1, keepdim=True) / T_m / B
                else:
                    value -= p[0].log() / B
                    d_q[b] = ((p[0] - 1) * pos_[b] + p[1:] @ d) / T / B
                    d_pos[b] = (p[0] - 1) * q_[b] / T / B
        return value, d_q, d_pos, g

    for part, k, t, p in zip(
        ("loss", "d_q", "d_pos", "d_memory"), got, written_out(torch.float64), written_out(q.dtype), strict=True
    ):
        compare.rounded(f"adco {part}", k, t, p, 1 / T_m + 10)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("form", ["queue", "own keys"])
def test_mixgcf_is_its_formula(any_backend, layers, form):
    """With enough draws, all negatives are candidates: all are mixed with the positive, and each layer keeps the hardest mix."""
    device = device_of(any_backend)
    vectors, mask = inputs(device=device), torch.rand(B, K, device=device) < 0.7
    rows = torch.arange(B) + 11
    word = philox.words(rows, torch.arange(layers), philox.STREAM_PARTNER, 4, 2)[0]
    share = philox.unit(word, None).to(device)  # (B, layers)

    def ours(leaves, T):
        q, pos, keys = leaves
        pool = Negatives(keys if form == "queue" else keys.expand(B, -1, -1), mask=mask)
        options = {"layers": layers, "temperature": T, "seed": 4, "step": 2, "row_offset": 11, "reduction": "none"}
        return mixgcf(q, pos, pool, candidates=4000, backend=any_backend, **options)

    def dense(leaves, T):
        q, pos, keys = leaves
        losses = []
        for b in range(B):
            score = -(q[b] @ pos[b])
            for of_layer, a in zip(torch.arange(D).chunk(layers), share[b].to(q.dtype), strict=True):
                mixes = a * pos[b, of_layer] + (1 - a) * keys[mask[b]][:, of_layer]  # (candidates, D / layers)
                score = score + (mixes @ q[b, of_layer]).max()
            losses.append(torch.log1p((score / T).exp()))
        return torch.stack(losses)

    agree("mixgcf", ours, dense, 0.5, vectors, 10.0)


def test_mixgcf_draws_its_candidates():
    """The hardest of 9 draws from 90 has each rank with the right frequency, in a queue that is not full and has masked rows."""
    q, pos, keys = inputs()
    q, pos = q[:1].expand(3000, -1), torch.zeros(3000, D)
    order = (keys @ q[0]).sort(descending=True).values
    queue = negmine.MoCoQueue(D, 2 * K, with_ids=True, random_init=False)
    queue.enqueue(keys, ids=torch.arange(K))
    queue.queue[K:] = torch.nan
    unknown = torch.full((3000,), -1)
    for step, columns, given in ((0, keys, {}), (1, queue, {"query_ids": unknown})):
        loss = mixgcf(q, pos, columns, candidates=9, step=step, reduction="none", **given)
        gap = loss.expm1().log()  # (1 - a) times the hardest score
        word = philox.words(torch.arange(3000), torch.arange(1), philox.STREAM_PARTNER, 0, step)[0][:, 0]
        score = gap / (1 - philox.unit(word, None))
        rank = (score[:, None] - order).abs().argmin(1)
        for r in range(3):
            want = (1 - r / 90) ** 9 - (1 - (r + 1) / 90) ** 9
            share = float((rank == r).double().mean())
            assert abs(share - want) < 4 * (want * (1 - want) / 3000) ** 0.5
    hidden = mixgcf(q, pos, queue, candidates=9, query_ids=torch.full((3000,), 7), reduction="none")
    assert torch.equal(
        hidden, mixgcf(q, pos, Negatives(keys, mask=torch.arange(K) != 7), candidates=9, reduction="none")
    )


@pytest.mark.parametrize("kind", ["none", "everything"])
def test_siglip_is_its_formula(any_backend, kind):
    device = device_of(any_backend)
    vectors, bias = inputs(device=device), -2.0
    given = masks(kind, B, K, device)
    keep = dense_mask(vectors[0], vectors[2], given)

    def ours(leaves, t):
        keywords = {"scale": t, "bias": bias, "reduction": "none", "backend": any_backend}
        return negmine.siglip(*leaves[:2], negatives(leaves[2], given), **keywords, **tags(given))

    def dense(leaves, t):
        q, pos, keys = leaves
        each = (1 + (t * (q @ keys.T) + bias).exp()).log()
        each = each if keep is None else each * keep
        return (1 + (-(t * (q * pos).sum(1) + bias)).exp()).log() + each.sum(1)

    agree("siglip", ours, dense, 10.0, vectors, 10.0)


@pytest.mark.parametrize("kind", ["none", "everything"])
def test_synco_is_its_formula(any_backend, kind):
    device = device_of(any_backend)
    vectors = inputs(device=device)
    given = masks(kind, B, K, device)
    allowed = dense_mask(vectors[0], vectors[2], given)
    keep = torch.ones(B, K, dtype=torch.bool, device=device) if allowed is None else allowed
    draw = (7, 11, 2**33)
    _, index = reference.mine_hardest(vectors[0].double(), vectors[2].double(), SMALL.hard, allowed)

    def ours(leaves, T):
        keyed = dict(zip(("seed", "step", "row_offset"), draw, strict=True))
        keywords = {"kinds": SMALL, "reduction": "none", "backend": any_backend}
        columns = negatives(leaves[2], given)
        return synco(*leaves[:2], columns, temperature=T, **keywords, **keyed, **tags(given))

    def dense(leaves, T):
        q, pos, keys = leaves
        h = synco_vectors(q, keys, index, SMALL, draw)  # (B, S, D)
        made = (torch.einsum("bd,bsd->bs", q, h) / T).masked_fill((index < 0).all(1, keepdim=True), OUT)
        return nce((q * pos).sum(1) / T, torch.cat([(q @ keys.T / T).masked_fill(~keep, OUT), made], 1))

    agree("synco", ours, dense, 0.2, vectors, 10.0)


def test_each_kind_of_synco_has_its_closed_form():
    """Logits of kinds 1, 2, 5 and 6 follow from scores alone. Kind 2 is easier than its source; 1, 5 and 6 are harder."""
    q, _, keys = (v.double() for v in inputs())
    _, index = reference.mine_hardest(q, keys, SMALL.hard)
    for number, name in enumerate(COUNTS, 1):
        only = Kinds(SMALL.hard, **dict.fromkeys(COUNTS, 0) | {name: 400}, sigma=0.3, delta=0.2, eta=0.1)
        h = synco_vectors(q, keys, index, only, (1, 2, 3))
        torch.testing.assert_close(h.norm(dim=2), torch.ones(B, 400).double())
        logit = torch.einsum("bd,bsd->bs", q, h)
        words = philox.words(torch.arange(B) + 3 + (number << 48), torch.arange(400), philox.STREAM_MIX, 1, 2)
        source = index.gather(1, philox.below(words[1], torch.full((B, 1), SMALL.hard)))
        s, f = (q[:, None] * keys[source]).sum(2), philox.unit(words[2], None).double()
        share = {"interpolated": 0.5 * f, "extrapolated": 0.5 * f - 0.5, "graded": torch.full_like(f, 0.2 / 1.2)}
        if name in share:
            c = share[name]
            closed = (c + (1 - c) * s) / (c**2 + (1 - c) ** 2 + 2 * c * (1 - c) * s).sqrt()
            torch.testing.assert_close(logit, closed)
            assert bool((logit <= s + 1e-12).all() if name == "extrapolated" else (logit >= s - 1e-12).all())
        if name == "graded":
            torch.testing.assert_close(logit, (s + 0.2) / (1 + 2 * 0.2 * s + 0.2**2).sqrt())
        if name == "signed":
            along = (keys[source] * q.sign()[:, None]).sum(2)
            norm = (1 + 2 * 0.1 * along + 0.1**2 * D).sqrt()
            torch.testing.assert_close(logit, (s + 0.1 * q.abs().sum(1, keepdim=True)) / norm)
        if name == "noised":
            assert (h - keys[source]).norm(dim=2).median() < 1.0  # near its source
            assert (logit - s).std() > 0.05


def test_the_normal_noise_is_normal():
    z = philox.normals(torch.arange(300), torch.arange(50), 7, 5, 6).double().flatten()
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5 and abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5 and abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    first, again = (philox.normals(torch.arange(2) + 8, torch.arange(3), 7, 5, s) for s in (6, 6))
    assert torch.equal(first, again)
    assert torch.equal(first[1:], philox.normals(torch.arange(1) + 9, torch.arange(3), 7, 5, 6))


def test_kinds_do_not_share_draws():
    """Adding a kind, or more members of a kind, does not change the vectors of the others."""
    q, _, keys = inputs()
    _, index = reference.mine_hardest(q, keys, 20)
    whole = synco_vectors(q, keys, index, SMALL, (0, 0, 0))
    for name, part in zip(COUNTS, whole.split([getattr(SMALL, n) for n in COUNTS], 1), strict=True):
        alone = Kinds(20, **dict.fromkeys(COUNTS, 0) | {name: part.shape[1]}, sigma=0.3, delta=0.2, eta=0.1)
        compare.exact(name, synco_vectors(q, keys, index, alone, (0, 0, 0)), part)


CALLS = {
    **{name: (getattr(methods, name), {}) for name in CASES},
    "siglip": (negmine.siglip, {}),
    "synco": (synco, {"kinds": SMALL}),
    "i_mix": (methods.i_mix, {"share": torch.full((B,), 0.7), "partner": torch.arange(B).flip(0)}),
    "un_mix": (methods.un_mix, {"mixed_query": unit(B, D, seed=3), "share": torch.tensor(0.7)}),
    "adco": (methods.adco, {}),
    "mixgcf": (mixgcf, {"candidates": 30, "layers": 3}),
}


@pytest.mark.parametrize("name", ["rince", "ifm", "siglip", "i_mix", "un_mix", "mixgcf"])
def test_finite_differences(name):
    """For methods that detach nothing. Gradients of the others are compared with autograd of the dense formula."""
    function, options = CALLS[name]
    q, pos, keys = (v.double().requires_grad_() for v in inputs())
    options = {
        n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in options.items()
    }
    assert torch.autograd.gradcheck(
        lambda q, p, n: function(q, p, n, reduction="none", backend="reference", **options), (q, pos, keys)
    )


@pytest.mark.parametrize("name", CALLS)
def test_empty_rows_nan_rows_and_reductions(any_backend, name):
    device = device_of(any_backend)
    function, options = CALLS[name]
    options = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    q, pos, keys = inputs(device=device)
    usable = torch.ones(B, K, dtype=torch.bool, device=device)
    usable[1] = False
    q, columns = q.requires_grad_(), Negatives(keys, mask=usable)
    rows = function(q, pos, columns, reduction="none", backend=any_backend, **options)
    (gradient,) = torch.autograd.grad(rows.sum(), q)
    assert bool(rows.isfinite().all()) and bool(gradient.isfinite().all())
    if name not in ("siglip", "i_mix"):  # their rows have a term that needs no negatives
        assert rows[1] == 0 and not gradient[1].any()
    for reduction, want in (("sum", rows.sum()), ("mean", rows.mean())):
        got = function(q, pos, columns, reduction=reduction, backend=any_backend, **options)
        torch.testing.assert_close(got, want)
    if name not in ("decoupled_weighted", "i_mix"):  # their rows depend on each other
        broken = q.detach().clone()
        broken[3] = torch.nan
        spoiled = function(broken, pos, columns, reduction="none", backend=any_backend, **options)
        assert spoiled.isnan().tolist() == [False, False, False, True, False]


def test_limits_and_identities():
    q, pos, keys = (v.double() for v in inputs())
    call = {"reduction": "none", "backend": "reference", "temperature": 0.2}
    plain = negmine.info_nce(q, pos, keys, **call)
    x_pos, lse = (q * pos).sum(1) / 0.2, negmine.logsumexp(q, keys, temperature=0.2, backend="reference")
    close = torch.testing.assert_close
    close(F.softplus(lse - x_pos), plain)
    close(methods.hardness_added(q, pos, keys, alpha=0.0, **call), plain)
    close(methods.ifm(q, pos, keys, epsilon=0.0, **call), plain)
    close(methods.ifm(q, pos, keys, alpha=0.0, **call), plain)
    close(methods.dual_temperature(q, pos, keys, temperature_ratio=1.0, **call), plain)
    close(synco(q, pos, keys, kinds=PAPER.enabled_where(torch.tensor(False)), **call), plain)
    close(synco(q, pos, keys, kinds=Kinds(5, 0, 0, 0, 0, 0, 0), **call), plain)
    # an additive margin of 2 epsilon on the positive
    moved = 2 * methods.ifm(q, pos, keys, epsilon=0.05, **call) - plain
    close(moved, F.softplus(lse - x_pos + 2 * 0.05 / 0.2))
    # r -> 0 is InfoNCE plus log lam; r = 1 is linear in the exponentials
    close(methods.rince(q, pos, keys, r=1e-6, lam=0.5, **call), plain + math.log(0.5), rtol=1e-4, atol=1e-4)
    close(methods.rince(q, pos, keys, r=1.0, lam=0.5, **call), 0.5 * lse.exp() - 0.5 * x_pos.exp())
    # equal positives weigh alike, and weights add up to B
    exact = F.normalize(q, dim=1)
    decoupled = negmine.info_nce(exact, exact, keys, decoupled=True, **call)
    close(methods.decoupled_weighted(exact, exact, keys, **call), decoupled)
    # alpha = beta / T is HCL's sharpened sum without its normaliser
    sharper = negmine.logsumexp(q, keys, temperature=0.2 / (1 + 2.0), backend="reference")
    close(methods.hardness_added(q, pos, keys, alpha=2.0 / 0.2, **call), F.softplus(sharper - x_pos))
    # MoCHi's two kinds are SynCo's 1 and 3
    share, partner = torch.ones(B).double(), torch.arange(B)
    both = Negatives(torch.cat([pos, keys]), ids=torch.arange(B + K))
    everything = negmine.info_nce(q, pos, both, **call, query_ids=torch.arange(B))
    close(methods.i_mix(q, pos, keys, share=share, partner=partner, **call), everything)
    # the pair alone
    alone = negmine.siglip(q, pos, keys[:0], scale=3.0, bias=0.5, reduction="none")
    close(alone, -F.logsigmoid(3.0 * (q * pos).sum(1) + 0.5))


def test_mixed_inputs_are_a_permutation_of_the_batch():
    x = torch.randn(64, 3, 4, 4)
    mixed, share, partner = recipes.mixed_inputs(x, seed=1, step=2)
    assert partner.sort().values.tolist() == list(range(64)) and bool((share >= 0.5).all() & (share <= 1).all())
    torch.testing.assert_close(mixed[5], share[5] * x[5] + (1 - share[5]) * x[partner[5]])
    again, other = (recipes.mixed_inputs(x, seed=1, step=s)[1] for s in (2, 3))
    assert torch.equal(again, share) and not torch.equal(other, share)
    many = recipes.mixed_inputs(torch.zeros(20_000, 1), concentration=0.3)[1].double()
    top = torch.distributions.Beta(0.3, 0.3).sample((400_000,))
    want = torch.maximum(top, 1 - top).double().mean()
    assert abs(many.mean() - want) < 4 * float(many.std()) / 20_000**0.5


def test_a_module_learns_its_numbers_counts_and_is_pickled():
    q, pos, keys = inputs()
    learned = torch.nn.Parameter(torch.tensor(0.3))
    loss = recipes.synco(*[20, 5, 6, 7, 3, 4, 5], temperature=learned, warmup_steps=1, seed=4)
    values = [float(loss(q, pos, keys).detach()) for _ in range(3)]
    assert len(set(values)) == 3 and values[0] < min(values[1:])
    loss(q, pos, keys).backward()
    assert learned.grad.isfinite() and loss.state_dict()["step"] == 4
    again = pickle.loads(pickle.dumps(loss))
    assert again(q, pos, keys, step=2) == values[2]
    siglip = recipes.siglip(select=Select(0, 0.5))
    siglip(q, pos, keys).backward()
    assert siglip.log_scale.grad.isfinite() and siglip.bias.grad.isfinite() and siglip.step == 1
    assert not recipes.siglip(learn=False)(q, pos, keys).requires_grad


def test_a_step_compiles_into_one_graph():
    torch._dynamo.reset()
    q, pos, keys = inputs()

    def step(q, pos, keys):
        rows = [getattr(methods, name)(q, pos, keys) for name in CASES]
        return torch.stack([*rows, synco(q, pos, keys, kinds=SMALL)])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, pos, keys), step(q, pos, keys))
