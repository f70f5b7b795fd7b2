"""Rounds of mining and training: what is handed over, what is kept, when they stop; a toy model that they improve."""

import numpy as np
import pytest
import torch

import negmine
from negmine import Select
from negmine.mining import mining_rounds
from negmine.mining.rounds import new_share
from tests.cases import unit

Q, K, D = 30, 200, 12
POSITIVES = [[b, b + 40] for b in range(Q)]


def drifting(number):
    """Embeddings that move a little each round."""
    q, c = unit(Q, D, seed=1), unit(K, D, seed=2)
    return q, torch.nn.functional.normalize(c + 0.3 * number * unit(K, D, seed=3 + number), dim=1)


def test_each_round_is_a_mining_run_of_its_own():
    seen = []
    options = {"num_negatives": 4, "sampling_strategy": "random", "select": Select(1, 30)}
    rounds = mining_rounds(
        drifting, lambda r, result: seen.append(result) or r * 10, POSITIVES, rounds=3, seed=5, **options
    )
    assert [r.outcome for r in rounds] == [0, 10, 20] and [r.number for r in rounds] == [0, 1, 2]
    for number, result in enumerate(seen):
        want = negmine.mine_hard_negatives(*drifting(number), POSITIVES, seed=5 + number, **options)
        np.testing.assert_array_equal(result.indices, want.indices)
        assert rounds[number].result is result
    assert rounds[0].new == 1.0 and 0 < rounds[1].new < 1


def test_new_share_by_sets():
    now, before = np.array([[1, 2, -1], [4, 5, 6], [-1, -1, -1]]), np.array([[2, 9], [7, -1], [0, 1]])
    assert new_share(now, before) == 4 / 5
    assert new_share(now[2:], before[2:]) == 0.0


def test_old_negatives_stay_by_todays_scores_and_filters():
    select, exclude = Select(2, absolute_margin=0.1), [[100 + b] for b in range(Q)]
    options = {"num_negatives": 4, "select": select, "exclude": exclude}
    rounds = mining_rounds(drifting, lambda r, result: None, POSITIVES, rounds=3, keep_old=3, **options)
    assert rounds[0].result.indices.shape == (Q, 7) and (rounds[0].result.num_valid <= 4).all()
    for number in (1, 2):
        q, c = (part.double() for part in drifting(number))
        scores, before = q @ c.T, rounds[number - 1].result.indices
        fresh = negmine.mine_hard_negatives(*drifting(number), POSITIVES, **options).indices
        for b in range(Q):
            new = [k for k in fresh[b].tolist() if k >= 0]
            top = min(scores[b, k] for k in POSITIVES[b]) - 0.1
            old = [k for k in before[b].tolist() if k >= 0 and k not in new and scores[b, k] <= top]
            old = sorted(old, key=lambda k, b=b: -scores[b, k])[:3]
            want = sorted(new + old, key=lambda k, b=b: -scores[b, k])
            got = rounds[number].result
            assert got.indices[b].tolist() == want + [-1] * (7 - len(want))
            np.testing.assert_allclose(got.scores[b, : len(want)], scores[b, want], atol=1e-6)
            assert got.num_valid[b] == len(want)
    assert any(rounds[1].result.num_valid > 4)


def test_rounds_that_bring_nothing_new_stop():
    trained = []
    still = mining_rounds(lambda r: drifting(0), lambda r, result: trained.append(r), POSITIVES, rounds=9, min_new=0.01)
    assert len(still) == 1 and trained == [0]
    assert len(mining_rounds(lambda r: drifting(0), lambda r, result: None, POSITIVES, rounds=3)) == 3
    moving = mining_rounds(drifting, lambda r, result: None, POSITIVES, rounds=3, min_new=0.01)
    assert len(moving) == 3


def test_a_toy_model_learns_from_rounds():
    """A linear map must undo a distortion that hides which row answers a query; each round it ranks the answer higher."""
    torch.manual_seed(0)
    truth = unit(K, D, seed=4)
    noise = torch.randn(K, D) * 1.5
    seen = torch.cat([truth, noise], 1)  # (K, 2 D): half of what is seen means nothing
    asked = torch.cat([truth[:Q] + 0.1 * torch.randn(Q, D), torch.randn(Q, D) * 1.5], 1)
    model = torch.nn.Linear(2 * D, D, bias=False)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)

    def embed(number):
        with torch.no_grad():
            return tuple(torch.nn.functional.normalize(model(part), dim=1) for part in (asked, seen))

    def rank(number):
        q, c = embed(number)
        scores = q @ c.T
        return float((scores > scores[torch.arange(Q), torch.arange(Q)][:, None]).sum(1).float().mean())

    def train(number, result):
        rows = torch.from_numpy(result.indices)
        for _ in range(30):
            q, p = (torch.nn.functional.normalize(model(part), dim=1) for part in (asked, seen[:Q]))
            keys = torch.nn.functional.normalize(model(seen[rows]), dim=-1)
            loss = negmine.info_nce(q, p, keys, temperature=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return rank(number)

    start = rank(0)
    ranks = [r.outcome for r in mining_rounds(embed, train, list(range(Q)), rounds=3, num_negatives=10, keep_old=5)]
    assert start > ranks[0] > ranks[-1] and ranks[-1] < start / 10


@pytest.mark.parametrize(
    "options,error,words",
    [
        ({"rounds": 0}, ValueError, "rounds must be an int of 1 or more, got 0"),
        ({"keep_old": -1}, ValueError, "keep_old must be an int of 0 or more, got -1"),
        ({"min_new": 1.5}, ValueError, r"min_new must be a share in \[0, 1\], got 1.5"),
        ({"resume_dir": "x"}, ValueError, "resume_dir must be left out"),
        ({"process_group": 1}, TypeError, "process_group must be a process group of torch.distributed"),
        ({"embed": 3}, TypeError, "embed must be a callable, got 3"),
        ({"train_round": None}, TypeError, "train_round must be a callable, got None"),
    ],
)
def test_refusals(options, error, words):
    call = {"embed": drifting, "train_round": lambda r, result: None, **options}
    with pytest.raises(error, match="^mining_rounds: " + words):
        mining_rounds(call.pop("embed"), call.pop("train_round"), POSITIVES, **call)
