"""Taps: a scheduler tells the walk that runs in this thread or task what it does.

    set_timesteps    a walk begins at these timesteps
    step             a step ends, of the scheduler or of a copy of it

Nobody waits for a device: timesteps that lie there are made once more on the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from harmonica.models.pipelines.patched import patched
from harmonica.models.pipelines.standin import plain_scheduler
from harmonica.models.pipelines.tracker import current
from harmonica.override import Method, overridden


@contextmanager
def tapped(scheduler: Any) -> Iterator[None]:
    """Let a scheduler and its copies tell the trackers of the walks that they run in."""
    with ExitStack() as stack:
        for name, tap in (("set_timesteps", _set_timesteps), ("step", _step)):
            stack.enter_context(patched(type(scheduler), name, tap))
            if name in vars(scheduler):  # somebody's wrapper may call what the class had before
                stack.enter_context(
                    overridden([(scheduler, name, partial(_wrapped, tap, scheduler))])
                )
        yield


def _wrapped(tap: Method, scheduler: Any, method: Method, args: Any, kwargs: Any) -> Any:
    return tap(lambda _, *args, **kwargs: method(*args, **kwargs), scheduler, *args, **kwargs)


def _set_timesteps(method: Method, scheduler: Any, /, *args: Any, **kwargs: Any) -> Any:
    result, tracker = method(scheduler, *args, **kwargs), current.get()
    if tracker is not None:
        times, own = scheduler.timesteps, inspect.unwrap(type(scheduler).set_timesteps)
        on_cpu, signature = scheduler, inspect.signature(own)
        if not torch.as_tensor(times).is_cpu and "device" in signature.parameters:
            on_cpu = plain_scheduler(scheduler, vars(scheduler))
            bound = signature.bind(on_cpu, *args, **kwargs)
            bound.arguments["device"] = "cpu"
            own(*bound.args, **bound.kwargs)
        tracker.begin(torch.as_tensor(on_cpu.timesteps).tolist(), times)
    return result


def _step(method: Method, scheduler: Any, /, *args: Any, **kwargs: Any) -> Any:
    result, tracker = method(scheduler, *args, **kwargs), current.get()
    if tracker is not None:
        bound = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs)
        tracker.step(bound.arguments.get("timestep"))
    return result
