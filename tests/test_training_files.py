"""Training data in the formats of other programs, from and to a MiningResult, with ids, titles and scores."""

import gzip
import json
import sys

import numpy as np
import pytest

import negmine
from negmine.cli import files
from negmine.cli.main import main
from negmine.mining import MiningResult
from negmine.mining.text_sets import read_beir, read_msmarco, read_training_lines
from negmine.mining.training_rows import FORMS
from tests.cases import unit
from tests.peers import peer_file

K = 12
CORPUS = unit(K, 6, seed=2).numpy()
IDS, TITLES = [f"d{k}" for k in range(K)], [f"Title {k}" if k % 2 else "" for k in range(K)]
BODIES = [f"body {k} ß\u2028" for k in range(K)]
JOINED = [f"{title} {body}".strip() if title else body for title, body in zip(TITLES, BODIES, strict=True)]


@pytest.fixture
def result() -> MiningResult:
    """Four queries: with one positive; with two; with one and a single negative; without a positive."""
    exclude = [[], [], [IDS[k] for k in range(K) if k not in (2, 5)], []]
    return negmine.mine_hard_negatives(
        CORPUS[:4],
        CORPUS,
        [["d0"], ["d1", "d3"], ["d2"], []],
        query_ids=["qa", "qb", "qc", "qd"],
        corpus_ids=IDS,
        query_texts=["one", "two", "three", "four"],
        corpus_texts=JOINED,
        exclude=exclude,
        num_negatives=2,
    )


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]


def written(result, tmp_path, form: str) -> list[dict]:
    with pytest.warns(UserWarning, match="1 queries have no positive and are left out"):
        count = result.to_jsonl(tmp_path / "o.jsonl", corpus_texts=BODIES, corpus_titles=TITLES, form=form)
    found = lines(tmp_path / "o.jsonl")
    assert len(found) == count
    return found


def test_1g_ids_and_titles_pass_through_every_form(result, tmp_path):
    names = [[IDS[k] for k in row if k >= 0] for row in result.indices]
    docs = [[JOINED[k] for k in row if k >= 0] for row in result.indices]
    scores = [[float(str(s)) for s in row if s > -np.inf] for row in result.scores]
    own = [1.0, 1.0]
    assert [len(row) for row in names] == [2, 2, 1, 2]

    flag = written(result, tmp_path, "flagembedding")
    assert [line["query"] for line in flag] == ["one", "two", "three"]
    assert flag[1]["pos"] == [JOINED[1], JOINED[3]] and flag[1]["neg"] == docs[1] and flag[1]["neg_scores"] == scores[1]
    pair = [float(CORPUS[1] @ CORPUS[k]) for k in (1, 3)]
    np.testing.assert_allclose(flag[1]["pos_scores"], pair, rtol=1e-5)
    np.testing.assert_allclose(flag[0]["pos_scores"], own[:1], rtol=1e-5)

    tevatron = written(result, tmp_path, "tevatron")
    assert tevatron[1]["query_id"] == "qb" and len(tevatron[2]["negative_passages"]) == 1
    assert tevatron[1]["positive_passages"] == [
        {"docid": f"d{k}", "title": TITLES[k], "text": BODIES[k]} for k in (1, 3)
    ]

    swift = written(result, tmp_path, "ms-swift")
    user = [{"role": "user", "content": "two"}]
    assert swift[1]["messages"] == user and [m[0]["content"] for m in swift[1]["negative_messages"]] == docs[1]

    with pytest.warns(UserWarning, match="1 queries have fewer than 2 negatives and are left out"):
        assert result.to_jsonl(tmp_path / "s.jsonl", form="sentence-transformers") == 3
    rows = lines(tmp_path / "s.jsonl")
    assert [list(row) for row in rows] == [["anchor", "positive", "negative_1", "negative_2"]] * 3
    assert rows[2] == {"anchor": "two", "positive": JOINED[3], "negative_1": docs[1][0], "negative_2": docs[1][1]}
    with pytest.warns(UserWarning):
        result.to_jsonl(tmp_path / "s.jsonl", form="distillation")
    assert lines(tmp_path / "s.jsonl")[2]["label"] == [flag[1]["pos_scores"][1], *scores[1]]

    pylate = written(result, tmp_path, "pylate")
    assert pylate[1]["query_id"] == "qb" and pylate[1]["document_ids"] == ["d1", "d3", *names[1]]
    assert pylate[1]["scores"] == flag[1]["pos_scores"] + scores[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_parquet_and_datasets_hold_the_same_rows(result, tmp_path, form):
    want = written(result, tmp_path, form) if form not in ("sentence-transformers", "distillation") else None
    if want is None:
        result.to_jsonl(tmp_path / "o.jsonl", corpus_texts=BODIES, corpus_titles=TITLES, form=form)
        want = lines(tmp_path / "o.jsonl")
    parquet = pytest.importorskip("pyarrow.parquet")
    assert result.to_parquet(tmp_path / "o.parquet", corpus_texts=BODIES, corpus_titles=TITLES, form=form) == len(want)
    assert parquet.read_table(tmp_path / "o.parquet").to_pylist() == want
    pytest.importorskip("datasets")
    assert result.to_dataset(corpus_texts=BODIES, corpus_titles=TITLES, form=form).to_list() == want


def test_pylate_and_tevatron_read_their_forms(result, tmp_path):
    datasets = pytest.importorskip("datasets")
    scored = peer_file("pylate", "utils/processing.py").KDProcessing(
        queries=datasets.Dataset.from_dict({"query_id": result.query_ids, "text": result.query_texts}),
        documents=datasets.Dataset.from_dict({"document_id": IDS, "text": JOINED}),
    )
    row = scored.map(written(result, tmp_path, "pylate")[1])
    assert row["query"] == "two" and row["documents"][:2] == [JOINED[1], JOINED[3]] and len(row["scores"]) == 4

    class Words:
        def encode(self, text, **options):
            return text.split()

    read = peer_file("tevatron", "datasets/preprocessor.py").TrainPreProcessor(Words())
    row = read(written(result, tmp_path, "tevatron")[1])
    assert row["query"] == ["two"] and row["positives"] == [f"{TITLES[k]} {BODIES[k]}".split() for k in (1, 3)]


def test_missing_packages_are_named(result, monkeypatch):
    for package, call in (("datasets", result.to_dataset), ("pandas", result.to_pandas)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"needs the package {package}: pip install {package}"):
            call()


def test_to_pandas(result):
    pytest.importorskip("pandas")
    table = result.to_pandas()
    assert list(table.columns) == ["query_id", "document_id", "label", "rank", "score", "query", "document"]
    assert table[table.query_id == "qb"].document_id.tolist()[:2] == ["d1", "d3"]
    assert (table.label == (table["rank"] == 0)).all() and len(table) == 4 + 7


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["flagembedding", "tevatron", "ms-swift"])
def test_training_lines_are_read_back(result, tmp_path, form):
    result.to_jsonl(tmp_path / "o.jsonl", corpus_texts=BODIES, corpus_titles=TITLES, form=form)
    (tmp_path / "o.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + (tmp_path / "o.jsonl").read_bytes()))
    for name in ("o.jsonl", "o.jsonl.gz"):
        found = read_training_lines(tmp_path / name)
        assert found.query_texts == ["one", "two", "three"]
        text_of = dict(zip(found.corpus_ids, found.corpus_texts, strict=True))
        assert [text_of[name] for name in found.positives[1]] == [JOINED[1], JOINED[3]]
        if form == "tevatron":
            assert found.query_ids == ["qa", "qb", "qc"] and found.positives[1] == ["d1", "d3"]
            assert found.corpus_titles[found.corpus_ids.index("d3")] == "Title 3"


def beir(folder, ending=""):
    """A BEIR folder with K documents and five queries, one of which has no judgement."""
    (folder / "qrels").mkdir(parents=True)
    write = (lambda path, text: path.write_bytes(gzip.compress(text.encode()))) if ending else type(folder).write_text
    corpus = [{"_id": IDS[k], "title": TITLES[k], "text": BODIES[k], "metadata": {}} for k in range(K)]
    queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(5)]
    for name, records in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(record) + "\r\n" for record in records)
        write(folder / f"{name}.jsonl{ending}", "\ufeff" + text)
    judgements = ["q0\td0\t1", "q0\td3\t2", "q1\td1\t1", "q2\td2\t0", "q2\td4\t1", "q4\td0\t1"]
    for split in ("train", "test"):
        write(folder / f"qrels/{split}.tsv{ending}", "query-id\tcorpus-id\tscore\n" + "\n".join(judgements) + "\n")
    return folder


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_1i_a_beir_folder_is_read(tmp_path, ending):
    found = read_beir(beir(tmp_path / "scifact", ending))
    assert found.query_ids == ["q0", "q1", "q2", "q4"] and found.query_rows == [0, 1, 2, 4]
    assert found.positives == [["d0", "d3"], ["d1"], ["d4"], ["d0"]] and found.corpus_ids == IDS
    assert found.corpus_texts == JOINED and found.corpus_titles == TITLES
    assert found.files[2] == str(tmp_path / f"scifact/qrels/train.tsv{ending}")


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_beir_folder_in_object_storage_is_read(tmp_path, monkeypatch, capsys, protocol):
    fsspec = pytest.importorskip("fsspec")
    folder = beir(tmp_path / "scifact", ".gz")
    url = f"{protocol}://{tmp_path if protocol == 'file' else ''}/scifact"
    if protocol == "memory":
        fsspec.filesystem("memory").put(str(folder), url, recursive=True)
    found, local = read_beir(url + "/", "test"), read_beir(folder, "test")
    assert found.files == [f"{url}/{name}.gz" for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")]
    assert vars(found) | {"files": []} == vars(local) | {"files": []}
    with pytest.raises(ValueError, match=f"'{url}/no' must be a folder with files in it"):
        read_beir(f"{url}/no")

    monkeypatch.chdir(tmp_path)
    for name, rows in (("q", 5), ("c", K)):
        np.save(f"{name}.npy", np.random.default_rng(0).standard_normal((rows, 6)).astype(np.float32))
    words = ["mine", "--query-embeddings", "q.npy", "--corpus-embeddings", "c.npy", "--num-negatives", "2"]
    lines = []
    for place, output in ((url, "remote.jsonl"), (str(folder), "local.jsonl")):
        assert main([*words, "--beir", place, "--output", output, "--dry-run"]) == 0
        assert f"reads {place}/queries.jsonl.gz" in capsys.readouterr().out
        assert main([*words, "--beir", place, "--output", output]) == 0
        lines.append((tmp_path / output).read_text())
    assert lines[0] == lines[1] and lines[0]


def test_1i_msmarco_is_read(tmp_path):
    (tmp_path / "collection.tsv").write_text("7\tfirst passage\n8\tsecond\n9\tthird\n")
    (tmp_path / "queries.tsv").write_text("100\twhat\n200\twhy\n300\tunjudged\n")
    for text in ("100\t0\t8\t1\n200\t0\t7\t1\n", "100 0 8 1\n200 0 7 1\n"):
        (tmp_path / "qrels.tsv").write_text(text)
        found = read_msmarco(*(tmp_path / f"{name}.tsv" for name in ("collection", "queries", "qrels")))
        assert (found.query_ids, found.positives) == (["100", "200"], [["8"], ["7"]])
        assert found.corpus_texts == ["first passage", "second", "third"] and found.corpus_titles is None


BROKEN = [
    (
        "corpus.jsonl",
        b'{"_id": "a", "text": "x"}\n{"_id": "b", "text": "caf\xe9"}\n',
        r"line 2 of .*corpus.jsonl.* UTF-8",
    ),
    ("corpus.jsonl", "a\tb\n".encode("utf-16"), r"corpus.jsonl.* UTF-16"),
    ("corpus.jsonl", b'{"_id": "a", "text": 3}\n', r'line 1 of .*corpus.jsonl.* a string "text", got 3'),
    ("corpus.jsonl", b'{"_id": "a", "text": "\\ud800"}\n', r"line 1 of .*corpus.jsonl.* surrogate"),
    ("corpus.jsonl", b'{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n', r"line 2 of .*corpus.jsonl.* id 'a'"),
    ("corpus.jsonl", gzip.compress(b'{"_id": "a", "text": "x"}\n' * 9)[:-9], r"corpus.jsonl.* is damaged"),
    ("queries.jsonl", b"[1\n", r"line 1 of .*queries.jsonl.* is not valid JSON"),
    (
        "qrels/train.tsv",
        b"query-id\tcorpus-id\tscore\nq0\tnone\t1\n",
        r"line 2 of .*train.tsv.* names the document 'none'",
    ),
    ("qrels/train.tsv", b"q9\td0\t1\n", r"line 1 of .*train.tsv.* names the query 'q9'"),
    ("qrels/train.tsv", b"q0\td0\tgood\n", r"line 1 of .*train.tsv.* end with a score, got 'good'"),
    ("qrels/train.tsv", b"q0 d0\n", r"line 1 of .*train.tsv.* must have query id"),
    ("qrels/train.tsv", b"q0\td0\tnan\n", r"line 1 of .*train.tsv.* end with a score, got 'nan'"),
    ("qrels/train.tsv", b"", r"train.tsv.* has no relevant pair"),
    ("qrels/train.tsv", b"q0\td0\t0\nq0\td1\t-1\n\t\t\n", r"train.tsv.* has no relevant pair"),
]


@pytest.mark.parametrize("name, content, words", BROKEN, ids=[words for *_, words in BROKEN])
def test_1i_errors_name_file_and_line(tmp_path, name, content, words):
    folder = beir(tmp_path / "scifact")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_beir(folder)


NAMED = [{"_id": "007", "text": "tea"}, {"_id": "7", "text": "milk"}]


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "A.JSONL", "list.json", "a.jsonl.gz", "list.json.gz"])
def test_ids_and_texts_of_json(tmp_path, kind):
    """For every common JSON form, the fields are read, not the JSON text. Ids keep leading zeros."""
    content = json.dumps(NAMED, indent=1) if kind.startswith("list") else "\n".join(map(json.dumps, NAMED)) + "\n"
    data = ("\ufeff\n" + content.replace("\n", "\r\n")).encode()
    (tmp_path / kind).write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    assert files.texts(f"{tmp_path}/{kind}") == ["tea", "milk"]
    assert files.labels(f"{tmp_path}/{kind}") == ["007", "7"]


@pytest.mark.parametrize("read", [files.texts, files.labels])
def test_entries_that_are_not_one_value_are_refused(tmp_path, read):
    for name, content, words in (
        ("a.jsonl", '"b"\n{"title": "c"}\n', r"line 2 of '.*a.jsonl' must be a"),
        ("a.json", '["b", true]', r"entry 2 of '.*a.json' must be a"),
        ("collection.tsv", "0\ttea\n", r"'.*collection.tsv' has several fields in a line"),
        ("c.csv.gz", "id,text\n", r"'.*c.csv.gz' has several fields in a line"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=words):
            read(f"{tmp_path}/{name}")


def test_zstd(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(9))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(
        ImportError, match=r"a.jsonl' is compressed by zstd, and reading it needs pip install zstandard"
    ):
        read_training_lines(tmp_path / "a.jsonl")
    monkeypatch.delitem(sys.modules, "zstandard")
    zstandard = pytest.importorskip("zstandard")
    lines = [b'{"query": "%d", "pos": ["b"]}\n' % number for number in range(4000)]
    skippable = b"\x50\x2a\x4d\x18\x05\0\0\0hello"
    whole = zstandard.compress(b"".join(lines[:3999])) + skippable + zstandard.compress(lines[3999])
    (tmp_path / "a.jsonl").write_bytes(whole)
    assert read_training_lines(tmp_path / "a.jsonl").query_texts == [str(number) for number in range(4000)]
    stream = zstandard.ZstdCompressor().compressobj()
    flushed = stream.compress(lines[0]) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)  # the stream does not end
    for cut in (whole[:-1], whole[:200], flushed, whole + b"more"):
        (tmp_path / "a.jsonl").write_bytes(cut)
        with pytest.raises(ValueError, match=r"a.jsonl' is damaged after line \d+"):
            read_training_lines(tmp_path / "a.jsonl")


def test_one_id_names_one_query(tmp_path):
    """Lines with the same query id share their positives, so another text with this id would mask rows that are no positives."""
    passage = {"docid": "1", "title": "", "text": "b"}
    record = {"query_id": "7", "query": "a", "positive_passages": [passage], "negative_passages": []}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps(record) + "\n")
    assert read_training_lines(path).query_ids == ["7", "7"]
    path.write_text(json.dumps(record) + "\n" + json.dumps(record | {"query": "other"}) + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .* has the id '7' of an earlier query, but another text"):
        read_training_lines(path)


def test_headers_of_msmarco_files_are_skipped(tmp_path):
    header = "query-id corpus-id score\n"
    for begin, judged in (("", ""), ("\ufeff", header), ("\r\n \n", header)):  # a byte order mark, and blank lines
        contents = ("pid\tpassage\n0\ta\n", "qid\tquery\n5\tb\n", judged + ("5 0 1\n" if judged else "5 0 0 1\n"))
        for name, content in zip("cqr", contents, strict=True):
            (tmp_path / name).write_text(begin + content)
        found = read_msmarco(*(tmp_path / name for name in "cqr"))
        assert (found.corpus_ids, found.query_ids, found.positives) == (["0"], ["5"], [["0"]])


def test_training_lines_have_the_scores_of_the_second_model(tmp_path):
    """The scores of positives, also of promoted ones, are those of the judge, like the scores of negatives."""

    def judge(pairs):
        return [float(document.split()[-2]) / 100 for _, document in pairs]

    result = negmine.mine_hard_negatives(
        CORPUS[:2], CORPUS, [["d5"], ["d4", "d6"]], corpus_ids=IDS, query_texts=["one", "two"], corpus_texts=BODIES,
        num_negatives=2, rescore=judge, rescore_candidates=K, promote=0.0,
    )  # fmt: skip
    result.to_jsonl(tmp_path / "o.jsonl")
    for line, own in zip(lines(tmp_path / "o.jsonl"), ({5}, {4, 6}), strict=True):
        assert {int(text.split()[1]) for text in line["pos"]} >= own
        for side in ("pos", "neg"):
            scores = [int(text.split()[1]) / 100 for text in line[side]]
            np.testing.assert_allclose(line[f"{side}_scores"], scores, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_ms_swift_reads_what_is_written(result, tmp_path):
    """The loader of ms-swift and the inputs of its templates have the messages of the file."""
    dataset = pytest.importorskip("swift.dataset", exc_type=ImportError)
    inputs = pytest.importorskip("swift.template.template_inputs").TemplateInputs
    want = written(result, tmp_path, "ms-swift")
    rows, _ = dataset.load_dataset([str(tmp_path / "o.jsonl")], split_dataset_ratio=0.0, strict=True)
    assert len(rows) == len(want) == 3
    for row, line in zip(rows, want, strict=True):
        read = inputs.from_dict({name: value for name, value in row.items() if value is not None})
        assert read.chosen.messages == line["messages"]
        assert [each.messages for each in read.positive] == line["positive_messages"]
        assert [each.messages for each in read.negative] == line["negative_messages"]


def test_unknown_scores_are_left_out_of_every_line_or_refused(result, tmp_path):
    merged = negmine.mining.merge_retrievers([result, result])
    with pytest.warns(UserWarning, match="pos_scores and neg_scores are left out"):
        merged.to_jsonl(tmp_path / "o.jsonl")
    assert list(lines(tmp_path / "o.jsonl")[0]) == ["query", "pos", "neg"]
    for form in ("distillation", "pylate"):
        with pytest.raises(
            ValueError, match="form must be one without scores, because the scores of some positives are unknown"
        ):
            merged.to_jsonl(tmp_path / "p.jsonl", form=form)
    assert not (tmp_path / "p.jsonl").exists()
