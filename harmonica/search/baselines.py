"""Baselines: other methods that fill the table, each a function that returns a `Schedule`.

    every                  FORA            whole steps, evenly spread    measures nothing
    dynamic_programming    after DPCache   whole steps, cheapest path    2T predictions, T²/2 cheap

    denoiser, x, cond    what `denoise` takes; x (B, C, H, W) is pure noise to measure on
    speedup              a target, theoretical (`Schedule.speedup(macs(denoiser))`)

A table meets its target as closely as the method allows: whole steps are coarse, entries are fine.
A target out of reach is a ValueError that names the maximum. Every method here reuses the last
computed feature; where its paper does something else, the docstring says so. More
methods are in benchmarks/rivals.py.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from torch import Tensor

from harmonica.check import require_denoiser
from harmonica.cost import macs
from harmonica.denoise import Denoiser
from harmonica.router import Schedule
from harmonica.search.paths import cheapest_path, reuse_errors, spread, whole_steps
from harmonica.search.target import Target
from harmonica.values import number, require


def every(denoiser: Denoiser, n: float | None = None, *, speedup: float | None = None) -> Schedule:
    """Compute all sites at every n-th step, reuse all in between (FORA, Selvaraju et al. 2024,
    arXiv 2407.01425).

    The computed steps are ⌈i·n⌉: for a whole n those with k % n == 0, for n = 2.5 steps 0, 3, 5, 8,
    10, … With a speedup instead, n = T / (number of steps that may compute).
    """
    require_denoiser(denoiser)
    one = (n is None) != (speedup is None)
    require(one, f"n is {n} and speedup {speedup}; give one of the two")
    steps, interval = denoiser.steps, Fraction(number("n", 1 if n is None else n, 1))
    if speedup is not None:
        interval = Fraction(steps, Target(speedup, macs(denoiser), steps).steps_that_compute)
    table = whole_steps(denoiser, spread(steps, interval))
    return named(denoiser, table, "FORA", {"interval": float(interval)})


def dynamic_programming(denoiser: Denoiser, x: Tensor, cond: Any, *, speedup: float) -> Schedule:
    """Compute the whole steps that make the cheapest path (the idea of DPCache, Cui et al. 2026,
    arXiv 2602.22654).

    As many steps compute as the speedup allows; `cheapest_path` chooses them by `reuse_errors`.
    DPCache predicts skipped features from several computed ones. Here the last is reused, so that a
    step's cost depends on it alone.
    """
    target = Target(speedup, macs(denoiser), denoiser.steps)
    path = cheapest_path(reuse_errors(denoiser, x, cond), target.steps_that_compute)
    settings = {"speedup": speedup, "noises": len(x)}
    return named(denoiser, whole_steps(denoiser, path), "dynamic programming", settings)


def named(denoiser: Denoiser, table: Tensor, method: str, facts: Mapping[str, float]) -> Schedule:
    """Return a table (T, N) as a schedule for this denoiser that says how it was made."""
    about = {**denoiser.about, "provenance": {"method": method, **facts}}
    return Schedule(table, sites=tuple(denoiser.sites), **about)
