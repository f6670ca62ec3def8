"""Timing: how long walks and sites take, by the clock of the device that they run on.

MACs say what a table saves in theory. With `milliseconds` in their place, `Schedule.speedup` says
what to expect on this machine, and `train_sdt(…, cost=…)` aims at real time. This file does not
know models.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harmonica.cache import Cache, Compute, Feature, Gate
from harmonica.cost import Macs
from harmonica.denoise import Denoiser, sample
from harmonica.inference.walk import Walk
from harmonica.router import Schedule
from harmonica.values import whole


@contextmanager
def timed(x: Tensor) -> Iterator[Callable[[], float]]:
    """Time the work of a `with` on the device of x, by CUDA events or else by the host's clock.

    Gives a function that returns the milliseconds; on CUDA it waits for the end of the work.

    >>> with timed(torch.zeros(1)) as milliseconds:
    ...     _ = torch.ones(100).sum()
    >>> 0 < milliseconds() < 1000
    True
    """
    cuda = x.device.type == "cuda"

    def now() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(x.device))
        return event

    def milliseconds() -> float:
        if cuda:
            end.synchronize()
        return float(start.elapsed_time(end) if cuda else (end - start) * 1e3)

    start = now()
    yield milliseconds
    end = now()


class Timing(NamedTuple):
    """Seconds of one walk, medians over turns."""

    plain: float
    cached: float

    @property
    def speedup(self) -> float:
        """Measured speedup."""
        return self.plain / self.cached


def measure(
    denoiser: Denoiser, schedule: Schedule, x: Tensor, cond: Any, *, repeats: int = 7,
    walk: Callable[[Tensor, Any], Tensor] | None = None,
) -> Timing:  # fmt: skip
    """Time the walk from noise x (B, C, H, W) with and without a schedule, by turns, `repeats` of
    which count. `walk` is the cached one, such as `Walk(denoiser, schedule)`; None is `sample`.
    """
    plain, cached = partial(sample, denoiser), partial(sample, denoiser, schedule=schedule)
    seconds = by_turns({"plain": plain, "cached": walk or cached}, x, cond, repeats=repeats)
    return Timing(*map(median, seconds.values()))


def by_turns(
    walks: Mapping[str, Callable[[Tensor, Any], Tensor]], x: Tensor, cond: Any, *, repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of each walk, in the order of the turns, after one turn that warms up.

    The walks take turns because a machine's speed drifts: compare medians, or ratios of one turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in walks}
    for _ in range(repeats + 1):
        for name, walk in walks.items():
            with timed(x) as time_of_walk:
                walk(x, cond)
            seconds[name].append(time_of_walk() / 1e3)
    return {name: turns[1:] for name, turns in seconds.items()}


def milliseconds(denoiser: Denoiser, batch_size: int = 1, *, repeats: int = 7) -> Macs:
    """Return the milliseconds of one guided prediction of a batch, site by site, in the form of
    `Macs`: medians over walks of `Walk` without reuse, on this machine.

    A site is all that `Walk` skips with it, norm and modulation included. The rest is what no
    schedule saves, the sampler included. Keep the result: the next measurement differs by a few
    percent, and a training run can only be resumed with the same costs.
    """
    start = denoiser.draw(whole("batch_size", batch_size), torch.Generator().manual_seed(0))
    turns = [_site_times(Walk(denoiser), *start) for _ in range(1 + whole("repeats", repeats))][1:]
    *each, total = (median(values) / denoiser.steps for values in zip(*turns, strict=True))
    return Macs(torch.tensor(each, dtype=torch.float64), max(total - sum(each), 0.0))


def _site_times(walk: Walk, x: Tensor, cond: Any) -> list[float]:
    """Return the milliseconds of each site in one walk, and of the whole walk: N + 1."""
    readings: list[tuple[int, Callable[[], float]]] = []

    def gate_of(k: int, cache: Cache) -> Gate:
        gate = walk.gate(k, cache)

        def ask(site: int, compute: Compute) -> Feature:
            with timed(x) as time_of_site:
                feature = gate(site, compute)
            readings.append((site, time_of_site))
            return feature

        return ask

    with timed(x) as time_of_walk:
        walk.run(x, cond, gate_of)
    times = [0.0] * len(walk.denoiser.sites)
    for site, time_of_site in readings:
        times[site] += time_of_site()
    return [*times, time_of_walk()]
