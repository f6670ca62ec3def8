"""Caching: a stock diffusers pipeline under a schedule, with one line.

    with cached(pipe, schedule):
        images = pipe(prompt, num_inference_steps=20).images

While the `with` is open, the class of the pipeline is patched, so that a call of this very pipeline
is a walk of its session. Other objects of the class run as ever, and so do pipelines that share the
transformer or the scheduler.
"""

import inspect
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import Context, copy_context
from functools import partial
from types import coroutine
from typing import Any, Literal
from weakref import WeakKeyDictionary, finalize

from torch import nn

from harmonica.models.pipelines.session import Session
from harmonica.models.pipelines.taps import patched
from harmonica.models.pipelines.tracker import current, in_walk
from harmonica.override import Method
from harmonica.router import Schedule
from harmonica.values import items, of_type

_sessions: WeakKeyDictionary[Any, list[Session]] = WeakKeyDictionary()  # outermost first


@contextmanager
def cached(
    pipe: Any, schedules: Schedule | Sequence[Schedule], *,
    sites: Mapping[str, nn.Module] | None = None,
    otherwise: Literal["raise", "compute"] = "raise", offload: bool = False,
) -> Iterator[Session]:  # fmt: skip
    """Run a stock diffusers pipeline under a schedule for as long as the `with` is open.

    A schedule that computes everything gives the pipeline's own images, bit for bit. Several
    threads and tasks may call it and its siblings at once; a walk belongs to whoever began it, with
    all that its callbacks call. A pipeline of another class that a callback calls on the same
    transformer needs `cached(it, [], otherwise="compute")`, or it follows the table too. At the end
    everything is as it was, exception or not.

    Args:
        pipe: a pipeline with a `transformer` and a `scheduler`; adapters, offloading and another
            scheduler may come and go between walks.
        schedules: one for each set of timesteps that will run, or one alone. Other names of sites
            are understood (`harmonica.site_names`).
        sites: cacheable modules by name; None finds them (`harmonica.models.sites`).
        otherwise: what to do at timesteps that no schedule is for.
        offload: keep features in pinned host memory; exact, each is copied there and back. Slow:
            Flux without a cache is faster. For features that fit nowhere else (docs/scale.md).

    Yields a `Session`: `print(session)` says what was reused, `session.report()` in numbers. Raises
    TypeError if pipe has no transformer or scheduler, or a compiled transformer; ValueError if it
    cannot be cached, or a schedule does not fit it, or none is for the timesteps of a run. Warns at
    the end if a schedule reuses and no site was ever skipped.
    """
    several = (schedules,) if isinstance(schedules, Schedule) else items("schedules", schedules)
    given = [of_type("a schedule", each, Schedule, "Schedule.load(path)") for each in several]
    session = Session(pipe, given, sites, otherwise, offload)
    kind, open_sessions = type(pipe), _sessions.setdefault(pipe, [])
    del pipe  # this frame must not keep it alive
    with patched(kind, "__call__", _walked):
        open_sessions.append(session)
        try:
            yield session
        finally:
            open_sessions.remove(session)
    if session.skipped == 0 and any(schedule.cur > 0 for schedule in given):
        walks = f"no site was skipped while cached was open ({session.walks} walks were begun)"
        warnings.warn(f"{walks}; call this very pipeline inside the with", stacklevel=3)


def _walked(pipe: Any, call: Method, args: Any, kwargs: Any) -> Any:
    """Call a pipeline, as a walk of its innermost session if it has one."""
    open_sessions = _sessions.get(pipe)
    if not open_sessions and current.get() is None:
        return call(*args, **kwargs)
    walk = open_sessions[-1].walk() if open_sessions else in_walk(None)
    if inspect.isgeneratorfunction(call):
        return _streamed(walk, call(*args, **kwargs))
    if inspect.isasyncgenfunction(call):
        return _streamed_to_task(walk, call(*args, **kwargs))
    if inspect.iscoroutinefunction(call):
        return _awaited(walk, call(*args, **kwargs))
    with walk:
        return call(*args, **kwargs)


@contextmanager
def _own_context(walk: AbstractContextManager[None]) -> Iterator[Context]:
    """Open a walk in a context of its own: between two images, a caller is in no walk."""
    context = copy_context()
    context.run(walk.__enter__)
    try:
        yield context
    finally:
        context.run(walk.__exit__, None, None, None)


def _run_in(context: Context, steps: Any) -> Generator[Any, Any, Any]:
    """Do what `yield from steps` does, in a context."""
    go_on = partial(steps.send, None)
    while True:
        try:
            step = context.run(go_on)
        except StopIteration as end:
            return end.value
        try:
            go_on = partial(steps.send, (yield step))
        except GeneratorExit:
            raise
        except BaseException as error:  # that the caller throws in
            go_on = partial(steps.throw, error)


def _streamed(walk: AbstractContextManager[None], images: Any) -> Generator[Any, Any, Any]:
    with _own_context(walk) as context:
        try:
            return (yield from _run_in(context, images))
        finally:
            context.run(images.close)


async def _streamed_to_task(walk: AbstractContextManager[None], images: Any) -> Any:
    run_in = coroutine(_run_in)
    with _own_context(walk) as context:
        try:
            while True:
                yield await run_in(context, images.__anext__().__await__())
        except StopAsyncIteration:
            return
        finally:
            await run_in(context, images.aclose().__await__())


async def _awaited(walk: AbstractContextManager[None], image: Any) -> Any:
    with walk:
        return await image


def enable_cache(
    pipe: Any, schedules: Schedule | Sequence[Schedule], *,
    sites: Mapping[str, nn.Module] | None = None,
    otherwise: Literal["raise", "compute"] = "raise", offload: bool = False,
) -> Session:  # fmt: skip
    """Open `cached` with these arguments until `disable_cache(pipe)`, and return its session.

    A second call replaces the first.
    """
    stack = ExitStack()
    opened = cached(pipe, schedules, sites=sites, otherwise=otherwise, offload=offload)
    session = stack.enter_context(opened)
    disable_cache(pipe)
    session.disable = stack.close
    finalize(pipe, stack.close).atexit = False
    return session


def disable_cache(pipe: Any) -> None:
    """Make the pipeline the stock one again; nothing happens if no cache is enabled."""
    for session in list(_sessions.get(pipe, ())):
        if session.disable is not None:
            session.disable()
