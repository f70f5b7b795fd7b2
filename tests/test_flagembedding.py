"""negmine mine --compat flagembedding gives the results of FlagEmbedding's hn_mine.py, written as a loop."""

import json
import random
import zlib

import numpy as np
import pytest

from negmine.cli import flagembedding, main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Words:
    """An embedder with a different vector for each text, so that no scores are equal."""

    def encode(self, texts):
        draws = [np.random.default_rng(zlib.crc32(text.encode())).standard_normal(8) for text in texts]
        return {"dense_vecs": np.array(draws)}

    def encode_queries(self, texts):
        return self.encode(texts)


model = Words()


def spoken(seed: int, lines: int = 12) -> list[dict]:
    rng = random.Random(seed)
    text = lambda: "".join(rng.choices("abcdefgh", k=9))  # noqa: E731
    data = [
        {"query": text(), "pos": [text() for _ in range(1 + i % 2)], "neg": [text()], "id": i} for i in range(lines)
    ]
    data[3]["pos"].append(data[4]["query"])  # a query that is in the corpus
    del data[5]["neg"]
    return data


def script(data: list[dict], pool: list[str] | None, low: int, high: int) -> list[list[str]]:
    """The candidates of hn_mine.py for each query, sorted by score: a range of ranks without positives and the query itself."""
    seen = [text for line in data for text in line["pos"] + line.get("neg", [])] if pool is None else pool
    corpus = list(dict.fromkeys(seen))
    unit_rows = [v / np.linalg.norm(v) for v in model.encode(corpus)["dense_vecs"].astype(np.float32)]
    out = []
    for line in data:
        query = model.encode([line["query"]])["dense_vecs"][0].astype(np.float32)
        scores = [-float(np.float32(query / np.linalg.norm(query)) @ row) for row in unit_rows]
        ranked = sorted(range(len(corpus)), key=lambda k: scores[k])[low:high]
        out.append([corpus[k] for k in ranked if corpus[k] not in line["pos"] and corpus[k] != line["query"]])
    return out


def hn_mine(folder, data, *words) -> list[dict]:
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in data))
    start = ["mine", "--compat", "flagembedding", "--input_file", "in.jsonl", "--output_file", "out.jsonl"]
    assert main([*start, *words]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


EMBEDDER = ("--embedder_name_or_path", "tests.test_flagembedding:model")


@pytest.mark.parametrize("pooled", [False, True])
def test_negatives_are_what_the_script_may_draw(folder, pooled):
    data = spoken(1)
    pool = [line["text"] for line in [{"text": "".join(p)} for p in zip("aabbccddee", "hgfedcbahg", strict=True)]] * 2
    (folder / "pool.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in pool))
    words = ("--candidate_pool", "pool.jsonl") if pooled else ()
    low, high = (1, 8) if pooled else (2, 14)
    drawn_from = script(data, pool if pooled else None, low, high)
    out = hn_mine(folder, data, *EMBEDDER, "--range_for_sampling", f"{low}-{high}", "--negative_number", "4", *words)
    for before, after, allowed in zip(data, out, drawn_from, strict=True):
        assert {**before, "neg": after["neg"]} == after, "everything else stays"
        assert len(set(after["neg"])) == len(after["neg"]) == 4
        assert set(after["neg"]) <= set(allowed)
    # As many as the window has: exactly the texts that the script finds, then random texts of the corpus.
    most = max(map(len, drawn_from))
    out = hn_mine(
        folder, data, *EMBEDDER, "--range_for_sampling", f"{low}-{high}", "--negative_number", str(most), *words
    )
    for line, allowed in zip(out, drawn_from, strict=True):
        assert set(line["neg"][: len(allowed)]) == set(allowed)
        assert not set(line["neg"]) & {*line["pos"], line["query"]}


def test_short_lines_are_filled_up_and_draws_follow_the_seed(folder, capsys):
    data = spoken(2)
    first = hn_mine(folder, data, *EMBEDDER, "--range_for_sampling", "0-2", "--negative_number", "6")
    assert (
        all(len(set(line["neg"])) == 6 for line in first) and "because a window had too few" in capsys.readouterr().out
    )
    again = hn_mine(
        folder, data, *EMBEDDER, "--range_for_sampling", "0-2", "--negative_number", "6", "--search_batch_size", "2"
    )
    assert again == first
    assert (
        hn_mine(folder, data, *EMBEDDER, "--range_for_sampling", "0-2", "--negative_number", "6", "--seed", "1")
        != first
    )


def test_files_of_embeddings_are_the_embedder(folder):
    data = spoken(3)
    corpus = list(dict.fromkeys(text for line in data for text in line["pos"] + line.get("neg", [])))
    np.save("dq.npy", model.encode_queries([line["query"] for line in data])["dense_vecs"].astype(np.float32))
    np.save("dc.npy", model.encode(corpus)["dense_vecs"].astype(np.float32))
    by_files = ("--query_embeddings", "dq.npy", "--corpus_embeddings", "dc.npy")
    rest = ("--range_for_sampling", "0-9", "--negative_number", "3")
    assert hn_mine(folder, data, *by_files, *rest) == hn_mine(folder, data, *EMBEDDER, *rest)
    raw = hn_mine(folder, data, *by_files, *rest, "--normalize_embeddings", "False")
    assert [len(line["neg"]) for line in raw] == [3] * len(data)


BAD = [
    ("{}", (), 'record 1 of input_file must be an object with a text "query"'),
    ('{"query": "a"}', (), 'must have "pos", a list of texts, got None'),
    ('{"query": "a", "pos": ["b"], "neg": "c"}', (), 'must have "neg", a list of texts'),
    ("", (), "input_file is empty"),
    ('{"query": "a", "pos": []}', (), "the corpus is empty"),
    ('{"query": "a", "pos": ["b"]}', ("--embedder", "x:y"), "'x:y' cannot be imported"),
    ('{"query": "a", "pos": ["b"]}', ("--range_for_sampling", "9-2"), "two ranks such as 10-210"),
    ('{"query": "a", "pos": ["b"]}', ("--negative_number", "0"), "must be 1 or more"),
    ('{"query": "a", "pos": ["b"]}', ("--use_gpu_for_searching", "maybe"), "True or False, not 'maybe'"),
    (
        '{"query": "a", "pos": ["b"]}',
        ("--query_embeddings", "q.npy"),
        "give an embedder or files with embeddings, not both",
    ),
    ('{"query": "a", "pos": ["b"]}', ("--pooling_method", "cls"), "there is no option --pooling-method"),
]


@pytest.mark.parametrize("line, words, said", BAD, ids=[said[:40] for *_, said in BAD])
def test_bad_lines_end_with_2(folder, line, words, said, capsys):
    (folder / "in.jsonl").write_text(line)
    start = ["mine", "--compat", "flagembedding", "--input_file", "in.jsonl", "--output_file", "o.jsonl"]
    assert main([*start, *EMBEDDER, *words]) == 2
    assert said in capsys.readouterr().err


def test_embeddings_of_the_wrong_shape_exit_with_2(folder, capsys):
    (folder / "in.jsonl").write_text('{"query": "a", "pos": ["b"]}')
    np.save("q.npy", np.ones((3, 2), np.float32))
    start = ["mine", "--compat", "flagembedding", "--input_file", "in.jsonl", "--output_file", "o.jsonl"]
    assert main(start) == 2 and "give --embedder_name_or_path, or both" in capsys.readouterr().err
    assert main([*start, "--query_embeddings", "q.npy", "--corpus_embeddings", "q.npy"]) == 2
    assert "the embeddings of the queries must be (1, D), got (3, 2)" in capsys.readouterr().err
    assert flagembedding._yes("yes") and not flagembedding._yes("0")
