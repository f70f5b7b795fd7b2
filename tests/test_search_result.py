"""What comes out of dataset mining: index arrays, lines of JSON, files that may be damaged, the config; and every refusal."""

import json
import re

import numpy as np
import pytest
import torch

import negmine
from negmine import MiningResult, Select
from negmine.report import mined
from tests.cases import unit
from tests.test_search import same

mine = negmine.mine_hard_negatives


@pytest.fixture
def result() -> MiningResult:
    """Four queries: full, two positives and one negative, none left, no positive."""
    c = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    return mine(torch.ones(4, 1), c, [[0], [0, 1], [0], []], exclude=[[], [2], [1, 2, 3], [0]], num_negatives=2)


def test_index_arrays(result):
    assert result.indices.tolist() == [[1, 2], [3, -1], [-1, -1], [1, 2]]
    assert result.to_triplets().tolist() == [[0, 0, 1], [0, 0, 2], [1, 0, 3], [1, 1, 3]]
    assert result.to_n_tuples().tolist() == [[0, 0, 1, 2]]
    pairs = [[0, 0, 1], [0, 1, 0], [0, 2, 0], [1, 0, 1], [1, 1, 1], [1, 3, 0], [2, 0, 1], [3, 1, 0], [3, 2, 0]]
    assert result.to_labeled_pairs().tolist() == pairs
    queries, rows, labels = result.to_labeled_lists()
    assert queries.tolist() == [0, 1, 1]
    assert rows.tolist() == [[0, 1, 2], [0, 3, -1], [1, 3, -1]]
    assert labels.tolist() == [[1, 0, 0], [1, 0, -1], [1, 0, -1]]


def test_jsonl(result, tmp_path):
    texts = ["a", "b", "ç", "d"]
    assert result.to_jsonl(tmp_path / "f.jsonl", ["p", "q", "r", "s"], texts) == 2
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"query": "p", "pos": ["a"], "neg": ["b", "ç"]}, {"query": "q", "pos": ["a", "b"], "neg": ["d"]}]
    result.to_jsonl(tmp_path / "t.jsonl", ["p", "q", "r", "s"], texts, form="tevatron")
    line = json.loads((tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()[1])
    assert line["query_id"] == "1" and line["negative_passages"] == [{"docid": "3", "title": "", "text": "d"}]
    with pytest.raises(ValueError, match="to_jsonl: corpus_texts must be 4 texts, one a row, got '3 in a list'"):
        result.to_jsonl(tmp_path / "x", texts, texts[:3])
    with pytest.raises(ValueError, match="to_jsonl: form must be 'flagembedding' or 'tevatron', got 'x'"):
        result.to_jsonl(tmp_path / "x", texts, texts, form="x")


def test_the_page_shows_what_was_found_and_dropped(result, tmp_path):
    path = tmp_path / "mined.html"
    result.to_html(path)
    text = path.read_text()
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", text)
    assert "exclude: 5 (query, row) pairs dropped." in text and "2 queries have fewer than 2" in text
    assert mined.shares_found(result) == {"0": 0.25, "1": 0.25, "2": 0.5}
    assert mined.gaps(result).tolist() == [1.0, 2.0, 2.0]  # the last query has no positive
    assert mined.shares_of_gaps(np.array([-1.0, 0.5, 0.5, 3.0])) == pytest.approx(
        {"below 0": 0.25, "from 0": 0.5, "from 1": 0.0, "from 2": 0.25}
    )
    assert mined.shares_of_gaps(np.array([2.0, 2.0])) == {"2": 1.0} and mined.shares_of_gaps(np.array([])) == {}
    many = mine(unit(3, 4), unit(60, 4, seed=1), [[], [], []], num_negatives=50)
    many.to_html(path)
    assert sum(mined.shares_found(many).values()) == 1 and list(mined.shares_found(many))[-1] == "45 to 50"
    assert "Nothing here asks for a change." in path.read_text() and many.summary().splitlines()[0] in path.read_text()
    with pytest.raises(OSError, match=r"MiningResult.to_html: .* could not be written"):
        many.to_html(tmp_path / "no folder" / "mined.html")


def test_save_and_load(result, tmp_path):
    path = tmp_path / "mined.bin"
    result.save(path)
    same(MiningResult.load(path), result)
    assert MiningResult.load(path).config == result.config and MiningResult.load(path).summary() == result.summary()
    np.testing.assert_array_equal(MiningResult.load(path).to_triplets(), result.to_triplets())
    assert [file.name for file in tmp_path.iterdir()] == ["mined.bin"]
    good = path.read_bytes()
    for at in range(0, len(good), 13):  # flipped bits: refused in words, or harmless
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            same(MiningResult.load(path), result)
        except ValueError as error:
            assert str(error).startswith("MiningResult.load: ")
    for text in (b"", good[: len(good) // 2], good[:-30], b"\x93NUMPY", b"not a file of ours"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"mined.bin' is damaged or was not written by save"):
            MiningResult.load(path)
    with pytest.raises(ValueError, match="path must be an existing file"):
        MiningResult.load(tmp_path / "missing.npz")
    for field, wrong, words in (
        ("indices", result.indices + 9, "names rows outside its corpus of 4"),
        ("num_valid", result.num_valid + 1, "num_valid does not count its indices"),
        ("scores", result.scores[:, :1], r"scores have shape \(4, 1\), not \(4, 2\)"),
        ("scores", result.scores.astype(np.float64), "scores are float64, not float32"),
    ):
        MiningResult(**{**vars(result), field: wrong}).save(path)
        with pytest.raises(ValueError, match=words):
            MiningResult.load(path)


def test_config_says_what_ran():
    q, c = unit(4, 8, seed=1), unit(30, 8, seed=2)
    config = mine(q, c, [0, 1, 2, 3], select=Select(0.1, 5), seed=7).config
    assert json.loads(json.dumps(config)) == config
    assert config["arguments"]["seed"] == 7 and config["arguments"]["select"]["range_min"] == 0.1
    assert (config["queries"], config["corpus_rows"], config["dimension"]) == (4, 30, 8)
    assert config["versions"]["negmine"] == negmine.__version__
    changed = c.clone()
    changed[29, 7] += 1e-6
    other = mine(q, changed, [0, 1, 2, 3]).config["content"]
    assert [key for key in other if other[key] != config["content"][key]] == ["corpus_embeddings"]


ROWS_3, ROWS_7 = unit(3, 4), unit(7, 4)


def call(query=ROWS_3, corpus=ROWS_7, positives=(0, 1, 2), **options):
    return lambda: mine(query, corpus, positives, **options)


REFUSALS = [
    (
        call(query=3),
        TypeError,
        "query_embeddings must be an array, a tensor, the path of a .npy, .safetensors or .parquet file, or a list of those",
    ),
    (call(query=torch.ones(3, 4).double()), TypeError, "query_embeddings must be float32, float16 or bfloat16"),
    (call(query=np.ones((3, 4), ">f4")), TypeError, "native byte order, got '>f4'"),
    (
        call(query=torch.ones(3)),
        ValueError,
        "query_embeddings must be of shape (rows, D) with D of 1 or more, got (3,)",
    ),
    (call(corpus=torch.ones(7, 5)), ValueError, "corpus_embeddings must be of query_embeddings' D = 4, got (7, 5)"),
    (call(corpus=[]), ValueError, "corpus_embeddings must be an array"),
    (
        call(corpus=[unit(3, 4), unit(3, 4).half()]),
        ValueError,
        "corpus_embeddings[1] must be of the D and dtype of the first",
    ),
    (
        call(corpus="missing.npy"),
        ValueError,
        "corpus_embeddings must be the path of an existing .npy, .safetensors or .parquet file, got 'missing.npy'",
    ),
    (call(positives=[0, 1]), ValueError, "positives must be as long as there are queries (3), got '2 entries'"),
    (
        call(positives=[0, 1, 7]),
        ValueError,
        "positives must be row numbers of the corpus, in [0, 7), got '7 for query 2'",
    ),
    (call(positives=[[0], [-1], []]), ValueError, "in [0, 7), got '-1 for query 1'"),
    (call(positives=[0.0, 1.0, 2.0]), TypeError, "positives must be a flat sequence of ints"),
    (call(positives=[[0], 1, [2]]), TypeError, "positives[1] must be a flat sequence of ints"),
    (call(positives="012"), TypeError, "positives must be one row number a query"),
    (call(positives=([0, 1, 3], [0, 1, 2])), ValueError, "positives's indptr must be ascending from 0"),
    (call(exclude=[1]), ValueError, "exclude must be as long as there are queries"),
    (call(positives=[[0], [], [1]], select=Select(absolute_margin=0.1)), ValueError, "got 'none for query 1'"),
    (call(select=0.5), TypeError, "select must be a negmine.Select or None"),
    (call(select=Select(sample=2)), ValueError, "select must be without sample"),
    (call(range_mode="raw"), ValueError, "select.range_max must be given where range_mode is 'raw', got None"),
    (call(range_mode="rank"), ValueError, "range_mode must be 'filtered' or 'raw', got 'rank'"),
    (call(sampling_strategy="tpo"), ValueError, "sampling_strategy must be 'top' or 'random' or 'weighted', got 'tpo'"),
    (call(positive_aggregation="median"), ValueError, "positive_aggregation must be 'min' or 'max' or 'mean'"),
    (call(deduplicate=True), ValueError, "deduplicate must be 'none' or 'exact' or 'near', got True"),
    (call(sampling_temperature=0), ValueError, "sampling_temperature must be a number above 0, got 0"),
    (call(num_negatives=0), ValueError, "num_negatives must be an int of 1 or more, got 0"),
    (call(seed=-1), ValueError, "seed must be an int in [0, 2**32), got -1"),
    (call(count_skipped=1), TypeError, "count_skipped must be True or False, got 1"),
    (call(batch_size=0), ValueError, "batch_size must be an int of 1 or more, got 0"),
    (call(corpus_chunk_size=2.0), ValueError, "corpus_chunk_size must be an int of 1 or more, got 2.0"),
    (call(max_memory_bytes=100), ValueError, "max_memory_bytes must be at least"),
    (call(device="nowhere"), ValueError, "device must be a device that torch has here"),
    (call(backend="gpu"), ValueError, "backend must be None"),
]


@pytest.mark.parametrize("refused,error,words", REFUSALS, ids=[words[:50] for _, _, words in REFUSALS])
def test_refusals(refused, error, words):
    with pytest.raises(error, match="^mine_hard_negatives: .*" + re.escape(words)):
        refused()


def test_damaged_shard_is_refused(tmp_path):
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY\x01\x00garbage")
    with pytest.raises(ValueError, match=r"corpus_embeddings must be a whole .npy file"):
        call(corpus=tmp_path / "c.npy")()


def test_a_corpus_of_more_rows_than_a_place_can_name_is_refused():
    corpus = np.broadcast_to(np.ones((1, 4), np.float32), (2**32, 4))  # one row of memory
    with pytest.raises(ValueError, match="corpus_embeddings must be of fewer than 4294967295 rows, got 4294967296"):
        negmine.mine_hard_negatives(np.ones((1, 4), np.float32), corpus, [0])
