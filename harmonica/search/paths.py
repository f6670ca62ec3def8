"""Paths: which whole steps compute, judged by walks that fork from one another.

    Fork       a walk before some step: x (B, C, H, W), its cache, its sampler's memory
    entry      one decision of the table: step k, site i

    cheapest_path   whole steps, by what reuse from one to the next does to x (`step_costs`)

A change at step k leaves steps 0 … k−1 as they were: it costs T − k predictions, from the fork
before k on. This file does not know routers, training, or how fast a table is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fractions import Fraction
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

from harmonica.cache import Cache, reuse
from harmonica.denoise import Denoiser, denoise
from harmonica.search.errors import image_mse

Fork = tuple[Tensor, Cache, dict[str, Any]]


def continue_walk(
    denoiser: Denoiser, cond: Any, table: Tensor, fork: Fork, start: int
) -> Iterator[Fork]:
    """Walk on from a fork before step `start` under a table (T, N), yielding a fork after each
    step.

    The fork that it starts from stays as it is.
    """
    x, cache, memory = fork[0], fork[1].copy(), fork[2].copy()
    rows = table.tolist()
    for after in denoise(
        denoiser, x, cond, lambda k: reuse(rows[k], cache), start=start, memory=memory
    ):
        yield after, cache.copy(), memory.copy()


def image_if_flipped(
    denoiser: Denoiser, cond: Any, table: Tensor, k: int, i: int, fork: Fork
) -> Tensor:
    """Return the image (B, C, H, W) of a table (T, N) with entry k, i flipped, from the
    fork before step k.
    """
    table = table.clone()
    table[k, i] = ~table[k, i]
    *_, (image, _, _) = continue_walk(denoiser, cond, table, fork, k)
    return image


def predictions_of_all(denoiser: Denoiser) -> int:
    """Return the predictions of one walk and of flipping each entry by itself: T +
    N·T(T−1)/2.
    """
    return denoiser.steps + len(denoiser.sites) * denoiser.steps * (denoiser.steps - 1) // 2


def whole_steps(denoiser: Denoiser, computed: Collection[int]) -> Tensor:
    """Return the table (T, N) that computes all sites at these steps and none at others."""
    return torch.tensor([[k in computed] * len(denoiser.sites) for k in range(denoiser.steps)])


def spread(steps: int, interval: Fraction) -> set[int]:
    """Return the steps ⌈i·interval⌉ below `steps`, i = 0, 1, …: evenly spread, 0 among them.

    >>> sorted(spread(10, Fraction(5, 2)))
    [0, 3, 5, 8]
    """
    return {ceil(i * interval) for i in range(ceil(steps / interval))}


def step_costs(denoiser: Denoiser, x: Tensor, cond: Any) -> Tensor:
    """Return what it costs to compute step j and reuse all of it at steps j + 1 … k: (T, T)
    float64, [j, k].

    It is the mean squared difference to the plain walk after step k; zero for k ≤ j. The plain walk
    is forked once after each j: 2T predictions, and T(T−1)/2 in which every site reuses.
    """
    steps = denoiser.steps
    start: Fork = (x, {}, {})
    everything = torch.ones(steps, len(denoiser.sites), dtype=torch.bool)
    plain = [after for after, _, _ in continue_walk(denoiser, cond, everything, start, 0)]
    costs = torch.zeros(steps, steps, dtype=torch.float64)
    for j, fork in enumerate(continue_walk(denoiser, cond, everything, start, 0)):
        for k, (after, _, _) in enumerate(
            continue_walk(denoiser, cond, ~everything, fork, j + 1), start=j + 1
        ):
            costs[j, k] = image_mse(after, plain[k])
    return costs


def cheapest_path(costs: Tensor, count: int) -> list[int]:
    """Return the `count` steps to compute, 0 among them, whose runs of reuse cost least in sum
    (Bellman 1957).

    best(m, k) = min over j of best(m − 1, j − 1) + costs[j, k], where m runs cover steps 0 … k.

    >>> cheapest_path(torch.tensor([[0.0, 1, 9, 9], [0, 0, 2, 9], [0, 0, 0, 1], [0, 0, 0, 0]]), 2)
    [0, 2]
    """
    table = costs.tolist()
    best: list[tuple[float, list[int]]] = [(cost, [0]) for cost in table[0]]  # [k], of one run
    for m in range(1, count):
        best = [
            min(
                ((best[j - 1][0] + table[j][k], [*best[j - 1][1], j]) for j in range(m, k + 1)),
                default=(inf, []),
            )
            for k in range(len(table))
        ]
    return best[-1][1]
