"""Taps: what a class of pipelines or schedulers is called for, as long as somebody wants to know.

    pipeline.__call__          is a walk of the session that is open for that pipeline (caching.py)
    scheduler.set_timesteps    a walk begins at these timesteps
    scheduler.step             a step ends, of the scheduler or of a copy of it

The walk is that of this thread or task. Nobody waits for a device: timesteps that lie there are
made once more on the CPU.
"""

import copy
import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch

from harmonica.models.pipelines.schedulers import step_arguments
from harmonica.models.pipelines.tracker import Tracker, current
from harmonica.override import Method, overridden

_lock = threading.RLock()
_patches: dict[tuple[type, str], list[Any]] = {}  # what was there, what stands there now, how many


@contextmanager
def patched(kind: type, name: str, answer: Method) -> Iterator[None]:
    """Answer calls of a method of all objects of a class, in all threads, by
    answer(object, its method, arguments, keyword arguments).

    Subclasses are left alone. Who patches a method that is patched already shares the first
    answer, so all answers for one method must be the same function.

    >>> class Thing:
    ...     def name(self): return "thing"
    >>> with patched(Thing, "name", lambda _, name, *__: f"no {name()}"): Thing().name()
    'no thing'
    >>> Thing().name()
    'thing'
    """
    with _lock:
        if (kind, name) not in _patches:
            original = getattr(kind, name)

            @wraps(original)
            def method(self: Any, *args: Any, **kwargs: Any) -> Any:
                if type(self) is not kind:
                    return original(self, *args, **kwargs)
                return answer(self, partial(original, self), args, kwargs)

            _patches[kind, name] = [vars(kind).get(name), method, 0]
            setattr(kind, name, method)
        _patches[kind, name][2] += 1
    try:
        yield
    finally:
        with _lock:
            before, method, _ = patch = _patches[kind, name]
            patch[2] -= 1
            if patch[2] == 0:
                del _patches[kind, name]
                if vars(kind).get(name) is method:
                    setattr(kind, name, before) if before else delattr(kind, name)


@contextmanager
def tapped(scheduler: Any) -> Iterator[None]:
    """Let a scheduler and its copies tell the trackers of the walks that they run in."""
    with ExitStack() as stack:
        for name, told in (("set_timesteps", _set_timesteps), ("step", _step)):
            answer = partial(_after, told)
            stack.enter_context(patched(type(scheduler), name, answer))
            if name in vars(scheduler):  # somebody's wrapper may call what the class had before
                stack.enter_context(overridden([(scheduler, name, partial(answer, scheduler))]))
        yield


def _after(tell: Method, scheduler: Any, method: Method, args: Any, kwargs: Any) -> Any:
    result, tracker = method(*args, **kwargs), current.get()
    if tracker is not None:
        tell(tracker, scheduler, args, kwargs)
    return result


def _set_timesteps(tracker: Tracker, scheduler: Any, args: Any, kwargs: Any) -> None:
    times, own = scheduler.timesteps, inspect.unwrap(type(scheduler).set_timesteps)
    on_cpu, signature = scheduler, inspect.signature(own)
    if not torch.as_tensor(times).is_cpu and "device" in signature.parameters:
        bound = signature.bind(on_cpu := copy.copy(scheduler), *args, **kwargs)
        bound.arguments["device"] = "cpu"
        own(*bound.args, **bound.kwargs)
    tracker.begin(torch.as_tensor(on_cpu.timesteps).tolist(), times)


def _step(tracker: Tracker, scheduler: Any, args: Any, kwargs: Any) -> None:
    tracker.step(step_arguments(scheduler, args, kwargs).get("timestep"))
