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

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import ref

from torch import nn
from torch.utils._pytree import tree_map

from harmonica.cache import called_by
from harmonica.columns import fit
from harmonica.cost import Macs
from harmonica.models.arithmetic import EXACT, FUSED
from harmonica.models.blocks import gated_blocks
from harmonica.models.pipelines.checks import TRANSFORMERS, check_pipeline, transformers_of
from harmonica.models.pipelines.kept import Table
from harmonica.models.pipelines.taps import tapped
from harmonica.models.pipelines.tracker import Tracker, current
from harmonica.models.precompute import precomputed
from harmonica.models.site_costs import cost_of_call, without_numbers
from harmonica.models.sites import sites
from harmonica.override import Answer, Method, overridden
from harmonica.router import Schedule

PIPELINES = ("DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline")
"""What `cached(…, exact=False)` knows."""

log = logging.getLogger(__name__)


class Session:
    """The tables of one open `cached`, and the counts of its walks; `report()` and `str()` tell.

    Args:
        pipe: the pipeline; not kept alive.
        schedules: one for each set of timesteps.
        modules: the sites by name; None finds them.
        exact, otherwise, offload: as `cached` takes them.

    Attributes:
        sites: their names.
        schedules: in the names of these sites.
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
        if not exact and self._kind not in PIPELINES:
            known = ", ".join(PIPELINES)
            raise ValueError(f"exact=False is for {known}, not {self._kind}; leave it out")
        if otherwise not in ("raise", "compute"):
            raise ValueError(f"otherwise is {otherwise!r}; it must be 'raise' or 'compute'")
        self._exact, self._otherwise, self._offload = exact, otherwise, offload
        self._given = modules
        self.sites = tuple(_sites_of(pipe) if modules is None else modules)
        self.schedules = [fit(schedule, self.sites) for schedule in schedules]
        for schedule in self.schedules:
            schedule.check(schedule.steps, self.sites)
        self._tables = [Table(schedule) for schedule in self.schedules]
        self._inputs: dict[str, Any] = {}  # of the first call of each transformer, without numbers
        self._costs: dict[str, Macs | None] = {}
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
        how: dict[str, Any] = {"exact": self._exact, "offload": self._offload}
        tracker = Tracker(partial(self._choose, scheduler), len(self.sites), **how)
        both = nn.ModuleList()
        both._modules.update(models)  # not added one by one, which would look like a change
        with ExitStack() as stack:
            stack.callback(self._close, tracker)
            stack.enter_context(tapped(scheduler))
            stack.enter_context(overridden(self._taps(tracker, models)))
            math = EXACT if self._exact else FUSED
            stack.enter_context(gated_blocks(both, self._modules(pipe), tracker.ask, math=math))
            for model in models.values():
                stack.enter_context(precomputed(model, tracker.memo))
            with self._lock:
                self.walks += 1
                self._live.append(tracker)
            stack.callback(current.set, current.get())
            current.set(tracker)
            yield

    def _taps(
        self, tracker: Tracker, models: Mapping[str, Any]
    ) -> Iterator[tuple[Any, str, Answer]]:
        def answer(name: str, forward: Method, args: Any, kwargs: Any) -> Any:
            if current.get() is tracker:
                if name not in self._inputs:
                    self._inputs[name] = tree_map(without_numbers, (args, kwargs))
                tracker.call(name, (args, kwargs))
            return forward(*args, **kwargs)

        return ((model, called_by(model), partial(answer, name)) for name, model in models.items())

    def _modules(self, pipe: Any) -> list[nn.Module]:
        if self._given is not None:
            return list(self._given.values())
        models, modules = transformers_of(pipe), []
        for site in self.sites:
            name, path = _place(site)
            try:
                modules.append(models[name].get_submodule(path))
            except (AttributeError, KeyError):
                raise ValueError(
                    f"pipe.{name} has no {path} any more, which is a site of this table; after "
                    "changing the model's parts, open cached(pipe, schedule) again"
                ) from None
        return modules

    def _choose(self, scheduler: Any, times: tuple[float, ...]) -> tuple[Table, int] | None:
        """Return the table for these timesteps, and the row of the first of them."""
        starts = [(start, t) for t in self._tables if (start := t.start(times)) is not None]
        if starts:
            start, table = min(starts, key=lambda pair: pair[0])
            return table, start
        run = f"no table is for the {len(times)} steps {_span(times)}"
        if self._otherwise == "compute":
            self._say_once(f"{run} of a run, so all of it is computed")
            return None
        have = "; ".join(f"{each.steps} steps {_span(each.timesteps)}" for each in self.schedules)
        message = f"{run} of this run; there are tables for {have}. Run one of these, add a table, "
        message += "or pass otherwise='compute'"
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

    def _all(self) -> list[Tracker]:
        with self._lock:
            return [self._ended, *self._live]

    @property
    def skipped(self) -> int:
        """How often a site was answered without computing."""
        return sum(sum(tracker.skipped) for tracker in self._all())

    def report(self) -> dict[str, Any]:
        """Return what has happened, in numbers, for a server's metrics.

        `asked` counts the answers of sites, and `skipped` those without computing. `beyond` counts
        what was computed although the table reuses it, by reason.
        """
        trackers = self._all()
        asked, skipped = sum(sum(t.asked) for t in trackers), self.skipped
        return {
            "walks": self.walks,
            "in_flight": len(trackers) - 1,
            "asked": asked,
            "skipped": skipped,
            "reused_share": skipped / asked if asked else 0.0,
            "beyond": dict(sum((t.beyond for t in trackers), Counter[str]())),
        }

    def __str__(self) -> str:
        told, n = self.report(), len(self.sites)
        lines = [
            f"{self._kind}, {each.steps} steps × {n} sites, CUR {each.cur:.1%}"
            for each in self.schedules
        ]
        lines += [f"{told['reused_share']:.1%} of the sites reused so far, walks: {told['walks']}"]
        lines += [f"computed beyond the table: {n} ({why})" for why, n in told["beyond"].items()]
        if (speedup := self.speedup()) is not None:
            lines.append(f"theoretical speedup of the transformer {speedup:.2f}x")
        return "\n".join(lines)

    def speedup(self) -> float | None:
        """Return the speedup of the transformer so far, by multiply-accumulates.

        Counting them takes seconds, once. None before the first walk, or if torch cannot count.
        """
        trackers, full, saved = self._all(), 0.0, 0.0
        for name in TRANSFORMERS:
            mine = [i for i, site in enumerate(self.sites) if _place(site)[0] == name]
            calls = sum(tracker.calls[name] for tracker in trackers)
            if calls:
                if (cost := self._cost(name, mine)) is None:
                    return None
                full += calls * cost.total
                for i, price in zip(mine, cost.sites.tolist(), strict=True):
                    saved += price * sum(tracker.skipped[i] for tracker in trackers)
        return full / (full - saved) if full > saved else None

    def _cost(self, name: str, columns: Sequence[int]) -> Macs | None:
        """Count one call like the first one, with zeros for its tensors; None if torch cannot."""
        pipe = self.pipe()
        if name not in self._costs and pipe is not None:
            try:
                modules = self._modules(pipe)
                mine = {self.sites[i]: modules[i] for i in columns}
                model, inputs = transformers_of(pipe)[name], self._inputs[name]
                self._costs[name] = cost_of_call(model, mine, inputs)
            except Exception as error:  # a summary must not fail where the pipeline ran
                self._say_once(f"the operations of {name} cannot be counted: {error}")
                self._costs[name] = None
        return self._costs.get(name)


def _sites_of(pipe: Any) -> list[str]:
    return [
        site if name == "transformer" else f"{name}.{site}"
        for name, model in transformers_of(pipe).items()
        for site in sites(model)
    ]


def _place(site: str) -> tuple[str, str]:
    """Return the name of a site's transformer, and where it is in there."""
    name, _, path = site.partition(".")
    return (name, path) if name in TRANSFORMERS[1:] else (TRANSFORMERS[0], site)


def _span(times: Sequence[float]) -> str:
    return f"({times[0]:g} … {times[-1]:g})" if times else "(any timesteps)"
