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
counted with its reason. This file does not know how a pipeline is tapped (`taps.py`), nor which
modules are sites.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from operator import eq
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from torch.utils.weak import WeakIdRef

from harmonica.cache import Compute, Feature
from harmonica.forecast import weighted_sum
from harmonica.inference.lifetimes import Entry
from harmonica.models.pipelines.schedulers import place_of

Rows = Sequence[Sequence[Entry]]
"""What `plan_of` makes of a table, T of N."""

Counts = Counter[tuple[str, Any]]
"""How often something has happened: ("computed", site) and ("skipped", site) for each answer of a
site, ("calls", name of a transformer), and ("beyond", reason) for what was computed although the
table reuses it."""

UNKNOWN = -1
FIRST = Entry(True, (1.0,), (0,), (UNKNOWN,))
"""What every site does at a walk's first step, whose row is not known yet."""

MOST_CALLS = 16
"""Calls of a transformer in one step whose features are kept; pipelines make one to three."""

MISSING, IN_PARTS = "nothing of these shapes was kept", "called in parts"
SPOILT = "changed in place"
"""Reasons why a site was computed although the table reuses it."""


class Output(NamedTuple):
    """An output of a site that is kept."""

    step: int  # that it comes from
    value: Callable[[], Feature]
    intact: Callable[[], bool] = lambda: True  # whether nobody has written to it since


def keep(step: int, feature: Feature, offload: bool) -> Output:
    """Keep a feature, as a copy that nobody else holds if it shall lie in host memory, or if torch
    does not count what is written to it (inference mode).
    """
    tensors = [leaf for leaf in tree_leaves(feature) if isinstance(leaf, Tensor)]
    if offload or any(tensor.is_inference() for tensor in tensors):
        copies = tree_map_only(Tensor, partial(_copy, offload=offload), feature)
        return Output(step, lambda: tree_map_only(partial, partial.__call__, copies))
    versions = [tensor._version for tensor in tensors]
    return Output(step, lambda: feature, lambda: versions == [each._version for each in tensors])


def _copy(tensor: Tensor, offload: bool) -> partial[Tensor]:
    """Copy a tensor; return a function that copies the copy back to where the tensor lies."""
    place, pinned = "cpu" if offload else tensor.device, offload and tensor.is_cuda
    copy = torch.empty_like(tensor, device=place, pin_memory=pinned)
    copy.copy_(tensor, non_blocking=True)
    return partial(copy.to, tensor.device, non_blocking=True, copy=True)


@dataclass
class Call:
    """One of the calls that a step makes of a transformer, and what is kept for it."""

    kind: tuple[Any, ...]  # transformer, structure of the inputs, shapes of the tensors among them
    inputs: list[Any] = field(default_factory=list)  # at the last step, as `_identity` knows them
    kept: dict[int, tuple[Output, ...]] = field(default_factory=dict)  # by site, newest first
    reused: dict[int, bool] = field(default_factory=dict)  # by site, of those asked in this step
    used: bool = False  # in the step that runs


def _identity(leaf: Any) -> Any:
    """Return what tells an input of one call from that of another: a number or a flag itself, a
    tensor, the text as a rule, by the object that it is or is a view of.
    """
    if isinstance(leaf, Tensor):
        viewed = leaf.untyped_storage() if leaf.is_inference() else leaf._base
        return WeakIdRef(leaf if viewed is None else viewed), leaf.storage_offset()
    return leaf if isinstance(leaf, int | float | str) else None


class Tracker:
    """Follows one walk of a pipeline: from `begin` over calls and steps to `end`.

    Args:
        choose: timesteps -> (a table, the row of the first of them), or None to compute everything.
        offload: as in `cached`.
    """

    def __init__(
        self, choose: Callable[[tuple[float, ...]], tuple[Rows, int] | None], offload: bool
    ) -> None:
        self._choose, self._offload, self.counts = choose, offload, Counts()
        self._lock = threading.Lock()  # a step may make its calls in several threads
        self.end()

    def end(self) -> None:
        """Follow nothing, and let every feature go."""
        self._rows: Rows = ()  # empty where nothing is reused
        self._first, self._times = 0, list[float]()  # the first timestep's row; all timesteps
        self._tensor: Any = None  # the same timesteps, as the scheduler holds them
        self._k: int | None = None  # the row that runs; None in the first step
        self._open = list[Call]()

    def begin(self, times: Sequence[float], tensor: Any = None) -> None:
        """Begin, or begin again, at these timesteps, which the scheduler holds in `tensor`.

        Raises ValueError if no table is for them and none shall be.
        """
        self.end()
        chosen = self._choose(tuple(times))
        if chosen is not None:
            self._rows, self._first = chosen
            self._times, self._tensor = list(times), tensor

    @contextmanager
    def call(self, transformer: str, inputs: Any) -> Iterator[None]:
        """Let what runs in this `with` be a call of the transformer of this name."""
        self.counts["calls", transformer] += 1
        token = _call.set(self._call_of(transformer, inputs) if self._rows else None)
        try:
            yield
        finally:
            _call.reset(token)

    def _call_of(self, transformer: str, inputs: Any) -> Call:
        """Return the call of the last steps that this one is like, or a new one."""
        leaves, structure = tree_flatten(inputs)
        kind = transformer, structure, [getattr(leaf, "shape", None) for leaf in leaves]
        known = list(map(_identity, leaves))
        with self._lock:
            fitting = [call for call in self._open if not call.used and call.kind == kind]
            alike = [sum(map(eq, call.inputs, known)) for call in fitting]
            call = fitting[alike.index(max(alike))] if fitting else Call(kind)
            if not fitting and sum(each.used for each in self._open) < MOST_CALLS:
                self._open.append(call)
            call.inputs, call.reused, call.used = known, {}, True
        return call

    def step(self, timestep: Any) -> None:
        """End a step, when the scheduler, or a copy of it, steps."""
        if not any(call.used for call in self._open):
            return
        if (k := self._k) is None:
            place = place_of(timestep, self._tensor, self._times)
            if place is None:  # nobody knows where this walk is
                self.end()
                return
            k = self._first + place  # what the step has kept is of this row, and may not be read
            row = self._rows[k] if k >= 0 else ()
            for call in self._open:
                kept = ((site, own) for site, (own,) in call.kept.items() if row and row[site].keep)
                call.kept = {site: (own._replace(step=k),) for site, own in kept}
        self._k = k + 1 if k >= 0 else None
        self._open = [call for call in self._open if call.used]
        for call in self._open:
            call.used = False
        if self._k == len(self._rows):
            self.end()

    def ask(self, site: int, compute: Compute) -> Feature:
        """Answer a site; the gate of a walk."""
        if current.get() is not self:
            return compute()  # another pipeline is called inside this one
        if (call := _call.get()) is None:
            self.counts["computed", site] += 1
            return compute()
        if call.reused.get(site):
            what = f"site {site} was reused and is called again in one call of the transformer"
            todo = "call set_chunk_feed_forward(None, 0) on the blocks, and run the pipeline again"
            raise RuntimeError(f"{what} (its feed-forward began to run in chunks?); {todo}")
        entry, again = FIRST if self._k is None else self._rows[self._k][site], site in call.reused
        kept = call.kept.pop(site, ())
        valid = kept if all(output.intact() for output in kept) else ()
        call.reused[site] = reuses = bool(valid) and not entry.computes and not again
        outputs, features = valid, [output.value() for output in valid]
        if reuses:
            self.counts["skipped", site] += 1
        else:
            self.counts["computed", site] += 1
            if not entry.computes:
                why = SPOILT if len(valid) < len(kept) else IN_PARTS if again else MISSING
                self.counts["beyond", why] += 1
            fresh, k = compute(), UNKNOWN if self._k is None else self._k
            own = keep(k, fresh, self._offload) if entry.keep else Output(k, lambda: fresh)
            outputs, features = (own, *valid), [fresh, *features]
        # If exactly the outputs that the table expects are at hand, their weights are used;
        # otherwise the newest one is returned.
        planned = tuple(output.step for output in outputs) == entry.steps
        if not again:  # a part of a feature is not worth keeping
            stay = entry.keep if planned else range(min(len(entry.keep), len(outputs)))
            call.kept[site] = tuple(outputs[j] for j in stay)
        return weighted_sum(entry.weights, tuple(features)) if planned else features[0]


current: ContextVar[Tracker | None] = ContextVar("tracker", default=None)
"""The walk that this thread or task is in."""
_call: ContextVar[Call | None] = ContextVar("call of a transformer", default=None)


@contextmanager
def in_walk(tracker: Tracker | None) -> Iterator[None]:
    """Let this thread or task be in a walk, or in none although it is called inside one."""
    outer = current.get()
    current.set(tracker)
    try:
        yield
    finally:
        current.set(outer)
