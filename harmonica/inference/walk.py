"""Fast: the walk of `sample`, without the work that a frozen table makes needless.

    walk = Walk(denoiser, schedule)          as often as there are batches:
    images = walk(x, cond)

`sample(denoiser, x, cond, schedule)` is the plain, readable path, and what this file is held to. A
walk saves, beside the sites that the schedule skips,

    norm and modulation before a skipped site                    models/blocks.py     same bits
    embeddings that every step or block repeats                  models/precompute.py      same bits
    features that nobody will read again                         inference/lifetimes.py              same bits, less memory
    T modulation products, made as one                           models/precompute.py      to rounding
    passes over memory in h + gate·out                           models/blocks.py     to rounding

`exact=True` leaves the last two as they are. Models that are not known walk by overriding sites, as
`sample` does.

MACs say what a walk ought to take. `milliseconds` says what it takes, here, site by site: in the
same form, so that `schedule.speedup(milliseconds(denoiser, 8))` is what to expect, and
`train_sdt(..., cost=…)` aims at real time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.cache import Cache, Compute, Feature, Gate, weighted_sum
from harmonica.cost import Macs
from harmonica.denoise import Denoiser
from harmonica.inference.lifetimes import Plan, fused_sum
from harmonica.models.blocks import EXACT, FUSED, Compiled, gated_blocks
from harmonica.models.dit import DiTDenoiser
from harmonica.models.pipelines.denoiser import StockDiT
from harmonica.models.pixart import PixArtDenoiser
from harmonica.models.precompute import Clock, ahead
from harmonica.models.uvit import UViTDenoiser
from harmonica.router import Schedule


class Walk:
    """A denoiser under a schedule, as fast as the schedule allows: walk(x, cond) -> x₀.

    Args:
        denoiser: model, sampler, guidance; its weights must stay as they are while a walk runs.
        schedule: what is computed; None computes everything.
        exact: give the images of `sample` bit for bit. Otherwise they differ by rounding.
        compiled: compile branches and sums (torch.compile; adaLN blocks only). Seconds to minutes
            at the first batch.

    Raises:
        ValueError: if the schedule does not fit the denoiser, or both exact and compiled are asked
            for.

    >>> from harmonica.models import load
    >>> denoiser = load("tiny", steps=3)
    >>> x, labels = denoiser.draw(2, torch.Generator().manual_seed(0))
    >>> Walk(denoiser)(x, labels).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule | None = None,
        *,
        exact: bool = False,
        compiled: bool = False,
    ) -> None:
        if exact and compiled:
            raise ValueError(
                "exact and compiled are both true; a compiled branch rounds in its own way, choose one"
            )
        sites, timesteps = tuple(denoiser.sites), denoiser.about.get("timesteps", ())
        if schedule is None:
            schedule = Schedule(torch.ones(denoiser.steps, len(sites)), sites=sites)
        schedule.check(denoiser.steps, sites, timesteps)
        self.denoiser, self.schedule, self.exact = denoiser, schedule, exact
        self.plan = Plan.of(schedule)
        self.model = model_of(denoiser)
        self.math = Compiled() if compiled else EXACT if exact else FUSED

    def __call__(self, x: Tensor, cond: Any) -> Tensor:
        """Return the images (B, C, H, W) that noise x (B, C, H, W) becomes under conditions for
        it.
        """
        return self._run(x, cond, self._gate)

    def _gate(self, k: int, cache: Cache) -> Gate:
        return self.plan.gate(k, cache, weighted_sum if self.exact else fused_sum)

    def _run(self, x: Tensor, cond: Any, gate_of: Callable[[int, Cache], Gate]) -> Tensor:
        cache: Cache = {}
        memory: dict[str, Any] = {}
        denoiser, clock = self.denoiser, Clock(rows=not self.exact)
        clock.begin(denoiser.about.get("timesteps", ()))
        gate = gate_of(0, cache)

        def ask(site: int, compute: Compute) -> Feature:
            return gate(site, compute)

        blocks = gated_blocks(self.model, denoiser.sites, ask, math=self.math)
        with torch.no_grad(), ahead(self.model, clock), blocks:
            for k in range(denoiser.steps):
                clock.k, gate = k, gate_of(k, cache)
                x = denoiser.step(x, denoiser.predict(x, k, cond), k, memory)
        return x

    @property
    def draws_noise(self) -> bool:
        """Whether the sampler adds noise of its own; false for a denoiser of somebody else's
        making.
        """
        denoiser = self.denoiser
        if isinstance(denoiser, DiTDenoiser | PixArtDenoiser | UViTDenoiser):
            return denoiser.sampler.draws_noise
        return False


class Milliseconds(Macs):
    """Milliseconds of one guided prediction of a batch, site by site, in the form of `Macs`."""


def milliseconds(denoiser: Denoiser, batch_size: int = 1, *, repeats: int = 7) -> Milliseconds:
    """Time what each site takes in a walk without reuse, as `Walk` runs it on this machine; medians
    over walks.

    A site is all that `Walk` skips with it, norm and modulation included; the rest is what no
    schedule saves, sampler included. Keep the result: another measurement differs by a few percent,
    and a resumed training needs the same.

    Args:
        denoiser: model, sampler, guidance.
        batch_size: images in a walk; a small one is slower for each than MACs say.
        repeats: walks that count, after one that does not.

    Raises ValueError if one of the two numbers is below 1.
    """
    if batch_size < 1 or repeats < 1:
        raise ValueError(
            f"found batch_size {batch_size}, repeats {repeats}; expected 1 or more of each"
        )
    walk, (x, cond) = Walk(denoiser), denoiser.draw(batch_size, torch.Generator().manual_seed(0))
    turns = [_spans(walk, x, cond) for _ in range(repeats + 1)][1:]
    *sites, total = (median(values) / denoiser.steps for values in zip(*turns, strict=True))
    return Milliseconds(torch.tensor(sites, dtype=torch.float64), max(total - sum(sites), 0.0))


def _spans(walk: Walk, x: Tensor, cond: Any) -> list[float]:
    """Return the milliseconds of each site in one walk, and of all of it: N + 1."""
    spans: list[tuple[int, Clocked]] = []

    def gate_of(k: int, cache: Cache) -> Gate:
        gate = walk._gate(k, cache)

        def timed(site: int, compute: Compute) -> Feature:
            with Clocked(x) as span:
                feature = gate(site, compute)
            spans.append((site, span))
            return feature

        return timed

    with Clocked(x) as whole:
        walk._run(x, cond, gate_of)
    turn = [0.0] * len(walk.denoiser.sites)
    for site, span in spans:
        turn[site] += span.milliseconds()
    return [*turn, whole.milliseconds()]


class Clocked:
    """The time that a block of code takes on the device of a tensor; on CUDA by events, so that
    nobody waits.
    """

    def __init__(self, x: Tensor) -> None:
        self.cuda = x.is_cuda
        self.ends: list[Any] = []

    def __enter__(self) -> Clocked:
        self._mark()
        return self

    def __exit__(self, *_: object) -> None:
        self._mark()

    def _mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.ends.append(event)
        else:
            self.ends.append(time.perf_counter())

    def milliseconds(self) -> float:
        """Return it; on CUDA this waits for the end."""
        first, last = self.ends
        if not self.cuda:
            return float(last - first) * 1e3
        last.synchronize()
        return float(first.elapsed_time(last))


def model_of(denoiser: Denoiser) -> nn.Module | None:
    """Return the model whose blocks may be known, or None: the denoiser is of somebody else's
    making.
    """
    if not isinstance(denoiser, DiTDenoiser | PixArtDenoiser | UViTDenoiser):
        return None
    model: nn.Module = denoiser.model
    return model.transformer if isinstance(model, StockDiT) else model
