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
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.cache import Cache, Compute, Feature, Gate, weighted_sum
from harmonica.denoise import Denoiser
from harmonica.inference.lifetimes import Plan, fused_sum
from harmonica.models.arithmetic import EXACT, FUSED, Compiled
from harmonica.models.blocks import gated_blocks
from harmonica.models.dit import DiTDenoiser
from harmonica.models.memo import Memo
from harmonica.models.pipelines.denoiser import StockDiT
from harmonica.models.pixart import PixArtDenoiser
from harmonica.models.precompute import precomputed
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
        return self.run(x, cond, self.gate)

    def gate(self, k: int, cache: Cache) -> Gate:
        """Return the gate of step k over a trajectory's cache."""
        return self.plan.gate(k, cache, weighted_sum if self.exact else fused_sum)

    def run(self, x: Tensor, cond: Any, gate_of: Callable[[int, Cache], Gate]) -> Tensor:
        """Walk under other gates than the schedule's, such as gates that measure."""
        cache: Cache = {}
        memory: dict[str, Any] = {}
        denoiser = self.denoiser
        memo = Memo(denoiser.about.get("timesteps", ()), exact=self.exact)
        gate = gate_of(0, cache)

        def ask(site: int, compute: Compute) -> Feature:
            return gate(site, compute)

        blocks = gated_blocks(self.model, denoiser.sites, ask, math=self.math)
        with torch.no_grad(), precomputed(self.model, memo), blocks:
            for k in range(denoiser.steps):
                memo.k, gate = k, gate_of(k, cache)
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


def model_of(denoiser: Denoiser) -> nn.Module | None:
    """Return the model whose blocks may be known, or None: the denoiser is of somebody else's
    making.
    """
    if not isinstance(denoiser, DiTDenoiser | PixArtDenoiser | UViTDenoiser):
        return None
    model: nn.Module = denoiser.model
    return model.transformer if isinstance(model, StockDiT) else model
