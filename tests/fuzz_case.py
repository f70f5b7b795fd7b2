"""Random shapes, values, layouts, dtypes, masks and options of one call for tests/fuzz.py."""

import random

import torch
from torch import Tensor

from negmine import Mix, Select

KINDS = ["whole"] * 4 + ["whole, special", "unit", "unit", "normal", "equal", "zero", "tiny", "huge", "special"]
DIMS = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64, 96, 100, 128, 130, 257]
DTYPES = [torch.float32] * 3 + [torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


class Case:
    """One random call, which depends only on (seed, number)."""

    def __init__(self, seed: int, number: int) -> None:
        self.draw = random.Random(seed * 1_000_003 + number)
        self.generator = torch.Generator().manual_seed(self.draw.getrandbits(40))
        big = self.chance(0.03)
        self.B = self.draw.choice([0, 1, 2, 3, 15, 16, 17, 64, 65, self.draw.randrange(100)])
        self.K = self.draw.randrange(4000, 20_000) if big else self.draw.choice([0, 1, 2, 33, self.draw.randrange(400)])
        self.D = self.draw.choice(DIMS)
        self.kind = self.draw.choice(KINDS)
        self.exact = self.kind.startswith("whole")
        # A NaN in the inputs must reach the loss. With infinities this is not checked, because inf - inf depends on the formula.
        self.specials = [NAN] if self.chance(0.5) else [NAN, INF, -INF]
        self.spreads = self.specials == [NAN] or "special" not in self.kind

    def chance(self, p: float) -> bool:
        return self.draw.random() < p

    def vectors(self, *shape: int) -> Tensor:
        """Random vectors of the kind of this case, with a random dtype and memory layout."""
        kind, generator = self.kind, self.generator
        t = torch.randn(*shape, generator=generator)
        if self.exact or kind == "equal":
            t = torch.randint(-3, 4, shape, generator=generator) * 2.0**-2
        if kind == "unit":
            t = torch.nn.functional.normalize(t, dim=-1)
        if kind == "equal" and t.numel():
            t = t[..., :1, :].expand(t.shape).clone()
        if kind == "zero":
            t = t * 0.0
        if kind in ("tiny", "huge"):
            t = t * 10.0 ** (self.draw.uniform(-44, -15) if kind == "tiny" else self.draw.uniform(3, 38))
        if "special" in kind and t.numel():
            for _ in range(self.draw.randrange(4)):
                t.view(-1)[self.draw.randrange(t.numel())] = self.draw.choice(self.specials)
        return self.laid_out(t.to(self.draw.choice(DTYPES)))

    def laid_out(self, t: Tensor) -> Tensor:
        """The same values with other strides or another offset in memory."""
        n, D = t.shape[-2:]
        layout = self.draw.choice(["plain", "plain", "wide", "every other", "transposed", "late", "one row"])
        if layout == "wide":
            return torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., :D]
        if layout == "every other":
            return torch.stack([t, torch.full_like(t, torch.nan)], -2).flatten(-3, -2)[..., ::2, :]
        if layout == "transposed":
            return t.mT.contiguous().mT
        if layout == "late":  # rows that start at an odd element
            return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)
        if layout == "one row" and n and t.dim() == 2 and "special" not in self.kind:
            return t[:1].expand(n, D)
        return t

    def masks(self) -> dict[str, Tensor]:
        given, generator = {}, self.generator
        for kind in ("ids", "labels"):
            if self.chance(0.25):
                dtype = self.draw.choice([torch.int64, torch.int64, torch.int32, torch.uint8])
                given[f"query_{kind}"] = torch.randint(-1, 5, (self.B,), generator=generator).to(dtype)
                given[f"negative_{kind}"] = torch.randint(-1, 5, (2 * self.K,), generator=generator)[::2]
        if self.chance(0.3):
            shape = (self.K,) if self.chance(0.5) else (self.B, self.K)
            mask = torch.rand(*shape, generator=generator) < self.draw.choice([0.0, 0.1, 0.7, 1.0])
            given["negative_mask"] = mask if self.chance(0.7) else mask.mT.contiguous().mT if mask.dim() == 2 else mask
        return given

    def select(self, margins: bool, replaces: bool = False) -> Select | None:
        """A random Select. It has filters only if scores are exact; otherwise rounding decides about scores near a bound."""
        if self.chance(0.4):
            return None
        pick, options = self.draw.choice, {}
        if self.exact and self.chance(0.4):
            options["min_score"] = pick([None, -1.0, 0.0])
            options["max_score"] = pick([None, 0.0, 1.0, 2.5])
            if margins:
                options["absolute_margin"] = pick([None, 0.25, -0.5])
                options["relative_margin"] = pick([None, 0.25, 0.5])
        if self.chance(0.2):
            options["sample"] = self.draw.randrange(1, 20)
            options["replace"] = replaces and self.chance(0.4)
        if self.chance(0.5):
            low = pick([0.0, 0.001, 0.05, self.draw.random()])
            return Select(low, pick([None, 1.0, low + (1 - low) * self.draw.uniform(0.001, 1)]), **options)
        low = pick([0, 1, self.draw.randrange(400), 2**40])
        return Select(low, pick([None, low + 1, low + self.draw.randrange(1, 500)]), **options)

    def mix(self) -> Mix:
        count = self.draw.randrange
        return Mix(
            count(1, 60), count(12), count(12), skip=self.draw.choice([0, 0, 1, count(500)]), distinct=self.chance(0.5),
            concentration=self.draw.choice([1.0, 1.0, 0.3, 2.0]), detach=not self.chance(0.2),
        )  # fmt: skip

    def key(self) -> dict[str, int]:
        pick = self.draw.choice
        return {"seed": pick([0, 2**32 - 1]), "step": pick([0, 7]), "row_offset": pick([0, 3, 2**31 - 1, 2**33 + 1])}

    def spoiled(self, call: dict) -> dict:
        """Return the call, sometimes with one argument replaced by an invalid value."""
        if self.chance(0.08):
            name = self.draw.choice(list(call))
            t = torch.zeros(3, 2)
            rubbish = [None, "x", -1, 1.5, True, [], t, t[0], t.long(), t.to("meta"), torch.zeros(0), t.to_sparse()]
            call[name] = self.draw.choice(rubbish)
        return call
