"""With a corpus distributed over 1, 2 and 3 processes on gloo, every rank returns the same bits as one process."""

import pytest
import torch
import torch.distributed as dist

import negmine
from negmine import Select
from negmine.mining import mining_rounds
from negmine.mining.scan import Scan
from tests.cases import unit
from tests.compare import same_result
from tests.ranks import run_ranks

Q, K, D = 40, 600, 20
CUTS = {1: [0, K], 2: [0, 37, K], 3: [0, 250, 250, K]}  # the second of three ranks has no rows
QUERY_CUTS = {1: [0, Q], 2: [0, 0, Q], 3: [0, 11, 12, Q]}  # the first of two ranks has no queries
RUNS = {
    "plain": {"num_negatives": 7},
    "margins": {"select": Select(2, 40, absolute_margin=0.02), "sampling_strategy": "random", "seed": 3},
    "fractions": {"select": Select(0.01, 0.3, max_score=0.6), "sampling_strategy": "weighted"},
    "raw": {"select": Select(1, 400, relative_margin=0.05), "range_mode": "raw", "positive_aggregation": "mean"},
    "exact": {"deduplicate": "exact", "num_negatives": 30},
    "texts": {
        "corpus_texts": [f"text {row % 560}" for row in range(K)],
        "query_texts": [f"text  {200 + row // 2}" for row in range(Q)],
        "query_ids": [row // 3 for row in range(Q)],
        "num_negatives": 30,
    },
    "near": {"deduplicate": "near", "near_duplicate_score": 0.4, "num_negatives": 5, "select": Select(3)},
}


def inputs(dtype=torch.float32, broken=False):
    """Queries, corpus, positives and exclusions. broken: some queries and rows contain NaN or infinity."""
    q, c = unit(Q, D, dtype=dtype, seed=1), unit(K, D, dtype=dtype, seed=2)
    c[300:340] = c[:40]  # copies of rows on other ranks
    if broken:
        q[[3, 20, 39], 5] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
        c[[2, 30, 330, 403, 505]], c[[40, 250, 599], 7] = torch.nan, torch.inf
    return q, c, [[b, b + 400] for b in range(Q)], [[500 + b] for b in range(Q)]


def _refused(call):
    try:
        call()
    except (ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def rounds(own, group):
    """Return what three rounds pass to training, where this rank has the rows `own` of a corpus that changes in each round."""
    q, _, positives, exclude = inputs()
    call = {"num_negatives": 4, "keep_old": 3, "exclude": exclude, "process_group": group, "select": Select(1, 30)}
    seen = []
    mining_rounds(
        lambda r: (q, unit(K, D, seed=2 + r)[own]), lambda r, result: seen.append(result), positives, rounds=3, **call
    )
    return seen


def fails_in_a_scan(fails, *arguments, **options):
    """Mine. If `fails`, the scan of the second batch raises an unexpected exception."""
    run, calls = Scan.run, []

    def failing(self, *asked):
        calls.append(1)
        if fails and len(calls) == 2:
            raise MemoryError("no memory for the second batch")
        return run(self, *asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scan, "run", failing)
        return negmine.mine_hard_negatives(*arguments, batch_size=10, **options)


def work(rank, world, folder):
    group, results = dist.group.WORLD, {}
    for dtype in (torch.float32, torch.bfloat16):
        q, c, positives, exclude = inputs(dtype)
        own = c[CUTS[world][rank] : CUTS[world][rank + 1]]
        for name, options in RUNS.items():
            if dtype == torch.float32 or name in ("plain", "near"):
                got = negmine.mine_hard_negatives(
                    *(q, own, positives), exclude=exclude, process_group=group, batch_size=9 + rank, **options
                )
                results[name, dtype] = got
    results["rounds"] = rounds(slice(CUTS[world][rank], CUTS[world][rank + 1]), group)
    q, c, positives, exclude = inputs()
    own = c[CUTS[world][rank] : CUTS[world][rank + 1]]
    options = {"process_group": group, "resume_dir": f"{folder}/run", "batch_size": 8}
    results["resumed"] = negmine.mine_hard_negatives(q, own, positives, **options)
    dist.barrier()
    if rank == 0:
        for path in sorted((folder / "run").glob("queries-*"))[1:3]:
            path.unlink()
    dist.barrier()
    results["again"] = negmine.mine_hard_negatives(q, own, positives, **options)
    mine = negmine.mine_hard_negatives
    own_queries = q[QUERY_CUTS[world][rank] : QUERY_CUTS[world][rank + 1]]
    for name in ("fractions", "texts"):
        asked = {"process_group": group, "batch_size": 9} | RUNS[name]
        results["own queries", name] = mine(own_queries, own, positives, exclude=exclude, **asked)
    q, c, positives, exclude = inputs(broken=True)
    own_queries, broken = (
        rows[edges[world][rank] : edges[world][rank + 1]] for rows, edges in ((q, QUERY_CUTS), (c, CUTS))
    )
    with pytest.warns(UserWarning, match="contain NaN or infinity"):
        asked = {"process_group": group, "batch_size": 9} | RUNS["margins"]
        results["not finite"] = mine(own_queries, broken, positives, exclude=exclude, **asked)
    if world > 1:
        asked = {"process_group": group, "index": "exact"}
        results["in the middle"] = _refused(lambda: fails_in_a_scan(rank == world - 1, q, own, positives, **asked))
        wrong = unit(5, D + 1) if rank == 1 else own
        results["own refusal"] = _refused(lambda: mine(q, wrong, positives, process_group=group))
        results["other seed"] = _refused(lambda: mine(q, own, positives, seed=rank, process_group=group))
        options["resume_dir"] = f"{folder}/store" if rank == 0 else f"{folder}/run"  # a file instead of a folder
        results["no folder"] = _refused(lambda: mine(q, own, positives, **options))
    return results


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_mine_what_one_process_mines(world, tmp_path):
    got = run_ranks(work, world, tmp_path, tmp_path)
    q, c, positives, exclude = inputs()
    alone = negmine.mine_hard_negatives(q, c, positives)
    shared = {
        name: negmine.mine_hard_negatives(q, c, positives, exclude=exclude, **RUNS[name])
        for name in ("fractions", "texts")
    }
    q, c, positives, exclude = inputs(broken=True)
    with pytest.warns(UserWarning, match="contain NaN or infinity"):
        broken = negmine.mine_hard_negatives(q, c, positives, exclude=exclude, **RUNS["margins"])
    for rank in range(world):
        for dtype in (torch.float32, torch.bfloat16):
            q, c, positives, exclude = inputs(dtype)
            for name, options in RUNS.items():
                if (name, dtype) in got[rank]:
                    want = negmine.mine_hard_negatives(q, c, positives, exclude=exclude, **options)
                    assert (want.indices >= 0).any(), name
                    if name == "texts":
                        reasons = ("own_text", "equal_to_positive", "duplicate")
                        assert all(want.skipped[reason] > 0 for reason in reasons)
                    same_result(got[rank][name, dtype], want)
        for got_round, want_round in zip(got[rank]["rounds"], rounds(slice(None), None), strict=True):
            same_result(got_round, want_round)
        same_result(got[rank]["resumed"], alone)
        same_result(got[rank]["again"], alone)
        for name, want in shared.items():
            same_result(got[rank]["own queries", name], want)
            assert got[rank]["own queries", name].config == want.config
        same_result(got[rank]["not finite"], broken)
        assert got[rank]["not finite"].config == broken.config
        if world > 1:
            middle = got[rank]["in the middle"]
            failed = f"RuntimeError: mine_hard_negatives: rank {world - 1} failed, so every rank stops: MemoryError: no memory"
            assert middle.startswith("MemoryError: no memory for" if rank == world - 1 else failed), middle
            own = "ValueError: mine_hard_negatives: corpus_embeddings must be of query_embeddings' D = 20"
            others = "ValueError: mine_hard_negatives: rank 1 rejected its input, so every rank stops: " + own[:60]
            assert got[rank]["own refusal"].startswith(own if rank == 1 else others)
            assert "but rank 1 gives seed=1 and rank 0 seed=0" in got[rank]["other seed"]
            assert "resume_dir must be the path of a folder, got" in got[rank]["no folder"]
            assert ("rank 0 rejected its input, so every rank stops" in got[rank]["no folder"]) == (rank > 0)


def test_refusals():
    q, c, positives, _ = inputs()
    with pytest.raises(TypeError, match=r"process_group must be a process group of torch.distributed, such as"):
        negmine.mine_hard_negatives(q, c, positives, process_group="world")
    with pytest.raises(ValueError, match="index must be 'exact' if process_group is given, got 'Flat'"):
        negmine.mine_hard_negatives(q, c, positives, process_group="world", index="Flat")
