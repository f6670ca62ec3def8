"""Stand-in: an object that runs a pipeline's own `__call__`, and tells a `Run` what happens in it.

A stand-in is of a class derived from the pipeline's. It has the same components, but a copy of the
scheduler and shallow copies of the models, which tell the run when they are called. The pipeline
itself, its scheduler and its models are never changed, so there is nothing to put back. This file
does not know denoisers, schedules or gates.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from harmonica.models.pipelines.recorded import Leave, state_of
from harmonica.models.pipelines.runs import Run
from harmonica.override import overridden

ENCODES = re.compile(r"_?(encode|get)_\w*(prompt|text|embed)\w*")
"""Methods of pipelines whose answer depends on the condition alone."""


class StandIns:
    """Makes stand-ins of one pipeline and runs them."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        kind = type(pipe)
        members: dict[str, Any] = {"__module__": kind.__module__}
        members["_execution_device"] = property(lambda stand_in: stand_in._run.device)
        for name in dir(kind):
            method = inspect.getattr_static(kind, name)
            tells = name == "prepare_latents" or ENCODES.fullmatch(name)
            if tells and inspect.isfunction(method):
                members[name] = _tap(name, method)
        self._class = type(kind.__name__, (kind,), members)
        self._devices: dict[torch.device, torch.device] = {}

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs; found once, since it walks through all modules."""
        home = next(self.pipe.transformer.parameters()).device
        if home not in self._devices:
            self._devices[home] = torch.device(self.pipe._execution_device)
        return self._devices[home]

    def run(self, run: Run, call: Mapping[str, Any]) -> None:
        """Run `__call__` with these arguments until it ends or `run` leaves."""
        stand_in: Any = object.__new__(self._class)
        own = vars(stand_in)
        own.update(vars(self.pipe), _run=run, _progress_bar_config={"disable": True})
        for name, part in vars(self.pipe).items():
            if isinstance(part, nn.Module):
                own[name] = _model(part, run, name)
        own["scheduler"] = run.scheduler = _scheduler(self.pipe.scheduler, run)
        module, name = sys.modules[type(self.pipe).__module__], "randn_tensor"

        def drawn(draw: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return run.prepared(name, draw(*args, **kwargs))

        with overridden([(module, name, drawn)] if hasattr(module, name) else []):
            try:
                stand_in(**call)
            except Leave as leave:
                if leave.args != (run,):
                    raise
            finally:
                del vars(run.scheduler)["step"]  # it refers to the run, which refers to it


def _tap(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def tap(self: Any, *args: Any, **kwargs: Any) -> Any:
        compute = partial(method, self, *args, **kwargs)
        if name == "prepare_latents":
            return self._run.prepared(name, compute())
        return self._run.encoded(name, compute, (args, kwargs))

    return tap


def _model(module: nn.Module, run: Run, name: str) -> nn.Module:
    """Return a shallow copy whose forward, and encode and decode if it has them, tell first. Hooks
    belong to the original, which is what runs in the end.
    """
    stand_in = copy.copy(module)
    own = vars(stand_in)
    own |= {key: type(it)() for key, it in own.items() if "_hooks" in key and isinstance(it, dict)}
    own["forward"] = partial(run.called, name, module)
    for method in ("encode", "decode"):
        if callable(getattr(module, method, None)):
            own[method] = partial(run.called, f"{name}.{method}", getattr(module, method))
    return stand_in


def _scheduler(scheduler: Any, run: Run) -> Any:
    """Return a copy of the scheduler, of the very same class, that tells before it steps."""
    stand_in = plain_scheduler(scheduler, vars(scheduler))
    tap = partial(_step, run, stand_in)
    vars(tap)["__signature__"] = inspect.signature(stand_in.step)  # pipelines look at it
    vars(stand_in)["step"] = tap
    return stand_in


def _step(run: Run, scheduler: Any, /, *args: Any, **kwargs: Any) -> Any:
    step = partial(type(scheduler).step, scheduler)
    # A pipeline may step a deep copy of its scheduler, and the tap is copied with it.
    if scheduler is not run.scheduler:
        return step(*args, **kwargs)
    given = inspect.signature(step).bind(*args, **kwargs).arguments
    return run.stepped(partial(step, *args, **kwargs), dict(given))


def plain_scheduler(scheduler: Any, state: dict[str, Any]) -> Any:
    """Return a scheduler of the same class in a state, its attributes by name."""
    plain = object.__new__(type(scheduler))
    vars(plain).update(state_of(state))
    return plain
