"""Ahead: what a model would compute again at every step, although it is known before the walk.

    once     depends on the condition alone: label and caption embeddings, keys and values of the text       same bits
    shared   blocks hold equal copies of an embedding (diffusers' DiT: 27 of 28): one of them answers for all  same bits
    rows     depends on timestep and condition: embeddings of all T timesteps, and the modulation of every block for
             many steps, in one product each. Weights are read once, not T times                         to rounding

Modules are shadowed for one walk. Modulations of several steps take room, so they are made for as many steps at once
as fit a fiftieth of the model (or 16 MiB); a batch so large that only one step fits gains nothing and is left alone.

    T steps   B samples in the model's batch, guidance included   D hidden size   W steps in a window

This file does not know schedules, caches or samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonica.models.dit import DiT
from harmonica.shadows import put_back

LEAST_ROOM = 16 * 2**20
"""Bytes that modulations made ahead may always take."""


@dataclass
class Clock:
    """Where a walk is; the walk sets it.

    Attributes:
        timesteps: T, in execution order, as the model is given them.
        k: executed step.
        rows: whether embeddings and modulations may be made for several steps at once.
    """

    timesteps: Sequence[float]
    k: int = 0
    rows: bool = True


Shadow = Callable[..., Any]
"""(the forward that it hides, *arguments of that forward) -> output."""


@contextmanager
def ahead(model: nn.Module | None, clock: Clock) -> Iterator[None]:
    """Shadow what is known before the walk in a model of a known class, for one walk at one batch and condition."""
    shadows = _shadows(model, clock) if model is not None else []
    placed = []
    try:
        for module, shadow in shadows:
            before, answering = vars(module).get("forward"), partial(shadow, module.forward)
            vars(module)["forward"] = answering
            placed.append((module, before, answering))
        yield
    finally:
        for module, before, answering in placed:
            put_back(module, "forward", answering, before)


def _shadows(model: nn.Module, clock: Clock) -> list[tuple[nn.Module, Shadow]]:
    if isinstance(model, DiT):
        return _of_dit(model, clock)
    name = type(model).__name__
    if type(model).__module__.startswith("diffusers.models.transformers."):
        if name == "DiTTransformer2DModel":
            return _of_stock_dit(model, clock)
        if name == "PixArtTransformer2DModel":
            return _of_pixart(model, clock)
    return []


# ------------------------------------------------------------ what does not change along a walk


@dataclass
class Once:
    """Runs at the first call of a walk and answers the rest from memory."""

    outputs: list[Any] = field(default_factory=list)

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `forward` returned first."""
        if not self.outputs:
            self.outputs.append(forward(*args, **kwargs))
        return self.outputs[0]


# ------------------------------------------------------------ what depends on timestep and condition


class Embedded:
    """The condition vector c = embed(t) + embed(y) of all steps.

    Args:
        clock: of the walk.
        time: timesteps (T,) -> (T, D).
        label: labels (B,) -> (B, D).
    """

    def __init__(self, clock: Clock, time: Callable[[Tensor], Tensor], label: Callable[[Tensor], Tensor]) -> None:
        self.clock, self._time, self._label = clock, time, label
        self._times: Tensor | None = None  # (T, D)
        self._labels: Tensor | None = None  # (B, D)
        self._made: tuple[int, int, Tensor] | None = None  # first step, window, c (W·B, D)

    def times(self, t: Tensor) -> Tensor:
        """Return embed(t) of the current step, one row for all of t (B,): (1, D)."""
        if self._times is None:
            self._times = self._time(all_timesteps(self.clock.timesteps, t))
        return self._times[self.clock.k, None]

    def labels(self, y: Tensor) -> Tensor:
        """Return embed(y), (B, D), made once."""
        if self._labels is None:
            self._labels = self._label(y)
        return self._labels

    def window(self, first: int, steps: int) -> Tensor:
        """Return c of steps first … first + W − 1: (W·B, D)."""
        if self._made is None or self._made[:2] != (first, steps):
            assert self._times is not None
            assert self._labels is not None
            c = (self._times[first : first + steps, None] + self._labels).flatten(0, 1)
            self._made = (first, steps, c)
        return self._made[2]


def all_timesteps(timesteps: Sequence[float], like: Tensor) -> Tensor:
    """Return (T,) timesteps as the model is given them. Filled in on the device: nothing is copied or waited for."""
    return torch.cat([like.new_full((1,), t) for t in timesteps])


class Modulation:
    """One adaLN product for W steps at a time, answered step by step.

    Args:
        embedded: what it is a product of.
        steps: W.
        before: applied to c first, where the model does that outside of the module.
    """

    def __init__(self, embedded: Embedded, steps: int, before: Callable[[Tensor], Tensor] | None = None) -> None:
        self.embedded, self.steps, self.before = embedded, steps, before
        self._rows: Sequence[Tensor] = ()  # W × (B, 6D)
        self._first = -1

    def __call__(self, forward: Callable[[Tensor], Tensor], c: Tensor) -> Tensor:
        """Return `forward(c)`, (B, 6D), of the current step."""
        clock = self.embedded.clock
        first = clock.k - clock.k % self.steps
        if first != self._first:
            window = min(self.steps, len(clock.timesteps) - first)
            rows = self.embedded.window(first, window)
            made = forward(rows if self.before is None else self.before(rows))
            self._rows, self._first = made.view(window, len(c), -1).unbind(), first
        return self._rows[clock.k - first]


def window_of(linears: Sequence[nn.Linear], batch: int, room: int) -> int:
    """Return for how many steps the outputs of these layers fit the room, at least 1.

    >>> window_of([nn.Linear(4, 100)], 2, 8000)  # 2 · 100 · 4 bytes a step
    10
    """
    a_step = batch * sum(layer.out_features * layer.weight.element_size() for layer in linears)
    return max(1, room // a_step)


def room_of(model: nn.Module) -> int:
    """Return how many bytes modulations may take: a fiftieth of the model's, or LEAST_ROOM."""
    return max(LEAST_ROOM, sum(p.numel() * p.element_size() for p in model.parameters()) // 50)


class Windowed:
    """A modulation that looks at its first batch to choose its window; W = 1 is the model's own way."""

    def __init__(self, embedded: Embedded, linears: Sequence[nn.Linear], room: int, *, silu: bool = False) -> None:
        self._embedded, self._linears, self._room = embedded, linears, room
        self._before: Callable[[Tensor], Tensor] | None = F.silu if silu else None
        self._made: Modulation | None = None

    def __call__(self, forward: Callable[[Tensor], Tensor], c: Tensor) -> Tensor:
        """Return `forward(c)` of the current step."""
        if self._made is None:
            self._made = Modulation(self._embedded, window_of(self._linears, len(c), self._room), self._before)
        return forward(c) if self._made.steps == 1 else self._made(forward, c)


# ------------------------------------------------------------ the models


def _of_dit(model: DiT, clock: Clock) -> list[tuple[nn.Module, Shadow]]:
    if not clock.rows:
        return [(model.y_embedder, Once())]
    embedded = Embedded(clock, model.t_embedder.forward, model.y_embedder.forward)
    products: list[Any] = [*(block.adaLN_modulation for block in model.blocks), model.final_layer.adaLN_modulation]
    linears, room = [product[1] for product in products], room_of(model)
    return [
        (model.t_embedder, lambda forward, t: embedded.times(t)),
        (model.y_embedder, lambda forward, y: embedded.labels(y)),
        *((product, Windowed(embedded, linears, room)) for product in products),
    ]


def _of_stock_dit(model: Any, clock: Clock) -> list[tuple[nn.Module, Shadow]]:
    embeddings = [block.norm1.emb for block in model.transformer_blocks]
    answering = {id(emb): next(other for other in embeddings if same(emb, other)) for emb in embeddings}
    if not clock.rows:
        shared = {id(emb): _EachStep(clock) for emb in answering.values()}
        return [(emb, shared[id(answering[id(emb)])]) for emb in embeddings]
    made = {id(emb): _combined(clock, emb) for emb in answering.values()}
    embedded = [made[id(answering[id(emb)])] for emb in embeddings]
    linears = [*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1]
    room = room_of(model)
    pairs = zip(linears, [*embedded, embedded[0]], strict=True)  # the last layer asks the first block's
    return [
        *((emb, _Condition(its)) for emb, its in zip(embeddings, embedded, strict=True)),
        *((linear, Windowed(its, linears, room, silu=True)) for linear, its in pairs),
    ]


def _combined(clock: Clock, emb: Any) -> Embedded:
    dtype = next(emb.timestep_embedder.parameters()).dtype
    return Embedded(clock, lambda t: emb.timestep_embedder(emb.time_proj(t).to(dtype)), emb.class_embedder.forward)


class _Condition:
    """Answers diffusers' embedding of timestep and label with c (B, D) of the current step."""

    def __init__(self, embedded: Embedded) -> None:
        self._embedded = embedded

    def __call__(self, forward: Callable[..., Tensor], timestep: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return self._embedded.times(timestep) + self._embedded.labels(labels)


class _EachStep:
    """Runs once a step for all who share it."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._k, self._output = clock, -1, torch.empty(0)

    def __call__(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self._k != self._clock.k:
            self._output, self._k = forward(*args, **kwargs), self._clock.k
        return self._output


def same(a: nn.Module, b: nn.Module) -> bool:
    """Tell whether two modules of one class hold equal weights and settings."""
    if a is b:
        return True
    mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    if type(a) is not type(b) or _settings(a) != _settings(b) or mine.keys() != theirs.keys():
        return False
    return all(_equal(weight, theirs[name]) for name, weight in mine.items())


def _settings(module: nn.Module) -> list[dict[str, Any]]:
    return [{name: value for name, value in vars(part).items() if name[0] != "_"} for part in module.modules()]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.device == b.device and not a.is_meta and torch.equal(a, b))


def _of_pixart(model: Any, clock: Clock) -> list[tuple[nn.Module, Shadow]]:
    # The text does not change along a walk, so its projection does not, and in every block its keys and values.
    attentions = [block.attn2 for block in model.transformer_blocks if not block.attn2.fused_projections]
    text = [model.caption_projection, *(layer for attn in attentions for layer in (attn.to_k, attn.to_v))]
    fixed: list[tuple[nn.Module, Shadow]] = [(module, Once()) for module in text if module is not None]
    return [*fixed, (model.adaln_single, _Single(clock))] if clock.rows else fixed


class _Single:
    """PixArt's one modulation for all blocks: all T steps in one product. Images of a batch are of one size."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._rows: tuple[Tensor, Tensor] | None = None  # (T, 6D), (T, D)

    def __call__(
        self, forward: Callable[..., Any], timestep: Tensor, added: Any = None, *, batch_size: int, hidden_dtype: Any
    ) -> tuple[Tensor, Tensor]:
        steps = len(self._clock.timesteps)
        if self._rows is None:
            sizes = {name: None if v is None else v[:1].expand(steps, -1) for name, v in (added or {}).items()}
            times = all_timesteps(self._clock.timesteps, timestep)
            self._rows = forward(times, sizes, batch_size=steps, hidden_dtype=hidden_dtype)
        modulation, embedded = (rows[self._clock.k].expand(batch_size, -1) for rows in self._rows)
        return modulation, embedded
