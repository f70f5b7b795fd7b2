"""grad_cache: a training step with a large batch that needs the memory of a small batch (gradient caching)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from negmine.ops import checks
from negmine.ops.vectors import disable_autocast

OP = "grad_cache"


def grad_cache(
    loss: Callable[..., Any],
    encoders: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
    inputs: Sequence[Any],
    chunk_size: int,
    *,
    backward: Callable[[Tensor], Any] | None = None,
) -> Any:
    """The loss of a large batch and its gradients, while only the activations of one chunk are in memory.

        1. embeddings = encoder(chunk) for every chunk, without gradients; the random state before each chunk is saved
        2. loss(*embeddings) for the whole batch, and its gradient with respect to the embeddings
        3. encoder(chunk) again for every chunk, from the saved random state, and backward with the gradient of step 2

    Loss and gradients equal those of one step that keeps the activations of all chunks. The cost is a second forward pass.
    Gradients are added to the ``.grad`` of the parameters, as ``loss.backward()`` does.

    Parameters
    ----------
    loss : callable
        Called once as ``loss(*embeddings)``, with one tensor for each element of `inputs`. It returns a 0-d tensor, or a
        tuple whose first element is one. It may be any loss of this package, also with `gather_distributed`. Arguments that
        need no gradient, such as a queue, can be bound with a lambda or functools.partial.
    encoders : callable or sequence of callables
        One encoder for all inputs, or one for each. An encoder returns a floating tensor (n, ...) for n rows.
    inputs : sequence
        The inputs of the encoders: tensors (B, ...) or lists of B items. A tuple or a mapping of these is passed as several
        positional or keyword arguments; its other values are passed unchanged. B may differ between inputs.
    chunk_size : int
        The number of rows in a chunk.
    backward : callable, optional
        Called once with the 0-d loss. The default calls ``loss.backward()``. For a GradScaler pass ``lambda loss:
        scaler.scale(loss).backward()``.

    Returns
    -------
    Any
        The result of `loss`, in which the loss is detached. If gradients are disabled, `loss` is only evaluated.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid, or if an encoder or `loss` returns something else than described above.

    Notes
    -----
    Dropout is the same in steps 1 and 3, because the random states of the CPU, of the current GPU and of the GPUs of the
    chunk's tensors are restored.

    Layers that use statistics of the batch, such as BatchNorm, use those of a chunk, and update their running statistics
    twice.

    Call this function inside of autocast if you would call the encoders and the loss inside of it.

    A DistributedDataParallel encoder synchronises its gradients once, at its last chunk. If a parameter is not used in that
    chunk, set ``find_unused_parameters=True``. If encoders have buffers, all ranks must have the same number of chunks.

    References
    ----------
    Gao et al. 2021 (arXiv 2101.06983; luyug/GradCache).

    Examples
    --------
    >>> encoder, images, texts = torch.nn.Linear(32, 16), torch.randn(64, 32), torch.randn(64, 32)
    >>> loss = negmine.losses.grad_cache(negmine.info_nce, encoder, [images, texts], chunk_size=16)
    >>> encoder.weight.grad.shape
    torch.Size([16, 32])
    """
    each = _encoders(encoders, inputs)
    checks.require_count(OP, "chunk_size", chunk_size)
    counts = [_count_rows(f"inputs[{place}]", given) for place, given in enumerate(inputs)]
    parts = [
        [slice(start, min(start + chunk_size, count)) for start in range(0, count, chunk_size)] for count in counts
    ]
    states: list[list[tuple]] = []
    embeddings = []
    with torch.no_grad():
        for place, (encoder, given) in enumerate(zip(each, inputs, strict=True)):
            chunks = [_rows_of(given, part) for part in parts[place]]
            states.append([])
            chunk_embeddings = []
            for chunk, part in zip(chunks, parts[place], strict=True):
                states[-1].append(_random_state(chunk))
                chunk_embeddings.append(_embedding(place, _called(encoder, chunk), part))
            embeddings.append(torch.cat(chunk_embeddings))
    torch.clear_autocast_cache()  # it has weights that were cast while gradients were disabled
    if not torch.is_grad_enabled():
        return loss(*embeddings)
    leaves = [embedding.requires_grad_() for embedding in embeddings]
    result = loss(*leaves)
    value = result[0] if isinstance(result, tuple) else result
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise checks.refuse(OP, "what loss returns", "a 0-d tensor, or a tuple that begins with one", value, TypeError)
    with disable_autocast(value.device):
        value.backward() if backward is None else backward(value)
    remaining = {
        id(encoder): sum(len(parts[at]) for at, other in enumerate(each) if other is encoder) for encoder in each
    }
    for place, encoder in enumerate(each):
        gradient = leaves[place].grad
        for part, state in zip(parts[place], states[place], strict=True):
            remaining[id(encoder)] -= 1
            no_sync = getattr(encoder, "no_sync", nullcontext) if remaining[id(encoder)] else nullcontext
            with no_sync():
                _replay(encoder, _rows_of(inputs[place], part), state, None if gradient is None else gradient[part])
    if isinstance(result, tuple):
        others = result[1:]
        detached = value.detach()
        return type(result)(detached, *others) if hasattr(result, "_fields") else (detached, *others)
    return value.detach()


def _replay(encoder: Callable[..., Tensor], chunk: Any, state: tuple, gradient: Tensor | None) -> None:
    """Encode a chunk again with its saved random state, now with gradients, and run its backward pass."""
    cpu, on_gpus = state
    with torch.random.fork_rng(list(on_gpus)):
        torch.set_rng_state(cpu)
        for gpu, on_gpu in on_gpus.items():
            torch.cuda.set_rng_state(on_gpu, gpu)
        embedding = _called(encoder, chunk)
    if embedding.requires_grad:
        with disable_autocast(embedding.device):
            # An embedding that the loss does not use gets zeros, because DistributedDataParallel waits for every parameter.
            embedding.backward(torch.zeros_like(embedding) if gradient is None else gradient)


def _encoders(encoders: Any, inputs: Any) -> list[Callable[..., Tensor]]:
    if not isinstance(inputs, (list, tuple)) or not inputs:
        raise checks.refuse(OP, "inputs", "a list or tuple of at least one input", checks.kind_of(inputs))
    each = list(encoders) if isinstance(encoders, (list, tuple)) else [encoders] * len(inputs)
    if len(each) != len(inputs) or not all(callable(encoder) for encoder in each):
        wanted = f"a callable, or one for each of the {len(inputs)} inputs"
        raise checks.refuse(
            OP, "encoders", wanted, checks.Phrase(", ".join(map(checks.kind_of, each)) or "none"), TypeError
        )
    return each


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)


def _arguments(given: Any) -> Iterator[Any]:
    """The arguments that an input passes to its encoder."""
    yield from given.values() if isinstance(given, Mapping) else given if isinstance(given, tuple) else (given,)


def _random_state(chunk: Any) -> tuple[Tensor, dict[int, Tensor]]:
    """The random states of the CPU, of the current GPU, and of the GPUs of the chunk's tensors."""
    gpus = {value.device.index for value in _arguments(chunk) if isinstance(value, Tensor) and value.is_cuda}
    if torch.cuda.is_initialized():
        gpus.add(torch.cuda.current_device())
    return torch.get_rng_state(), {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus}


def _count_rows(name: str, given: Any) -> int:
    counts = {len(value) for value in _arguments(given) if _is_rows(value)}
    if len(counts) != 1 or 0 in counts:
        wanted = "a tensor (B, ...), a list of B items, or a tuple or mapping of these with the same B of 1 or more"
        came = checks.Phrase(f"lengths {sorted(counts)}") if counts else checks.kind_of(given)
        raise checks.refuse(OP, name, wanted, came)
    return counts.pop()


def _rows_of(given: Any, part: slice) -> Any:
    """Some rows of an input."""
    if isinstance(given, Mapping):
        return {key: _rows_of(value, part) if _is_rows(value) else value for key, value in given.items()}
    if isinstance(given, tuple):
        return tuple(_rows_of(value, part) if _is_rows(value) else value for value in given)
    return given[part]


def _called(encoder: Callable[..., Any], chunk: Any) -> Any:
    if isinstance(chunk, dict):
        return encoder(**chunk)
    return encoder(*chunk) if isinstance(chunk, tuple) else encoder(chunk)


def _embedding(place: int, embedding: Any, part: slice) -> Tensor:
    rows = part.stop - part.start
    fits = isinstance(embedding, Tensor) and embedding.is_floating_point() and embedding.dim() > 0
    if not fits or len(embedding) != rows:
        wanted = f"a floating tensor of shape ({rows}, ...) for {rows} rows"
        raise checks.refuse(OP, f"what the encoder of inputs[{place}] returns", wanted, embedding, TypeError)
    return embedding
