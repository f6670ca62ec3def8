"""Samplers: from x and a model output at step k to x at step k + 1.

A sampler knows its T timesteps in the order they are executed and one update rule. It keeps nothing
between steps: what a multistep or stochastic rule must remember lives in `memory`, a dict that
belongs to the walk, so a walk is forked at any k by copying two dicts (its cache and its memory).

    name           rule                                                   the paper runs it at
    ddim           deterministic, to the true next timestep               T = 10, 20, 50   DiT
    dpm-solver++   multistep of order 2, data prediction                  T = 20   PixArt, U-ViT
    iddpm          ancestral, learned variance where the model has one    T = 100  PixArt
    sa-solver      stochastic Adams, predictor and corrector of order 2   T = 25   PixArt

    sampler.timesteps         (T,) given to the model, in execution order   999 … 0
    sampler.learns_variance   whether `step` reads variance channels, so that out is (B, 2C, H, W)
    sampler.draws_noise       whether `step` adds noise of its own
    sampler.step(x, out, k, memory)     x (B, C, H, W) at step k + 1
    sampler.with_steps(steps)           the same rule with another number of steps
    ᾱ (alphas_cumprod)                  signal left at a timestep, (1000,)

The diffusion's noise levels are called β as well, and SA-Solver has a τ of its own; neither is the
price β or the threshold τ of a router. This file does not know models, guidance or caches.
"""

import copy
import zlib
from importlib import import_module
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from harmonica.values import require, whole

Memory = dict[str, Any]  # what a sampler remembers along one walk; empty at k = 0
TRAIN_TIMESTEPS = 1000  # length of the diffusion that all models here were trained with
Betas = Literal["linear", "scaled-linear"]  # its noise; the second is Stable Diffusion's, U-ViT's
_TRAINED: dict[str, dict[str, Any]] = {  # in the words of diffusers
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}


def alphas_cumprod(betas: Betas = "linear") -> Tensor:
    """Return ᾱ_t = ∏_{s≤t} (1 − β_s): (1000,) float64.

    linear          β from 1e-4 to 0.02 (Ho et al. 2020)
    scaled-linear   √β from √0.00085 to √0.012 (Rombach et al. 2022)

    >>> round(float(alphas_cumprod()[-1]), 7)
    4.04e-05
    """
    power = 1.0 if betas == "linear" else 2.0
    low, high = (_TRAINED[betas][end] ** (1 / power) for end in ("beta_start", "beta_end"))
    beta = torch.linspace(low, high, TRAIN_TIMESTEPS, dtype=torch.float64) ** power
    return torch.cumprod(1.0 - beta, dim=0)


def spaced_timesteps(steps: int) -> tuple[int, ...]:
    """Return T timesteps evenly spaced from 999 down to 0, as the original DiT does; one is (999,).

    >>> spaced_timesteps(6)
    (999, 799, 599, 400, 200, 0)
    """
    steps = whole("steps", steps, 1, TRAIN_TIMESTEPS + 1)
    # Added up, not multiplied: where a timestep falls on a half, as at T = 21, rounding follows the
    # original's sum.
    last = TRAIN_TIMESTEPS - 1
    sums = accumulate([last / (steps - 1)] * (steps - 1), initial=0.0) if steps > 1 else [last]
    return tuple(map(round, sums))[::-1]


class DDIM:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with η = 0) to the *true* next timestep.

    x₀ = (x − √(1−ᾱ)·ε) / √ᾱ  and then  x' = √ᾱ'·x₀ + √(1−ᾱ')·ε, with ᾱ' = 1 after the last step.

    This is the original DiT's DDIM. `diffusers.DDIMScheduler` steps to t − 1000 // T. That is the
    next timestep that it runs under its default "leading" spacing, but not under "linspace", whose
    timesteps are the original DiT's (docs/fidelity.md).

    >>> DDIM(20).timesteps[:3]
    (999, 946, 894)
    """

    name, learns_variance, draws_noise = "ddim", False, False
    timesteps: tuple[float, ...]

    def __init__(self, steps: int, betas: Betas = "linear") -> None:
        self.timesteps, self.betas = spaced_timesteps(steps), betas
        # Python floats: a step moves nothing to the device and waits for nothing.
        alphas = alphas_cumprod(betas)[list(spaced_timesteps(steps))]
        self._alphas: list[float] = [*alphas.tolist(), 1.0]  # (T + 1,)

    def step(self, x: Tensor, out: Tensor, k: int, memory: Memory) -> Tensor:
        now, after = self._alphas[k], self._alphas[k + 1]
        eps = out[:, : x.shape[1]]  # (B, C, H, W)
        x0 = (x - (1.0 - now) ** 0.5 * eps) / now**0.5  # (B, C, H, W)
        moved: Tensor = after**0.5 * x0 + (1.0 - after) ** 0.5 * eps
        return moved

    def with_steps(self, steps: int) -> "DDIM":
        return type(self)(steps, self.betas)


_LATENTS = {"clip_sample": False}  # diffusers clips to [−1, 1], where images are
_ORDERS = {"predictor_order": 2, "corrector_order": 2, "algorithm_type": "data_prediction"}
_SCHEDULERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Lu et al. 2022, with PixArt's settings
    "dpm-solver++": ("scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler", {}),
    # Nichol & Dhariwal 2021
    "iddpm": ("scheduling_ddpm", "DDPMScheduler", {"variance_type": "learned_range", **_LATENTS}),
    # Xue et al. 2023, with τ(t) = 1 for 200 ≤ t ≤ 800, else 0
    "sa-solver": ("scheduling_sasolver", "SASolverScheduler", _ORDERS),
}
"""By name of the sampler: module, class and settings of diffusers' scheduler."""


class Scheduled:
    """A diffusers scheduler as a sampler whose state belongs to the walk.

    Every step works on a copy of the scheduler whose state comes out of `memory` and goes back into
    it, so walks share nothing and a fork is exact. Noise comes from a generator seeded by (seed of
    the sample, k), so that any step can be run again; without `memory["seeds"]`, one integer a
    sample, the seeds are computed from x_T. Where a model has no variance channels, IDDPM takes the
    posterior's variance (Ho et al. 2020).
    """

    def __init__(self, name: str, steps: int, betas: Betas) -> None:
        module, kind, options = _SCHEDULERS[name]
        of_diffusers = import_module(f"diffusers.schedulers.{module}")
        scheduler = getattr(of_diffusers, kind)(**_TRAINED[betas], **options)
        if name == "iddpm":
            scheduler.set_timesteps(timesteps=list(spaced_timesteps(steps)))
        else:
            scheduler.set_timesteps(steps)
        self.name, self.betas, self.draws_noise = name, betas, name != "dpm-solver++"
        self.learns_variance = name == "iddpm"
        self._times = scheduler.timesteps.cpu()  # (T,); on a GPU, every step would wait for it
        self.timesteps: tuple[float, ...] = tuple(self._times.tolist())
        self._scheduler, self._start = scheduler, _copied(vars(scheduler))

    def step(self, x: Tensor, out: Tensor, k: int, memory: Memory) -> Tensor:
        if k > 0 and "scheduler" not in memory:
            need = f"step {k} of {self.name} needs what the steps before it left in `memory`"
            raise RuntimeError(f"{need}; pass a copy")
        scheduler, noise = copy.copy(self._scheduler), {}
        vars(scheduler).update(_copied(memory.get("scheduler", self._start)))
        if self.draws_noise:
            if "seeds" not in memory:
                bits = [sample.detach().float().cpu().numpy().tobytes() for sample in x]
                memory["seeds"] = tuple(map(zlib.crc32, bits))
            noise = {"generator": [noise_generator(seed, k) for seed in memory["seeds"]]}
        if not self.learns_variance:
            out = out[:, : x.shape[1]]  # (B, C, H, W)
        elif out.shape[1] == x.shape[1]:  # −1 stands for the posterior's variance
            out = torch.cat([out, -torch.ones_like(out)], dim=1)  # (B, 2C, H, W)
        moved: Tensor = scheduler.step(out, self._times[k], x, return_dict=False, **noise)[0]
        memory["scheduler"] = _copied(vars(scheduler))
        return moved.to(x.dtype)

    def with_steps(self, steps: int) -> "Sampler":
        return make_sampler(self.name, steps, self.betas)


def _copied(state: Any) -> Any:
    """Copy dicts, lists and tensors; a deep copy would fail under autograd."""
    if type(state) is dict:  # not a scheduler's config, which stays as it is
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state.clone() if isinstance(state, Tensor) else state


def noise_generator(seed: int, k: int) -> torch.Generator:
    """Return the generator of a sample's noise at step k; torch reads 32 bits of a seed only."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {k}".encode()))


Sampler = DDIM | Scheduled
SAMPLERS = ("ddim", *_SCHEDULERS)
"""The names that `load(…, sampler=…)` and schedules use."""


def make_sampler(name: str, steps: int, betas: Betas = "linear") -> Sampler:
    """Return the sampler called `name` with T = `steps`, for a model trained with `betas`."""
    require(name in SAMPLERS, f"sampler is {name!r}; this version has {', '.join(SAMPLERS)}")
    steps = whole("steps", steps, 1, TRAIN_TIMESTEPS + 1)  # the model was trained on no more
    return DDIM(steps, betas) if name == "ddim" else Scheduled(name, steps, betas)
