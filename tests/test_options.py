"""Options that are not implemented in kernels: agreement with the reference, gradients, errors."""

import pytest
import torch

import negmine
from negmine import Mix, Select, Weight, reference
from tests import compare
from tests.cases import unit
from tests.conftest import device_of

POSITIVE_BIAS = [
    {},
    {"select": Select(0.0, 0.5)},
    {"select": Select(0, 9, absolute_margin=0.01)},  # the margin is subtracted from the score, not from the logit
    {"mix": Mix(6, 9, 5)},
    {"weight": Weight(1.0, 0.001)},
    {"decoupled": True},
]


@pytest.mark.parametrize("options", POSITIVE_BIAS, ids=lambda options: ",".join(options) or "plain")
def test_positive_bias(backend, options):
    device = device_of(backend)
    vectors = [unit(n, 16, device=device, seed=i) for i, n in enumerate((5, 5, 90))]
    bias = torch.linspace(-3.0, 2.0, 5, device=device)

    def run(function, dtype, **more):
        leaves = [t.to(dtype).requires_grad_() for t in (*vectors, bias)]
        rows, stats = function(*leaves[:3], temperature=0.5, positive_bias=leaves[3], **options, **more)
        return [rows, *torch.autograd.grad(rows.double().sum(), leaves)], stats

    got, stats = run(negmine.info_nce, torch.float32, reduction="none", return_stats=True, backend=backend)
    truth, want = run(reference.info_nce, torch.float64)
    plain, _ = run(reference.info_nce, torch.float32)
    for name, k, t, p in zip(("loss", "d_query", "d_positive", "d_keys", "d_bias"), got, truth, plain, strict=True):
        compare.rounded(name, k, t, p, 2.0, truth[2] if name == "d_query" else None)
    compare.exact("positive_rank", stats.positive_rank, want["positive_rank"])
    compare.exact("num_negatives", stats.num_negatives, want["num_negatives"])


def test_an_invalid_positive_bias_raises_an_error():
    q, keys = unit(3, 4), unit(7, 4)
    with pytest.raises(ValueError, match=r"info_nce: positive_bias must be a floating tensor of shape \(3,\), got"):
        negmine.info_nce(q, q, keys, positive_bias=torch.zeros(7))
    with pytest.raises(TypeError, match="info_nce: positive_bias must be a tensor, got a float"):
        negmine.info_nce(q, q, keys, positive_bias=1.0)
