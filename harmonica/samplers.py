"""Samplers: from x and a model output at step k to x at step k + 1.

A sampler knows its T timesteps in the order they are executed and one update rule. It keeps nothing
between steps: what a multistep or stochastic rule must remember lives in `memory`, a dict that belongs to
the walk, so a walk is forked at any k by copying two dicts (its cache and its memory).

    T                     executed steps                       steps
    k = 0 … T−1           index of an executed step            k
    timesteps[k]          the model's own clock, 999 … 0       (T,)
    ᾱ (alphas_cumprod)    signal left at a timestep            (1000,)

It does not know the model, guidance, caches or routers.
"""

from __future__ import annotations

from itertools import accumulate, repeat
from typing import Any, Protocol

import torch
from torch import Tensor

Memory = dict[str, Any]
"""What a sampler remembers along one walk; made by whoever owns the walk, empty at k = 0."""

TRAIN_TIMESTEPS = 1000
"""Length of the diffusion that DiT, PixArt and the bundled model were trained with."""


class Sampler(Protocol):
    """What a walk needs of a sampler.

    Attributes:
        name: short name, stored in schedules.
        timesteps: (T,) timesteps given to the model, in execution order.
    """

    name: str
    timesteps: tuple[int, ...]

    def step(self, x: Tensor, out: Tensor, k: int, memory: Memory) -> Tensor:
        """Take x (B, C, H, W) from step k to step k + 1 with the model output (B, C or 2C, H, W)."""
        ...


def linear_alphas_cumprod(train_timesteps: int = TRAIN_TIMESTEPS) -> Tensor:
    """Return ᾱ_t = ∏_{s≤t} (1 − β_s), β linear from 1e-4 to 0.02 (DDPM; used by DiT): (1000,) float64.

    >>> round(float(linear_alphas_cumprod()[-1]), 7)
    4.04e-05
    """
    betas = torch.linspace(1e-4, 0.02, train_timesteps, dtype=torch.float64)
    return torch.cumprod(1.0 - betas, dim=0)


def spaced_timesteps(steps: int, train_timesteps: int = TRAIN_TIMESTEPS) -> tuple[int, ...]:
    """Return T timesteps evenly spaced from 999 down to 0, both ends included, as the original DiT does.

    A single step starts, like every walk, from pure noise: (999,).

    Raises:
        ValueError: if steps is not between 1 and train_timesteps.

    >>> spaced_timesteps(6)
    (999, 799, 599, 400, 200, 0)
    """
    if not 1 <= steps <= train_timesteps:
        raise ValueError(
            f"steps is {steps}; a sampler takes between 1 and {train_timesteps} steps, "
            "one for each timestep that the model was trained on at most"
        )
    if steps == 1:
        return (train_timesteps - 1,)
    stride = (train_timesteps - 1) / (steps - 1)
    # Added up, not multiplied: where a timestep falls on a half, as at T = 21, rounding follows the original's sum.
    return tuple(round(t) for t in accumulate(repeat(stride, steps - 1), initial=0.0))[::-1]


class DDIM:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with η = 0), stepping to the *true* next timestep.

    x₀ = (x − √(1−ᾱ)·ε) / √ᾱ  and then  x' = √ᾱ'·x₀ + √(1−ᾱ')·ε, with ᾱ' = 1 after the last step.

    This is the original DiT's DDIM. `diffusers.DDIMScheduler` is not: it steps to t − 1000 // T, which is not
    the next timestep that it runs (see docs/fidelity.md).

    Args:
        steps: T, the number of model evaluations.

    Raises:
        ValueError: if steps is not between 1 and 1000.

    >>> DDIM(20).timesteps[:3]
    (999, 946, 894)
    """

    name = "ddim"

    def __init__(self, steps: int) -> None:
        self.timesteps = spaced_timesteps(steps)
        alphas = linear_alphas_cumprod()[list(self.timesteps)].tolist()
        # Python floats: a step reads two numbers, moves nothing to the device and waits for nothing.
        self._alphas: list[float] = [*alphas, 1.0]  # (T + 1,)

    def step(self, x: Tensor, out: Tensor, k: int, memory: Memory) -> Tensor:
        """Take x from step k to k + 1. Learned-variance channels of `out`, if any, are not used by DDIM."""
        now, after = self._alphas[k], self._alphas[k + 1]
        eps = out[:, : x.shape[1]]  # (B, C, H, W)
        x0 = (x - (1.0 - now) ** 0.5 * eps) / now**0.5  # (B, C, H, W)
        moved: Tensor = after**0.5 * x0 + (1.0 - after) ** 0.5 * eps
        return moved


SAMPLERS: dict[str, type[DDIM]] = {DDIM.name: DDIM}
"""Samplers by the name that `load(…, sampler=…)` and schedules use."""


def make_sampler(name: str, steps: int) -> Sampler:
    """Return the sampler called `name` with `steps` steps.

    Raises:
        ValueError: if the name is not one of SAMPLERS, or steps is out of range.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}; this version has {', '.join(SAMPLERS)}")
    return SAMPLERS[name](steps)
