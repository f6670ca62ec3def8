"""Forecast: another gate, which continues a site's output instead of repeating it (TaylorSeer,
arXiv 2503.06923).

    F          a site's output as a function of the step k
    D⁰         F where it was last computed, at step k₀
    Dⁱ         its i-th difference there: (Dⁱ⁻¹ now − Dⁱ⁻¹ before) / (steps between the two)
    forecast   Σᵢ Dⁱ·(k − k₀)ⁱ / i!, i = 0 … order

Order 0 is `reuse`, bit for bit, and is what the paper does. Each order takes a feature more of
memory for each site, and a pass over it where a reuse only looks one up. Which entries compute is
the table's business: `Schedule.order` says how the others are filled, and every walk of this
library does so. This file does not know models or samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import factorial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_map

from harmonica.cache import Cache, Compute, Feature, Gate, never_computed, reuse

if TYPE_CHECKING:
    from harmonica.router import Schedule

Seen = tuple[int, list[Feature]]
"""What the cache of a forecasting walk holds for a site: k₀, and D⁰, D¹, … there, as many as are
known."""


def forecast(row: Tensor | Sequence[bool], k: int, cache: Cache, *, order: int) -> Gate:
    """Return the gate of step k that forecasts where `row` is false.

    Args:
        row: (N,) bool, one step of a schedule.
        k: the step.
        cache: of the trajectory, a `Seen` for each site; written where the row computes.
        order: of the highest difference; fewer are used while fewer outputs were computed.

    >>> import torch
    >>> cache = {}
    >>> for k, value in enumerate([1.0, 3.0]):
    ...     _ = forecast([True], k, cache, order=1)(0, lambda: torch.tensor(value))
    >>> forecast([False], 4, cache, order=1)(0, lambda: None)
    tensor(9.)
    """

    def gate(site: int, compute: Compute) -> Feature:
        if row[site]:
            cache[site] = seen(k, compute(), cache.get(site), order)
            return cache[site][1][0]
        if site not in cache:
            raise never_computed(site, len(row))
        return continued(cache[site], k)

    return gate


def gates_of(schedule: Schedule, cache: Cache) -> Callable[[int], Gate]:
    """Return k -> the gate of step k under a schedule: `reuse`, or `forecast` if its order is above
    0.
    """
    rows, order = schedule.compute.tolist(), schedule.order
    return lambda k: forecast(rows[k], k, cache, order=order) if order else reuse(rows[k], cache)


def seen(k: int, fresh: Feature, before: Seen | None, order: int) -> Seen:
    """Return what is known of a site that gives `fresh` at step k, and was seen before."""
    differences = [fresh]
    if before is not None:
        for old in before[1][:order]:
            differences.append(tree_map(partial(_slope, k - before[0]), differences[-1], old))
    return k, differences


def continued(before: Seen, k: int) -> Feature:
    """Return Σᵢ Dⁱ·(k − k₀)ⁱ / i!."""
    (since, (feature, *differences)) = before
    for i, difference in enumerate(differences, start=1):
        weight = (k - since) ** i / factorial(i)
        feature = tree_map(partial(_plus, weight), feature, difference)
    return feature


def _plus(weight: float, feature: Any, difference: Any) -> Any:
    # Not torch.add(…, alpha=weight): it rounds once or twice depending on where in memory an
    # element lies.
    return feature + weight * difference if isinstance(feature, Tensor) else feature


def _slope(steps: int, new: Any, old: Any) -> Any:
    return (
        (new - old) / steps if isinstance(new, Tensor) else new
    )  # attention may return (output, None)
