"""Tracker: follows one call of a pipeline, and decides at each site whether anything can be reused.

    pipe(…)                      a walk begins; it belongs to this thread or task
      scheduler.set_timesteps    the table for these timesteps is chosen; nothing is kept yet
      transformer(…)             the features of this call are found: same transformer, same shapes
        site                     gate: reuse if the table says so and a valid feature is kept
      scheduler.step             the step ends, if the transformer was called since the last one
    pipe(…) returns or raises    the walk ends; every feature is let go

One rule replaces refusals: *where nothing valid is kept, compute*. So the first step that runs
computes everything; which row of the table it was is known when the scheduler steps. A call of
other shapes, a further call in a step, a feature that was changed in place, a second transformer:
all of them compute, and are reused in their turn. An output remembers the step that it comes from,
and whether anybody has written to it since. What was computed although the table reuses it is
counted with its reason. This file does not know how a pipeline is tapped (`taps.py`), nor which
modules are sites.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from harmonica.cache import Compute, Feature
from harmonica.forecast import weighted_sum
from harmonica.inference.lifetimes import Entry
from harmonica.models.memo import Memo

Rows = Sequence[Sequence[Entry]]
"""Of a table's `Plan`, T of N."""

UNKNOWN = -1
FIRST = Entry(True, (1.0,), (0,), (UNKNOWN,))
"""What every site does at a walk's first step, whose row is not known yet."""

MOST_CALLS = 16
"""Calls of a transformer in one step whose features are kept; pipelines make one to three."""

MISSING, IN_PARTS = "nothing of these shapes was kept", "called in parts"
SPOILT = "changed in place"
"""Reasons why a site was computed although the table reuses it."""


@dataclass
class Counts:
    """What has happened."""

    asked: int = 0  # how often a site was asked
    skipped: Counter[int] = field(
        default_factory=Counter
    )  # and answered without computing, by site
    calls: Counter[str] = field(default_factory=Counter)  # of each transformer
    beyond: Counter[str] = field(default_factory=Counter)  # reason -> computed, though to be reused

    def __add__(self, other: Counts) -> Counts:
        skipped, calls = self.skipped + other.skipped, self.calls + other.calls
        return Counts(self.asked + other.asked, skipped, calls, self.beyond + other.beyond)


@dataclass
class Output:
    """An output of a site.

    It is kept `apart`, as a copy that nobody else holds, if it shall lie in host memory, or if
    torch does not count what is written to it (inference mode).
    """

    step: int  # that it comes from
    feature: Feature
    apart: bool = False
    tensors: tuple[Tensor, ...] = ()  # in it
    versions: tuple[int, ...] = ()  # how often each was written to when it was kept

    @classmethod
    def of(cls, step: int, feature: Feature, offload: bool) -> Output:
        """Keep a feature, in host memory if it is `offload`ed."""
        tensors = tuple(leaf for leaf in tree_leaves(feature) if isinstance(leaf, Tensor))
        if offload or any(tensor.is_inference() for tensor in tensors):
            return cls(step, tree_map(_to_host if offload else _copied, feature), True)
        return cls(step, feature, False, tensors, tuple(each._version for each in tensors))

    def intact(self) -> bool:
        """Tell whether nobody has written to the feature since."""
        return tuple(tensor._version for tensor in self.tensors) == self.versions

    def value(self) -> Feature:
        """Return the feature, or a copy of one that is kept apart, on its own device."""
        return tree_map(_copied, self.feature) if self.apart else self.feature


@dataclass(frozen=True)
class _Hosted:
    tensor: Tensor
    device: torch.device


def _to_host(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    host = torch.empty_like(leaf, device="cpu", pin_memory=leaf.is_cuda)
    return _Hosted(host.copy_(leaf, non_blocking=True), leaf.device)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, _Hosted):
        there = torch.empty_like(leaf.tensor, device=leaf.device)
        return there.copy_(leaf.tensor, non_blocking=True)
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


@dataclass
class Call:
    """One of the calls that a step makes of a transformer, and what is kept for it."""

    transformer: str
    shapes: list[torch.Size]  # of its input tensors
    inputs: list[ref[Tensor]] = field(default_factory=list)  # these at the last step
    kept: dict[int, tuple[Output, ...]] = field(default_factory=dict)  # by site, newest first
    known: dict[Any, Any] = field(default_factory=dict)  # ahead, as `Memo.known`
    used: bool = False  # in the step that runs

    def alike(self, tensors: Sequence[Tensor]) -> int:
        """Count the inputs that are the same objects as at the last step: the text, as a rule."""
        return sum(old() is new for old, new in zip(self.inputs, tensors, strict=True))


class Tracker:
    """Follows one walk of a pipeline: from `begin` over calls and steps to `end`.

    Args:
        choose: timesteps -> (a table, the row of the first of them), or None to compute everything.
        exact: as in `cached`.
        offload: as in `cached`.
    """

    def __init__(
        self, choose: Callable[[tuple[float, ...]], tuple[Rows, int] | None], *, exact: bool,
        offload: bool,
    ) -> None:  # fmt: skip
        self._choose, self._offload = choose, offload
        self.memo, self.counts = Memo(exact=exact, trusted=False), Counts()
        self.end()

    def end(self) -> None:
        """Follow nothing, and let every feature go."""
        self._rows: Rows = ()  # empty where nothing is reused
        self._times: list[float] = []
        self._tensor: Any = None  # the same timesteps, as the scheduler holds them
        self._k: int | None = None  # the row that runs; None in the first step
        self._row: Sequence[Entry] = ()
        self._open: list[Call] = []
        self._call: Call | None = None
        self._answered: dict[int, bool] = {}  # site -> was it reused, in this call
        self._called = False
        self.memo.known, self.memo.k = {}, None

    def begin(self, times: Sequence[float], tensor: Any = None) -> None:
        """Begin, or begin again, at these timesteps, which the scheduler holds in `tensor`.

        Raises ValueError if no table is for them and none shall be.
        """
        self.end()
        chosen = self._choose(tuple(times))
        if chosen is not None:
            self._rows, offset = chosen
            self._row = (FIRST,) * len(self._rows[0])
            self._times, self._tensor = [float("nan")] * offset + list(times), tensor
            self.memo.timesteps = self._times

    def call(self, transformer: str, inputs: Any) -> None:
        """Begin a call of the transformer of this name: find what is kept for it."""
        self.counts.calls[transformer] += 1
        self._answered = {}
        if not self._rows:
            return
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        shapes = [tensor.shape for tensor in tensors]
        mine = (each for each in self._open if not each.used and each.transformer == transformer)
        fitting = (each for each in mine if each.shapes == shapes)
        call = max(fitting, key=lambda each: each.alike(tensors), default=None)
        if call is None:
            call = Call(transformer, shapes)
            if sum(each.used for each in self._open) < MOST_CALLS:
                self._open.append(call)
        call.inputs, call.used = [ref(tensor) for tensor in tensors], True
        self._call, self._called = call, True
        self.memo.known = call.known
        self.memo.k = 0 if self.memo.exact and self._k is None else self._k

    def step(self, timestep: Any) -> None:
        """End a step, when the scheduler, or a copy of it, steps."""
        if not self._rows or not self._called:
            return None
        if self._k is None:
            self._k = self._row_at(timestep)
            if self._k is None:  # nobody knows where this walk is
                return self.end()
            for call in self._open:  # what the first step kept is of this row, and may not be read
                row, kept = self._rows[self._k], call.kept.items()
                call.kept = {i: (replace(own, step=self._k),) for i, (own,) in kept if row[i].keep}
        self._k += 1
        self._called = False
        self._open = [call for call in self._open if call.used]
        for call in self._open:
            call.used = False
        if self._k >= len(self._rows):
            return self.end()
        self._row = self._rows[self._k]
        return None

    def _row_at(self, timestep: Any) -> int | None:
        """Return the row of a timestep; one of the scheduler's own is known by where it lies, so
        that nobody waits for the device.
        """
        own, offset = self._tensor, next(k for k, t in enumerate(self._times) if t == t)
        if timestep is None:
            return offset
        if isinstance(timestep, Tensor) and isinstance(own, Tensor) and own.dtype == timestep.dtype:
            place, rest = divmod(timestep.data_ptr() - own.data_ptr(), own.element_size())
            if own.is_contiguous() and rest == 0 and 0 <= place < len(own):
                return offset + place
        start = float(torch.as_tensor(timestep).flatten()[0])
        return self._times.index(start) if start in self._times else None

    def ask(self, site: int, compute: Compute) -> Feature:
        """Answer a site; the gate of a walk."""
        if current.get() is not self:
            return compute()  # another pipeline is called inside this one
        self.counts.asked += 1
        call, before = self._call, self._answered.get(site)
        if call is None or not self._rows:
            return compute()
        if before:
            raise RuntimeError(
                f"site {site} was reused and is called again in the same call of the transformer "
                "(its feed-forward began to run in chunks?); call set_chunk_feed_forward(None, 0) "
                "on the blocks, and run the pipeline again"
            )
        entry, kept = self._row[site], call.kept.pop(site, ())
        valid = kept if all(output.intact() for output in kept) else ()
        reuses = not entry.computes and before is None and bool(valid)
        self._answered[site] = reuses
        if reuses:
            self.counts.skipped[site] += 1
            outputs, features = valid, [output.value() for output in valid]
        else:
            if not entry.computes:
                spoilt = SPOILT if len(valid) < len(kept) else None
                self.counts.beyond[spoilt or (MISSING if before is None else IN_PARTS)] += 1
            fresh, k = compute(), UNKNOWN if self._k is None else self._k
            features = [fresh, *(output.value() for output in valid)]
            own = Output.of(k, fresh, self._offload) if entry.keep else Output(k, fresh)
            outputs = (own, *valid)
        # If exactly the outputs that the table expects are at hand, their weights are used;
        # otherwise the newest one is returned.
        planned = tuple(output.step for output in outputs)[: len(entry.steps)] == entry.steps
        keep = entry.keep if planned else range(len(entry.keep))
        if keep and before is None:  # a part of a feature is not worth keeping
            call.kept[site] = tuple(outputs[j] for j in keep if j < len(outputs))
        return weighted_sum(entry.weights, tuple(features)) if planned else features[0]


current: ContextVar[Tracker | None] = ContextVar("tracker", default=None)
"""The walk that this thread or task is in."""
