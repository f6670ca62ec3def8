"""Session: what one open `cached` follows, walk by walk, and what has happened so far.

During a walk, in its thread or task alone:

    scheduler.set_timesteps, scheduler.step    tell the tracker (copies of the scheduler too)
    transformer                                tells the tracker
    blocks and sites of the transformer        ask the tracker, which reuses or computes
    embeddings, text projections               are answered ahead (harmonica.models.precompute)

Between walks nothing stands on the transformer: it can be called, saved, copied and changed like
any other. Every walk takes the scheduler, the transformer and the adapters that it finds.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.utils._pytree import tree_map

from harmonica.cache import called_by
from harmonica.models.arithmetic import EXACT, FUSED
from harmonica.models.blocks import gated_blocks
from harmonica.models.pipelines.checks import TRANSFORMERS, check_pipeline, transformers_of
from harmonica.models.pipelines.kept import Table
from harmonica.models.pipelines.standin import plain_scheduler
from harmonica.models.pipelines.tracker import Tracker, current
from harmonica.models.precompute import precomputed
from harmonica.models.site_costs import cost_of_call, without_numbers
from harmonica.models.sites import sites
from harmonica.override import Answer, Method, overridden, patched
from harmonica.router import Schedule

log = logging.getLogger(__name__)


class Session:
    """The tables of one open `cached`, and the counts of its walks; `report()` and `str()` tell.

    Args:
        pipe: the pipeline; not kept alive.
        schedules: one for each set of timesteps.
        modules: the sites by name; None finds them.
        exact, otherwise, offload: as `cached` takes them.

    Attributes:
        schedules: in the names of this pipeline's sites.
        walks: begun so far.
    """

    def __init__(
        self,
        pipe: Any,
        schedules: Sequence[Schedule],
        modules: Mapping[str, nn.Module] | None = None,
        *,
        exact: bool = True,
        otherwise: str = "raise",
        offload: bool = False,
    ) -> None:
        check_pipeline(pipe)
        self.pipe, self._kind, self.walks = ref(pipe), type(pipe).__name__, 0
        self._exact, self._otherwise, self._offload = exact, otherwise, offload
        self._given = modules
        self.sites = tuple(_sites_of(pipe) if modules is None else modules)
        self.schedules = [schedule.fit(self.sites) for schedule in schedules]
        for schedule in self.schedules:
            schedule.check(schedule.steps, self.sites)
        self._tables = [Table(schedule) for schedule in self.schedules]
        self._inputs: dict[str, Any] = {}  # of the first call of each transformer, without numbers
        self._costs: dict[str, Any] = {}
        self._live: list[Tracker] = []
        self._ended = Tracker(lambda times: None, len(self.sites))
        self._lock, self._told = threading.Lock(), set[str]()

    @contextmanager
    def walk(self) -> Iterator[None]:
        """Follow what runs in this `with`, in this thread or task, as a call of the pipeline.

        A call of the pipeline does so by itself; a loop that is written by hand does it here.
        Raises ValueError if the pipeline cannot be cached as it stands now.
        """
        pipe: Any = self.pipe()
        check_pipeline(pipe)
        models, scheduler = transformers_of(pipe), pipe.scheduler
        tracker = Tracker(
            lambda times: self._choose(scheduler, times),
            len(self.sites),
            exact=self._exact,
            offload=self._offload,
        )
        outer = current.get()
        with ExitStack() as stack:
            stack.callback(self._close, tracker)
            for name, answer in (("set_timesteps", _set_timesteps), ("step", _step)):
                stack.enter_context(patched(type(scheduler), name, answer))
            calls: list[tuple[Any, str, Answer]] = [
                (model, called_by(model), self._told_of_calls(tracker, name))
                for name, model in models.items()
            ]
            # Somebody's wrapper on the scheduler itself may call the class as it was before.
            calls += [
                (scheduler, name, partial(_tell, tell, scheduler))
                for name, tell in (("set_timesteps", _timesteps_set), ("step", _stepped))
                if name in vars(scheduler)
            ]
            stack.enter_context(overridden(calls))
            math = EXACT if self._exact else FUSED
            both = nn.ModuleList()
            both._modules.update(models)  # not added one by one, which would look like a change
            stack.enter_context(gated_blocks(both, self._modules(pipe), tracker.ask, math=math))
            for model in models.values():
                stack.enter_context(precomputed(model, tracker.memo))
            with self._lock:
                self.walks += 1
                self._live.append(tracker)
            stack.callback(current.set, outer)
            current.set(tracker)
            yield

    def _modules(self, pipe: Any) -> list[nn.Module]:
        if self._given is not None:
            return list(self._given.values())
        models, modules = transformers_of(pipe), []
        for site in self.sites:
            part, _, rest = site.partition(".")
            model, path = (models[part], rest) if part in models else (models["transformer"], site)
            try:
                modules.append(model.get_submodule(path))
            except AttributeError:
                raise ValueError(
                    f"{type(model).__name__} has no {path} any more, which is a site of this table; "
                    "after changing the model's parts, open cached(pipe, schedule) again"
                ) from None
        return modules

    def _told_of_calls(self, tracker: Tracker, name: str) -> Answer:
        def answer(forward: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if current.get() is tracker:
                if name not in self._inputs:
                    self._inputs[name] = tree_map(without_numbers, (args, kwargs))
                tracker.call(name, (args, kwargs))
            return forward(*args, **kwargs)

        return answer

    def _choose(self, scheduler: Any, times: tuple[float, ...]) -> tuple[Table, int] | None:
        """Return the table for these timesteps, and the row of the first of them."""
        fitting = [(table.start(times), table) for table in self._tables]
        for start, table in sorted(fitting, key=lambda pair: pair[0] or 0):
            if start is not None:
                return table, start
        run = f"{len(times)} steps {_span(times)}"
        if self._otherwise == "compute":
            self._say_once(f"no table is for the {run} of a run, so all of it is computed")
            return None
        tables = "; ".join(f"{each.steps} steps {_span(each.timesteps)}" for each in self.schedules)
        message = (
            f"no table is for the {run} of this run; there are tables for {tables}. Run one of "
        )
        message += "these, add a table, or pass otherwise='compute'"
        if len(self.schedules) == 1:
            try:
                self.schedules[0].check(len(times), self.sites, times)
            except ValueError as error:
                message = str(error)
        if getattr(scheduler.config, "use_dynamic_shifting", False):
            message += (
                f". {type(scheduler).__name__} shifts its timesteps with the resolution "
                "(use_dynamic_shifting): a table belongs to the resolution it was made at"
            )
        raise ValueError(message)

    def _close(self, tracker: Tracker) -> None:
        tracker.end()
        with self._lock:
            if tracker in self._live:
                self._live.remove(tracker)
            self._ended.add(tracker)
        for reason, count in tracker.beyond.items():
            self._say_once(
                f"a walk computed {count} sites although the table reuses them: {reason}", reason
            )

    def _say_once(self, text: str, key: str = "") -> None:
        if (key or text) not in self._told:
            self._told.add(key or text)
            log.warning("%s (said once)", text)

    @property
    def asked(self) -> int:
        """How often sites were asked for their output."""
        return sum(sum(tracker.asked) for tracker in self._all())

    @property
    def skipped(self) -> int:
        """How often one of them was answered without computing."""
        return sum(sum(tracker.skipped) for tracker in self._all())

    def report(self) -> dict[str, Any]:
        """Return what has happened, in numbers, for a server's metrics.

        `beyond` counts what was computed although the table reuses it, by reason.
        """
        trackers = self._all()
        beyond = sum((tracker.beyond for tracker in trackers), Counter[str]())
        asked, skipped = self.asked, self.skipped
        return {
            "walks": self.walks,
            "in_flight": len(trackers) - 1,
            "asked": asked,
            "skipped": skipped,
            "reused_share": skipped / asked if asked else 0.0,
            "beyond": dict(beyond),
        }

    def __str__(self) -> str:
        told = self.report()
        lines = [
            f"{self._kind}, {each.steps} steps × {len(self.sites)} sites, CUR {each.cur:.1%}"
            for each in self.schedules
        ]
        lines += [f"{told['walks']} walks, {told['reused_share']:.1%} of the sites reused so far"]
        lines += [f"computed beyond the table: {n} ({why})" for why, n in told["beyond"].items()]
        if (speedup := self.speedup()) is not None:
            lines.append(f"theoretical speedup of the transformer {speedup:.2f}x")
        return "\n".join(lines)

    def _all(self) -> list[Tracker]:
        with self._lock:
            return [self._ended, *self._live]

    def speedup(self) -> float | None:
        """Return the speedup of the transformer so far, by multiply-accumulates.

        Counting them takes seconds, once. None before the first walk, or if torch cannot count.
        """
        trackers, full, saved = self._all(), 0.0, 0.0
        for name, sites_of in self._columns().items():
            calls = sum(tracker.calls[name] for tracker in trackers)
            cost = self._cost(name, sites_of) if calls else None
            if calls and cost is None:
                return None
            if cost is not None:
                full += calls * cost.total
                for site, price in zip(sites_of, cost.sites.tolist(), strict=True):
                    saved += price * sum(tracker.skipped[site] for tracker in trackers)
        return full / (full - saved) if full > saved else None

    def _columns(self) -> dict[str, list[int]]:
        """Return the columns of each transformer's sites."""
        columns: dict[str, list[int]] = {}
        for column, site in enumerate(self.sites):
            part = site.partition(".")[0]
            columns.setdefault(part if part in TRANSFORMERS[1:] else "transformer", []).append(
                column
            )
        return columns

    def _cost(self, name: str, columns: Sequence[int]) -> Any:
        """Count one call like the first one, with zeros for its tensors; None if torch cannot."""
        pipe = self.pipe()
        if name not in self._costs and pipe is not None:
            try:
                modules = self._modules(pipe)
                mine = {self.sites[column]: modules[column] for column in columns}
                self._costs[name] = cost_of_call(
                    transformers_of(pipe)[name], mine, self._inputs[name]
                )
            except Exception as error:  # a summary must not fail where the pipeline ran
                self._say_once(f"the operations of {name} cannot be counted: {error}")
                self._costs[name] = None
        return self._costs.get(name)


def _set_timesteps(method: Method, scheduler: Any, /, *args: Any, **kwargs: Any) -> Any:
    return _tell(_timesteps_set, scheduler, partial(method, scheduler), args, kwargs)


def _step(method: Method, scheduler: Any, /, *args: Any, **kwargs: Any) -> Any:
    return _tell(_stepped, scheduler, partial(method, scheduler), args, kwargs)


def _tell(
    tell: Method, scheduler: Any, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    result = method(*args, **kwargs)
    if (tracker := current.get()) is not None:
        tell(tracker, scheduler, args, kwargs)
    return result


def _timesteps_set(tracker: Tracker, scheduler: Any, args: Any, kwargs: Any) -> None:
    """Begin, with the timesteps as numbers; those on a device are made again on the CPU, where
    nothing waits.
    """
    times, method = scheduler.timesteps, inspect.unwrap(type(scheduler).set_timesteps)
    on_cpu, signature = scheduler, inspect.signature(method)
    if not torch.as_tensor(times).is_cpu and "device" in signature.parameters:
        on_cpu = plain_scheduler(scheduler)
        bound = signature.bind(on_cpu, *args, **kwargs)
        bound.arguments["device"] = "cpu"
        method(*bound.args, **bound.kwargs)
    tracker.begin(torch.as_tensor(on_cpu.timesteps).tolist(), times)


def _stepped(tracker: Tracker, scheduler: Any, args: Any, kwargs: Any) -> None:
    bound = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs)
    tracker.step(bound.arguments.get("timestep"))


def _sites_of(pipe: Any) -> list[str]:
    names = []
    for name, model in transformers_of(pipe).items():
        names += [f"{'' if name == 'transformer' else f'{name}.'}{site}" for site in sites(model)]
    return names


def _span(times: Sequence[float]) -> str:
    return f"({times[0]:g} … {times[-1]:g})" if times else "(any timesteps)"
