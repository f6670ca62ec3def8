"""Ahead: what a model would compute again at every step, although it is known before the walk.

    once     depends on the condition alone: label and caption embeddings, keys and values of the text         same bits
    shared   blocks hold equal copies of an embedding (diffusers' DiT: 27 of 28): the first asked answers      same bits
    rows     depends on timestep and condition: embeddings of all T timesteps, and the modulation of every block for
             many steps, in one product each. Weights are read once, not T times                          to rounding

Modules are overridden; what they know belongs to the walk and lies in its `Clock`. Modulations of
several steps take room, so they are made for as many steps at once as fit a fiftieth of the model
(or 16 MiB); a batch so large that only one step fits gains nothing and is left alone.

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
from harmonica.override import overridden

LEAST_ROOM = 16 * 2**20
"""Bytes that modulations made ahead may always take."""


@dataclass
class Clock:
    """Where a walk is, and what it knows; the walk sets it.

    Attributes:
        timesteps: T, in execution order, as the model is given them.
        rows: whether embeddings and modulations may be made for several steps at once.
        trusted: whether the walk vouches for its condition: the same from its first step to its
            last. Otherwise what is known of tensors is known of these very tensors.
        k: executed step; −1 outside of a walk, where every module runs as it is.
        call: of the model within the step, 0 but for pipelines that call it once for each half of
            guidance.
        known: what was made for this walk, by (maker, call).
    """

    timesteps: Sequence[float] = ()
    rows: bool = True
    trusted: bool = True
    k: int = -1
    call: int = 0
    known: dict[Any, Any] = field(default_factory=dict)

    def begin(self, timesteps: Sequence[float]) -> None:
        """Begin a walk, which knows nothing yet."""
        self.timesteps, self.k, self.call, self.known = timesteps, 0, 0, {}

    def end(self) -> None:
        """Be outside of a walk."""
        self.k, self.known = -1, {}

    def recall(self, maker: object, make: Callable[[], Any], *about: Any) -> Any:
        """Return what `maker` knows in this call of the model, made now if it knows nothing, or
        knows it of others.

        Args:
            maker: who asks.
            make: makes what is to be known.
            about: numbers and tensors that it is made of; other ones, or one that was written to,
                make it anew.
        """
        about = tuple(thing for thing in about if not (self.trusted and isinstance(thing, Tensor)))
        key, marks = (maker, self.call), tuple(map(_mark, about))
        if key not in self.known or self.known[key][0] != marks or _UNTOLD in marks:
            # The tensors are held as well: as long as they live, no other one lies where they do.
            self.known[key] = marks, make(), about
        return self.known[key][1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        """Return an idle clock: a module that is copied along with its shadow runs as it is."""
        return Clock()


_UNTOLD = object()


def _mark(thing: Any) -> Any:
    """Return what tells whether a tensor is another one, or has been written to."""
    if not isinstance(thing, Tensor):
        return thing
    if thing.is_inference():  # torch does not count what is written to it
        return _UNTOLD
    return thing.data_ptr(), thing.shape, thing.stride(), thing.dtype, thing._version


Shadow = Callable[..., Any]
"""(the forward that it hides, *arguments of that forward) -> output."""


@contextmanager
def ahead(model: nn.Module | None, clock: Clock) -> Iterator[None]:
    """Shadow what is known before a walk in a model of a known class."""
    known = _shadows(model, clock) if model is not None else []
    answering = (
        (module, partial(_answer, clock, shadow, module.forward)) for module, shadow in known
    )
    with overridden("forward", answering):
        yield


def _answer(
    clock: Clock, shadow: Shadow, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    return shadow(forward, *args, **kwargs) if clock.k >= 0 else forward(*args, **kwargs)


def _shadows(model: nn.Module, clock: Clock) -> list[tuple[nn.Module, Shadow]]:
    if isinstance(model, DiT):
        return _of_dit(model, clock)
    kind = type(model)
    if kind.__module__ == "diffusers.models.transformers.dit_transformer_2d":
        return _of_stock_dit(model, clock)
    if kind.__module__ == "diffusers.models.transformers.pixart_transformer_2d":
        return _of_pixart(model, clock)
    return []


# ------------------------------------------------------------ the same at every step, or for every
# block


class Once:
    """Runs once in a walk, for one input."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, forward: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Return `forward(x)`."""
        return self._clock.recall(self, lambda: forward(x), x)


class Shared:
    """Runs once in a step, for all blocks that hold a copy of it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(
        self, forward: Callable[..., Tensor], t: Tensor, y: Tensor, **options: Any
    ) -> Tensor:
        """Return `forward(t, y)`, (B, D)."""
        clock = self._clock
        return clock.recall(self, lambda: forward(t, y, **options), clock.k, t, y)  # type: ignore[no-any-return]


# ------------------------------------------------------------ what depends on timestep and
# condition


class Embedded:
    """The condition vector c = embed(t) + embed(y), of all steps.

    Args:
        clock: of the walk.
        time: timesteps (T,) -> (T, D).
        label: labels (B,) -> (B, D).
    """

    def __init__(
        self, clock: Clock, time: Callable[[Tensor], Tensor], label: Callable[[Tensor], Tensor]
    ) -> None:
        self.clock, self._time, self._label = clock, time, label

    def time(self, t: Tensor) -> Tensor:
        """Return embed(t) of the current step, one row for all of t (B,): (1, D)."""
        rows: Tensor = self.clock.recall(
            (self, "t"), lambda: self._time(all_timesteps(self.clock.timesteps, t))
        )
        row: Tensor = rows[self.clock.k, None]
        return row

    def label(self, y: Tensor) -> Tensor:
        """Return embed(y), (B, D), made once."""
        return self.clock.recall((self, "y"), lambda: self._label(y), y)  # type: ignore[no-any-return]

    def both(self, forward: Callable[..., Tensor], t: Tensor, y: Tensor, **_: Any) -> Tensor:
        """Return c of the current step, (B, D), for a module that embeds timestep and label."""
        return self.time(t) + self.label(y)

    def rows(self, first: int, steps: int) -> Tensor:
        """Return c of steps first … first + W − 1, of what was embedded in this call: (W·B, D)."""
        held: tuple[Tensor, ...] = tuple(
            self.clock.known[(self, part), self.clock.call][1] for part in "ty"
        )
        times, labels = held  # (T, D), (B, D)

        def made() -> Tensor:
            return (times[first : first + steps, None] + labels).flatten(0, 1)

        return self.clock.recall((self, "c"), made, first, steps, labels)  # type: ignore[no-any-return]


def all_timesteps(timesteps: Sequence[float], like: Tensor) -> Tensor:
    """Return (T,) timesteps as the model is given them. Filled in on the device: nothing is copied
    or waited for.
    """
    return torch.cat([like.new_full((1,), t) for t in timesteps])


class Modulation:
    """One adaLN product for W steps at a time, answered step by step.

    Args:
        embedded: what it is a product of.
        a_step: bytes that the modulations of all blocks take for one step and one sample.
        room: bytes that those of all W steps may take.
        before: applied to c first, where the model does that outside of the module.
    """

    def __init__(
        self,
        embedded: Embedded,
        a_step: int,
        room: int,
        before: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._embedded, self._a_step, self._room, self._before = embedded, a_step, room, before

    def __call__(self, forward: Callable[[Tensor], Tensor], c: Tensor) -> Tensor:
        """Return `forward(c)`, (B, 6D), of the current step."""
        clock, batch = self._embedded.clock, len(c)
        steps = self._room // (self._a_step * batch)
        if steps < 2:
            return forward(c)  # a product of so many rows gains nothing by more of them
        first = clock.k - clock.k % steps
        rows = self._embedded.rows(first, min(steps, len(clock.timesteps) - first))  # (W·B, D)

        def made() -> Sequence[Tensor]:
            outputs = forward(rows if self._before is None else self._before(rows))
            return outputs.view(-1, batch, outputs.shape[1]).unbind()  # W × (B, 6D)

        return clock.recall(self, made, first, rows)[clock.k - first]  # type: ignore[no-any-return]


def bytes_of(linears: Sequence[nn.Linear]) -> int:
    """Return how many bytes the outputs of these layers take for one sample.

    >>> bytes_of([nn.Linear(4, 100), nn.Linear(4, 10)])
    440
    """
    return sum(layer.out_features * layer.weight.element_size() for layer in linears)


def room_of(model: nn.Module) -> int:
    """Return how many bytes modulations may take: a fiftieth of the model's, or LEAST_ROOM."""
    return max(LEAST_ROOM, sum(p.numel() * p.element_size() for p in model.parameters()) // 50)


class Single:
    """PixArt's one modulation for all blocks: all T steps in one product. The images of a batch are
    of one size.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(
        self,
        forward: Callable[..., Any],
        timestep: Tensor,
        added: Any = None,
        *,
        batch_size: int,
        hidden_dtype: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return modulation (B, 6D) and embedded timestep (B, D) of the current step."""
        clock, steps = self._clock, len(self._clock.timesteps)

        def made() -> tuple[Tensor, Tensor]:
            sizes = {
                name: None if size is None else size[:1].expand(steps, -1)
                for name, size in (added or {}).items()
            }
            times = all_timesteps(clock.timesteps, timestep)
            return forward(times, sizes, batch_size=steps, hidden_dtype=hidden_dtype)  # type: ignore[no-any-return]

        modulation, embedded = clock.recall(self, made)  # (T, 6D), (T, D)
        return modulation[clock.k].expand(batch_size, -1), embedded[clock.k].expand(batch_size, -1)


# ------------------------------------------------------------ the models


def _of_dit(model: DiT, clock: Clock) -> list[tuple[nn.Module, Shadow]]:
    if not clock.rows:
        return [(model.y_embedder, Once(clock))]
    embedded = Embedded(clock, model.t_embedder.forward, model.y_embedder.forward)
    products: list[Any] = [
        *(block.adaLN_modulation for block in model.blocks),
        model.final_layer.adaLN_modulation,
    ]
    a_step, room = bytes_of([product[1] for product in products]), room_of(model)
    return [
        (model.t_embedder, lambda forward, t: embedded.time(t)),
        (model.y_embedder, lambda forward, y: embedded.label(y)),
        *((product, Modulation(embedded, a_step, room)) for product in products),
    ]


def _of_stock_dit(model: Any, clock: Clock) -> list[tuple[nn.Module, Shadow]]:
    blocks = list(model.transformer_blocks)
    embeddings = [block.norm1.emb for block in blocks]
    answering = [next(other for other in embeddings if same(other, emb)) for emb in embeddings]
    if not clock.rows:
        shared = {id(emb): Shared(clock) for emb in answering}
        return [(emb, shared[id(its)]) for emb, its in zip(embeddings, answering, strict=True)]
    made = {id(emb): _combined(clock, emb) for emb in answering}
    embedded = [made[id(its)] for its in answering]
    linears = [*(block.norm1.linear for block in blocks), model.proj_out_1]
    a_step, room = bytes_of(linears), room_of(model)
    pairs = zip(
        linears, [*embedded, embedded[0]], strict=True
    )  # the last layer asks the first block's
    return [
        *((emb, its.both) for emb, its in zip(embeddings, embedded, strict=True)),
        *((linear, Modulation(its, a_step, room, F.silu)) for linear, its in pairs),
    ]


def _combined(clock: Clock, emb: Any) -> Embedded:
    dtype = next(emb.timestep_embedder.parameters()).dtype
    return Embedded(
        clock,
        lambda t: emb.timestep_embedder(emb.time_proj(t).to(dtype)),
        emb.class_embedder.forward,
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    """Tell whether two modules of one class hold equal weights and settings."""
    if a is b:
        return True
    mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    if type(a) is not type(b) or _settings(a) != _settings(b) or mine.keys() != theirs.keys():
        return False
    return all(_equal(weight, theirs[name]) for name, weight in mine.items())


def _settings(module: nn.Module) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in vars(part).items() if name[0] != "_"}
        for part in module.modules()
    ]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.dtype == b.dtype and a.device == b.device and not a.is_meta and torch.equal(a, b)
    )


def _of_pixart(model: Any, clock: Clock) -> list[tuple[nn.Module, Shadow]]:
    # The text does not change along a walk, so its projection does not, and in every block its keys
    # and values.
    attentions = [block.attn2 for block in model.transformer_blocks if block.attn2 is not None]
    text = [
        model.caption_projection,
        *(layer for attn in attentions for layer in (attn.to_k, attn.to_v)),
    ]
    fixed: list[tuple[nn.Module, Shadow]] = [
        (module, Once(clock)) for module in text if module is not None
    ]
    return [*fixed, (model.adaln_single, Single(clock))] if clock.rows else fixed
