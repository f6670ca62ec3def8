"""Denoiser and the walk: a frozen model with its sampler, and the loop that makes an image.

A walk is a loop over T executed steps k = 0 … T−1 (the paper's t is T − k). Its state:

    x        the noisy image               (B, C, H, W)
    cache    site → feature                a dict, written by gates (harmonica.cache)
    memory   what the sampler remembers    a dict, written by Denoiser.step

so a walk is forked before any step by copying two dicts. This file knows no losses and no model.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from harmonica.cache import Cache, Gate, gated, reuse
from harmonica.router import Schedule
from harmonica.values import of_type, whole


@runtime_checkable
class Denoiser(Protocol):
    """A frozen model, its sampler and its guidance.

    Attributes:
        steps: T, predictions in one walk.
        sites: N cacheable modules by name, in the order of a table's columns.
        about: what a table made here is for, as `Schedule`'s model, sampler, timesteps, guidance.
    """

    steps: int
    sites: Mapping[str, nn.Module]

    @property
    def about(self) -> dict[str, Any]: ...  # noqa: D102 (described above)

    def predict(self, x: Tensor, k: int, cond: Any) -> Tensor:
        """Return the guided output at step k for x (B, C, H, W): B rows, or 2B, both halves."""
        ...

    def step(self, x: Tensor, out: Tensor, k: int, memory: dict[str, Any]) -> Tensor:
        """Return x (B, C, H, W) after step k; replaces values in `memory`, never changes them."""
        ...

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Any]:
        """Draw what a walk starts from: pure noise x (B, C, H, W) and conditions for it."""
        ...


def denoise(  # noqa: D417 (some arguments share a line)
    denoiser: Denoiser, x: Tensor, cond: Any, gates: Callable[[int], Gate] | None = None, *,
    start: int = 0, memory: dict[str, Any] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Walk without gradients, yielding x (B, C, H, W) after each step; the last is the image x₀.

    The model is gated only inside a step: a walk abandoned between two leaves nothing behind.

    Args:
        denoiser: model, sampler, guidance.
        x, cond: (B, C, H, W), pure noise at start = 0, and conditions for the batch.
        gates: k -> gate of step k, such as `gates_of(schedule, cache)`; None is the plain model.
        start: first step to run; a walk forked before step k starts at k.
        memory: the sampler's, changed by the walk; a fork passes copies of it and of the cache.
    """
    memory = {} if memory is None else memory
    for k in range(whole("start", start, 0, denoiser.steps + 1), denoiser.steps):
        with torch.no_grad():  # not inference_mode: a cache filled there could not be trained from
            with nullcontext() if gates is None else gated(denoiser.sites, gates(k)):
                out = denoiser.predict(x, k, cond)
            x = denoiser.step(x, out, k, memory)
        yield x


def gates_of(schedule: Schedule, cache: Cache) -> Callable[[int], Gate]:
    """Return k -> the gate of step k under a schedule: `reuse`, or `weighted` if it has weights."""
    rows, weights = schedule.compute.tolist(), schedule.gate_weights
    if weights is None:
        return lambda k: reuse(rows[k], cache)
    from harmonica.forecast import weighted

    numbers = weights.tolist()
    return lambda k: weighted(rows[k], numbers[k], cache)


def final_image(walk: Iterable[Tensor]) -> Tensor:
    """Run a walk to its end and return the image x₀ (B, C, H, W)."""
    return deque(walk, maxlen=1).pop()


def check_fit(schedule: Schedule, denoiser: Denoiser) -> None:
    """Raise ValueError, naming both sides, unless the schedule fits the denoiser."""
    of_type("schedule", schedule, Schedule, "router.schedule() gives one")
    schedule.check(denoiser.steps, tuple(denoiser.sites), denoiser.about.get("timesteps", ()))


def sample(denoiser: Denoiser, x: Tensor, cond: Any, schedule: Schedule | None = None) -> Tensor:
    """Return the image x₀ of noise x, both (B, C, H, W), under a schedule or the plain model."""
    if schedule is None:
        return final_image(denoise(denoiser, x, cond))
    check_fit(schedule, denoiser)
    return final_image(denoise(denoiser, x, cond, gates_of(schedule, {})))
