"""engine="ray" on a local Ray gives the same bits as one process, with empty shards or if a worker or the driver is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import negmine
from negmine.mining.decoding import DecodedRows
from negmine.mining.ray_executor import RayExecutor, ShardActor
from tests.compare import same_result
from tests.test_mining_parts import JOBS
from tests.test_mining_ranks import inputs
from tests.test_mining_rounds import rounds_of_halves

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    where = {"PYTHONPATH": str(ROOT)}
    ray.init("local", num_cpus=2, log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": where})
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The rows of test_mining_ranks as three .npy files, the second without rows, and an array."""
    folder, rows = tmp_path_factory.mktemp("shards"), inputs()[1].numpy()
    for name, begin, end in (("a", 0, 37), ("b", 37, 37), ("c", 37, 400)):
        np.save(folder / f"{name}.npy", rows[begin:end])
    return [folder / "a.npy", folder / "b.npy", folder / "c.npy", rows[400:]]


@pytest.mark.parametrize("name", ["fractions", "near", "exact", "texts"])
def test_actors_mine_what_one_process_mines(name, cluster, shards):
    q, c, positives, exclude = inputs()
    want = negmine.mine_hard_negatives(q, c, positives, exclude=exclude, **JOBS[name])
    given = (shards, {"num_actors": 2}) if name != "texts" else (c, {"num_actors": 2, "num_cpus": 0.5})
    got = negmine.mine_hard_negatives(
        *(q, given[0], positives), exclude=exclude, engine="ray", engine_options=given[1], batch_size=17, **JOBS[name]
    )
    same_result(got, want)
    assert got.config == want.config


def test_actors_embed_the_shards_of_each_round(cluster):
    rounds_of_halves(engine="ray", engine_options={"num_cpus": 0.5})


def test_a_killed_worker_is_started_again(cluster, shards, monkeypatch):
    q, c, positives, _ = inputs()
    want = negmine.mine_hard_negatives(q, c, positives)
    execute, scans = RayExecutor.execute, []

    def killing(self, plan, phase, query):
        scans.extend([phase] * (phase.name == "scan"))
        if len(scans) == 2:
            os.kill(cluster.get(self._actors[1].__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        return execute(self, plan, phase, query)

    monkeypatch.setattr(RayExecutor, "execute", killing)
    same_result(negmine.mine_hard_negatives(q, [*shards[:2], c[37:]], positives, engine="ray", batch_size=10), want)
    assert len(scans) == 4


def test_actors_share_files_of_parquet_and_lance_that_they_read_where_they_lie(cluster, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    q, c, positives, _ = inputs()
    rows = c.numpy()
    table = arrow.table({"v": arrow.FixedSizeListArray.from_arrays(arrow.array(rows.reshape(-1)), rows.shape[1])})
    parquet.write_table(table.slice(0, 500), tmp_path / "a.parquet", row_group_size=41)
    parquet.write_table(table.slice(500, 3), tmp_path / "b.parquet")
    corpora = [[tmp_path / "a.parquet", f"{tmp_path}/b.parquet::v", rows[503:]]]
    try:
        import lance

        lance.write_dataset(table, str(tmp_path / "c.lance"), max_rows_per_file=130)
        corpora.append([tmp_path / "c.lance"])
    except ImportError:
        pass
    want = negmine.mine_hard_negatives(q, c, positives)
    for corpus in corpora:
        options = {"num_actors": 4, "num_cpus": 0.25}
        same_result(negmine.mine_hard_negatives(q, corpus, positives, engine="ray", engine_options=options), want)


def test_an_actor_decodes_its_own_row_groups(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(np.arange(400, dtype=np.float32)), 2)
    parquet.write_table(arrow.table({"v": lists}), tmp_path / "a.parquet", row_group_size=30)
    groups, decode = [], DecodedRows._decode
    monkeypatch.setattr(DecodedRows, "_decode", lambda self, group: groups.append(group) or decode(self, group))
    rows = ShardActor()._open("op", [(str(tmp_path / "a.parquet"), 65, 120)])
    assert groups == [2, 3] and rows.block(0, 55, torch.device("cpu"))[:, 0].tolist() == list(range(130, 240, 2))


LOST_NODE = """
import ray, negmine
from ray.cluster_utils import Cluster
from negmine.mining.ray_executor import RayExecutor
from tests.compare import same_result
from tests.test_mining_ranks import inputs
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1, resources={"shards": 1}) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
q, c, positives, _ = inputs()
want = negmine.mine_hard_negatives(q, c, positives)
execute, scans = RayExecutor.execute, []

def losing(self, plan, phase, query):
    scans.extend([phase] * (phase.name == "scan"))
    if phase.name == "scan" and len(scans) == 2:
        references = [each.mine.remote(shard, 9, plan, phase, query) for each, shard in zip(self._actors, self._shards)]
        ray.wait(references, num_returns=len(references))  # their parts lie on the nodes of the actors
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.add_node(num_cpus=1, resources={"shards": 1})
        assert len(ray.get(references)) == 2  # made again
    return execute(self, plan, phase, query)

RayExecutor.execute = losing
options = {"num_actors": 2, "resources": {"shards": 1}}
got = negmine.mine_hard_negatives(q, c, positives, engine="ray", engine_options=options, batch_size=10)
same_result(got, want)
assert len(scans) == 4
ray.shutdown()
cluster.shutdown()
print("the same")
"""


def test_a_lost_node_is_replaced_by_another(tmp_path):
    pytest.importorskip("ray")
    command = [sys.executable, "-c", LOST_NODE]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("the same\n"), done.stderr[-3000:]


DRIVER = """
import os, signal, sys
import ray, negmine
from negmine.mining.resume import RunState
from tests.test_mining_ranks import inputs
ray.init(address=sys.argv[1], log_to_driver=False)
record = RunState.record
def killed(self, begin, *batch):
    if begin == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, begin, *batch)
RunState.record = killed
q, c, positives, _ = inputs()
negmine.mine_hard_negatives(q, c, positives, engine="ray", resume_dir=sys.argv[2], batch_size=10)
"""


def test_a_killed_driver_is_resumed(cluster, tmp_path):
    q, c, positives, _ = inputs()
    address = cluster.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, address, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert len(list(tmp_path.glob("queries-*"))) == 2
    resumed = negmine.mine_hard_negatives(q, c, positives, resume_dir=tmp_path)  # on another engine, too
    same_result(resumed, negmine.mine_hard_negatives(q, c, positives))


def test_errors_of_actors_keep_their_message(cluster, shards, tmp_path):
    q, _, positives, _ = inputs()
    (tmp_path / "x.npy").write_bytes(b"no array")
    np.save(tmp_path / "narrow.npy", np.ones((3, 4), np.float32))
    for said, corpus, options in (
        ("corpus_embeddings\\[0\\] must be a complete .npy file, got .*x.npy", [tmp_path / "x.npy"], {}),
        ("corpus_embeddings must be of the D and dtype of the first shard", [shards[0], tmp_path / "narrow.npy"], {}),
        ("engine_options must be a dict with keys among num_actors, num_cpus, .*, got 'cpus'", shards, {"cpus": 1}),
    ):
        with pytest.raises((ValueError, RuntimeError), match=f"^mine_hard_negatives: {said}"):
            negmine.mine_hard_negatives(q, corpus, positives, engine="ray", engine_options=options)


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"^mine_hard_negatives: engine 'ray' needs .*pip install negmine\[ray\]"):
        negmine.mine_hard_negatives(*inputs()[:3], engine="ray")
