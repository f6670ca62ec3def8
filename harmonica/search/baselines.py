"""Baselines: other methods that fill the table, each a function that returns a `Schedule`.

    every                  FORA            whole steps, evenly spread     measures nothing
    dynamic_programming    after DPCache   whole steps, cheapest path     2T predictions, T²/2 cheap
    learning_to_cache      L2C             entries of every second step   trained on images

    denoiser, x, cond    what `denoise` takes; x (B, C, H, W) is pure noise to measure on
    speedup              a target, theoretical (`Schedule.speedup(macs(denoiser))`)

A table meets its target as closely as the method allows: whole steps are coarse, entries are fine.
A target out of reach is a ValueError that names the maximum. Every method here reuses the last
computed feature; where its paper does something else, the docstring says so. This file does not
know routers or λ.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from harmonica.cache import Cache, blend, gated, reuse
from harmonica.cost import macs
from harmonica.denoise import Denoiser
from harmonica.iepo import objective
from harmonica.router import Schedule
from harmonica.samplers import alphas_cumprod
from harmonica.search.paths import cheapest_path, reuse_errors, spread, whole_steps
from harmonica.table import require


def every(denoiser: Denoiser, n: float | None = None, *, speedup: float | None = None) -> Schedule:
    """Compute all sites at every n-th step, reuse all in between (FORA, Selvaraju et al. 2024,
    arXiv 2407.01425).

    The computed steps are ⌈i·n⌉: for a whole n those with k % n == 0, for n = 2.5 steps 0, 3, 5, 8,
    10, … With a speedup instead, n = T / (number of steps that may compute).
    """
    one = (n is None) != (speedup is None)
    require(one, f"n is {n} and speedup {speedup}; give one of the two")
    require(n is None or 1 <= n < inf, f"n is {n}; it must be 1 (compute all) or more steps")
    steps = denoiser.steps
    interval = Fraction(n or Fraction(steps, steps_that_compute(denoiser, speedup or 1.0)))
    table = whole_steps(denoiser, spread(steps, interval))
    return named(denoiser, table, "FORA", {"interval": float(interval)})


def dynamic_programming(denoiser: Denoiser, x: Tensor, cond: Any, *, speedup: float) -> Schedule:
    """Compute the whole steps that make the cheapest path (the idea of DPCache, Cui et al. 2026,
    arXiv 2602.22654).

    As many steps compute as the speedup allows; `cheapest_path` chooses them by `reuse_errors`.
    DPCache predicts skipped features from several computed ones. Here the last is reused, so that a
    step's cost depends on it alone.
    """
    path = cheapest_path(reuse_errors(denoiser, x, cond), steps_that_compute(denoiser, speedup))
    settings = {"speedup": speedup, "noises": len(x)}
    return named(denoiser, whole_steps(denoiser, path), "dynamic programming", settings)


def learning_to_cache(
    denoiser: Denoiser,
    images: Tensor,
    labels: Tensor,
    *,
    tau: float = 0.1,
    speedup: float | None = None,
    updates: int = 2000,
    batch_size: int = 32,
    beta: float = 1e-4,
    lr: float = 0.01,
    generator: torch.Generator | None = None,
) -> Schedule:
    """Train scores of every second step on real images (Learning-to-Cache, Ma et al. 2024, arXiv
    2406.01733).

    Steps come in pairs (k, k + 1), k even: k computes, k + 1 may reuse. An update draws a pair, and
    images with one noise at both steps, and lowers ‖ε − ε_router‖² + β·Σᵢ rᵢ by the scores r of
    step k + 1: ε is the plain prediction there, ε_router the one that blends with the features of
    step k. No walk is taken, so what earlier reuse did to x is never seen, and no more than half of
    the steps can reuse.

    `images` (M, C, H, W) are scaled as the model was trained on them, `labels` (M, …) are their
    conditions; the sampler must add noise as √ᾱ·x + √(1−ᾱ)·ε. β is the price of computing one site.
    With a speedup the lowest scores reuse, without one those not above τ. The generator's seed is 0
    if None.
    """
    times = len(denoiser.about.get("timesteps", ()))
    has = f"the denoiser has {denoiser.steps} steps and {times} timesteps"
    rule = "it must have 2 steps or more, and a timestep for each"
    require(times == denoiser.steps >= 2, f"{has}; {rule}")
    r = torch.full((denoiser.steps, len(denoiser.sites)), inf)  # (T, N)
    r[1::2] = 0.0
    if speedup is not None:
        reuse_lowest(denoiser, r, speedup)  # a target out of reach is refused before training
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    logits = torch.randn(r[1::2].shape, generator=generator, device=generator.device)
    rows = [row.to(images.device).requires_grad_() for row in logits.clone().unbind()]
    optimizer = AdamW(rows, lr=lr, weight_decay=0.0)
    pairs = _pairs(denoiser, images, labels, batch_size, generator)
    for _, (k, pair, cond) in zip(range(updates), pairs, strict=False):
        optimizer.zero_grad(set_to_none=True)  # a row without a gradient keeps still
        rows[k // 2].grad = _pair_gradient(denoiser, pair, cond, k, rows[k // 2], beta)
        optimizer.step()
    r[1::2] = torch.stack(rows).detach().sigmoid().cpu()
    table = r > tau if speedup is None else reuse_lowest(denoiser, r, speedup)
    settings = {"updates": updates, "batch_size": batch_size, "beta": beta, "lr": lr}
    settings |= {"tau": tau} if speedup is None else {"speedup": speedup}
    return named(denoiser, table, "Learning-to-Cache", settings)


def _pairs(
    denoiser: Denoiser, images: Tensor, labels: Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """Yield an even step k, images with one noise at k and k + 1, 2 × (B, C, H, W), and labels."""
    levels = alphas_cumprod()[[round(t) for t in denoiser.about["timesteps"]]].tolist()  # ᾱ of each
    here: dict[str, Any] = {"generator": generator, "device": generator.device}
    while True:
        k = 2 * int(torch.randint(len(levels) // 2, (), **here))
        rows = torch.randint(len(images), (size,), **here).to(images.device)
        noise = torch.randn((size, *images.shape[1:]), **here).to(images)
        noisy = [a**0.5 * images[rows] + (1 - a) ** 0.5 * noise for a in levels[k : k + 2]]
        yield k, noisy, labels[rows]


def _pair_gradient(
    denoiser: Denoiser, pair: Sequence[Tensor], cond: Tensor, k: int, logits: Tensor, beta: float
) -> Tensor:
    """Return the gradient (N,) of the loss of step k + 1 by its logits; nothing else gets one."""
    cache, r = Cache(), logits.sigmoid()
    with torch.no_grad():
        with gated(denoiser.sites, reuse([True] * len(denoiser.sites), cache)):
            denoiser.predict(pair[0], k, cond)
        target = denoiser.predict(pair[1], k + 1, cond)
    with gated(denoiser.sites, blend(r, cache, 0.0)):  # any τ: the cache is not read again
        loss = objective(denoiser.predict(pair[1], k + 1, cond), target, r, 1.0, beta)
        return torch.autograd.grad(loss, logits)[0]


def steps_that_compute(denoiser: Denoiser, speedup: float) -> int:
    """Return how many whole steps may compute at a speedup."""
    table = lambda n: whole_steps(denoiser, range(denoiser.steps - n))  # noqa: E731
    return denoiser.steps - fewest_reused(denoiser, table, denoiser.steps - 1, speedup)


def reuse_lowest(denoiser: Denoiser, r: Tensor, speedup: float) -> Tensor:
    """Return the table (T, N) that reuses as many of the lowest scores r (T, N) as the speedup
    takes; infinite scores compute.
    """
    order = r.flatten().argsort(stable=True)[: int(r.isfinite().sum())]

    def table(n: int) -> Tensor:
        compute = torch.ones(r.numel(), dtype=torch.bool)
        compute[order[:n]] = False
        return compute.view_as(r)

    return table(fewest_reused(denoiser, table, len(order), speedup))


def fewest_reused(
    denoiser: Denoiser, table: Callable[[int], Tensor], most: int, speedup: float
) -> int:
    """Return the least n ≤ most whose table(n) has the speedup; the more n, the more it reuses."""
    cost = macs(denoiser)

    def speed(n: int) -> float:
        return Schedule(table(n)).speedup(cost)

    require(speedup >= 1, f"speedup is {speedup}; it must be 1 (compute all) or more")
    n = bisect_left(range(most + 1), speedup, key=speed)
    maximum = "" if n <= most else f"{speed(most):.4g}"
    require(n <= most, f"speedup is {speedup:g}; the maximum of this method here is {maximum}")
    return n


def named(
    denoiser: Denoiser, table: Tensor, method: str, settings: Mapping[str, float]
) -> Schedule:
    """Return a table (T, N) as a schedule for this denoiser that says how it was made."""
    about = {**denoiser.about, "provenance": {"method": method, **settings}}
    return Schedule(table, sites=tuple(denoiser.sites), **about)
