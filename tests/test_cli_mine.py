"""negmine mine on data sets: BEIR, MS MARCO and training lines in, training data out, and dry runs that write nothing."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import negmine
from negmine.cli import checkout, main
from negmine.cli.main import parser
from tests.test_training_files import BODIES, CORPUS, IDS, JOINED, TITLES, K, beir

QUERIES = CORPUS[:5] + 0.1 * np.ones((5, CORPUS.shape[1]), np.float32)
EMBEDDINGS = ["--query-embeddings", "q.npy", "--corpus-embeddings", "c.npy", "--num-negatives", "2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a BEIR folder, files of MS MARCO, and embeddings, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    beir(tmp_path / "beir")
    np.save("q.npy", QUERIES)
    np.save("c.npy", CORPUS)
    (tmp_path / "collection.tsv").write_text("".join(f"{k}\tpassage {k}\n" for k in range(K)))
    (tmp_path / "queries.tsv").write_text("".join(f"{100 + i}\tquery {i}\n" for i in range(5)))
    (tmp_path / "qrels.tsv").write_text("".join(f"{100 + i} 0 {i} 1\n" for i in range(5)))
    return tmp_path


def lines(name) -> list[dict]:
    with open(name, encoding="utf-8") as file:
        return [json.loads(line) for line in file.read().split("\n") if line]


def test_a_beir_folder_becomes_training_data(folder, capsys):
    assert main(["mine", "--beir", "beir", *EMBEDDINGS, "--output", "t.jsonl", "--form", "tevatron"]) == 0
    kept = [0, 1, 2, 4]  # query 3 has no judgement
    want = negmine.mine_hard_negatives(
        QUERIES[kept],
        CORPUS,
        [["d0", "d3"], ["d1"], ["d4"], ["d0"]],
        corpus_ids=IDS,
        corpus_texts=JOINED,
        num_negatives=2,
    )
    found = lines("t.jsonl")
    assert [line["query_id"] for line in found] == ["q0", "q1", "q2", "q4"]
    for line, row in zip(found, want.indices, strict=True):
        assert line["negative_passages"] == [{"docid": IDS[k], "title": TITLES[k], "text": BODIES[k]} for k in row]
    assert "4 lines in t.jsonl" in capsys.readouterr().out
    assert main(["mine", "--beir", "beir", *EMBEDDINGS, "--output", "T.JSONL", "--form", "tevatron"]) == 0
    assert lines("T.JSONL") == found
    np.save("q.npy", QUERIES[kept])  # alternatively, only rows of queries with judgements
    words = ["mine", "--beir", "beir", "--split", "test", *EMBEDDINGS, "--output", "s.jsonl"]
    assert main([*words, "--form", "sentence-transformers"]) == 0
    assert lines("s.jsonl")[0]["negative_1"] == JOINED[want.indices[0, 0]]


def test_msmarco_and_training_lines(folder):
    words = ["mine", "--collection", "collection.tsv", "--queries", "queries.tsv", "--qrels", "qrels.tsv"]
    assert main([*words, *EMBEDDINGS, "--output", "a.jsonl", "--form", "flagembedding"]) == 0
    found = lines("a.jsonl")
    assert found[1]["query"] == "query 1" and found[1]["pos"] == ["passage 1"] and len(found[1]["neg"]) == 2
    passages = list(dict.fromkeys(text for line in found for text in line["pos"] + line["neg"]))
    np.save("c.npy", CORPUS[[int(text.split()[1]) for text in passages]])
    assert main(["mine", "--data", "a.jsonl", *EMBEDDINGS, "--output", "b.jsonl"]) == 0
    for old, new in zip(found, lines("b.jsonl"), strict=True):  # 1h: scores are those of the new negatives
        assert new["pos"] == old["pos"] and len(new["neg_scores"]) == len(new["neg"])
        assert new["neg_scores"][0] >= old["neg_scores"][0] - 1e-6 or new["neg"][0] in old["neg"]


def test_1h_fields_of_the_old_negatives_are_left_out(folder):
    line = {"query": "a", "pos": ["b"], "neg": ["c"], "pos_scores": [0.9], "neg_scores": [0.1], "prompt": "find"}
    (folder / "in.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "query": "d"}) + "\n")
    np.save("eq.npy", CORPUS[:2])
    np.save("ec.npy", CORPUS[2:4])
    words = ["mine", "--compat", "flagembedding", "--input_file", "in.jsonl", "--output_file", "out.jsonl"]
    words += ["--query_embeddings", "eq.npy", "--corpus_embeddings", "ec.npy", "--range_for_sampling", "0-2"]
    with pytest.warns(UserWarning, match="neg_scores, pos_scores of in.jsonl describe the old negatives"):
        assert main([*words, "--negative_number", "1"]) == 0
    assert lines("out.jsonl")[0] == {"query": "a", "pos": ["b"], "neg": ["c"], "prompt": "find"}


def test_a_warning_is_one_line(folder, capsys):
    queries, corpus = QUERIES.copy(), CORPUS.copy()
    queries[1, 2], corpus[7] = np.nan, np.inf
    np.save("q.npy", queries), np.save("c.npy", corpus)
    words = ["mine", "--beir", "beir", *EMBEDDINGS, "--output", "t.jsonl"]
    said = [
        "negmine: mine_hard_negatives: query_embeddings contain NaN or infinity in 1 of 4 rows, which get no negatives: 1",
        "negmine: mine_hard_negatives: corpus_embeddings contain NaN or infinity in 1 of 12 rows, which are never negatives: 7",
    ]
    for more, warned in ((["--dry-run"], said[:1]), ([], said)):
        command = [sys.executable, "-m", "negmine", *words, *more]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout.ROOT), *sys.path])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and done.stderr.splitlines()[: len(warned)] == warned
        assert sum("NaN" in line for line in done.stderr.splitlines()) == len(warned)
    assert "rows that contain NaN or infinity: 1 of query_embeddings, 1 of corpus_embeddings" in done.stdout
    assert len(lines("t.jsonl")) == 3


def test_a_dry_run_writes_nothing(folder, capsys):
    before = sorted(path for path in folder.rglob("*"))
    assert main(["mine", "--beir", "beir", *EMBEDDINGS, "--output", "t.jsonl", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in (
        "reads beir/corpus.jsonl",
        "4 of 5 queries have a positive",
        "12 rows of D = 6",
        "MiB",
        "time: about 0:0",
    ):
        assert words in said
    assert sorted(path for path in folder.rglob("*")) == before
    assert main(["mine", "--beir", "beir", *EMBEDDINGS, "--output", "no/t.jsonl", "--dry-run"]) == 1


REFUSED = [
    ("--positives short.npy", "positives must be of 5 entries, one for each query, got 4 entries"),
    ("--positives far.npy", "positives must be row numbers of the corpus, in [0, 12), got 99 for query 4"),
    ("--positives p.npy --query-ids short.npy", "query_ids must be 5 ids, one per row, got 4"),
    ("--positives p.npy --num-negatives 0", "num_negatives must be an int of 1 or more, got 0"),
    ("--positives p.npy --rescore embedder:Words", "query_texts must be given if rescore is, got None"),
    ("--positives none.jsonl --relative-margin 0.1", "positives must be at least one per query if select has a margin"),
    (
        "--positives p.npy --index IVFlat",
        "index must be 'exact', 'cagra', or a factory string that FAISS takes for D =",
    ),
    ("--positives p.npy --query-embeddings c.npy narrow.npy", "query_embeddings[1] must be of the D and dtype"),
]


@pytest.mark.parametrize("words, said", REFUSED, ids=[words for words, _ in REFUSED])
def test_a_dry_run_refuses_what_a_run_refuses(folder, capsys, words, said):
    (folder / "embedder.py").write_text(MODEL)
    (folder / "none.jsonl").write_text("[0]\n[1]\n[]\n[3]\n[4]\n")
    for name, entries in (("p", [0, 1, 2, 3, 4]), ("short", [0, 1, 2, 3]), ("far", [0, 1, 2, 3, 99])):
        np.save(f"{name}.npy", np.array(entries))
    np.save("narrow.npy", CORPUS[:, :3])
    if "--index" in words:
        pytest.importorskip("faiss")
    for more in ([], ["--dry-run"]):
        assert main(["mine", *EMBEDDINGS, *words.split(), "--output", "r.npz", *more]) == 2
        assert said in capsys.readouterr().err
    assert not (folder / "r.npz").exists()


def test_a_dry_run_embeds_as_a_run_does(folder, capsys):
    """A model with different methods for queries and documents, whose results require gradients; and prompts."""
    (folder / "sides.py").write_text(SIDES)
    words = ["mine", "--beir", "beir", "--model", "sides:model", "--query-prompt", "find: ", "--output", "t.jsonl"]
    assert main([*words, "--dry-run"]) == 0
    assert "corpus_embeddings: 12 rows of D = 4" in capsys.readouterr().out
    assert main(words) == 0
    (folder / "sides.py").write_text(SIDES.replace("torch.ones", "torch.nan * torch.ones"))
    command = [sys.executable, "-m", "negmine", *words, "--overwrite", "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout.ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "finite rows for all texts of queries, got NaN or infinity in rows 0" in done.stderr


SIDES = """
import torch
class Sides:
    def encode_queries(self, texts):
        assert all(text.startswith("find: ") for text in texts)
        return torch.ones(len(texts), 4).requires_grad_()
    def encode_corpus(self, texts):
        return torch.eye(4)[[len(text) % 4 for text in texts]]
model = Sides()
"""


def test_training_data_on_stdout_is_nothing_else(folder):
    words = ["mine", "--beir", "beir", *EMBEDDINGS, "--jsonl", "/dev/stdout"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout.ROOT), *sys.path])}
    command = [sys.executable, "-m", "negmine", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "4 lines in /dev/stdout" in done.stderr and "4 queries" in done.stderr
    rows = [json.loads(line) for line in done.stdout.removesuffix("\n").split("\n")]
    assert [row["query"] for row in rows] == [f"query {i}" for i in (0, 1, 2, 4)]


USAGE = [
    ("--beir beir --positives p.npy --output t.jsonl", "--beir contains --positives: leave it out"),
    ("--beir beir --data x.jsonl --output t.jsonl", "give one data set, not --beir and --data"),
    ("--beir nowhere --output t.jsonl", "'nowhere' must be a folder with files in it"),
    ("--beir beir --output t.jsonl.gz", "--output must end in .jsonl or .parquet, for training data, or in .npz"),
    ("--beir beir --output s3://b/t.jsonl", "--output must be the path of a file on this machine"),
    ("--beir beir --split test --corpus-embeddings q.npy --output t.jsonl", "--corpus-embeddings must be of"),
    (
        "--beir beir --split dev --output t.jsonl",
        "must be a BEIR folder with qrels/dev.tsv, got one with the splits test, train",
    ),
    ("--collection collection.tsv --output t.jsonl", "give --collection, --queries and --qrels together"),
    ("--beir beir --output beir/corpus.jsonl --overwrite", "--output must not replace an input"),
    ("--beir beir --output beir/qrels/../queries.jsonl --overwrite", "--output must not replace an input"),
    ("--positives p.npy --output t.jsonl", "--output needs --query-texts and --corpus-texts, or a data set"),
]


@pytest.mark.parametrize("words, said", USAGE, ids=[said for _, said in USAGE])
def test_inputs_that_do_not_fit_raise_errors_before_the_work(folder, capsys, words, said):
    assert main(["mine", *EMBEDDINGS, *words.split()]) == 2
    assert said in capsys.readouterr().err
    assert len(os.listdir(folder / "beir")) == 3 and not (folder / "t.jsonl").exists()


def test_help_is_grouped_with_an_example_for_each_format():
    mine = next(action for action in parser()._actions if action.dest == "command").choices["mine"]
    said = mine.format_help()
    for words in ("inputs as data sets:", "inputs as arrays:", "which negatives:", "search:", "output:"):
        assert words in said
    for words in ("--beir scifact", "--collection collection.tsv", "--data old.jsonl", "--dry-run", "--compat"):
        assert words in said[said.index("examples, one for each format") :]


MODEL = """
import zlib, numpy as np
class Words:
    def encode(self, texts):
        return np.stack([np.random.default_rng(zlib.crc32(t.encode())).standard_normal(16) for t in texts])
words = Words()
"""


def test_a_beir_folder_and_a_model_become_training_data(folder, capsys):
    (folder / "embedder.py").write_text(MODEL)
    words = ["mine", "--beir", "beir", "--model", "embedder:words", "--num-negatives", "2", "--query-prompt", "find: "]
    words += ["--output", "t.jsonl", "--form", "sentence-transformers"]
    assert main([*words, "--dry-run"]) == 0 and not (folder / "t.jsonl").exists()
    assert "embedding 16 texts: about 0:0" in capsys.readouterr().out
    assert main(words) == 0
    found = lines("t.jsonl")
    assert len(found) == 5 and set(found[0]) == {"anchor", "positive", "negative_1", "negative_2"}
    assert {line["anchor"] for line in found} == {f"query {i}" for i in (0, 1, 2, 4)}
    assert main([*words, "--overwrite", "--query-embeddings", "q.npy"]) == 2
    assert "--query-embeddings cannot be used with --model" in capsys.readouterr().err
    assert main(["mine", "--beir", "beir", "--model", "embedder.py", "--output", "u.jsonl"]) == 2
    assert "must be the folder of a model, or module:name" in capsys.readouterr().err
    compat = ["mine", "--compat", "flagembedding", "--input_file", "in.jsonl", "--output_file", "out.jsonl"]
    (folder / "in.jsonl").write_text('{"query": "a", "pos": ["b"], "neg": ["c", "d"]}\n')
    compat += ["--embedder_name_or_path", "embedder:words", "--query_instruction_for_retrieval", "find: "]
    assert main([*compat, "--range_for_sampling", "0-3", "--negative_number", "2"]) == 0
    assert sorted(lines("out.jsonl")[0]["neg"]) == ["c", "d"]


@pytest.mark.parametrize(
    "more", [["--relative-margin", "0.05"], ["--deduplicate", "near", "--near-duplicate-score", "0.9"]]
)
def test_parts_merge_to_the_files_of_one_run(more, folder, capsys):
    words = ["mine", "--beir", "beir", *EMBEDDINGS, *more]
    assert main([*words, "--output", "whole.npz", "--jsonl", "whole.jsonl"]) == 0
    for part in ("3/3", "1/3", "2/3"):
        assert main([*words, "--part", part, "--output", f"{part[0]}.part"]) == 0
    assert f"part 2/3, {'1 queries' if '0.9' in more else '4 rows'}, in 2.part" in capsys.readouterr().out
    parts = ["3.part", "1.part", "2.part"]
    assert main(["merge", *parts, "--beir", "beir", "--output", "m.npz", "--jsonl", "m.jsonl"]) == 0
    for kind in ("npz", "jsonl"):
        assert (folder / f"m.{kind}").read_bytes() == (folder / f"whole.{kind}").read_bytes()
    capsys.readouterr()

    assert main([*words, "--seed", "1", "--part", "2/3", "--output", "seed.part"]) == 0
    assert main([*words, "--part", "2/4", "--output", "four.part"]) == 0
    negmine.mining.MiningResult.load("m.npz").save("result.part")
    for said, given in {
        "negmine merge: parts 2/3, 3/3 are missing": ["1.part"],
        "each share once, got 3/3 more than once": [*parts, "3.part"],
        "same inputs, arguments, kernels and versions, got arguments.seed 0 and 1": ["1.part", "seed.part", "3.part"],
        "equally many shares, got shares of 3 and of 4": ["1.part", "four.part"],
        "'result.part' is damaged or was not written by save": ["result.part"],
    }.items():
        assert main(["merge", *given, "--output", "no.npz"]) == 2
        assert said in capsys.readouterr().err
        assert not (folder / "no.npz").exists()
    for said, more in {
        "'4/3' must be I/N, such as 1/3": ["--part", "4/3", "--output", "x"],
        "parts are counted from 1, so an array of jobs begins at 1": ["--part", "0/3", "--output", "x"],
        "--part needs --output, a file for the part": ["--part", "1/3", "--output", "x.jsonl"],
        "--part cannot be used with --dry-run": ["--part", "1/3", "--output", "x", "--dry-run"],
    }.items():
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    for said, more in {  # the files of a merge are checked as those of a run are
        "--output must end in .jsonl or .parquet": ["--output", "m.jsonl.gz"],
        "--output must not replace an input": ["--beir", "beir", "--output", "beir/queries.jsonl", "--overwrite"],
        "give one data set, not --beir and --data": ["--beir", "beir", "--data", "m.jsonl", "--output", "o.jsonl"],
        "--beir contains --query-texts: leave it out": [
            "--beir",
            "beir",
            "--query-texts",
            "q.txt",
            "--output",
            "o.jsonl",
        ],
        "--split needs --beir": ["--split", "test", "--output", "o.npz"],
    }.items():
        assert main(["merge", *parts, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["merge", *parts, "--output", "m.jsonl", "--overwrite"]) == 2
    assert "--output needs --query-texts and --corpus-texts, or a data set" in capsys.readouterr().err
