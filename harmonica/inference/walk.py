"""Walk: what `sample` does, without the work that a frozen table makes needless.

    walk = Walk(denoiser, schedule)
    images = walk(x, cond)                   for as many batches as there are

Besides the sites that the schedule skips, a walk leaves out

    norm and modulation before a skipped site       models/blocks.py          same images
    labels and text that every step embeds again    models/precompute.py      same images
    features that no later step reads               inference/lifetimes.py    less memory
    modulation of single steps: W in one product    models/precompute.py      to rounding
    passes over memory in h + gate·out              models/blocks.py          to rounding

`exact=True` does without the last two: the images are those of `sample`, bit for bit.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from harmonica.cache import Cache, Compute, Feature, Gate, gated
from harmonica.check import require_denoiser
from harmonica.denoise import Denoiser, check_fit
from harmonica.forecast import weighted_sum
from harmonica.inference.lifetimes import plan_of, planned
from harmonica.router import Schedule

InForce = AbstractContextManager[Callable[[int], None] | None]


@runtime_checkable
class Refinable(Denoiser, Protocol):
    """A denoiser that can be had with another number of steps."""

    @property
    def draws_noise(self) -> bool: ...  # noqa: D102 (whether the sampler draws during the walk)
    def with_steps(self, steps: int) -> Denoiser: ...  # noqa: D102 (and all else the same)


@runtime_checkable
class Accelerated(Denoiser, Protocol):
    """A denoiser that knows its model's blocks, and so can skip more than sites."""

    def accelerated(self, gate: Gate, *, exact: bool) -> InForce:
        """Ask `gate` in this `with`, with all of a branch inside it, and know ahead what can be
        known; gives a function that is called with k before each step.
        """
        ...


class Walk:
    """A denoiser under a schedule, as fast as the schedule allows: walk(x, cond) -> x₀.

    Args:
        denoiser: model, sampler, guidance; its weights must stay as they are while a walk runs.
        schedule: what is computed; None computes everything.
        exact: give the images of `sample` bit for bit. Otherwise they differ by rounding.

    Raises ValueError if the schedule does not fit the denoiser.

    >>> from harmonica import load
    >>> denoiser = load("tiny", steps=3)
    >>> x, labels = denoiser.draw(2, torch.Generator().manual_seed(0))
    >>> Walk(denoiser)(x, labels).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self, denoiser: Denoiser, schedule: Schedule | None = None, *, exact: bool = False
    ) -> None:
        require_denoiser(denoiser)
        if schedule is None:
            names = tuple(denoiser.sites)
            schedule = Schedule(torch.ones(denoiser.steps, len(names)), names)
        check_fit(schedule, denoiser)
        self.denoiser, self.schedule, self.exact = denoiser, schedule, exact
        self.plan = plan_of(schedule)

    def __call__(self, x: Tensor, cond: Any) -> Tensor:
        """Return the images that noise x becomes, both (B, C, H, W), under conditions for it."""
        return self.run(x, cond, self.gate)

    def gate(self, k: int, cache: Cache) -> Gate:
        """Return the gate of step k over a walk's cache."""
        return planned(self.plan[k], cache, partial(weighted_sum, fused=not self.exact))

    def run(self, x: Tensor, cond: Any, gate_of: Callable[[int, Cache], Gate]) -> Tensor:
        """Walk under other gates than the schedule's, such as gates that measure."""
        cache, memory, denoiser = Cache(), dict[str, Any](), self.denoiser
        gate = gate_of(0, cache)

        def ask(site: int, compute: Compute) -> Feature:
            return gate(site, compute)

        in_force: InForce = gated(denoiser.sites, ask)
        if isinstance(denoiser, Accelerated):
            in_force = denoiser.accelerated(ask, exact=self.exact)
        with torch.no_grad(), in_force as begin_step:
            for k in range(denoiser.steps):
                if begin_step is not None:
                    begin_step(k)
                gate = gate_of(k, cache)
                x = denoiser.step(x, denoiser.predict(x, k, cond), k, memory)
        return x
