"""Paths: walks that fork from one another, or are differentiated, and which whole steps compute.

    Fork       a walk before some step: x (B, C, H, W), its cache, its sampler's memory

    cheapest_path   whole steps, by the error that reuse from one to the next makes (`reuse_errors`)

A change at step k leaves steps 0 … k−1 as they were: it costs T − k predictions, from the fork
before k on. This file does not know routers, training, or how fast a table is.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from fractions import Fraction
from functools import partial
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from harmonica.cache import Cache, Gate, gated, reuse
from harmonica.denoise import Denoiser, denoise
from harmonica.memory import free_bytes
from harmonica.run_again import run_again, run_once
from harmonica.search.references import image_mse

Fork = tuple[Tensor, Cache, dict[str, Any]]
Run = Callable[..., Any]
"""`run_again` keeps the activations of one step only for backward, `run_once` of the whole walk."""


def continue_walk(
    denoiser: Denoiser, cond: Any, table: Tensor, fork: Fork, start: int
) -> Iterator[Fork]:
    """Walk on from a copy of a fork before `start` under a table (T, N); yield a fork a step."""
    x, cache, memory = fork[0], fork[1].copy(), fork[2].copy()
    rows = table.tolist()
    gates = lambda k: reuse(rows[k], cache)  # noqa: E731
    for after in denoise(denoiser, x, cond, gates, start=start, memory=memory):
        yield after, cache.copy(), memory.copy()


def differentiable_walk(
    denoiser: Denoiser, x: Tensor, cond: Any, weights: Sequence[Tensor],
    gate_of: Callable[[int, Tensor, Cache], Gate], run: Run = run_again,
) -> Tensor:  # fmt: skip
    """Return the image (B, C, H, W) of noise x, differentiable in the weights that gates read: step
    k walks under gate_of(k, weights[k], cache).
    """

    def step(
        x: Tensor, w: Tensor, k: int, cache: Cache, memory: dict[str, Any]
    ) -> tuple[Tensor, Cache, dict[str, Any]]:
        memory, cache = memory.copy(), cache.copy()
        with gated(denoiser.sites, gate_of(k, w, cache)):
            out = denoiser.predict(x, k, cond)
        return denoiser.step(x, out, k, memory), cache, memory

    cache, memory = Cache(), dict[str, Any]()
    for k, w in enumerate(weights):
        x, cache, memory = run(step, x, w, k, cache, memory)
    return x


def room_for(denoiser: Denoiser, x: Tensor, cond: Any, most: int) -> tuple[int, Run]:
    """Return with how many noises, `most` at most, a walk is differentiated, and how it is run.

    The features of all T steps take half of the free memory; a quarter more lets all activations
    be kept. Costs a prediction of one noise.
    """
    kept: dict[int, int] = {}  # of one prediction: storage -> bytes

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = 0 if isinstance(tensor, nn.Parameter) else storage.nbytes()
        return tensor

    x, cond = x[:1].clone().requires_grad_(), tree_map_only(Tensor, lambda leaf: leaf[:1], cond)
    cache, free = Cache(), free_bytes(x.device) // denoiser.steps  # of one step
    gate = reuse([True] * len(denoiser.sites), cache)
    with saved_tensors_hooks(note, lambda tensor: tensor), gated(denoiser.sites, gate):
        out = run_once(denoiser.predict, x, 0, cond)
    features = sum(f.nbytes for f in tree_leaves(list(cache.values())) if isinstance(f, Tensor))
    noises = max(1, min(most, free // 2 // max(features, 1)))
    run = run_once if noises * sum(kept.values()) < free // 4 else run_again
    del out  # which keeps the storages alive, so that each has a number of its own
    return noises, run


def whole_steps(denoiser: Denoiser, computed: Collection[int]) -> Tensor:
    """Return the table (T, N) that computes all sites at these steps and none at others."""
    return torch.tensor([[k in computed] * len(denoiser.sites) for k in range(denoiser.steps)])


def spread(steps: int, interval: Fraction) -> set[int]:
    """Return the steps ⌈i·interval⌉ below `steps`, i = 0, 1, …: evenly spread, 0 among them.

    >>> sorted(spread(10, Fraction(5, 2)))
    [0, 3, 5, 8]
    """
    return {ceil(i * interval) for i in range(ceil(steps / interval))}


def reuse_errors(denoiser: Denoiser, x: Tensor, cond: Any) -> Tensor:
    """Return the error that is made when step j computes and steps j + 1 … k reuse it: (T, T)
    float64, [j, k].

    It is the mean squared difference to the plain walk after step k; zero for k ≤ j. The plain walk
    is forked once after each j: 2T predictions, and T(T−1)/2 in which every site reuses.
    """
    steps, start = denoiser.steps, (x, Cache(), dict[str, Any]())
    everything = torch.ones(steps, len(denoiser.sites), dtype=torch.bool)
    walk = partial(continue_walk, denoiser, cond)
    plain = [after for after, _, _ in walk(everything, start, 0)]
    errors = torch.zeros(steps, steps, dtype=torch.float64)
    for j, fork in enumerate(walk(everything, start, 0)):
        for k, (after, _, _) in enumerate(walk(~everything, fork, j + 1), start=j + 1):
            errors[j, k] = image_mse(after, plain[k])
    return errors


def cheapest_path(errors: Tensor, count: int) -> list[int]:
    """Return the `count` steps to compute, 0 among them, whose runs of reuse add up to the least
    error (Bellman 1957).

    best(m, k) = min over j of best(m − 1, j − 1) + errors[j, k], where m runs cover steps 0 … k.

    >>> cheapest_path(torch.tensor([[0.0, 1, 9, 9], [0, 0, 2, 9], [0, 0, 0, 1], [0, 0, 0, 0]]), 2)
    [0, 2]
    """
    table = errors.tolist()
    best: list[tuple[float, list[int]]] = [(error, [0]) for error in table[0]]  # [k], of one run
    for m in range(1, count):  # the last run is steps j … k
        paths = [
            [(best[j - 1][0] + table[j][k], [*best[j - 1][1], j]) for j in range(m, k + 1)]
            for k in range(len(table))
        ]
        best = [min(each, default=(inf, [])) for each in paths]
    return best[-1][1]
