"""The ops computed by other packages. Like all variants, each is timed only if its results are correct.

    variants(op, inputs) -> {name: callable}      the packages that are installed here and can compute this op
    ABSENT                                        the packages that are missing, and why

Objects that a package needs to make only once, such as an index of the keys or a filled memory bank, are made here and not timed.
Search packages have no masks for each query. They are asked for a few more rows than N, and rows with the id of the query are
removed afterwards.
"""

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Inputs
from benchmarks.peers import (
    Answer,
    N,
    as_tokens,
    hardest_documents,
    in_batch,
    locked,
    loss_and_gradient,
    loss_by_attention,
)
from benchmarks.stand_ins import stand_ins

ABSENT: dict[str, str] = {}
FAISS_GPU_MOST = 2048  # largest number of neighbours in a search
PAIRS_LIMIT = 1 << 26  # entries of the (positives, negative pairs) table that one package builds


def first_line(error: Exception) -> str:
    """The first line of the message of an error, or the name of its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def load(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        ABSENT[module] = f"not installed: {first_line(error)}"
        return None


def on_gpu(inputs: Inputs) -> bool:
    return inputs.keys.is_cuda


def without_own_ids(scores: Any, index: Any, inputs: Inputs) -> Answer:
    """scores, index (B, N + more), sorted -> (B, N) each: the first N that do not have the id of the query."""
    if isinstance(index, np.ndarray):
        index = index.astype(np.int64)  # torch has no arithmetic for some unsigned types
    device = inputs.keys.device
    scores, found = torch.as_tensor(scores, device=device), torch.as_tensor(index, device=device).long()
    own = inputs.negative_ids[found] == inputs.query_ids[:, None]  # (B, N + more)
    first = own.byte().argsort(dim=1, stable=True)[:, :N]  # (B, N)
    return scores.gather(1, first), found.gather(1, first)


def num_requested(inputs: Inputs) -> int:
    """N plus the largest number of rows that have the id of one query, at most K."""
    shared = (inputs.query_ids[:, None] == inputs.negative_ids).sum(dim=1).max().item()
    return min(N + int(shared), len(inputs.keys))


def faiss_flat(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    if on_gpu(inputs):
        return None
    faiss = load("faiss")
    if faiss is None or inputs.keys.dtype != torch.float32:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(inputs.keys.shape[1])
    index.add(inputs.keys.numpy())
    query, k = inputs.query.numpy(), num_requested(inputs)
    return lambda _: without_own_ids(*index.search(query, k), inputs)


def usearch_exact(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    if on_gpu(inputs):
        return None
    usearch = load("usearch.index")
    if usearch is None or inputs.keys.dtype != torch.float32:
        return None
    query, keys, k = inputs.query.numpy(), inputs.keys.numpy(), num_requested(inputs)

    def run(_: Inputs) -> Answer:
        found = usearch.search(keys, query, k, usearch.MetricKind.IP, exact=True, threads=torch.get_num_threads())
        index = found.keys.reshape(len(query), -1)  # (B, k); its distance is 1 - inner product
        return without_own_ids(1 - found.distances.reshape(len(query), -1), index, inputs)

    return run


def faiss_gpu(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    """faiss.GpuIndexFlatIP with the keys in fp32, the dtype that it stores."""
    if not on_gpu(inputs):
        return None
    faiss = load("faiss")
    if faiss is None or load("faiss.contrib.torch_utils") is None:  # it makes faiss accept torch tensors
        return None
    if not hasattr(faiss, "GpuIndexFlatIP"):
        ABSENT["faiss"] = "this build has no GPU support"
        return None
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexFlatIP(resources, inputs.keys.shape[1])
    index.add(inputs.keys.float())
    query, k = inputs.query.float(), num_requested(inputs)
    if k > FAISS_GPU_MOST:
        ABSENT["faiss GPU"] = f"it finds {FAISS_GPU_MOST} at most, and {k} are wanted"
        return None
    return lambda _: without_own_ids(*index.search(query, k), inputs)


def cuvs_exact(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    """cuVS brute force with the keys in fp32 or fp16; it does not support bf16."""
    if not on_gpu(inputs):
        return None
    brute_force = load("cuvs.neighbors.brute_force")
    if brute_force is None:
        return None
    kind = torch.float16 if inputs.keys.dtype == torch.float16 else torch.float32
    index, query, k = (
        brute_force.build(inputs.keys.to(kind), "inner_product"),
        inputs.query.to(kind),
        num_requested(inputs),
    )
    return lambda _: without_own_ids(*brute_force.search(index, query, k), inputs)


def flash_knn(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    """FlashLib's exact search by squared distances, which are converted to scores."""
    if not on_gpu(inputs):
        return None
    flashlib = load("flashlib.primitives.knn")
    if flashlib is None:
        return None
    k = num_requested(inputs)

    def run(given: Inputs) -> Answer:
        distances, index = flashlib.flash_knn(given.query, given.keys, k)  # (B, k) each
        squares = given.query.float().square().sum(1)[:, None] + given.keys.float().square().sum(1)[index]  # (B, k)
        scores, order = ((squares - distances) / 2).sort(dim=1, descending=True)  # (B, k) each
        return without_own_ids(scores, index.gather(1, order), given)

    return run


def xformers_attention(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    if not on_gpu(inputs):
        return None
    fmha = load("xformers.ops.fmha")
    if fmha is None:
        return None

    def attend(query: torch.Tensor, keys: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        query, keys = query[None, :, None], keys[None, :, None]  # (1, B, 1, D), (1, K, 1, D)
        mean, lse = fmha.memory_efficient_attention_forward_requires_grad(query, keys, keys, scale=scale)
        return mean[0, :, 0], lse[0, 0, : query.shape[1]].float()  # it may pad rows

    return loss_by_attention(attend)


def flash_attention(inputs: Inputs, module: str, options: dict[str, Any]) -> Callable[[Inputs], Answer] | None:
    """A version of FlashAttention. The options make it return the log-sum-exp and choose the number of splits of the queue.

    No version supports fp32.
    """
    if not on_gpu(inputs):
        return None
    package = load(module)
    if package is None:
        return None

    def attend(query: torch.Tensor, keys: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        query, keys = query[None, :, None], keys[None, :, None]  # (1, B, 1, D), (1, K, 1, D)
        mean, lse, *_ = package.flash_attn_func(query, keys, keys, softmax_scale=scale, **options)
        return mean[0, :, 0], lse.flatten()  # of (1, 1, B)

    return loss_by_attention(attend)


def inf_cl_loss(inputs: Inputs, way: Callable[..., Answer]) -> Callable[[Inputs], Answer] | None:
    """Inf-CL's flash loss of the rows of the batch. D is divided into heads of at most 256 elements."""
    if not on_gpu(inputs):
        return None
    flash = load("inf_cl.flash")
    head = min(inputs.keys.shape[1], 256)
    if flash is None or inputs.keys.shape[1] % head:
        return None
    own, scale = torch.arange(len(inputs.query), device=inputs.query.device), 1 / inputs.temperature
    return lambda _: way(inputs, lambda query, keys: flash.cal_flash_loss(query, keys, own, scale, head).mean())


def memeff_lit(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    """memeff's LiT loss with the exact gradient (stable=False)."""
    if not on_gpu(inputs):
        return None
    memeff = load("memeff")
    if memeff is None:
        return None
    loss = memeff.MemoryEfficientLiTLoss(inputs.temperature, normalized_inputs=True, stable=False)
    return lambda _: locked(inputs, loss)


def metric_learning(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    """pytorch-metric-learning's NTXentLoss with a reference set and given pairs. It builds a (positives, pairs) table."""
    with stand_ins():  # it imports scipy and scikit-learn, which the loss does not use
        losses = load("pytorch_metric_learning.losses")
    B, K = len(inputs.query), len(inputs.keys)
    if losses is None or B * B * K > PAIRS_LIMIT or inputs.keys.dtype != torch.float32:
        return None
    device = inputs.keys.device
    own, negatives = torch.arange(B, device=device), torch.arange(B, B + K, device=device)  # (B,), (K,)
    pairs = (own, own, own.repeat_interleave(K), negatives.repeat(B))
    everything = torch.cat([inputs.positive_key, inputs.keys])  # (B + K, D)
    labels = torch.arange(B + K, device=device)
    loss = losses.NTXentLoss(temperature=inputs.temperature)
    return lambda _: loss_and_gradient(
        inputs, lambda query: loss(query, own, pairs, ref_emb=everything, ref_labels=labels)
    )


def lightly_bank(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    """lightly's NTXentLoss with a memory bank of the same keys. Each call copies the bank and enqueues, as in training."""
    with stand_ins():  # it imports torchvision, which the loss does not use
        losses = load("lightly.loss")
    if losses is None or inputs.keys.dtype != torch.float32:
        return None
    loss = losses.NTXentLoss(temperature=inputs.temperature, memory_bank_size=tuple(inputs.keys.shape))
    loss.memory_bank.bank = inputs.keys.clone()
    return lambda _: loss_and_gradient(inputs, lambda query: loss(query, inputs.positive_key))


def maxsim_cpu(inputs: Inputs) -> Callable[[Inputs], Answer] | None:
    """The scores of maxsim-cpu, one query at a time."""
    if on_gpu(inputs) or inputs.keys.dtype != torch.float32:
        return None
    package = load("maxsim_cpu")
    if package is None:
        return None
    tokens, _, documents = (each.numpy() for each in as_tokens(inputs, inputs.query))

    def run(_: Inputs) -> Answer:
        scores = np.stack([package.maxsim_scores(each, documents) for each in tokens])  # (B, K)
        return hardest_documents(torch.from_numpy(scores))

    return run


MAKERS: dict[str, dict[str, Callable[[Inputs], Callable[[Inputs], Answer] | None]]] = {
    "mine_hardest": {
        "FAISS IndexFlatIP": faiss_flat, "usearch exact": usearch_exact,
        "FAISS GpuIndexFlatIP": faiss_gpu, "cuVS brute force": cuvs_exact, "FlashLib": flash_knn,
    },
    "maxsim": {"maxsim-cpu": maxsim_cpu},
    "in_batch": {"Inf-CL": partial(inf_cl_loss, way=in_batch)},
    "locked": {"Inf-CL": partial(inf_cl_loss, way=locked), "memeff LiT": memeff_lit},
    "whole_queue": {
        "pytorch-metric-learning": metric_learning, "lightly": lightly_bank, "xformers attention": xformers_attention,
        "FlashAttention-2": partial(flash_attention, module="flash_attn", options={"return_attn_probs": True}),
        "FlashAttention-3": partial(
            flash_attention, module="flash_attn_interface", options={"return_attn_probs": True, "num_splits": 0}
        ),
        "FlashAttention-4": partial(flash_attention, module="flash_attn.cute", options={"return_lse": True}),
    },
}  # fmt: skip
# These use other streams or wait for the device, so they cannot be captured in a CUDA graph.
UNCAPTURED = ("FAISS GpuIndexFlatIP", "cuVS brute force")


def variants(op: str, inputs: Inputs) -> dict[str, Callable[[Inputs], Answer]]:
    """The packages that are installed and can compute this op for these inputs."""
    made = {}
    for name, make in MAKERS.get(op, {}).items():
        try:
            run = make(inputs)
        except Exception as error:  # one package that fails must not affect the others
            ABSENT[name] = first_line(error)
        else:
            made |= {} if run is None else {name: run}
    return made
