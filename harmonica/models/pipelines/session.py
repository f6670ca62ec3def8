"""Session: what one open `cached` follows, walk by walk, and what has happened so far.

During a walk, in its thread or task alone:

    scheduler, its copies, transformer     tell the tracker what is called
    blocks and sites of the transformer    ask the tracker, which reuses or computes

Between walks nothing stands on the transformer: it can be called, saved, copied and changed like
any other. Every walk takes the scheduler, the transformer and the adapters that it finds.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import isclose
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from harmonica.cache import called_by
from harmonica.cost import Macs, cost_of_call
from harmonica.inference.lifetimes import plan_of
from harmonica.models.blocks import gated_blocks
from harmonica.models.pipelines import checks
from harmonica.models.pipelines.taps import tapped
from harmonica.models.pipelines.tracker import Counts, Rows, Tracker, current, in_walk
from harmonica.override import Method, overridden
from harmonica.router import Schedule
from harmonica.site_names import fit
from harmonica.values import require

log = logging.getLogger(__name__)


class Session:
    """The tables of one open `cached`, and the counts of its walks; `report()` and `str()` tell.

    Takes what `cached` takes; the pipeline is not kept alive. `sites` are their names, which the
    `schedules` are brought into. `walks` counts those that were begun.
    """

    def __init__(
        self, pipe: Any, schedules: Sequence[Schedule], modules: Mapping[str, nn.Module] | None,
        otherwise: str, offload: bool,
    ) -> None:  # fmt: skip
        checks.check_pipeline(pipe)
        given = f"otherwise is {otherwise!r}; it must be 'raise' or 'compute'"
        require(otherwise in ("raise", "compute"), given)
        self.pipe, self._kind, self.walks = ref(pipe), type(pipe).__name__, 0
        self.disable: Callable[[], None] | None = None  # where `enable_cache` opened it
        self._given, self._otherwise, self._offload = modules, otherwise, offload
        self.sites = tuple(checks.sites_of(pipe) if modules is None else modules)
        self.schedules = [fit(schedule, self.sites) for schedule in schedules]
        for schedule in self.schedules:
            schedule.check(schedule.steps, self.sites)
        of = [(each.steps, each.timesteps) for each in self.schedules]
        twice = f"two of {len(of)} schedules are for the same timesteps; pass the one to run"
        require(len(set(of)) == len(of), twice)
        none = "there is no schedule; pass one, or otherwise='compute' to reuse nothing"
        require(bool(of) or otherwise == "compute", none)
        self._tables = [(schedule, plan_of(schedule)) for schedule in self.schedules]
        self._inputs: dict[str, Any] = {}  # of the first call of each transformer, without numbers
        self._costs: dict[str, Macs | None] = {}
        self._live, self._ended = list[Tracker](), Counts()
        self._lock, self._told = threading.Lock(), set[str]()

    @contextmanager
    def walk(self) -> Iterator[None]:
        """Follow what runs in this `with`, in this thread or task, as a call of the pipeline.

        A call of the pipeline does so by itself; a loop that is written by hand does it here.
        Raises ValueError if the pipeline cannot be cached as it stands now.
        """
        pipe: Any = self.pipe()
        checks.check_pipeline(pipe)
        tracker = Tracker(partial(self._choose, pipe.scheduler), self._offload)
        models = nn.ModuleDict(checks.transformers_of(pipe))
        taps = ((m, called_by(m), partial(self._tap, tracker, name)) for name, m in models.items())
        blocks = gated_blocks(models, self._modules(pipe), tracker.ask)
        with tapped(pipe.scheduler), overridden(taps), blocks, in_walk(tracker):
            with self._lock:
                self.walks += 1
                self._live.append(tracker)
            try:
                yield
            finally:
                self._close(tracker)

    def _tap(self, tracker: Tracker, name: str, forward: Method, args: Any, kwargs: Any) -> Any:
        if current.get() is not tracker:
            return forward(*args, **kwargs)
        if name not in self._inputs:
            shapes_alone = partial(Tensor.to, device="meta")
            self._inputs[name] = tree_map_only(Tensor, shapes_alone, (args, kwargs))
        with tracker.call(name, (args, kwargs)):
            return forward(*args, **kwargs)

    def _modules(self, pipe: Any) -> list[nn.Module]:
        if self._given is not None:
            return list(self._given.values())
        try:
            models = nn.ModuleDict(checks.transformers_of(pipe))
            return [models.get_submodule(_path(site)) for site in self.sites]
        except AttributeError as error:
            todo = "after changing the model's parts, open cached(pipe, schedule) again"
            raise ValueError(f"a site of this table is gone ({error}); {todo}") from None

    def _choose(self, scheduler: Any, times: tuple[float, ...]) -> tuple[Rows, int] | None:
        """Return the table for these timesteps, and the row of the first of them."""
        pairs = [(rows, _row_of(each, times)) for each, rows in self._tables]
        if fitting := [(rows, k) for rows, k in pairs if k is not None]:
            return min(fitting, key=lambda pair: abs(pair[1]))
        run = f"no table is for the {len(times)} steps {_span(times)} of this run"
        if self._otherwise == "compute":
            self._say_once(f"{run}, so all of it is computed")
            return None
        have = "; ".join(f"{each.steps} steps {_span(each.timesteps)}" for each in self.schedules)
        todo = "Run one of these, add a table (schedule.resample stretches one), or pass "
        todo += "otherwise='compute'"
        if getattr(scheduler.config, "use_dynamic_shifting", False):
            shifts = f"{type(scheduler).__name__} shifts its timesteps with the resolution"
            todo += f". {shifts}: a table belongs to the one it was made at"
        raise ValueError(f"{run}; there are tables for {have}. {todo}")

    def _close(self, tracker: Tracker) -> None:
        tracker.end()
        with self._lock:
            self._live.remove(tracker)
            self._ended += tracker.counts
        for what, why in tracker.counts:
            if what == "beyond":
                self._say_once(f"sites are computed although the table reuses them: {why}")

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            log.warning("%s (said once)", text)

    def _counts(self) -> Counts:
        with self._lock:  # copies: walks go on counting meanwhile
            return sum((Counter(each.counts) for each in self._live), Counter(self._ended))

    @property
    def skipped(self) -> int:
        """How often a site was answered without computing."""
        return int(self.report()["skipped"])

    def report(self) -> dict[str, Any]:
        """Return what has happened, in numbers, for a server's metrics: `asked` counts the answers
        of sites, `skipped` those without computing, and `beyond`, for each reason, those computed
        although the table reuses them.
        """
        counts = self._counts().items()
        skipped = sum(n for (event, _), n in counts if event == "skipped")
        asked = skipped + sum(n for (event, _), n in counts if event == "computed")
        walks = {"walks": self.walks, "in_flight": len(self._live), "asked": asked}
        share = {"skipped": skipped, "reused_share": skipped / max(asked, 1)}
        beyond = {why: n for (event, why), n in counts if event == "beyond"}
        return {**walks, **share, "beyond": beyond}

    def __str__(self) -> str:
        report, size = self.report(), f"steps × {len(self.sites)} sites"
        lines = [f"{self._kind}, {s.steps} {size}, CUR {s.cur:.1%}" for s in self.schedules]
        lines += [f"{report['reused_share']:.1%} of the sites reused so far, walks: {self.walks}"]
        lines += [f"computed beyond the table: {n} ({why})" for why, n in report["beyond"].items()]
        if (speedup := self.speedup()) is not None:
            lines.append(f"theoretical speedup of the transformer {speedup:.2f}x")
        return "\n".join(lines)

    def speedup(self) -> float | None:
        """Return the speedup of the transformer so far, by multiply-accumulates.

        Counting them takes seconds, once. None before the first walk, or if torch cannot count.
        """
        counts, full, saved = self._counts(), 0.0, 0.0
        for name in list(self._inputs):
            mine = [i for i, site in enumerate(self.sites) if _path(site).startswith(f"{name}.")]
            if name not in self._costs:
                self._costs[name] = self._cost(name, mine)
            if (cost := self._costs[name]) is None:
                return None
            full += counts["calls", name] * cost.total
            prices = zip(mine, cost.sites.tolist(), strict=True)
            saved += sum(price * counts["skipped", i] for i, price in prices)
        return full / (full - saved) if full > saved else None

    def _cost(self, name: str, columns: Sequence[int]) -> Macs | None:
        """Count a call like the first one of this transformer; None if torch cannot."""
        pipe: Any = self.pipe()
        try:
            modules = self._modules(pipe)
            parts = {self.sites[i]: modules[i] for i in columns}
            return cost_of_call(getattr(pipe, name), parts, self._inputs[name])
        except Exception as error:  # a summary must not fail where the pipeline ran
            self._say_once(f"the operations of {name} cannot be counted: {error}")
            return None


def _row_of(schedule: Schedule, times: Sequence[float]) -> int | None:
    """Return the row of the first of these timesteps, None if the table is not for them.

    They may be a tail of the table's, or the table's a part of them, as where a run begins from an
    image: row -2 is two steps before the table. A table without timesteps is for any T of them.
    """
    own, T, n = schedule.timesteps, schedule.steps, len(times)
    if not own:
        return 0 if n == T else None
    shared = min(T, n)
    pairs = ((own[T - shared :], times[i : i + shared]) for i in range(n - shared, -1, -1))
    alike = (all(isclose(a, b, rel_tol=1e-5) for a, b in zip(*p, strict=True)) for p in pairs)
    offset = next((i for i, same in enumerate(alike) if same), None)
    return None if offset is None else T - n + offset


def _path(site: str) -> str:
    """Return where a site is in the pipeline."""
    first, *others = checks.TRANSFORMERS
    return site if site.split(".")[0] in others else f"{first}.{site}"


def _span(times: Sequence[float]) -> str:
    return f"({times[0]:g} … {times[-1]:g})" if times else "(any timesteps)"
