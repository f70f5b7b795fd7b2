"""Rounds of mining and training: arguments, kept negatives, stopping, and a toy model that improves."""

import functools
import os
import signal
import time

import numpy as np
import pytest
import torch

import negmine
from negmine import Select
from negmine.mining import atomic_file, merge_parts, mine_part, mining_rounds, newest_round
from negmine.mining.rounds import new_share
from tests import processes
from tests.cases import unit
from tests.compare import same_result

Q, K, D = 30, 200, 12
POSITIVES = [[b, b + 40] for b in range(Q)]


def drifting(number):
    """Embeddings that change slightly in each round."""
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


def test_a_kept_negative_is_dropped_when_it_was_mined_too_long_ago():
    kept = {
        age: mining_rounds(drifting, lambda r, _: None, POSITIVES, rounds=5, keep_old=6, max_age=age)
        for age in (0, 1, 2, None)
    }
    for age, rounds in kept.items():
        mined = [negmine.mine_hard_negatives(*drifting(r), POSITIVES).indices for r in range(5)]
        for this in rounds:
            indices, ages = this.result.indices, this.ages
            assert ((indices < 0) == (ages < 0)).all() and ages.max() <= (4 if age is None else age)
            for q, j in zip(*np.nonzero(indices >= 0), strict=True):
                last = max(r for r in range(this.number + 1) if indices[q, j] in mined[r][q])
                assert ages[q, j] == this.number - last
    assert (kept[0][4].result.num_valid == 3).all() and kept[None][4].ages.max() == 4
    same_result(kept[1][1].result, kept[None][1].result)


CUT = 120


def half_embedded(half, number):
    rows = drifting(number)[1]
    return rows[:CUT] if half == 0 else rows[CUT:]


def rounds_of_halves(**engine):
    """Three rounds that keep old negatives, with a corpus of two shards, each embedded by the process that has it."""
    options = {"keep_old": 3, "num_negatives": 4, "select": Select(1, 30)}
    want = mining_rounds(drifting, lambda r, _: r, POSITIVES, **options)
    halves = lambda r: [functools.partial(half_embedded, half, r) for half in range(2)]  # noqa: E731
    got = mining_rounds(lambda r: (drifting(r)[0], halves(r)), lambda r, _: r, POSITIVES, **options, **engine)
    for a, b in zip(got, want, strict=True):
        same_result(a.result, b.result)
        np.testing.assert_array_equal(a.ages, b.ages)


def test_shards_may_be_functions_that_embed_them():
    rounds_of_halves()
    with pytest.raises(ValueError, match=r"corpus_embeddings\[1\] must be of shape \(rows, D\)"):
        negmine.mine_hard_negatives(unit(3, D), [unit(9, D), lambda: unit(9, D)[0]], [0, 1, 2])


def test_rounds_of_another_engine():
    held = {}

    def embed(number):
        held["corpus"] = drifting(number)[1]
        return drifting(number)

    def engine(plan, phase, queries):
        shards = ((0, held["corpus"][:CUT]), (CUT, held["corpus"][CUT:]))
        return merge_parts([mine_part(plan, phase, queries, rows, first) for first, rows in shards])

    want = mining_rounds(drifting, lambda r, _: r, POSITIVES, keep_old=3)
    for a, b in zip(mining_rounds(embed, lambda r, _: r, POSITIVES, keep_old=3, engine=engine), want, strict=True):
        same_result(a.result, b.result)


def job(folder, **options):
    return mining_rounds(drifting, None, POSITIVES, folder=folder, keep_old=2, **options)


def test_a_folder_of_rounds_is_resumed_and_belongs_to_one_job(tmp_path):
    want = mining_rounds(drifting, lambda r, _: None, POSITIVES, keep_old=2, rounds=4)
    assert newest_round(tmp_path / "none") is None
    for rounds, numbers in ((2, [0, 1]), (4, [2, 3]), (4, [])):
        assert [done.number for done in job(tmp_path, rounds=rounds)] == numbers
        newest = newest_round(tmp_path)
        same_result(newest.result, want[rounds - 1].result)
        np.testing.assert_array_equal(newest.ages, want[rounds - 1].ages)
        assert newest.new == want[rounds - 1].new and newest.outcome is None
    with pytest.raises(ValueError, match=r"^mining_rounds: folder must be a new one, .* differs in num_negatives"):
        job(tmp_path, rounds=5, num_negatives=2)
    with pytest.raises(ValueError, match=r"^mining_rounds: folder must be a new one, .* differs in exclude"):
        job(tmp_path, rounds=5, exclude=[[100]] * Q)
    assert newest_round(tmp_path).number == 3
    (tmp_path / "round-000003.npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"round-000003.npz' is damaged"):
        newest_round(tmp_path)
    (tmp_path / "round-000003.ages.npz").unlink()  # as if another process deleted old rounds
    assert newest_round(tmp_path).number == 2
    ends = mining_rounds(lambda r: None if r == 5 else drifting(r), None, POSITIVES, folder=tmp_path / "b", rounds=9)
    assert len(ends) == 5


def killed_at(connection, folder, number):
    """Mine four rounds; die before the file with this number, counted from 1, is complete."""
    replace, asked = os.replace, []

    def killing(source, target):
        asked.append(1)
        if len(asked) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    atomic_file.os.replace = killing
    job(folder, rounds=4)


def test_a_trainer_beside_the_miner_reads_complete_rounds_only(tmp_path):
    """The miner is killed before each of its files is complete, while the trainer looks for new rounds."""
    want = mining_rounds(drifting, lambda r, _: None, POSITIVES, keep_old=2, rounds=4)
    seen, kill_at = [], iter((2, 3, 99))  # kill at the result of round 0, at the ages of the next round, and not at all
    miner = None
    while not seen or seen[-1] < 3:
        if miner is None or not miner.is_alive():
            assert miner is None or miner.exitcode == -signal.SIGKILL
            miner, _ = processes.started(killed_at, tmp_path, next(kill_at))
        newest = newest_round(tmp_path)
        if newest is not None and newest.number not in seen:
            same_result(newest.result, want[newest.number].result)
            seen.append(newest.number)
        time.sleep(0.002)
    miner.join(60)
    assert miner.exitcode == 0 and seen == sorted(seen) and next(kill_at, None) is None
    assert [path.name for path in tmp_path.glob(".*")], "what the killed miner left is no round"


def test_rounds_that_bring_nothing_new_stop():
    trained = []
    still = mining_rounds(lambda r: drifting(0), lambda r, result: trained.append(r), POSITIVES, rounds=9, min_new=0.01)
    assert len(still) == 1 and trained == [0]
    assert len(mining_rounds(lambda r: drifting(0), lambda r, result: None, POSITIVES, rounds=3)) == 3
    moving = mining_rounds(drifting, lambda r, result: None, POSITIVES, rounds=3, min_new=0.01)
    assert len(moving) == 3


def test_a_toy_model_learns_from_rounds():
    """A linear map learns to invert a distortion of the queries; in each round, it ranks the right row higher."""
    torch.manual_seed(0)
    truth = unit(K, D, seed=4)
    noise = torch.randn(K, D) * 1.5
    seen = torch.cat([truth, noise], 1)  # (K, 2 D); half of the dimensions are noise
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
        ({"max_age": -1}, ValueError, "max_age must be an int of 0 or more, got -1"),
        ({"train_round": None}, TypeError, "train_round must be a callable, or None if folder is given"),
        ({"folder": "x"}, TypeError, "train_round must be a callable, or None if folder is given"),
        ({"folder": 3, "train_round": None}, TypeError, "folder must be the path of a folder, got 3"),
    ],
)
def test_refusals(options, error, words):
    call = {"embed": drifting, "train_round": lambda r, result: None, **options}
    with pytest.raises(error, match="^mining_rounds: " + words):
        mining_rounds(call.pop("embed"), call.pop("train_round"), POSITIVES, **call)
