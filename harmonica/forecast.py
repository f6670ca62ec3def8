"""Forecast: another gate, which continues a site's output instead of repeating it (TaylorSeer, arXiv 2503.06923).

    F          a site's output as a function of the step k
    D⁰         F where it was last computed, at step k₀
    Dⁱ         its i-th difference there: (Dⁱ⁻¹ now − Dⁱ⁻¹ before) / (steps between the two)
    forecast   Σᵢ Dⁱ·(k − k₀)ⁱ / i!, i = 0 … order

Order 0 is `reuse`, bit for bit. A forecast takes `order` features more of memory, and passes over them where a reuse
only looks one up; the table, and so the theoretical speedup, is any `Schedule`. It stands here for comparison: the
paper reuses, and so does everything else in this library.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from harmonica.cache import Compute, Feature, Gate, reuse
from harmonica.denoise import Denoiser, denoise, last
from harmonica.router import Schedule

History = dict[int, tuple[int, list[Feature]]]
"""Site → the step k₀ at which it was last computed, and D⁰, D¹, … there, as many as are known."""


def forecast(row: Tensor | Sequence[bool], k: int, history: History, *, order: int = 1) -> Gate:
    """Return the gate of step k that forecasts where `row` is false.

    Args:
        row: (N,) bool, one step of a schedule.
        k: the step.
        history: of the trajectory, empty at its start; written where the row computes.
        order: of the highest difference, 0 or more; fewer are used while fewer outputs were computed.

    >>> import torch
    >>> history = {}
    >>> for k, value in enumerate([1.0, 3.0]):
    ...     _ = forecast([True], k, history)(0, lambda: torch.tensor(value))
    >>> forecast([False], 4, history)(0, lambda: None)
    tensor(9.)
    """
    if order < 0:
        raise ValueError(f"order is {order}; it is the number of differences, 0 (reuse) or more")

    def gate(site: int, compute: Compute) -> Feature:
        if not row[site]:
            if site not in history:
                return reuse([False] * len(row), {})(site, compute)  # raises, and says what is wrong
            before, differences = history[site]
            return _continued(differences, k - before)
        found = [compute()]
        if site in history:
            before, differences = history[site]
            for old in differences[:order]:
                found.append(tree_map(lambda new, old: _slope(new, old, k - before), found[-1], old))
        history[site] = (k, found)
        return found[0]

    return gate


def _slope(new: Any, old: Any, steps: int) -> Any:
    return (new - old) / steps if isinstance(new, Tensor) else new  # attention may return (output, None)


def _continued(differences: list[Feature], steps: int) -> Feature:
    """Return Σᵢ Dⁱ·stepsⁱ / i!."""
    feature = differences[0]
    for i, difference in enumerate(differences[1:], start=1):
        weight = steps**i / factorial(i)
        feature = tree_map(lambda f, d, w=weight: f + w * d if isinstance(f, Tensor) else f, feature, difference)
    return feature


def sample_forecast(denoiser: Denoiser, x: Tensor, cond: Any, schedule: Schedule, *, order: int = 1) -> Tensor:
    """Return the image x₀ that noise x becomes, both (B, C, H, W), forecasting where the schedule reuses.

    Raises ValueError if the schedule does not fit the denoiser or order is below 0.
    """
    schedule.check(steps=denoiser.steps, sites=tuple(denoiser.sites), timesteps=denoiser.about.get("timesteps", ()))
    history: History = {}
    rows = schedule.compute.tolist()
    return last(denoise(denoiser, x, cond, lambda k: forecast(rows[k], k, history, order=order)))
