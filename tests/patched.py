"""Training code in published styles (tests/data/published), and the same code after the patches of examples/patches."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
IN, DIM, K, B = 10, 8, 48, 4


def apply(patch, text):
    """Apply a unified diff to the text. Its context must match exactly."""
    old, new, at = text.splitlines(), [], 0
    for line in patch.splitlines()[2:]:
        if line.startswith("@@"):
            start = int(line.split()[1].split(",")[0][1:]) - 1
            new += old[at:start]
            at = start
            continue
        if line[:1] in (" ", "-"):
            assert old[at] == line[1:], (old[at], line)
            at += 1
        if line[:1] in (" ", "+"):
            new.append(line[1:])
    return "\n".join([*new, *old[at:]]) + "\n"


def published(name, patch=False):
    """Return the names that a published file defines, after its patch or before it."""
    text = (ROOT / "tests/data/published" / f"{name}.py").read_text()
    if patch:
        text = apply((ROOT / "examples/patches" / f"{name}.patch").read_text(), text)
    names: dict = {}
    exec(compile(text, name, "exec"), names)
    return SimpleNamespace(**names)


def encoder(num_classes=DIM):
    return nn.Sequential(nn.Linear(IN, 16), nn.Tanh(), nn.Linear(16, num_classes))


def moco(patch=False, seed=0):
    torch.manual_seed(seed)
    return published("moco", patch).MoCo(partial(encoder), DIM, K, T=0.2)


def batches(steps, rank=0, seed=1):
    """For each step, two views of B images, different on each rank."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    for _ in range(steps):
        image = torch.randn(B, IN, generator=generator)
        yield image + 0.3 * torch.randn(2, B, IN, generator=generator)


def teacher_forced(steps, rank=0, wrap=lambda model: model):
    """Train the published MoCo and the patched one. Before each step, the patched one loads the state of the published one.

    Return both logs with (loss, acc1, acc5) for each step, both queues and pointers after each step, and both models.
    """
    theirs, ours = moco(), moco(patch=True, seed=5)
    ours.load_state_dict(theirs.state_dict())  # strict
    models = {"theirs": theirs, "ours": ours}
    trained = {name: wrap(model) for name, model in models.items()}
    optimizers = {name: torch.optim.SGD(model.encoder_q.parameters(), 0.1) for name, model in models.items()}
    loops = {"theirs": published("moco").train, "ours": published("moco", patch=True).train}
    log: dict = {"theirs": [], "ours": [], "queues": []}
    for images in batches(steps, rank):
        ours.load_state_dict(theirs.state_dict())
        for name, train in loops.items():
            log[name] += train([images], trained[name], optimizers[name])
        log["queues"].append(
            [t.clone() for t in (theirs.queue, theirs.queue_ptr, ours.queue.queue.T, ours.queue.queue_ptr)]
        )
    return log, models
