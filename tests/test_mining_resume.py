"""Resuming interrupted runs: after a kill at any batch, a full disk or damaged files, the resumed run gives the same bits."""

import json
import os
import re
import resource
import signal
import time

import numpy as np
import pytest
import torch

import negmine
from negmine import Select
from negmine.mining import array_file, atomic_file, resume
from tests import processes
from tests.cases import unit
from tests.compare import same_result

mine = negmine.mine_hard_negatives
OPTIONS = {
    "select": Select(1, 30, absolute_margin=0.05),
    "num_negatives": 4,
    "sampling_strategy": "weighted",
    "seed": 5,
}
Q, K, D = 60, 500, 24


def inputs():
    return unit(Q, D, seed=1), unit(K, D, seed=2), [[b, b + 100] for b in range(Q)]


def parts(folder):
    return sorted(path for path in folder.iterdir() if path.name.startswith("queries-"))


def test_any_part_may_be_missing_and_any_batch_goes_on(tmp_path):
    want = mine(*inputs(), **OPTIONS)
    same_result(mine(*inputs(), **OPTIONS, resume_dir=tmp_path, batch_size=8), want)
    assert len(parts(tmp_path)) == 8
    before = [path.stat().st_mtime_ns for path in parts(tmp_path)]
    same_result(mine(*inputs(), **OPTIONS, resume_dir=tmp_path), want)
    assert [path.stat().st_mtime_ns for path in parts(tmp_path)] == before, "nothing is mined twice"
    rng = np.random.default_rng(0)
    for batch in (1, 3, 50, None):
        for path in rng.choice(parts(tmp_path), 3, replace=False):
            path.unlink()
        got = mine(
            *inputs(), **OPTIONS, resume_dir=tmp_path, batch_size=batch, corpus_chunk_size=int(rng.integers(9, 600))
        )
        same_result(got, want)
        assert got.config["content"] == want.config["content"]


def stops_after(connection, folder, batches):
    """Mine; say so and wait after this number of batches."""
    write, left = resume.ResumeFolder.write, [batches]

    def slow(*arguments):
        write(*arguments)
        left[0] -= 1
        if not left[0]:
            connection.send("ready")
            time.sleep(60)

    resume.ResumeFolder.write = slow
    mine(*inputs(), **OPTIONS, resume_dir=folder, batch_size=7)


def test_killed_runs_are_resumed(tmp_path):
    """Kill a run after one batch, the resumed run after another, and the next one too."""
    for batches in (1, 3, 2):
        process, connection = processes.started(stops_after, tmp_path, batches)
        assert connection.recv() == "ready"
        with pytest.raises(ValueError, match="resume_dir must be a folder that no other running process writes to"):
            mine(*inputs(), **OPTIONS, resume_dir=tmp_path)
        process.kill()
        process.join()
    assert len(parts(tmp_path)) == 6
    same_result(mine(*inputs(), **OPTIONS, resume_dir=tmp_path, batch_size=5), mine(*inputs(), **OPTIONS))


def mines_forever(connection, folder):
    connection.send("ready")
    while True:
        mine(*inputs(), **OPTIONS, resume_dir=folder, batch_size=1)
        for path in folder.glob("queries-*[05].negmine"):
            path.unlink()


def test_killed_at_any_moment(tmp_path):
    """The process writes and removes files all the time; after a kill, every remaining file is complete."""
    want = mine(*inputs(), **OPTIONS)
    for pause in (0.02, 0.11, 0.23):
        process, connection = processes.started(mines_forever, tmp_path)
        assert connection.recv() == "ready"
        time.sleep(pause)
        process.kill()
        process.join()
        same_result(mine(*inputs(), **OPTIONS, resume_dir=tmp_path), want)
        assert not list(tmp_path.glob("*.partial"))
        for path in parts(tmp_path)[::2]:
            path.unlink()


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_run_resumes_after_a_full_disk(name, tmp_path, monkeypatch):
    calls, real = [], getattr(os, name)

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_file.os, name, full)
        with pytest.raises(OSError, match=r"mine_hard_negatives: .* could not be written \(No space left") as caught:
            mine(*inputs(), **OPTIONS, resume_dir=tmp_path, batch_size=7)
        assert caught.value.errno == 28
    assert parts(tmp_path) and not list(tmp_path.glob("*.partial"))
    same_result(mine(*inputs(), **OPTIONS, resume_dir=tmp_path, batch_size=9), mine(*inputs(), **OPTIONS))


def mines_within(file_bytes, folder):
    """Mine while files may not grow beyond this size, and return the error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    try:
        mine(*inputs(), **OPTIONS, resume_dir=folder, batch_size=50)
    except OSError as error:
        return str(error)


def test_a_file_that_the_system_refuses_to_grow(tmp_path):
    error = processes.result_of(mines_within, 2000, tmp_path)
    assert "could not be written (File too large); existing files are unchanged" in error
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "run.json"}
    same_result(mine(*inputs(), **OPTIONS, resume_dir=tmp_path), mine(*inputs(), **OPTIONS))


def test_damaged_parts_warn_and_are_mined_anew(tmp_path):
    want = mine(*inputs(), **OPTIONS, resume_dir=tmp_path, batch_size=20)
    first, second, third = parts(tmp_path)
    good = first.read_bytes()
    first.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    second.write_bytes(b"")
    forged = {
        "indices": array_file.array_part(np.full((20, 4), K)),
        "scores": array_file.array_part(np.zeros((20, 4), np.float32)),
    }
    array_file.write("x", third, "mined queries", {"begin": 40, "dropped": {}}, forged)
    with pytest.warns(RuntimeWarning) as warned:
        got = mine(*inputs(), **OPTIONS, resume_dir=tmp_path)
    assert (
        len(warned) == 3 and "mined again" in str(warned[0].message) and "outside the corpus" in str(warned[2].message)
    )
    same_result(got, want)
    array_file.write("x", first, "mined queries", {"begin": 50, "dropped": {}}, forged)
    with pytest.warns(RuntimeWarning, match="from query 50"):
        same_result(mine(*inputs(), **OPTIONS, resume_dir=tmp_path), want)


def test_overlapping_parts_count_once(tmp_path):
    """Two folders of one run, copied into one."""
    want = mine(*inputs(), **OPTIONS, resume_dir=tmp_path / "a", batch_size=8)
    mine(*inputs(), **OPTIONS, resume_dir=tmp_path / "b", batch_size=7)
    for path in parts(tmp_path / "b"):
        path.rename(tmp_path / "a" / path.name)
    same_result(mine(*inputs(), **OPTIONS, resume_dir=tmp_path / "a"), want)


def test_another_run_is_refused(tmp_path):
    q, c, positives = inputs()
    mine(q, c, positives, **OPTIONS, resume_dir=tmp_path)
    changed = c.clone()
    changed[7, 3] += 1e-6
    for arguments, options, words in (
        ((q, changed, positives), {}, "content.corpus_embeddings (was "),
        ((q[1:], c, positives[1:]), {}, "content.positives"),
        ((q, c, positives[1:] + positives[:1]), {}, "content.positives"),
        ((q, c, positives), {"exclude": [[9]] * Q}, "content.exclude"),
        ((q, c, positives), {"seed": 6}, "arguments.seed (was 5, is 6)"),
        (
            (q, c, positives),
            {"select": Select(1, 31)},
            "arguments.select.absolute_margin (was 0.05, is None), arguments.s",
        ),
        ((q, c, positives), {"deduplicate": "exact"}, "arguments.deduplicate (was 'none', is 'exact')"),
        ((q, c, positives), {"backend": "reference"}, "kernels (was "),
    ):
        with pytest.raises(ValueError, match="^mine_hard_negatives: resume_dir must be .*" + re.escape(words)):
            mine(*arguments, **{**OPTIONS, **options}, resume_dir=tmp_path)
    same_result(mine(q, c, positives, **OPTIONS, resume_dir=tmp_path), mine(q, c, positives, **OPTIONS))
    assert json.loads((tmp_path / "run.json").read_text())["queries"] == Q
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json' is damaged"):
        mine(q, c, positives, **OPTIONS, resume_dir=tmp_path)
    with pytest.raises(TypeError, match="resume_dir must be the path of a folder, got 3"):
        mine(q, c, positives, resume_dir=3)


def test_no_queries_and_all_done(tmp_path):
    assert mine(torch.ones(0, D), unit(K, D), [], resume_dir=tmp_path).indices.shape == (0, 3)
    assert not parts(tmp_path)
