"""Pipelines: a stock diffusers pipeline under a schedule, with one line.

    with cached(pipe, schedule):
        images = pipe(prompt, num_inference_steps=20).images

While the `with` is open, three things are tapped, on the instances, and all are put back at its
end:

    scheduler.set_timesteps   a walk begins: k = 0, empty caches; the schedule is held against the timesteps
    scheduler.step            a step ends: k + 1
    transformer               a call begins: the row of step k, and one cache for each call within a step

So the step is counted where the pipeline itself counts it: nothing is looked up on the device, a
timestep may occur twice (Heun), and a walk that was interrupted is forgotten when the next one
begins. Pipelines that call the transformer once for each half of guidance get one cache for each
call.

`from_pipeline` turns a pipeline into a `Denoiser`, to train a schedule on the very walk that it
will run.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from harmonica.models.blocks import EXACT, FUSED, gated_blocks
from harmonica.models.pipelines.denoiser import PIPELINES, from_pipeline, original_numerics
from harmonica.models.pipelines.tracker import Session, answer, open_sessions
from harmonica.models.precompute import ahead
from harmonica.models.sites import sites
from harmonica.override import overridden
from harmonica.router import Schedule

__all__ = [
    "cached",
    "disable_cache",
    "enable_cache",
    "from_pipeline",
    "original_numerics",
    "sites",
    "summary",
]

_enabled: WeakKeyDictionary[Any, tuple[ExitStack, Session]] = WeakKeyDictionary()
"""Pipelines under `enable_cache`."""


@contextmanager
def cached(
    pipe: Any,
    schedule: Schedule,
    *,
    sites: Mapping[str, nn.Module] | None = None,
    parity: bool = False,
    exact: bool = True,
) -> Iterator[Session]:
    """Run a stock diffusers pipeline under a schedule for as long as the `with` is open.

    A schedule that computes everything gives the pipeline's own images, bit for bit. At the end
    everything is as it was, exception or not; what accelerate or others have put on top meanwhile
    stays.

    Args:
        pipe: a pipeline with a `transformer` and a `scheduler`, both as they will be used: adapters
            loaded, QKV fused, offloading switched on, scheduler set.
        schedule: for this scheduler's timesteps and these sites; names of the original DiT and
            tables without names or for kinds of site are understood (`harmonica.site_names`).
        sites: cacheable modules by name; None finds them (`harmonica.models.sites`).
        parity: for DiTPipeline: embed timesteps and normalise as the original DiT does
            (`original_numerics`).
        exact: compute what is computed bit for bit as the pipeline does. False, for DiT and PixArt
            pipelines, makes modulations of many steps in one product and fuses sums: faster, and
                other by rounding.

    Yields:
        Session: `print(session)` says what was reused.

    Raises:
        TypeError: if pipe has no transformer or scheduler, or has two transformers.
        ValueError: if the schedule does not fit, now or when the pipeline sets its timesteps.
        RuntimeError: from inside the pipeline, where a walk is not one that the schedule is for.

    Warns UserWarning at the end if the schedule reuses and no site was ever skipped.
    """
    for part in ("transformer", "scheduler"):
        if getattr(pipe, part, None) is None:
            raise TypeError(
                f"{type(pipe).__name__} has no {part}; cached takes a diffusers pipeline that has one"
            )
    if getattr(pipe, "transformer_2", None) is not None:
        raise TypeError(
            f"{type(pipe).__name__} runs two transformers in one walk, transformer and transformer_2; "
            "cached follows pipelines that have one"
        )
    transformer = pipe.transformer
    if not isinstance(transformer, nn.Module) or hasattr(transformer, "_orig_mod"):
        raise TypeError(
            "pipe.transformer is compiled, and compiled code does not ask; use the module it was compiled from"
        )
    if transformer.training:
        raise ValueError(
            "pipe.transformer is in training mode, where features are noisy; call its eval() first"
        )
    if not exact and type(pipe).__name__ not in PIPELINES:
        raise ValueError(
            f"exact=False is for {', '.join(PIPELINES)}, not {type(pipe).__name__}; leave it out"
        )
    session = Session(pipe, schedule, _found(transformer) if sites is None else sites, exact=exact)
    for other in open_sessions.get(transformer, []):
        if other.scheduler is pipe.scheduler and other.pipe() is not pipe:
            raise ValueError(
                "this pipeline shares its scheduler with another that is cached; give it a copy of its own"
            )
    del pipe  # this frame must not keep it alive
    with ExitStack() as stack:
        if parity:
            stack.enter_context(original_numerics(transformer))
        # A partial: a module that is copied inside the `with` is copied with an idle session.
        asking, math = functools.partial(answer, session), EXACT if exact else FUSED
        stack.enter_context(gated_blocks(transformer, session.modules, asking, math=math))
        stack.enter_context(ahead(transformer, session.clock))
        stack.enter_context(_tapped(session.scheduler, session))
        hook = transformer.register_forward_pre_hook(
            lambda module, args, kwargs: (
                session.call(args, kwargs) if module is transformer else None
            ),
            with_kwargs=True,
        )
        stack.callback(hook.remove)
        mine = open_sessions.setdefault(transformer, [])
        mine.append(session)
        stack.callback(mine.remove, session)
        stack.callback(session.forget)
        yield session
    if session.schedule.cur > 0 and session.skipped == 0:
        warnings.warn(
            f"no site was skipped while cached was open ({session.walks} walks were begun); run this very pipeline, "
            "with its transformer and scheduler as they were, inside the with",
            stacklevel=3,
        )


def _found(transformer: nn.Module) -> Mapping[str, nn.Module]:
    return sites(transformer)


@contextmanager
def _tapped(scheduler: Any, session: Session) -> Iterator[None]:
    """Tell the session when the scheduler sets its timesteps and when it steps."""
    with ExitStack() as stack:
        for name, tap in (("set_timesteps", _set_timesteps), ("step", _step)):
            method = getattr(scheduler, name)
            # A partial, as in `gated`: a scheduler copied inside the `with` has its own state, and
            # tells nobody.
            telling = functools.partial(tap, session, scheduler, method)
            vars(telling)["__signature__"] = inspect.signature(method)  # pipelines look at it
            stack.enter_context(overridden(name, [(scheduler, telling)]))
        yield


def _set_timesteps(
    session: Session, scheduler: Any, method: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    result = method(*args, **kwargs)
    if scheduler is session.scheduler:
        session.begin()
    return result


def _step(
    session: Session, scheduler: Any, method: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    if scheduler is session.scheduler:
        session.step(inspect.signature(method).bind(*args, **kwargs).arguments.get("timestep"))
    return method(*args, **kwargs)


def enable_cache(pipe: Any, schedule: Schedule) -> None:
    """Open `cached(pipe, schedule)` until `disable_cache(pipe)`; a second call replaces the first.

    Raises as `cached` does.
    """
    stack = ExitStack()
    opened = stack, stack.enter_context(cached(pipe, schedule))
    disable_cache(pipe)
    _enabled[pipe] = opened


def disable_cache(pipe: Any) -> None:
    """Make the pipeline the stock one again; nothing happens if no cache is enabled."""
    if pipe in _enabled:
        _enabled.pop(pipe)[0].close()


def summary(pipe: Any) -> str:
    """Say what `enable_cache` has done for this pipeline so far: walks, share of sites reused,
    theoretical speedup.
    """
    if pipe not in _enabled:
        return "no cache is enabled; enable_cache(pipe, schedule) enables one"
    return str(_enabled[pipe][1])
