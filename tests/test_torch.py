"""The ops under torch's own tools: torch.compile(fullgraph=True), offsets past 2^31, autocast, loss scaling, copies,
dtypes, functorch, aliases, threads, fork, and the table of backends.

Autocast: vectors are not cast. A bf16 query from an autocast layer is scored with fp32 sums of bf16 values, the loss is fp32, and
the gradient of the query is bf16, as for every op of torch.
Fork: after a process has used several threads, a forked child hangs even in torch's own matrix product (GNU OpenMP). So a child
must set one thread, as the workers of a DataLoader do, or must be spawned.
"""

import copy
import multiprocessing
import pickle
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import negmine
from negmine import FalseNegatives, InfoNCELoss, Mix, MoCoQueue, Negatives, Select, Weight, recipes
from negmine.ops import backends
from tests.cases import DTYPES, ids, negatives, tags, unit
from tests.conftest import device_of

cpu = next(row for row in backends.BACKENDS if row.name == "cpu")
needs_cpu = pytest.mark.skipif(bool(cpu.refusal), reason=cpu.refusal)
B, K, D = 6, 90, 12


@pytest.fixture(autouse=True)
def _cold_compiler():
    torch._dynamo.reset()


def cpp_ops():
    if cpu.refusal:
        pytest.skip(cpu.refusal)
    return cpu.functions


WITH_ANY_SHAPE = [
    {},
    {"select": Select(0.01, 0.5)},
    {"mix": Mix(6, 5, 4, concentration=2.0)},
    {"weight": Weight(1.0, 0.01)},
]
WITH_ONE_SHAPE = [
    {"select": Select(1, 9, sample=5, replace=True)},
    {"select": Select(1, 3)},
    {"decoupled": True},
    {"mix": Mix(6, 5, 4, detach=False)},
    {"false_negatives": FalseNegatives(None, 0.1), "support": unit(B, 2, D, seed=7)},
]


@pytest.mark.parametrize(
    "options, dynamic",
    [(o, True) for o in WITH_ANY_SHAPE] + [(o, False) for o in WITH_ONE_SHAPE],
    ids=lambda v: ",".join(v) or "plain" if isinstance(v, dict) else "dynamic" if v else "static",
)
def test_a_loss_step_compiles_into_one_graph(options, dynamic):
    cpp_ops()
    given = ids(B, K)

    def step(q, pos, keys):
        return negmine.info_nce(q, pos, negatives(keys, given), **options, **tags(given))

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = unit(B, D), unit(B, D, seed=1), unit(K, D, seed=2)
    results = []
    for function in (step, compiled):
        q = inputs[0].clone().requires_grad_()
        loss = function(q, *inputs[1:])
        loss.backward()
        results.append((loss.detach(), q.grad))
    torch.testing.assert_close(results[1], results[0])


COMPILED_WITH_A_QUEUE = [
    {},
    {"select": Select(0.01, 0.5)},
    {"mix": Mix(6, 5, 4)},
    {"weight": Weight(1.0, 0.01)},
    {"select": Select(0.0, 0.5, sample=5)},
    {"false_negatives": FalseNegatives(3, 0.1), "support": unit(B, 2, D, seed=7)},
]


@pytest.mark.parametrize(
    "backend, options",
    [(None, o) for o in COMPILED_WITH_A_QUEUE] + [("reference", COMPILED_WITH_A_QUEUE[-1])],
    ids=lambda v: ",".join(v) or "plain" if isinstance(v, dict) else str(v),
)
def test_a_training_step_with_a_queue_compiles_into_one_graph(options, backend):
    """Loss and enqueue are one graph over many steps, while the queue grows, fills and wraps around. The step is a tensor."""
    if backend is None:
        cpp_ops()
    queue = MoCoQueue(D, 20, with_ids=True, random_init=False)
    twin = copy.deepcopy(queue)
    own = torch.arange(B) % 4

    def train(queue, q, pos, step):
        loss = negmine.info_nce(q, pos, queue, **options, query_ids=own, step=step, backend=backend)
        queue.enqueue(pos, ids=own)
        return loss

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    for number in range(6):
        step = torch.tensor(number)
        leaves = [unit(B, D, seed=number).requires_grad_() for _ in range(2)]
        pos = unit(B, D, seed=100 + number)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            got = compiled(queue, leaves[0], pos, step)
        want = train(twin, leaves[1], pos, step)
        got.backward()
        want.backward()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        for name, buffer in queue.named_buffers():
            assert torch.equal(buffer, twin.get_buffer(name)), name
    assert len(queue) == 20


@pytest.mark.parametrize("form", ["own keys", "in batch", "mask", "queue with labels"])
def test_every_form_of_negatives_compiles_into_one_graph(form):
    cpp_ops()
    labels, queue = torch.arange(B) % 3, MoCoQueue(D, K, with_labels=True)

    def step(q, pos, keys):
        if form == "own keys":
            return negmine.info_nce(q, pos, keys[: 5 * B].view(B, 5, D), select=Select(0, 3))
        if form == "in batch":
            return negmine.info_nce(q, pos, None, query_labels=labels)
        if form == "mask":
            return negmine.info_nce(q, pos, Negatives(keys, mask=keys[:, 0] > 0))
        return negmine.info_nce(q, pos, Negatives(queue, mask=keys[:, 0] > 0), query_labels=labels)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        leaves = [unit(n, D, seed=i).requires_grad_() for i, n in enumerate((B, B, K))]
        loss = function(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)])
    torch.testing.assert_close(results[1], results[0])


def test_mining_compiles_into_one_graph():
    cpp_ops()
    q, keys = unit(B, D), unit(K, D, seed=1)
    compiled = torch.compile(lambda q, keys: negmine.mine_hardest(q, keys, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, keys).index, negmine.mine_hardest(q, keys, 4).index)


def test_offsets_past_two_to_the_31(backend):
    """Rows are 2^28 elements apart, so row 8 starts at element 2^31. Only the memory pages of the rows are used."""
    if device_of(backend) != "cpu":
        storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device_of(backend))
    else:
        storage = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.float16))
    far = storage.as_strided((9, 8), (2**28, 1))
    near = unit(9, 8, dtype=torch.float16, device=storage.device)
    far.copy_(near)
    q, pos = (unit(3, 8, device=storage.device, seed=s) for s in (1, 2))
    for keys in (far, near):
        q.grad = None
        leaf = q.clone().requires_grad_()
        loss = negmine.info_nce(leaf, pos, keys, mix=Mix(3, 4, 2), backend=backend)
        loss.backward()
        mined = negmine.mine_hardest(q, keys, 9, backend=backend)
        if keys is far:
            want = loss.detach(), leaf.grad, mined
    # A kernel compiled for another row stride may add in another order, so results are not bit-identical.
    torch.testing.assert_close(want[0], loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(want[1], leaf.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(want[2].index, mined.index)


def test_every_backend_has_functions_or_a_reason():
    rows = {row.name: row for row in backends.BACKENDS}
    for name, row in rows.items():
        assert name == "reference" or bool(row.functions) != bool(row.refusal)
        assert set(row.functions) <= set(backends.OPS)
    if rows["cuda"].refusal:
        with pytest.raises(backends.BackendUnavailable, match="takes cuda tensors"):
            negmine.mine_hardest(unit(2, 4), unit(5, 4), 2, backend="cuda")


def test_a_gpu_call_on_the_reference_warns_once(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match="stores the score matrix"):
        backends._warn_dense("info_nce", "cuda", "float64 input")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends._warn_dense("info_nce", "cuda", "float64 input")
        backends._warn_dense("info_nce", "cpu", "float64 input")


OPTIONS = [{}, {"select": Select(0.02, 0.4)}, {"mix": Mix(8, 6, 4, concentration=2.0)}, {"weight": Weight(1.0, 0.001)}]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")


def inputs():
    return [unit(n, D, seed=i) for i, n in enumerate((B, B, K))]


def loss_and_grad(q, *keys, **options):
    leaf = q.clone().requires_grad_()
    loss = negmine.info_nce(leaf, *keys, backend="cpu", **options)
    return loss.detach(), *torch.autograd.grad(loss, leaf)


@needs_cpu
@each_option
def test_autocast_casts_nothing_here(options):
    x, pos, keys = inputs()
    layer = nn.Linear(D, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = layer(x)
        q.retain_grad()
        loss = negmine.info_nce(q, pos, keys, **options, backend="cpu")
    loss.backward()
    assert q.dtype == torch.bfloat16 == q.grad.dtype and loss.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32 and bool(layer.weight.grad.abs().sum() > 0)
    want, grad = loss_and_grad(q.detach(), pos, keys, **options)
    assert torch.equal(loss.detach(), want) and torch.equal(q.grad, grad)
    exact = q.detach().double(), pos.double(), keys.double()
    if "mix" not in options:  # parents of mixes would differ
        torch.testing.assert_close(want.double(), negmine.info_nce(*exact, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_mining_under_autocast_is_mining(backend):
    q, _, keys = inputs()
    want = negmine.mine_hardest(q, keys, 9, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = negmine.mine_hardest(q, keys, 9, backend=backend)
    assert torch.equal(got.scores, want.scores) and torch.equal(got.index, want.index)


def test_what_is_scored_outside_kernels_keeps_its_products_under_autocast():
    q, pos, keys = inputs()
    found = {"false_negatives": negmine.FalseNegatives(3, 0.1), "support": pos[:, None]}
    for options in ({"mix": Mix(4, 3, 2, detach=False)}, {"select": Select(0, 0.5, sample=5)}, found):
        want = negmine.info_nce(q, pos, keys, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(negmine.info_nce(q, pos, keys, **options), want)


@needs_cpu
@each_option
def test_a_scaled_loss_scales_its_gradient(options):
    """As with GradScaler: powers of two do not change the bits of an fp32 gradient, and preserve small fp16 gradients."""
    q, pos, keys = inputs()
    for scale in (2.0**16, 2.0**-16):
        leaf = q.clone().requires_grad_()
        (negmine.info_nce(leaf, pos, keys, **options, backend="cpu") * scale).backward()
        torch.testing.assert_close(leaf.grad / scale, loss_and_grad(q, pos, keys, **options)[1], rtol=1e-6, atol=1e-9)
    half = unit(1, D).half()
    unscaled = loss_and_grad(half, half, -half.repeat(5, 1), temperature=0.1)[1]
    leaf = half.clone().requires_grad_()
    (negmine.info_nce(leaf, half, -half.repeat(5, 1), temperature=0.1, backend="cpu") * 2.0**16).backward()
    exact = half.double().requires_grad_()
    negmine.info_nce(exact, half.double(), -half.double().repeat(5, 1), temperature=0.1).backward()
    assert float(unscaled.abs().max()) < 1e-6  # below the smallest normal number of fp16
    torch.testing.assert_close(leaf.grad.double() / 2.0**16, exact.grad, rtol=2e-3, atol=1e-9)


def same_losses(module, twin):
    tensors = inputs()
    for _ in range(3):  # the step counts in both
        assert torch.equal(module(*tensors), twin(*tensors))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copied_loss_continues_with_the_same_values(make):
    learned = nn.Parameter(torch.tensor(0.2))
    for loss in (InfoNCELoss(learned, mix=Mix(8, 6, 4, concentration=2.0)), recipes.hardest(0.3), recipes.hcl()):
        loss(*inputs())
        same_losses(loss, make(loss))
    twin = make(InfoNCELoss(learned))
    assert twin.temperature is not learned and [name for name, _ in twin.named_parameters()] == ["temperature"]


def test_a_loaded_loss_continues_with_the_same_values():
    loss, twin = (InfoNCELoss(0.1, mix=Mix(8, 6, 4)) for _ in range(2))
    loss(*inputs())
    twin.load_state_dict(loss.state_dict())
    same_losses(loss, twin)


@pytest.mark.parametrize("stored", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("loaded", DTYPES, ids=str)
def test_queue_state_across_dtypes(stored, loaded):
    queue, other = MoCoQueue(D, 9, dtype=stored, with_ids=True), MoCoQueue(D, 9, dtype=loaded, with_ids=True)
    queue.enqueue(unit(5, D), ids=torch.arange(5))
    other.load_state_dict(queue.state_dict())
    assert other.queue.dtype == loaded and torch.equal(other.queue, queue.queue.to(loaded))
    assert torch.equal(other.ids, queue.ids) and torch.equal(other.queue_ptr, queue.queue_ptr)
    cast = copy.deepcopy(queue).to(loaded)
    assert cast.keys.dtype == loaded and cast.queue_ptr.dtype == cast.queue_ids.dtype == torch.int64
    cast.enqueue(unit(6, D), ids=torch.arange(6))
    assert int(cast.queue_ptr) == 2


@needs_cpu
def test_functorch_is_refused_or_right():
    """The fused loss supports backward(); for functorch transforms, torch raises an error. The reference supports them."""
    q, pos, keys = inputs()

    def fused(q):
        return negmine.info_nce(q, pos, keys, backend="cpu")

    def dense(q):
        return negmine.info_nce(q, pos, keys, backend="reference")

    for transform in (torch.func.grad, torch.vmap, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="do not support the transforms"):
            transform(fused)(q[None] if transform is torch.vmap else q)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        fused(torch.autograd.forward_ad.make_dual(q, q))
    torch.testing.assert_close(torch.func.grad(dense)(q), loss_and_grad(q, pos, keys)[1], rtol=1e-5, atol=1e-6)


@needs_cpu
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_mining_is_a_loop():
    q, _, keys = inputs()
    both = torch.vmap(lambda q: negmine.mine_hardest(q, keys, 4, backend="cpu").index)(torch.stack([q, q.flip(0)]))
    for got, one in zip(both, (q, q.flip(0)), strict=True):
        assert torch.equal(got, negmine.mine_hardest(one, keys, 4, backend="cpu").index)


@needs_cpu
@each_option
def test_deterministic_algorithms_cause_no_warning(options, recwarn):
    torch.use_deterministic_algorithms(True)
    tensors = inputs()
    first, second = (loss_and_grad(*tensors, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not [w for w in recwarn if "deterministic" in str(w.message)]


class Wanted(TorchDispatchMode):
    """Records which want_... arguments of the ops called inside were True."""

    def __init__(self):
        super().__init__()
        self.calls, self.wanted = 0, []

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        if op.namespace.startswith("negmine"):
            self.calls += 1
            names = [argument.name for argument in op._schema.arguments]
            given = dict(zip(names, arguments, strict=False)) | (options or {})
            self.wanted += [
                f"{op}: {name}" for name, value in given.items() if name.startswith("want_") and value is True
            ]
        return op(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "loss",
    [
        negmine.info_nce,
        partial(negmine.info_nce, weight=Weight(1.0, 0.01)),
        partial(negmine.info_nce, mix=Mix(6, 5, 4)),
        negmine.siglip,
        partial(negmine.info_nce, select=Select(0.02, 0.4)),
        partial(negmine.sup_con, positives="in"),  # the scores of positives are computed as for "out"
        partial(negmine.losses.matryoshka, widths=(4, 8)),
    ],
    ids=["plain", "weight", "mix", "siglip", "select", "sup_con", "matryoshka"],
)
@pytest.mark.parametrize("enabled", [False, True])
def test_a_loss_without_gradients_asks_for_none(loss, enabled):
    query, positive, keys = (unit(n, 8, seed=i).requires_grad_() for i, n in enumerate((6, 6, 20)))
    tags = torch.arange(6) // 2
    given = (query, positive, tags, tags) if "sup_con" in str(loss) else (query, positive, keys)
    with torch.set_grad_enabled(enabled), Wanted() as seen:
        loss(*given)
    assert seen.calls
    assert bool(seen.wanted) is enabled


@needs_cpu
@each_option
def test_inference_mode(options):
    tensors = inputs()
    with torch.inference_mode():
        inside = negmine.info_nce(*tensors, **options, backend="cpu")
    assert torch.equal(inside, negmine.info_nce(*tensors, **options, backend="cpu"))


@needs_cpu
@each_option
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_tensor_in_every_place(options, dtype):
    """In-batch negatives where query, positive and negatives are the same tensor, which requires a gradient."""
    x = unit(20, D).to(dtype)
    own = torch.arange(20)
    options = {"temperature": 0.3, "query_ids": own, **options}
    grads = []
    for cast, backend in ((dtype, "cpu"), (torch.float64, "reference")):
        leaf = x.to(cast).clone().requires_grad_()
        negmine.info_nce(leaf, leaf, Negatives(leaf, ids=own), **options, reduction="sum", backend=backend).backward()
        grads.append(leaf.grad.double())
    eps = torch.finfo(dtype).eps
    # Three terms of size 1 / T are rounded to the storage dtype and added.
    torch.testing.assert_close(*grads, rtol=4 * eps, atol=16 * eps / 0.3)
    detached = x.clone().requires_grad_()
    keys = Negatives(x, ids=own)
    negmine.info_nce(detached, x, keys, **options, backend="cpu").backward()
    assert torch.equal(detached.grad, loss_and_grad(x, x, keys, **options)[1])


@needs_cpu
def test_inputs_are_left_as_they_are():
    q, pos, keys = inputs()
    given = {**ids(B, K), "negative_mask": torch.rand(B, K) < 0.8}
    before = [t.clone() for t in (q, pos, keys, *given.values())]
    for options in OPTIONS:
        loss_and_grad(q, pos, negatives(keys, given), **options, **tags(given))
    for a, b in zip((q, pos, keys, *given.values()), before, strict=True):
        assert torch.equal(a, b)


@needs_cpu
def test_two_python_threads_get_the_same_bits():
    q, pos, keys = unit(70, 24), unit(70, 24, seed=1), unit(3000, 24, seed=2)

    def work():
        return [
            *loss_and_grad(q, pos, keys, select=Select(3, 0.2), mix=Mix(9, 8, 7)),
            *negmine.mine_hardest(q, keys, 100, backend="cpu"),
            negmine.quantile(q, keys, [0.5, 0.95], backend="cpu"),
        ]

    want, got = work(), {}

    def run(name):
        got[name] = [work() for _ in range(8)]

    threads = [threading.Thread(target=run, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in got.values():
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, want, strict=True))
    assert len(got) == 3


def _forked(out):
    torch.set_num_threads(1)
    out.put([t.tolist() for t in loss_and_grad(*inputs(), **OPTIONS[2])])


@needs_cpu
def test_a_forked_child_with_one_thread_works():
    loss_and_grad(unit(70, D), unit(70, D), unit(20_000, D))  # starts the threads of the parent
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    child = context.Process(target=_forked, args=(out,), daemon=True)
    child.start()
    child.join(30)
    assert child.exitcode == 0, "the child hangs or died"
    assert out.get() == [t.tolist() for t in loss_and_grad(*inputs(), **OPTIONS[2])]


def test_layouts_that_are_not_dense_are_refused():
    q, pos, keys = inputs()
    with pytest.raises(TypeError, match="query must be a dense tensor, got a tensor of layout torch"):
        negmine.info_nce(q.to_sparse(), pos, keys)
    for layout in (torch.jagged, torch.strided):
        with pytest.raises(TypeError, match="negative_keys must be a dense tensor"):
            negmine.info_nce(q, pos, torch.nested.nested_tensor([keys[:4], keys[4:]], layout=layout))


def test_samples_followed_mixes_and_support_views_differentiate():
    q, pos, keys = inputs()
    for options in ({"select": Select(sample=5)}, {"mix": Mix(4, 3, 2, detach=False)}):
        leaf = q.clone().requires_grad_()
        negmine.info_nce(leaf, pos, keys, **options).backward()
        assert bool(leaf.grad.isfinite().all())
    loss = negmine.info_nce(q, pos, keys, false_negatives=FalseNegatives(3, 0.1), support=q[:, None])
    assert bool(loss.isfinite())
