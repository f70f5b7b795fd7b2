"""Parts of a mining job, split by queries and rows and merged in random order, give the same bits as one process; errors."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import negmine
from negmine import Select
from negmine.mining import MiningResult, Part, merge_parts, mine_part, sources
from negmine.mining.hard_negatives import mine_share
from negmine.mining.scan import Scan
from negmine.mining.shares import SAMPLED_ROWS
from tests.compare import same_result
from tests.test_mining_ranks import RUNS, D, K, Q, inputs

JOBS = RUNS | {
    "relative": {"select": Select(1, 0.4, relative_margin=0.1), "deduplicate": "near", "near_duplicate_score": 0.5},
    "no counts": {"select": Select(min_score=-0.2, absolute_margin=0.3), "count_skipped": False},
}


def cut(rng, n, most=4):
    """Return the edges of up to `most` ranges that cover [0, n); some may be empty."""
    return [0, *np.sort(rng.integers(0, n + 1, rng.integers(0, most))).tolist(), n]


class AnyTree:
    """An engine that splits each phase into tiles, converts parts to bytes and back, and merges them in a random tree."""

    def __init__(self, corpus, seed):
        self.corpus, self.rng, self.phases = corpus, np.random.default_rng(seed), set()

    def __call__(self, plan, phase, queries):
        self.phases.add(phase.name)
        rows, parts = cut(self.rng, len(self.corpus)), []
        across = [0, 0] if queries is None else cut(self.rng, len(queries), 3)
        for first_query, end in itertools.pairwise(across):
            block = None if queries is None else queries[first_query:end]
            for first, last in itertools.pairwise(rows):
                part = mine_part(plan, phase, block, self.corpus[first:last], first, first_query=first_query)
                parts.append(Part.from_bytes(part.to_bytes()))
        while len(parts) > 1:
            chosen = self.rng.permutation(len(parts))[: self.rng.integers(2, 4)].tolist()
            merged = merge_parts([parts[i] for i in chosen])
            parts = [part for i, part in enumerate(parts) if i not in chosen] + [merged]
        return parts[0]


@pytest.mark.parametrize("name", JOBS)
def test_any_tree_of_any_parts_gives_the_bits_of_one_process(name):
    seen = set()
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        q, c, positives, exclude = inputs(dtype)
        want = negmine.mine_hard_negatives(q, c, positives, exclude=exclude, **JOBS[name])
        engine = AnyTree(c, seed)
        got = negmine.mine_hard_negatives(
            q, c, positives, exclude=exclude, engine=engine, batch_size=17, corpus_chunk_size=50, **JOBS[name]
        )
        same_result(got, want)
        assert got.config == want.config
        seen |= engine.phases
    assert {"documents", "positives", "scan"} <= seen
    assert ("counts" in seen) == (name in ("fractions", "relative"))
    assert ("rows" in seen) == (name in ("near", "relative")) and ("digests" in seen) == (name == "exact")


@pytest.mark.parametrize("name", ["plain", "margins", "fractions", "raw", "near", "texts", "no counts", "window"])
def test_shares_merge_to_the_file_of_one_process(name, tmp_path):
    q, c, positives, exclude = (part[:15] if len(part) == Q else part for part in inputs())
    ids = [f"d\0ö{row}" for row in range(K)]
    job = (JOBS | {"window": {"select": Select(0.01, 0.2)}})[name]
    named = {"corpus_ids": ids, "exclude": [[ids[row] for row in part] for part in exclude]} | job
    named |= {key: named[key][:15] for key in ("query_ids", "query_texts") if key in named}
    arguments = {"query_embeddings": q, "corpus_embeddings": c, **named}
    arguments["positives"] = [[ids[row] for row in part] for part in positives]
    shares = []
    for number in (17, *range(4, 17), 3, 1, 2):  # also more shares than queries, so that some are empty
        of_machine = {"max_memory_bytes": number << 20, "batch_size": number}  # different on each machine
        mine_share(number, 17, arguments | of_machine).save(tmp_path / f"{number}.part")
        shares.append(Part.load(tmp_path / f"{number}.part"))
    assert shares[0].phase == ("negatives" if name in ("near", "fractions") else "candidates")
    rng = np.random.default_rng(0)
    while len(shares) > 1:
        rng.shuffle(shares)
        shares = [merge_parts(shares[:5]), *shares[5:]]
    shares[0].save(tmp_path / "merged.npz")
    negmine.mine_hard_negatives(**arguments).save(tmp_path / "whole.npz")
    assert (tmp_path / "merged.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert MiningResult.load(tmp_path / "merged.npz").corpus_ids[1] == "d\0ö1"


@pytest.mark.filterwarnings("ignore:.*contain NaN or infinity:UserWarning")
@pytest.mark.parametrize("name", ["margins", "fractions", "raw", "exact", "texts", "near", "window"])
def test_parts_and_shares_agree_on_rows_that_are_not_finite(name, tmp_path):
    q, c, positives, exclude = inputs(broken=True)
    job = (JOBS | {"window": {"select": Select(0.01, 0.2)}})[name] | {"exclude": exclude}
    arguments = {"query_embeddings": q, "corpus_embeddings": c, "positives": positives} | job
    want = negmine.mine_hard_negatives(**arguments)
    assert want.skipped["not_finite"] > 3 * 300 and want.config["not_finite"] == {
        "query_embeddings": 3,
        "corpus_embeddings": 8,
    }
    got = negmine.mine_hard_negatives(**arguments, engine=AnyTree(c, 0), batch_size=17, corpus_chunk_size=50)
    same_result(got, want)
    merge_parts([mine_share(number, 3, arguments) for number in (2, 3, 1)]).save(tmp_path / "merged.npz")
    want.save(tmp_path / "whole.npz")
    merged, whole = (MiningResult.load(tmp_path / f"{file}.npz") for file in ("merged", "whole"))
    same_result(merged, whole)
    assert merged.config == whole.config == got.config


class Watched(sources.DecodedRows):
    """A shard that records which of its rows were read."""

    def __init__(self, rows):
        self.rows, self.read, self.shape, self.dtype = rows, np.zeros(len(rows), bool), rows.shape, rows.dtype

    def __getitem__(self, key):
        self.read[key] = True
        return self.rows[key]


@pytest.mark.parametrize("name", ["plain", "margins", "raw", "texts"])
def test_a_share_of_the_rows_reads_its_own_rows_and_those_of_positives(name, monkeypatch):
    q, c, positives, exclude = inputs()
    shards, margin = [c.numpy()[:250], c.numpy()[250:260], c.numpy()[260:]], name == "margins"
    own, known = np.zeros(K, bool), np.zeros(K, bool)
    own[200:400], known[np.concatenate(positives)] = True, margin
    known[np.linspace(0, K - 1, SAMPLED_ROWS).astype(int)] = True
    watched = [Watched(rows) for rows in shards]
    job = {"query_embeddings": q, "positives": positives, "exclude": exclude} | JOBS[name]
    mine_share(2, 3, job | {"corpus_embeddings": watched, "batch_size": 10})
    read = np.concatenate([each.read for each in watched])
    assert read[own].all() and not (read & ~own & ~known).any()
    assert not margin or read[known].all()


def test_shares_of_another_corpus_or_another_kind_are_refused(tmp_path):
    q, c, positives, _ = inputs()
    job = {"query_embeddings": q, "corpus_embeddings": c, "positives": positives}
    first, changed = mine_share(1, 2, job), mine_share(2, 2, job | {"corpus_embeddings": c.flip(1)})
    with pytest.raises(
        ValueError, match=r"of the same inputs, arguments, kernels and versions, got content\.corpus_embeddings"
    ):
        merge_parts([first, changed])
    by_query = mine_share(2, 2, job | {"deduplicate": "near"})
    assert (first.phase, by_query.phase) == ("candidates", "negatives")
    with pytest.raises(ValueError, match=r"^merge_parts: parts must be of one phase"):
        merge_parts([first, by_query])
    with pytest.raises(ValueError, match="each share once, got 1/2 more than once"):
        merge_parts([first, first])


def test_a_killed_share_of_the_rows_is_resumed(tmp_path, monkeypatch):
    q, c, positives, _ = inputs()
    job = {
        "query_embeddings": q,
        "corpus_embeddings": c,
        "positives": positives,
        "batch_size": 10,
        "resume_dir": tmp_path,
    }
    job["select"] = Select(1, relative_margin=0.1)
    want = mine_share(2, 3, job | {"resume_dir": None})
    mine_share(2, 3, job)
    left = sorted(tmp_path.glob("queries-*"))
    assert len(left) == 4
    left[2].unlink()
    scans = []
    monkeypatch.setattr(Scan, "run", lambda *asked, run=Scan.run: scans.append(1) or run(*asked))
    assert mine_share(2, 3, job).to_bytes() == want.to_bytes() and len(scans) == 1
    with pytest.raises(ValueError, match=r"differs in own rows .*, share of the rows"):
        mine_share(3, 3, job)


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    q, c, positives, _ = inputs()
    parts = []

    def engine(plan, phase, queries):
        whole = mine_part(plan, phase, queries, c, 0)
        if phase.name == "scan":
            cuts = (0, 300), (300, K)
            parts.extend([plan, phase, whole, *(mine_part(plan, phase, queries, c[a:b], a) for a, b in cuts)])
        return whole

    negmine.mine_hard_negatives(q, c, positives, engine=engine)
    plan, phase, whole, low, high = parts[:5]
    changed = {
        "of one plan, that is, of the same inputs and arguments, got": [low, dataclasses.replace(high, plan="other")],
        "computed by the same kernels and instruction set": [low, dataclasses.replace(high, kernels="cpu avx2")],
        "of one phase, got": [low, dataclasses.replace(high, phase_digest="0")],
        "disjoint in phase scan, got queries 0 to 40 with rows 0 to 600 and queries 0 to 40 with rows 300": [
            whole,
            high,
        ],
        "a list of at least one Part": [],
    }
    for said, given in changed.items():
        with pytest.raises((ValueError, TypeError), match=f"^merge_parts: parts must be {said}"):
            merge_parts(given)
    with pytest.raises(ValueError, match=r"engine must be .*, got 300 of the 600 rows for query 0 in phase documents"):
        negmine.mine_hard_negatives(q, c, positives, engine=lambda *asked: mine_part(*asked, c[:300], 0))
    with pytest.raises(TypeError, match=r"engine must be a function that returns the Part .*, got None"):
        negmine.mine_hard_negatives(q, c, positives, engine=lambda *asked: None)
    for said, arguments in {
        "first_row must be at most": (plan, phase, q, c, 1),
        f"corpus must be of D = {D} and float32, as the plan says": (plan, phase, q, c[:, 1:], 0),
        f"queries must be of D = {D} and float32, as the plan says": (plan, phase, q.bfloat16(), c, 0),
        "queries must be at most 40 rows from query 0": (plan, phase, torch.cat([q, q]), c, 0),
        "plan must be a MiningPlan": (phase, plan, q, c, 0),
    }.items():
        with pytest.raises((ValueError, TypeError), match=f"^mine_part: {said}"):
            mine_part(*arguments)
    with pytest.raises(ValueError, match=r"^mine_hard_negatives: index must be 'exact' when a share"):
        mine_share(1, 2, {"query_embeddings": q, "corpus_embeddings": c, "positives": positives, "index": "Flat"})

    low.save(tmp_path / "part")
    content = (tmp_path / "part").read_bytes()
    same = Part.load(tmp_path / "part")
    assert all(np.array_equal(same.arrays[name], array) for name, array in low.arrays.items())
    for damaged in (
        content[:-30],
        content.replace(b'"depth": 3', b'"depth": 4'),
        b"",
        content.replace(b"scan", b"rows"),
    ):
        (tmp_path / "part").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^Part.load: .*part' is damaged or was not written by save"):
            Part.load(tmp_path / "part")
    assert phase.num_queries == Q
