"""Taps: a scheduler tells the walk that runs in this thread or task what it does.

    set_timesteps    a walk begins at these timesteps
    step             a step ends, of the scheduler or of a copy of it

Nobody waits for a device: timesteps that lie there are made once more on the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from harmonica.models.pipelines.standin import plain_scheduler
from harmonica.models.pipelines.tracker import Tracker, current
from harmonica.override import Method, overridden, patched


@contextmanager
def tapped(scheduler: Any) -> Iterator[None]:
    """Let a scheduler and its copies tell the trackers of the walks that they run in."""
    taps = ("set_timesteps", _set_timesteps, _begin), ("step", _step, _end)
    with ExitStack() as stack:
        for name, answer, tell in taps:
            stack.enter_context(patched(type(scheduler), name, answer))
            if name in vars(scheduler):  # somebody's wrapper may call what the class had before
                mine = partial(_tell, tell, scheduler)
                stack.enter_context(overridden([(scheduler, name, mine)]))
        yield


def _set_timesteps(method: Method, scheduler: Any, /, *args: Any, **kwargs: Any) -> Any:
    return _tell(_begin, scheduler, partial(method, scheduler), args, kwargs)


def _step(method: Method, scheduler: Any, /, *args: Any, **kwargs: Any) -> Any:
    return _tell(_end, scheduler, partial(method, scheduler), args, kwargs)


def _tell(tell: Callable[..., None], scheduler: Any, method: Method, args: Any, kwargs: Any) -> Any:
    result = method(*args, **kwargs)
    if (tracker := current.get()) is not None:
        tell(tracker, scheduler, args, kwargs)
    return result


def _begin(tracker: Tracker, scheduler: Any, args: Any, kwargs: Any) -> None:
    times, method = scheduler.timesteps, inspect.unwrap(type(scheduler).set_timesteps)
    on_cpu, signature = scheduler, inspect.signature(method)
    if not torch.as_tensor(times).is_cpu and "device" in signature.parameters:
        on_cpu = plain_scheduler(scheduler, vars(scheduler))
        bound = signature.bind(on_cpu, *args, **kwargs)
        bound.arguments["device"] = "cpu"
        method(*bound.args, **bound.kwargs)
    tracker.begin(torch.as_tensor(on_cpu.timesteps).tolist(), times)


def _end(tracker: Tracker, scheduler: Any, args: Any, kwargs: Any) -> None:
    bound = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs)
    tracker.step(bound.arguments.get("timestep"))
