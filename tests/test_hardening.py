"""Long training runs: little memory, worker processes, large offsets, damaged checkpoints."""

import importlib.util
import mmap
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import negmine
from negmine import InfoNCELoss, Mix, MoCoQueue, Select
from negmine.ops import backends
from tests import soak
from tests.cases import unit

cpu = next(row for row in backends.BACKENDS if row.name == "cpu")
pytestmark = pytest.mark.skipif(bool(cpu.refusal), reason=cpu.refusal)

# argv: B, K, D, N, and the megabytes that may still be allocated after the threads have started.
STARVED = """
import resource, sys, torch
import negmine
from negmine import _C

B, K, D, N, more = map(int, sys.argv[1:])
negmine.mine_hardest(torch.randn(300, 8), torch.randn(3000, 8), 3, backend="cpu")
q, keys = torch.randn(B, D), torch.randn(K, D)
mapped = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (mapped + more * 2**20,) * 2)
calls = [
    lambda: negmine.mine_hardest(q, keys, N, backend="cpu"),
    lambda: negmine.info_nce(q.clone().requires_grad_(), q, keys, backend="cpu"),
    lambda: _C.mine_hardest(q.numpy(), keys.numpy(), N, threads=2),
]
for call in calls:
    try:
        call()
        print("done")
    except (RuntimeError, MemoryError) as error:
        print(type(error).__name__, error)
"""


def starved(*arguments):
    run = subprocess.run(
        [sys.executable, "-c", STARVED, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_an_output_that_does_not_fit_is_told_with_its_bytes():
    mined, loss, _ = starved(4096, 2000, 64, 1_000_000, 64)
    assert mined == "RuntimeError negmine: out of memory: an output of shape (4096, 1000000) takes 16384000000 bytes"
    assert loss == "done", "the process is as good as before"


def test_out_of_memory_errors_give_the_number_of_bytes():
    """The exception is thrown on a worker thread and caught by the caller."""
    D, lanes = 4_000_000, 64
    for said in starved(2, 2, D, 1, 300):
        found = re.match(r"MemoryError negmine: out of memory: a thread's working memory takes (\d+) bytes", said)
        assert found, said
        assert int(found[1]) >= 4 * D * lanes, said  # bytes of the queries; the rest depends on the instruction set


def test_memory_does_not_grow():
    assert soak.growth_mb(400) <= soak.LIMIT_MB


def test_the_soak_test_detects_a_leak():
    kept = []

    def leaking(step, layer, queue):
        pages = mmap.mmap(-1, 2**18, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # not reused by an allocator
        pages.write(b"x" * 2**18)
        kept.append(pages)  # 256 KiB per step

    assert soak.growth_mb(100, leaking) > soak.LIMIT_MB


class Hardest(Dataset):
    """A data set that mines in the worker processes of a data loader."""

    def __init__(self, keys):
        self.keys = keys

    def __len__(self):
        return 8

    def __getitem__(self, index):
        query = unit(3, self.keys.shape[1], seed=index)
        leaf = query.clone().requires_grad_()
        loss = negmine.info_nce(leaf, query, self.keys, mix=Mix(9, 5, 4), step=index, backend="cpu")
        return negmine.mine_hardest(query, self.keys, 5, backend="cpu").index, torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_data_loader_workers_mine(start):
    keys = unit(500, 12)
    negmine.mine_hardest(unit(300, 12), keys, 5, backend="cpu")  # starts the threads of the parent process
    data = Hardest(keys)
    loader = DataLoader(
        data, batch_size=2, num_workers=2 if start == "fork" else 1, multiprocessing_context=start, timeout=60
    )
    made = [torch.cat(column) for column in zip(*loader, strict=True)]
    want = [torch.stack(column) for column in zip(*(data[i] for i in range(8)), strict=True)]
    for got, single in zip(made, want, strict=True):
        assert torch.equal(got, single)


def available_gb():
    with open("/proc/meminfo") as info:
        return next(int(line.split()[1]) for line in info if line.startswith("MemAvailable")) / 2**20


@pytest.mark.slow
@pytest.mark.skipif(available_gb() < 8, reason="needs 8 GB of free memory")
def test_a_queue_of_more_than_two_to_the_31_elements():
    """bf16, K D = 2^31 + 32,768: rows before, at and after element 2^31 are found, read and differentiated."""
    D, K = 128, 2**24 + 256
    # Pages that are not written need no memory.
    keys = torch.from_numpy(np.zeros(K * D, dtype=np.int16)).view(torch.bfloat16).view(K, D)
    rows = torch.tensor([5, 2**23 + 1, 2**24 - 1, 2**24, K - 1])
    keys[rows] = unit(5, D).bfloat16()
    q = unit(5, D).flip(0)
    mined = negmine.mine_hardest(q, keys, 2, backend="cpu")
    assert torch.equal(mined.index[:, 0], rows.flip(0))
    leaf = q.clone().requires_grad_()
    loss = negmine.info_nce(leaf, q, keys, select=Select(min_score=0.5), backend="cpu")
    loss.backward()
    few = q.clone().requires_grad_()
    near = negmine.info_nce(few, q, keys[rows], select=Select(min_score=0.5), backend="cpu")
    near.backward()
    assert torch.equal(loss.detach(), near.detach()) and torch.equal(leaf.grad, few.grad)
    first = torch.eye(1, D)  # its scores are exactly a column of the keys
    column = torch.cat([keys[rows, 0].float(), torch.zeros(9)]).sort(descending=True).values
    place = negmine.rank_thresholds(first, keys, [0, 3], backend="cpu")[0]
    assert place.tolist() == column[[0, 3]].tolist()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"queue_ptr": torch.tensor([9])}, "queue_ptr must be an integer from 0 to 8"),
        ({"queue_ptr": torch.tensor([-1])}, "queue_ptr must be an integer"),
        ({"queue_len": torch.tensor([10])}, "queue_len must be an integer from 0 to 9"),
        ({"queue_len": torch.tensor([1, 2])}, "queue_len must be an integer"),
        ({"queue": torch.zeros(8, 4)}, "size mismatch for queue"),
        ({"queue_ids": torch.zeros(3, dtype=torch.long)}, "size mismatch for queue_ids"),
    ],
)
def test_a_damaged_checkpoint_is_refused(change, said, tmp_path):
    queue = MoCoQueue(4, 9, with_ids=True)
    torch.save(queue.state_dict() | change, tmp_path / "queue.pt")
    with pytest.raises(RuntimeError, match=said):
        queue.load_state_dict(torch.load(tmp_path / "queue.pt"))
    assert len(queue.enqueue(unit(3, 4)) or queue.keys) == 9


@pytest.mark.parametrize("step", [-1, 2**32, 1.5, [1, 2]])
def test_a_damaged_step_count_is_refused(step):
    loss = InfoNCELoss()
    with pytest.raises(RuntimeError, match="step must be a 0-d int64 tensor with a value in"):
        loss.load_state_dict({"step": torch.tensor(step)})
    assert loss.step == 0


def test_a_default_device_does_not_reach_the_host_side_of_mining():
    """torch.set_default_device("cuda") is common; tensors that mining keeps on the host must stay there."""
    corpus = unit(600, 16).numpy()
    queries, rows = corpus[:9], torch.arange(9)
    vectors = [unit(4, 8, seed=i) for i in range(3)]
    with torch.device("meta"):
        for options in (
            {"select": Select(0, 0.5, relative_margin=0.05), "sampling_strategy": "random"},
            {"sampling_strategy": "weighted", "deduplicate": "near", "select": Select(3, 90)},
            {"index": "Flat", "select": Select(0, 30)},
            {"query_texts": list("abcdefghi"), "corpus_texts": [f"{i}" for i in range(600)]},
        ):
            if "index" not in options or importlib.util.find_spec("faiss"):
                assert negmine.mine_hard_negatives(queries, corpus, rows, **options).num_valid.min() > 0
        negmine.hardness_report(queries, corpus, rows)
        negmine.info_nce(*vectors, mix=Mix(3, 3, 1, concentration=2.5))
