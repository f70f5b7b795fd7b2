"""MiningResult: index arrays, JSON lines, the HTML page, and damaged files."""

import json
import re

import numpy as np
import pytest
import torch

import negmine
from negmine.mining import MiningResult, result_page
from tests.cases import unit
from tests.compare import same_result

mine = negmine.mine_hard_negatives


@pytest.fixture
def result() -> MiningResult:
    """Four queries: with all negatives; with two positives and one negative; without negatives; without a positive."""
    c = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    return mine(
        torch.ones(4, 1),
        c,
        [[0], [0, 1], [0], []],
        exclude=[[], [2], [1, 2, 3], [0]],
        query_ids=range(4),
        num_negatives=2,
    )


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
    with pytest.warns(
        UserWarning, match=r"to_jsonl: 1 queries have no positive .* 1 queries have no negative and are left out"
    ):
        assert result.to_jsonl(tmp_path / "f.jsonl", ["p", "q", "r", "s"], texts) == 2
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text(encoding="utf-8").splitlines()]
    first = {"query": "p", "pos": ["a"], "neg": ["b", "ç"], "pos_scores": [4.0], "neg_scores": [3.0, 2.0]}
    second = {"query": "q", "pos": ["a", "b"], "neg": ["d"], "pos_scores": [4.0, 3.0], "neg_scores": [1.0]}
    assert lines == [first, second]
    result.to_jsonl(tmp_path / "t.jsonl", ["p", "q", "r", "s"], texts, form="tevatron")
    line = json.loads((tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()[1])
    assert line["query_id"] == "1" and line["negative_passages"] == [{"docid": "3", "title": "", "text": "d"}]
    with pytest.raises(ValueError, match="to_jsonl: corpus_texts must be 4 texts, one per row, got 3"):
        result.to_jsonl(tmp_path / "x", texts, texts[:3])
    with pytest.raises(ValueError, match=r"to_jsonl: form must be 'flagembedding' or 'tevatron' or .*, got 'x'"):
        result.to_jsonl(tmp_path / "x", texts, texts, form="x")


def test_the_page_shows_what_was_found_and_dropped(result, tmp_path):
    path = tmp_path / "mined.html"
    result.to_html(path)
    text = path.read_text()
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", text)
    assert "exclude: 5 (query, row) pairs removed." in text and "2 queries have fewer than 2" in text
    assert result_page.shares_found(result.num_valid, 2) == {"0": 0.25, "1": 0.25, "2": 0.5}
    assert result_page.score_gaps(result.scores, result.positive_scores).tolist() == [
        1.0,
        2.0,
        2.0,
    ]  # the last query has no positive
    assert result_page.shares_of_gaps(np.array([-1.0, 0.5, 0.5, 3.0])) == pytest.approx(
        {"below 0": 0.25, "from 0": 0.5, "from 1": 0.0, "from 2": 0.25}
    )
    assert (
        result_page.shares_of_gaps(np.array([2.0, 2.0])) == {"2": 1.0}
        and result_page.shares_of_gaps(np.array([])) == {}
    )
    many = mine(unit(3, 4), unit(60, 4, seed=1), [[], [], []], num_negatives=50)
    many.to_html(path)
    shares = result_page.shares_found(many.num_valid, 50)
    assert sum(shares.values()) == 1 and list(shares)[-1] == "45 to 50"
    assert "No change is needed." in path.read_text() and many.summary().splitlines()[0] in path.read_text()
    with pytest.raises(OSError, match=r"MiningResult.to_html: .* could not be written"):
        many.to_html(tmp_path / "no folder" / "mined.html")


def test_save_and_load(result, tmp_path):
    path = tmp_path / "mined.bin"
    result.save(path)
    same_result(MiningResult.load(path), result)
    assert MiningResult.load(path).config == result.config and MiningResult.load(path).summary() == result.summary()
    np.testing.assert_array_equal(MiningResult.load(path).to_triplets(), result.to_triplets())
    assert [file.name for file in tmp_path.iterdir()] == ["mined.bin"]
    good = path.read_bytes()
    for at in range(0, len(good), 13):  # flipped bits: a clear error, or no effect
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            same_result(MiningResult.load(path), result)
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
