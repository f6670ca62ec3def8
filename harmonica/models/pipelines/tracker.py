"""Session: what one open `cached` knows of its pipeline, and when it must refuse to go on.

    begin    the scheduler sets its timesteps: k = 0, empty caches
    call     the transformer is called: the gate of step k and of this call within the step
    step     the scheduler steps: k + 1; after the last step the features are let go

Whatever would make a cached feature stale raises: another scheduler or transformer, other shapes,
more or fewer calls in a step than in the first, a walk that starts in the middle. How it is told is
pipelines.py's to know.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from harmonica.cache import Cache, Compute, Feature, Gate
from harmonica.cost import Count
from harmonica.inference.lifetimes import Plan
from harmonica.models.precompute import Clock
from harmonica.models.sites import count_calls
from harmonica.router import Schedule

MOST_CALLS = 16
"""Calls of the transformer before the scheduler's first step, each with features of its own, that
are believed."""


class Session:
    """What one open `cached` knows: where the walk is, and what it has saved so far. `str()` says
    it.

    Attributes:
        schedule: in the names of this pipeline's sites.
        clock: where the walk is, for what is known ahead of it.
        walks: walks begun.
        skipped, asked: sites that were reused, and that were asked, over all walks.
    """

    def __init__(
        self, pipe: Any, schedule: Schedule, modules: Mapping[str, nn.Module], *, exact: bool = True
    ) -> None:
        self.pipe = weakref.ref(pipe)  # enable_cache must not keep a pipeline alive
        self.transformer, self.scheduler = pipe.transformer, pipe.scheduler
        self.modules = modules
        self.schedule = schedule.fit(tuple(modules))
        self.schedule.check(self.schedule.steps, tuple(modules))
        self.clock = Clock(rows=not exact, trusted=False)
        self.walks = self.skipped = self.asked = 0
        self._plan = Plan.of(self.schedule)
        self._skips = (~self.schedule.compute).sum(1).tolist()
        self._inputs: Any = None
        self.forget()

    def forget(self) -> None:
        """Be between two walks: sites compute, and no feature is kept."""
        self._k = -1
        self._calls = 0  # of the transformer since the last step
        self._caches: list[Cache] = []  # one for each call within a step
        self._shapes: list[list[torch.Size]] = []
        self._gate: Gate | None = None
        self._times_asked: dict[int, int] = {}
        self.clock.end()

    def begin(self) -> None:
        """Begin a walk, if this session is the innermost of its scheduler; others of this
        transformer step back.
        """
        sessions = open_sessions.get(self.transformer, [])
        if self is not next(
            (each for each in reversed(sessions) if each.scheduler is self.scheduler), None
        ):
            return
        self._must_be_the_same_parts()
        for other in sessions:
            other.forget()
        times = tuple(torch.as_tensor(self.scheduler.timesteps).tolist())
        self.schedule.check(len(times), self.schedule.sites, times)
        self._k, self.walks = 0, self.walks + 1
        self.clock.begin(times)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a call of the transformer: choose the gate of this step and this call."""
        self._must_be_the_same_parts()
        if self._k < 0:
            return
        call, self._calls = self._calls, self._calls + 1
        self.clock.k, self.clock.call = self._k, call
        shapes = [leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._must_be_the_same_walk(call, shapes)
        if self._k == 0:
            self._caches.append({})
            self._shapes.append(shapes)
            self._times_asked = {}
            self._inputs = tree_map(
                lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs)
            )
        gate = self._plan.gate(self._k, self._caches[call])
        self._gate = self._counting(gate) if self._k == 0 else gate
        self.asked, self.skipped = (
            self.asked + len(self.modules),
            self.skipped + self._skips[self._k],
        )

    def _must_be_the_same_walk(self, call: int, shapes: list[torch.Size]) -> None:
        at = f"at step {self._k} of {self.schedule.steps}"
        if self.transformer.training:
            raise RuntimeError(
                f"the transformer is in training mode {at}, so its features are noisy; call its eval()"
            )
        if self._k == 0 and call == MOST_CALLS:
            raise RuntimeError(
                f"the transformer was called {call} times and the scheduler has not stepped; a walk interrupted at its "
                "first step, or calls outside of a walk? session.forget() ends it"
            )
        if self._k == 0:
            return
        if call >= len(self._caches):
            raise RuntimeError(
                f"the transformer is called {call + 1} times {at}, and was called {len(self._caches)} times at step 0: "
                "guidance, or whatever else makes calls, changed in the middle of a walk; keep it the same, or sample "
                "without the cache"
            )
        if shapes != self._shapes[call]:
            then, now = (
                [tuple(shape) for shape in group] for group in (self._shapes[call], shapes)
            )
            raise RuntimeError(
                f"the transformer's inputs have shapes {now} {at}, and had {then} at step 0: batch, size or guidance "
                "changed in the middle of a walk, so cached features do not fit; keep them the same"
            )

    def _must_be_the_same_parts(self) -> None:
        pipe = self.pipe()
        for part, mine in (("scheduler", self.scheduler), ("transformer", self.transformer)):
            if pipe is not None and getattr(pipe, part) is not mine:
                raise RuntimeError(
                    f"the {part} of {type(pipe).__name__} was replaced inside the with, and the new one is not "
                    f"followed; set the {part} first, then open cached(pipe, schedule)"
                )

    def _counting(self, gate: Gate) -> Gate:
        """Count how often each site is asked, at step 0, where everything computes anyway."""
        asked = self._times_asked

        def counting(site: int, compute: Compute) -> Feature:
            asked[site] = asked.get(site, 0) + 1
            if asked[site] > 1:
                name = self.schedule.sites[site]
                raise RuntimeError(
                    f"{name} is called more than once in one call of the transformer, and has one feature; if its "
                    "feed-forward runs in chunks, call set_chunk_feed_forward(None, 0) on the blocks, else leave "
                    "the module out: cached(pipe, schedule, sites={…})"
                )
            return gate(site, compute)

        return counting

    def step(self, timestep: Any) -> None:
        """End a step, before the scheduler takes it."""
        if self._k < 0:
            return
        self._must_be_the_same_parts()
        if self._k == 0:
            first = float(torch.as_tensor(self.scheduler.timesteps)[0])
            start = first if timestep is None else float(torch.as_tensor(timestep).flatten()[0])
            if start != first:
                raise RuntimeError(
                    f"this walk starts at timestep {start:g}, not at the first one, {first:g} (image to "
                    "image?); a schedule is for whole walks: train one from there, or sample without the cache"
                )
            if self._calls and not self._times_asked:
                raise RuntimeError(
                    "the transformer ran and asked no site; something else has replaced its modules"
                )
        elif self._calls != len(self._caches):
            raise RuntimeError(
                f"the transformer was called {self._calls} times at step {self._k} and {len(self._caches)} times at "
                "step 0; a pipeline that steps its scheduler without the transformer (a second transformer, two steps "
                "for one call) or changes its guidance in the middle of a walk cannot be followed"
            )
        self._k, self._calls, self._gate = self._k + 1, 0, None
        if self._k == self.schedule.steps:
            self.forget()  # the features are let go with the walk

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """Return a session of no pipeline: a copied module computes, and a copied scheduler tells
        nobody.
        """
        idle = copy.copy(self)
        idle.scheduler, idle.clock = None, Clock()
        idle.forget()
        return idle

    def __str__(self) -> str:
        share = self.skipped / self.asked if self.asked else 0.0
        head = f"{type(self.transformer).__name__}, {self.schedule.steps} steps × {len(self.modules)} sites"
        lines = [
            f"{head}, CUR {self.schedule.cur:.1%}",
            f"{self.walks} walks, {share:.1%} of the sites reused so far",
        ]
        if self._inputs is not None:
            count = self._costed()
            if count is not None:
                faster = self.schedule.speedup(count.macs)
                lines.append(
                    f"theoretical speedup of the transformer {faster:.2f}x ({count.macs.covered:.1%} covered)"
                )
        return "\n".join(lines)

    def _costed(self) -> Count | None:
        """Count one call like the last one, with zeros for its tensors."""
        weight = next(self.transformer.parameters())
        args, kwargs = tree_map(
            lambda leaf: (
                torch.zeros_like(leaf, device=weight.device) if isinstance(leaf, Tensor) else leaf
            ),
            self._inputs,
        )
        names = _argument_names(self.transformer)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        return count_calls(self.transformer, self.modules, inputs)


def answer(session: Session, site: int, compute: Compute) -> Feature:
    """Answer a site: by the schedule inside a walk, by computing outside of one."""
    gate = session._gate
    return compute() if gate is None else gate(site, compute)


open_sessions: WeakKeyDictionary[nn.Module, list[Session]] = WeakKeyDictionary()
"""Open sessions of each transformer, outermost first."""


def _argument_names(transformer: nn.Module) -> list[str]:
    return list(inspect.signature(type(transformer).forward).parameters)[1:]
