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
all of them compute, and are reused in their turn. What was computed although the table reuses it is
counted with its reason.

This file does not know how a pipeline is tapped (`caching.py`), nor which modules are sites.
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
from harmonica.models.memo import Memo
from harmonica.models.pipelines.kept import FIRST, Entry, Kept, Table, brought_back, keep

MOST_CALLS = 16
"""Calls of a transformer in one step whose features are kept; pipelines make one to three."""


@dataclass
class Call:
    """One of the calls that a step makes of a transformer, and what is kept for it.

    Attributes:
        transformer: name of the one that is called.
        shapes: of its input tensors.
        inputs: these tensors at the last step, not kept alive.
        kept: site -> its last outputs.
        known: what is known ahead for this call (`Memo.known`).
        used: whether the step that runs has made this call.
    """

    transformer: str
    shapes: list[torch.Size]
    inputs: list[ref[Tensor]] = field(default_factory=list)
    kept: dict[int, Kept] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)
    used: bool = False

    def alike(self, tensors: Sequence[Tensor]) -> int:
        """Count the inputs that are the same objects as at the last step: the text, as a rule."""
        return sum(old() is new for old, new in zip(self.inputs, tensors, strict=True))


class Tracker:
    """Follows one walk of a pipeline: from `begin` over calls and steps to `end`.

    Args:
        choose: timesteps -> (table, row of the first of them), or None to compute everything.
        sites: N.
        exact: see `Memo`.
        offload: keep features in host memory.

    Attributes:
        asked, skipped: (N,) how often each site was asked for its output, and answered without
            computing.
        calls: of each transformer, by name.
        beyond: reason -> sites that were computed although the table reuses them.
    """

    def __init__(
        self,
        choose: Callable[[tuple[float, ...]], tuple[Table, int] | None],
        sites: int,
        *,
        exact: bool = True,
        offload: bool = False,
    ) -> None:
        self._choose, self._offload = choose, offload
        self._tensor: Any
        self._call: Call | None
        self.memo = Memo(exact=exact, trusted=False)
        self.asked, self.skipped, self.calls = [0] * sites, [0] * sites, Counter[str]()
        self.beyond = Counter[str]()
        self._first: tuple[Entry, ...] = (FIRST,) * sites
        self.end()

    def end(self) -> None:
        """Follow nothing, and let every feature go."""
        self._table: Table | None = None
        self._times, self._tensor = list[float](), None  # numbers, and what the scheduler holds
        self._k: int | None = None  # the row that runs; None in the first step
        self._row: Sequence[Entry] = ()
        self._open, self._call = list[Call](), None
        self._answered: dict[int, bool] = {}  # site -> was it reused, in this call
        self._called = False
        self.memo.known, self.memo.k = {}, None

    def add(self, other: Tracker) -> None:
        """Add the counts of another walk."""
        self.asked = [a + b for a, b in zip(self.asked, other.asked, strict=True)]
        self.skipped = [a + b for a, b in zip(self.skipped, other.skipped, strict=True)]
        self.calls += other.calls
        self.beyond += other.beyond

    def begin(self, times: Sequence[float], tensor: Any = None) -> None:
        """Begin, or begin again, at these timesteps, which the scheduler holds in `tensor`.

        Raises ValueError if no table is for them and none shall be.
        """
        self.end()
        chosen = self._choose(tuple(times))
        if chosen is not None:
            self._table, offset = chosen
            self._times = [float("nan")] * offset + list(times)
            self._tensor = tensor
            self._row, self.memo.timesteps = self._first, self._times

    def call(self, transformer: str, inputs: Any) -> None:
        """Begin a call of the transformer of this name: find what is kept for it."""
        self.calls[transformer] += 1
        self._answered = {}
        if self._table is None:
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
        if self._table is None or not self._called:
            return
        if self._k is None:
            self._k = self._row_at(timestep)
            if self._k is None:  # nobody knows where this walk is
                self.end()
                return
            self._keep_what_is_read(self._table.rows[self._k])
        self._k += 1
        self._called = False
        self._open = [call for call in self._open if call.used]
        for call in self._open:
            call.used = False
        if self._k >= len(self._table.rows):
            self.end()
        else:
            self._row = self._table.rows[self._k]

    def _keep_what_is_read(self, row: Sequence[Entry]) -> None:
        """Of what the first step kept, keep what later rows read, and say which row it is from."""
        for call in self._open:
            call.kept = {
                site: replace(kept, steps=(self._k or 0,))
                for site, kept in call.kept.items()
                if row[site].keeps
            }

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
        call, table = self._call, self._table
        if current.get() is not self:
            return compute()  # another pipeline is called inside this one
        self.asked[site] += 1
        if call is None or table is None:
            return compute()
        entry, kept = self._row[site], call.kept.get(site)
        if entry.computes or kept is None or site in self._answered or not kept.intact():
            return self._compute(site, compute, entry, call, table.longest)
        self._answered[site] = True
        self.skipped[site] += 1
        features = tree_map(brought_back, kept.features) if kept.apart else kept.features
        if not entry.keeps:
            del call.kept[site]
        # Weights are made for the outputs of certain steps. Without those, the newest is repeated.
        if kept.steps[: len(entry.steps)] == entry.steps:
            return weighted_sum(entry.weights, features)
        return features[0]

    def _compute(
        self, site: int, compute: Compute, entry: Entry, call: Call, longest: int
    ) -> Feature:
        kept, answered = call.kept.pop(site, None), self._answered.get(site)
        self._answered[site] = False
        if answered:
            raise RuntimeError(
                f"site {site} was reused and is now called again in the same call of the "
                "transformer: its feed-forward began to run in chunks? Call "
                "set_chunk_feed_forward(None, 0) on the blocks, and run the pipeline again"
            )
        spoilt = kept is not None and not kept.intact()
        if not entry.computes:
            reason = "nothing of these shapes was kept" if answered is None else "called in parts"
            self.beyond["changed in place" if spoilt else reason] += 1
        fresh = compute()
        past = kept if kept is not None and not spoilt else Kept((), (), [], [], False)
        k = -1 if self._k is None else self._k
        steps, outputs = (k, *past.steps), (fresh, *past.features)
        if entry.keeps and answered is None:  # a part of a feature is not worth keeping
            call.kept[site] = keep(steps[:longest], outputs[:longest], self._offload)
        if steps[: len(entry.steps)] != entry.steps or len(entry.weights) == 0:
            return fresh
        outputs = tree_map(brought_back, outputs) if past.apart else outputs
        return weighted_sum(entry.weights, outputs)


current: ContextVar[Tracker | None] = ContextVar("tracker", default=None)
"""The walk that this thread or task is in."""
