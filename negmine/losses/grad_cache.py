"""grad_cache: the training step of a large batch with the memory of a small one (gradient caching)."""

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
    """The loss of a large batch and its gradients, with the encoders' activations of one chunk in memory at a time.

        1. embeddings = encoder(chunk) of every chunk, without gradient, remembering the random state of each
        2. loss(*embeddings) over the whole batch, and its gradient with respect to the embeddings
        3. each chunk again, from its random state, with the gradient of its embeddings

    Loss and gradients are those of a step that keeps the graphs of all chunks. It costs a second forward pass. Gradients
    are added to the ``.grad`` of the parameters, as ``loss.backward()`` would.

    Parameters
    ----------
    loss : callable
        Called once as ``loss(*embeddings)``, with one tensor for each of the inputs. Returns a 0-d tensor, or a tuple whose
        first item is one. It may be any loss of this package, with `gather_distributed` too. Bind what needs no gradient,
        such as a queue, in it.
    encoders : callable or sequence of callables
        One for all inputs, or one for each. An encoder returns a floating tensor (n, ...) for the n rows that it is given.
    inputs : sequence
        Each is a tensor (B, ...) or a list of B items. A tuple or a mapping of such is passed as several positional or
        keyword arguments, and what else it holds is passed on as it is. B may differ between inputs.
    chunk_size : int
        How many rows an encoder is given at a time.
    backward : callable, optional
        Called once with the 0-d loss; default ``loss.backward()``. With a GradScaler: ``lambda loss:
        scaler.scale(loss).backward()``.

    Returns
    -------
    Any
        What `loss` returned, with the loss detached. Where gradients are disabled, the loss alone.

    Raises
    ------
    ValueError, TypeError
        For input that does not fit, before any work, and where an encoder returns something else than it should.

    Notes
    -----
    Dropout repeats: in step 3 a chunk sees the random states of step 1, of the CPU, of the current GPU and of its tensors'
    GPUs.

    Layers that mix the rows of a batch, such as BatchNorm, see chunks, and their running statistics are updated twice.

    Call it inside of autocast, as you would call the encoders and the loss.

    A DistributedDataParallel encoder synchronises gradients once, at its last chunk. Parameters without a part in that
    chunk need ``find_unused_parameters=True``. Ranks whose encoders have buffers must have equally many chunks.

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
            made = []
            for chunk, part in zip(chunks, parts[place], strict=True):
                states[-1].append(_random_state(chunk))
                made.append(_embedding(place, _called(encoder, chunk), part))
            embeddings.append(torch.cat(made))
    torch.clear_autocast_cache()  # it holds weights that were cast without a graph
    if not torch.is_grad_enabled():
        return loss(*embeddings)
    leaves = [embedding.requires_grad_() for embedding in embeddings]
    result = loss(*leaves)
    value = result[0] if isinstance(result, tuple) else result
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise checks.refuse(OP, "what loss returns", "a 0-d tensor, or a tuple that begins with one", value, TypeError)
    with disable_autocast(value.device):
        value.backward() if backward is None else backward(value)
    waiting = {
        id(encoder): sum(len(parts[at]) for at, other in enumerate(each) if other is encoder) for encoder in each
    }
    for place, encoder in enumerate(each):
        gradient = leaves[place].grad
        for part, state in zip(parts[place], states[place], strict=True):
            waiting[id(encoder)] -= 1
            no_sync = getattr(encoder, "no_sync", nullcontext) if waiting[id(encoder)] else nullcontext
            with no_sync():
                _replay(encoder, _rows_of(inputs[place], part), state, None if gradient is None else gradient[part])
    if isinstance(result, tuple):
        others = result[1:]
        detached = value.detach()
        return type(result)(detached, *others) if hasattr(result, "_fields") else (detached, *others)
    return value.detach()


def _replay(encoder: Callable[..., Tensor], chunk: Any, state: tuple, gradient: Tensor | None) -> None:
    """Encode a chunk again, with a graph and its saved random state, and run its backward pass."""
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
        raise checks.refuse(OP, "inputs", "a list or tuple of one input or more", type(inputs).__name__)
    each = list(encoders) if isinstance(encoders, (list, tuple)) else [encoders] * len(inputs)
    if len(each) != len(inputs) or not all(callable(encoder) for encoder in each):
        wanted = f"a callable, or one for each of the {len(inputs)} inputs"
        raise checks.refuse(OP, "encoders", wanted, [type(encoder).__name__ for encoder in each], TypeError)
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
        wanted = "a tensor (B, ...) or a list, or a tuple or mapping of such with one B of 1 or more"
        came = f"lengths {sorted(counts)}" if counts else type(given).__name__
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
