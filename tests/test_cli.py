"""The command line: options agree with the signatures, input and output files, and every exit code."""

import argparse
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from typing import get_args

import numpy as np
import pytest
import torch

import negmine
from negmine import NegativeIndex, Select
from negmine.cli import checkout, main, mine, options
from negmine.cli.main import parser
from negmine.mining import progress
from negmine.ops import backends
from tests.cases import unit

Q, K, D = 6, 40, 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with embeddings, positives and texts, which is the working directory."""
    q, c = unit(Q, D, seed=1).numpy(), unit(K, D, seed=2).numpy()
    np.save(tmp_path / "q.npy", q)
    np.save(tmp_path / "c.npy", c)
    np.save(tmp_path / "c0.npy", c[:15])
    np.save(tmp_path / "c1.npy", c[15:])
    np.save(tmp_path / "p.npy", np.arange(Q))
    np.save(tmp_path / "labels.npy", np.arange(K) % 3)
    (tmp_path / "q.txt").write_text("".join(f"query {i}\n" for i in range(Q)))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(K)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(made: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return every subcommand, by its words."""
    found = {}
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found |= {f"{name} {rest}".strip(): inner for rest, inner in {"": sub, **commands(sub)}.items()}
    return found


IN_STEP = [
    ("mine", negmine.mine_hard_negatives, set(mine.NO_OPTION)),
    ("mine", Select, set(mine.NO_FIELD)),
    ("analyze", negmine.hardness_report, set()),
    ("index build", NegativeIndex.build, set()),
    ("index search", NegativeIndex.search, {"self"}),
    ("index search", NegativeIndex.load, {"path"}),
    ("index recall", NegativeIndex.recall, {"self"}),
]


@pytest.mark.parametrize("command, function, left_out", IN_STEP, ids=[f"{c}-{f.__name__}" for c, f, _ in IN_STEP])
def test_options_are_the_arguments(command, function, left_out):
    actions = {action.dest: action for action in commands(parser())[command]._actions}
    parameters = inspect.signature(function).parameters
    assert left_out <= set(parameters)
    for name, parameter in parameters.items():
        if name in left_out:
            assert name not in actions or name == "path"
            continue
        action = actions[name]
        assert f"--{name.replace('_', '-')}" in action.option_strings
        assert action.required == (parameter.default is inspect.Parameter.empty)
        assert action.default is argparse.SUPPRESS, "defaults are Python's own"
        if action.nargs is None and action.type is not None:
            kinds = get_args(parameter.annotation) or (parameter.annotation,)
            assert type(action.type("1")) in kinds
            assert action.type is str or (types.NoneType in kinds) == action.type.__name__.endswith("or none")


def test_option_strings_become_values():
    assert options.number("50") == 50 and isinstance(options.number("50"), int)
    assert options.number("0.5") == 0.5 and isinstance(options.number("1e-3"), float)
    assert options.none_or(int)("None") is None and options.none_or(int)("3") == 3
    assert options.spelled(["--num_negatives=a_b", "a_b", "--x_y"]) == ["--num-negatives=a_b", "a_b", "--x-y"]

    def documented(first, second, third):
        """What it does.

            first = x: a formula

        Parameters
        ----------
        first, second : int
            Of
            both.
        third : str
            Inside: colons, ``code``.

        Returns
        -------
        fourth : int
            Not an argument.
        """

    said = options.explained(documented.__doc__)
    assert said == {"first": "Of both.", "second": "Of both.", "third": "Inside: colons, code."}


def test_mine_is_the_function(folder, capsys):
    words = "mine --query-embeddings q.npy --corpus_embeddings c0.npy c1.npy --positives p.npy --num-negatives=4"
    words += " --range-min 2 --range-max 20 --max_score 0.9 --sampling-strategy random --seed 5 --no-count-skipped"
    words += " --output out.npz --jsonl out.jsonl --query-texts q.txt --corpus-texts c.jsonl"
    assert main(words.split()) == 0
    got = negmine.mining.MiningResult.load("out.npz")
    wanted = negmine.mine_hard_negatives(
        "q.npy",
        "c.npy",
        np.arange(Q),
        select=Select(2, 20, max_score=0.9),
        num_negatives=4,
        sampling_strategy="random",
        seed=5,
        count_skipped=False,
    )
    assert (got.indices == wanted.indices).all() and got.skipped == wanted.skipped
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert lines[2]["query"] == "query 2" and lines[2]["neg"] == [f"row {k}" for k in wanted.indices[2]]
    assert wanted.summary() in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["npz", "json", "jsonl"])
def test_positives_of_every_kind(folder, kind):
    lists = [[i, i + 1] for i in range(Q)]
    if kind == "npz":
        np.savez("p.npz", indptr=np.arange(0, 2 * Q + 1, 2), indices=np.concatenate(lists))
    elif kind == "json":
        (folder / "p.json").write_text(json.dumps(lists))
    else:
        (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lists)) + "\n\n")
    words = f"mine --query-embeddings q.npy --corpus-embeddings c.npy --positives p.{kind} --output out.npz"
    assert main(words.split()) == 0
    got = negmine.mining.MiningResult.load("out.npz")
    assert (got.indices == negmine.mine_hard_negatives("q.npy", "c.npy", lists).indices).all()


def test_index_builds_searches_and_recalls(folder, capsys):
    assert main(["index", "build", "--embeddings", "c0.npy", "c1.npy", "--output", "c.index"]) == 0
    assert (
        main(
            [
                "index",
                "search",
                "--index",
                "c.index",
                "--query-embeddings",
                "q.npy",
                "--k",
                "3",
                "--output",
                "found.npz",
            ]
        )
        == 0
    )
    scores, rows = (torch.from_numpy(np.load("q.npy")) @ torch.from_numpy(np.load("c.npy")).T).topk(3)
    with np.load("found.npz") as found:
        assert found["indices"].tolist() == rows.tolist()
        np.testing.assert_allclose(found["scores"], scores.numpy(), rtol=1e-5)
    words = "index recall --index c.index --query-embeddings q.npy --corpus-embeddings c.npy --k 3"
    assert main(words.split()) == 0
    assert capsys.readouterr().out.endswith("recall 1.0000\n")
    for i in "01":
        assert main(f"index build --embeddings c{i}.npy --output {i}.index".split()) == 0
    assert main(words.replace("c.index", "0.index 1.index").split()) == 0
    assert capsys.readouterr().out.endswith("recall 1.0000\n")
    mined = "mine --query-embeddings q.npy --corpus-embeddings c.npy --positives p.npy --output"
    assert (
        main([*mined.split(), "a.npz"]) == 0 and main([*mined.split(), "b.npz", "--index", "0.index", "1.index"]) == 0
    )
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()
    assert main(["index", "build", "--embeddings", "c.npy", "--search-options", "nprobe=x", "--output", "d.index"]) == 2
    assert "'nprobe=x' must be name=number" in capsys.readouterr().err


def test_analyze_is_the_function(folder, capsys):
    (folder / "judges.py").write_text("def equal(queries, rows):\n    return queries == rows\n")
    np.save("matrix.npy", np.eye(3))
    (folder / "classes.txt").write_text("\n".join(f"class {i % 2}" for i in range(Q)) + "\n")
    np.save("q_labels.npy", np.arange(Q) % 3)
    words = "analyze --query-embeddings q.npy --corpus-embeddings c.npy --positives p.npy --query-labels q_labels.npy"
    words += " --corpus-labels labels.npy --class-similarity matrix.npy same=judges:equal --query-texts q.txt"
    words += " --corpus-texts c.jsonl --previous q.npy c.npy --edges 0 0.1 0.5 1 --num-queries none --seed 3"
    assert main([*words.split(), "--title", "A title", "--page", "p.html", "--output", "f.json"]) == 0
    wanted = negmine.hardness_report(
        "q.npy",
        "c.npy",
        np.arange(Q),
        query_labels=np.arange(Q) % 3,
        corpus_labels=np.arange(K) % 3,
        class_similarity={"matrix": np.eye(3), "same": lambda q, k: q == k},
        query_texts=[f"query {i}" for i in range(Q)],
        corpus_texts=[f"row {i}" for i in range(K)],
        previous=("q.npy", "c.npy"),
        edges=(0.0, 0.1, 0.5, 1.0),
        num_queries=None,
        seed=3,
        title="A title",
    )
    assert negmine.report.HardnessReport.load("f.json").facts == wanted.facts
    assert "<h1>A title</h1>" in (folder / "p.html").read_text() and wanted.summary() in capsys.readouterr().out


BASE = "mine --query-embeddings q.npy --corpus-embeddings c.npy"
LIST = f"{BASE} --output o.npz --positives"
USAGE = [
    ("", "the following arguments are required: command"),
    ("nonsense", "invalid choice: 'nonsense'"),
    ("mine", "the following arguments are required: --query-embeddings"),
    (f"{BASE} --positives p.npy", "give --output or --jsonl"),
    (f"{BASE} --positives p.npy --jsonl o.jsonl", "--jsonl needs --query-texts and --corpus-texts"),
    (f"{LIST} p.npy --num-negatives three", "--num-negatives must be an int, got 'three'"),
    (f"{LIST} p.npy --batch-size x", "--batch-size must be an int or none, got 'x'"),
    (f"{LIST} p.npy --num-negatives 0", "num_negatives must be an int of 1 or more, got 0"),
    (f"{LIST} p.npy --range-min 5 --range-max 2", "range_min must be below range_max=2"),
    (f"{LIST} p.npy --index Q9", "'Q9'"),
    (f"{LIST} no.npy", "'no.npy' does not exist"),
    (f"{LIST} p.txt", "'p.txt' must be a .npy, .npz, .json or .jsonl file"),
    (f"{LIST} bad.npz", "must contain indptr and indices, got x"),
    (f"{LIST} bad.json", "'bad.json' is not valid JSON"),
    (f"{LIST} bad.jsonl", "line 2 of 'bad.jsonl' is not valid JSON"),
    (f"{LIST} bad.npy", "'bad.npy' must be a .npy file of numbers or strings"),
    (f"{LIST} p.npy --jsonl o.jsonl --query-texts bad_texts.jsonl --corpus-texts c.jsonl", 'an object with "text"'),
    (f"{LIST} p.npy --jsonl o.jsonl --query-texts q.txt --corpus-texts c.jsonl --form xml", "form must be 'flagembedding'"),
    ("analyze --query-embeddings q.npy --corpus-embeddings gone.npy", "corpus_embeddings"),
    ("analyze --query-embeddings q.npy --corpus-embeddings c.npy --class-similarity nothing", "must be module:name"),
    ("analyze --query-embeddings q.npy --corpus-embeddings c.npy --class-similarity no:where", "cannot be imported"),
    ("index search --index q.npy --query-embeddings q.npy --k 3 --output o.npz", "NegativeIndex.load"),
    ("bench --no-such-option", "unrecognized arguments: --no-such-option"),
]  # fmt: skip


@pytest.mark.parametrize("words, said", USAGE, ids=[said[:40] for _, said in USAGE])
def test_invalid_commands_exit_with_2(folder, words, said, capfd):
    np.savez("bad.npz", x=np.zeros(1))
    (folder / "bad.json").write_text("[1, 2")
    (folder / "bad.jsonl").write_text("[1]\n[2\n")
    (folder / "bad.npy").write_bytes(b"nothing")
    (folder / "bad_texts.jsonl").write_text("3\n")
    assert main(words.split()) == 2
    assert said in capfd.readouterr().err


def test_a_failure_exits_with_1(folder, capsys, monkeypatch):
    assert main([*LIST.split(), "p.npy", "--backend", "cuda"]) == 1
    assert capsys.readouterr().err.startswith("negmine: mine_hard_negatives: backend 'cuda'")
    with pytest.raises(backends.BackendUnavailable):
        main(["--traceback", *LIST.split(), "p.npy", "--backend", "cuda"])
    assert main([*f"{BASE} --positives p.npy --output no/such/folder.npz".split()]) == 1
    assert "no/such/folder.npz" in capsys.readouterr().err
    monkeypatch.setattr(checkout, "ROOT", folder)
    for name in ("bench", "demo"):
        assert main([name]) == 1
        assert f"make {name}" in capsys.readouterr().err


def test_bench_and_demo_run_from_a_checkout(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--help"]) == 0 and "--quick" in capfd.readouterr().out
    assert main(["demo", "--help"]) == 0 and "--recipes" in capfd.readouterr().out


def test_help_and_version_exit_with_0(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"negmine {negmine.__version__}\n"
    for words in commands(parser()):
        assert words in ("bench", "demo") or main([*words.split(), "--help"]) == 0, words
    assert main(["mine", "--compat", "flagembedding", "--help"]) == 0
    assert "--range-for-sampling" in capsys.readouterr().out
    assert main(["doctor"]) == 0 and "backends" in capsys.readouterr().out


def test_an_interrupt_exits_with_130(folder):
    (folder / "slow.py").write_text("import time\ndef judge(q, k):\n    print('in', flush=True)\n    time.sleep(100)\n")
    words = "analyze --query-embeddings q.npy --corpus-embeddings c.npy --class-similarity slow:judge"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout.ROOT), *sys.path])}
    command = [sys.executable, "-m", "negmine", *words.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def interruptible():  # background processes may ignore interrupts
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, **pipes, env=environment, preexec_fn=interruptible) as run:
        assert run.stdout.readline() == "in\n"
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=60) == 130
        assert run.stderr.read().endswith("negmine: interrupted\n")


def test_an_unread_output_ends_with_141(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout.ROOT), *sys.path])}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "negmine", "doctor"], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_progress_shows_the_remaining_time(capsys, monkeypatch):
    assert progress.clock(7) == "0:07" and progress.clock(3723) == "1:02:03"
    assert (
        progress.line("x", 5, 20, "rows", 10.0) == "x [======                  ]  25 %  5 of 20 rows, 0:10, 0:30 left"
    )
    assert progress.line("x", 0, 0, "rows", 0.0).endswith("0 of 0 rows, 0:00")
    now = iter([0.0, 1.0, 1.1, 3.0, 3.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with progress.progress(3, True, "x", "rows") as advance:
        for _ in range(3):
            advance(1)
    written = capsys.readouterr().err
    assert "1 of 3 rows, 0:01, 0:02 left" in written and "2 of 3" not in written
    assert written.count("3 of 3 rows, 0:03") == 2 and written.endswith("\n")
    now = iter([0.0])
    with progress.progress(3, False, "x", "rows"):
        pass
    assert capsys.readouterr().err == ""


@pytest.fixture
def run_page(tmp_path, monkeypatch, capfd):
    """Return a function that runs all sh blocks of a page in order in an empty folder, and returns what they print.

    `python` is this Python, and `negmine` is main() in this process, because importing torch for each command takes seconds.
    bash sends the arguments of each command as one line and waits for the exit code.
    """
    monkeypatch.chdir(tmp_path)

    def run(page):
        blocks = re.findall(r"^```sh\n(.*?)^```$", (checkout.ROOT / page).read_text(), re.M | re.S)
        words, send = os.pipe()
        receive, codes = os.pipe()
        functions = f"""
            set -e
            python() {{ "{sys.executable}" "$@"; }}
            negmine() {{ local IFS=$'\x1f' code; echo "$*" >&{send}; read -r code <&{receive}; return $code; }}
        """
        script = subprocess.Popen(["bash", "-c", functions + "\n".join(blocks)], pass_fds=(send, receive))
        os.close(send)
        os.close(receive)
        with open(words) as asked, open(codes, "w", buffering=1) as answers:
            for line in asked:
                print(main(line.rstrip("\n").split("\x1f")), file=answers)
        printed = capfd.readouterr()
        assert script.wait() == 0, printed.err
        return printed.out

    yield run
    sys.modules.pop("embed", None)  # written by the page


def test_the_page_of_the_command_runs(run_page, tmp_path):
    printed = run_page("docs/cli.md")
    assert {"mined.npz", "mined.jsonl", "train_hn.jsonl", "found.npz", "hardness.html"} <= set(os.listdir(tmp_path))
    assert "recall 1.0000" in printed and len((tmp_path / "train_hn.jsonl").read_text().splitlines()) == 50


def test_the_tutorial_of_beir_runs(run_page, tmp_path):
    assert '"anchor": "question 0"' in run_page("docs/tutorial_beir.md")
    assert {"train.jsonl", "hardness.html"} <= set(os.listdir(tmp_path))
