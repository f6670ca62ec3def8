"""Precompute: what a model computes again and again although it is known before the walk.

    part of the model                      plain model            here
    label and caption embedding            every step             once a walk            same bits
    keys and values of the text            every step and block   once a walk and block  same bits
    equal copies of an embedding, in all   every step and block   every step             same bits
        blocks of diffusers' DiT
    timestep embedding                     every step             once, all T steps      rounding
    modulation (adaLN)                     every step and block   W steps in a product   rounding

One `Memo` holds what a walk knows. There are two strategies. `once` keeps an output as long as its
inputs and weights are the same tensors, unchanged. `Condition` computes several steps in one
product; W is as many as fit into a fiftieth of the model's memory. At the end of the file a table
says which strategy is used for which module of which model.

A module that has hooks, wrappers or adapters runs at every step, and so does one that is changed
during the walk.

    T steps   B samples in the model's batch, guidance included   D hidden size   W steps a product

This file does not know schedules, caches or samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonica.models.memo import Memo, Watch, noticing_new_modules, settings_of
from harmonica.override import Answer, Method, overridden

LEAST_ROOM = 16 * 2**20
"""Bytes that modulations of several steps may always take."""


# ------------------------------------------------------------ two strategies


def once(memo: Memo, module: nn.Module, equals: object = None) -> Answer:
    """Answer a module by what it has returned for these inputs before.

    Modules that hold equal weights share a key, `equals`: while their weights stay as they are,
    what one of them returns at a step is the answer of all.
    """
    watch = Watch(module)
    at_first = watch.state()

    def answer(forward: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = watch.state()
        owner: object = module
        if equals is not None and state == at_first and state is not None:
            state, owner = (), equals
        step = None if equals is None else memo.k
        inputs = (step, *args, *kwargs.values())
        return memo.recall(owner, lambda: forward(*args, **kwargs), *inputs, state=state)

    return answer


class Condition:
    """The vector c = time(t) + label(y), which modulates all blocks, for all T steps at once.

    Args:
        memo: of the walk.
        time: timesteps (T,) -> (T, D).
        label: labels (B,) -> (B, D).
        modules: hold the weights of both.
    """

    def __init__(self, memo: Memo, time: Method, label: Method, *modules: nn.Module) -> None:
        self.memo, self._time, self._label, self._watch = memo, time, label, Watch(*modules)

    def times(self, t: Tensor) -> Tensor:
        """Return time(t) of this step, one row for all of t (B,), which are equal: (1, D)."""
        if self.memo.k is None:
            return self._time(t)  # type: ignore[no-any-return]
        rows = self._recall("times", lambda: self._time(all_timesteps(self.memo.timesteps, t)))
        return rows[self.memo.k, None]

    def labels(self, y: Tensor) -> Tensor:
        """Return label(y), (B, D)."""
        return self._recall("labels", lambda: self._label(y), y)

    def both(self, t: Tensor, y: Tensor) -> Tensor:
        """Return c of this step, (B, D)."""
        return self.times(t) + self.labels(y)

    def _recall(self, part: str, make: Callable[[], Tensor], *of: Any) -> Tensor:
        self.memo.known[self, part, "at"] = self.memo.k
        # A state of None would run `make` for all steps each time, which is right, and rare.
        value: Tensor = self.memo.recall((self, part), make, *of, state=self._watch.state())
        return value

    def modulation(
        self, product: nn.Module, room: int, before: Callable[[Tensor], Tensor] | None = None
    ) -> Answer:
        """Answer for an adaLN product c (B, D) -> (B, 6D) by one product of W steps.

        As many steps as fit into `room` rows; below two it runs as it is. `before` is applied to c
        first, where the model does that outside of the product.
        """
        memo, watch = self.memo, Watch(product)

        def answer(forward: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            known, batch, state = memo.known, len(args[0]), watch.state()
            parts = [known.get((self, part)) for part in ("times", "labels")]
            now = all(known.get((self, part, "at")) == memo.k for part in ("times", "labels"))
            if memo.k is None or state is None or None in parts or not now or room < 2 * batch:
                return forward(*args, **kwargs)
            times, labels = (part[0] for part in parts if part)  # (T, D), (B, D)
            steps = room // batch
            first = memo.k - memo.k % steps

            def make() -> Sequence[Tensor]:
                rows = (times[first : first + steps, None] + labels).flatten(0, 1)  # (W·B, D)
                outputs: Tensor = forward(rows if before is None else before(rows))
                return outputs.view(-1, batch, outputs.shape[1]).unbind()  # W × (B, 6D)

            of = (first, id(times), id(labels))
            return memo.recall(product, make, *of, state=state)[memo.k - first]

        return answer


def all_timesteps(timesteps: Sequence[float], like: Tensor) -> Tensor:
    """Return (T,) timesteps as the model is given them, without a copy from the CPU."""
    return torch.cat([like.new_full((1,), t) for t in timesteps])


def rows_that_fit(model: nn.Module, products: Sequence[Any]) -> int:
    """Return for how many samples the outputs of these layers fit a fiftieth of the model."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    a_row = sum(layer.out_features * layer.weight.element_size() for layer in products)
    return int(max(LEAST_ROOM, size // 50) // a_row)


def adaln_single(memo: Memo, module: nn.Module) -> Answer:
    """Answer for PixArt's one modulation of all blocks, for all T steps and images of one size."""
    watch = Watch(module)

    def answer(forward: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, steps = watch.state(), len(memo.timesteps)
        if memo.k is None or state is None:
            return forward(*args, **kwargs)
        timestep, added = (*args, None)[:2]
        batch, dtype = kwargs["batch_size"], kwargs["hidden_dtype"]

        def make() -> Any:
            sizes = dict(added or {})
            sizes |= {
                n: size[:1].expand(steps, -1) for n, size in sizes.items() if size is not None
            }
            times = all_timesteps(memo.timesteps, timestep)
            return forward(times, sizes, batch_size=steps, hidden_dtype=dtype)

        modulation, embedded = memo.recall(module, make, dtype, state=state)  # (T, 6D), (T, D)
        return modulation[memo.k].expand(batch, -1), embedded[memo.k].expand(batch, -1)

    return answer


# ------------------------------------------------------------ the models

Answers = list[tuple[nn.Module, Answer]]


def _dit(model: Any, memo: Memo) -> Answers:
    time, label = model.t_embedder, model.y_embedder
    if memo.exact:
        return [(label, once(memo, label))]
    products = [part.adaLN_modulation for part in (*model.blocks, model.final_layer)]
    room = rows_that_fit(model, [product[1] for product in products])
    c = Condition(memo, time.forward, label.forward, time, label)
    return [
        (time, lambda forward, args, kwargs: c.times(*args)),
        (label, lambda forward, args, kwargs: c.labels(*args)),
        *((product, c.modulation(product, room)) for product in products),
    ]


def _stock_dit(model: Any, memo: Memo) -> Answers:
    blocks = list(model.transformer_blocks)
    embeddings = [block.norm1.emb for block in blocks]
    same = equal_to_the_first(embeddings, memo)
    if memo.exact:
        pairs = zip(embeddings, same, strict=True)
        return [(e, once(memo, e, equals="embedding")) for e, equal in pairs if equal]
    first = _stock_condition(memo, embeddings[0])
    pairs = zip(embeddings, same, strict=True)
    conditions = [first if equal else _stock_condition(memo, e) for e, equal in pairs]
    linears = [*(block.norm1.linear for block in blocks), model.proj_out_1]
    room = rows_that_fit(model, linears)
    asked = zip(linears, [*conditions, first], strict=True)  # the last layer asks the first's
    return [
        *((e, _both(c)) for e, c in zip(embeddings, conditions, strict=True)),
        *((linear, c.modulation(linear, room, F.silu)) for linear, c in asked),
    ]


def _stock_condition(memo: Memo, emb: Any) -> Condition:
    def time(t: Tensor) -> Any:
        dtype = next(emb.timestep_embedder.parameters()).dtype
        return emb.timestep_embedder(emb.time_proj(t).to(dtype))

    return Condition(memo, time, emb.class_embedder, emb)


def _both(c: Condition) -> Answer:
    return lambda forward, args, kwargs: c.both(*args)


def _pixart(model: Any, memo: Memo) -> Answers:
    # The text does not change along a walk, nor do its keys and values in a block.
    attentions = [block.attn2 for block in model.transformer_blocks if block.attn2 is not None]
    text = [model.caption_projection, *(x for attn in attentions for x in (attn.to_k, attn.to_v))]
    answers = [(module, once(memo, module)) for module in text if module is not None]
    single = model.adaln_single
    return answers if memo.exact else [*answers, (single, adaln_single(memo, single))]


MODELS: dict[str, Callable[[Any, Memo], Answers]] = {
    "harmonica.models.dit.DiT": _dit,
    "diffusers.models.transformers.dit_transformer_2d.DiTTransformer2DModel": _stock_dit,
    "diffusers.models.transformers.pixart_transformer_2d.PixArtTransformer2DModel": _pixart,
}
"""Which modules of a model are answered how, by the name of its class, which imports nothing."""


@contextmanager
def precomputed(model: nn.Module | None, memo: Memo) -> Iterator[None]:
    """Answer for what is known ahead in a model of a known class, or in one that wraps it."""
    answers: Answers = []
    for module in () if model is None else model.modules():
        kind = type(module)
        answers_of = MODELS.get(f"{kind.__module__}.{kind.__qualname__}")
        if answers_of is not None:
            answers = answers_of(module, memo)
            break
    with noticing_new_modules(), overridden((m, "forward", answer) for m, answer in answers):
        yield


_compared: WeakKeyDictionary[nn.Module, tuple[Any, list[bool]]] = WeakKeyDictionary()


def equal_to_the_first(modules: Sequence[nn.Module], memo: Memo) -> list[bool]:
    """Tell of each module whether it holds the weights and settings of the first.

    This waits for the device once; a trusted walk that finds the same weights, not written to
    since, does not wait again.
    """
    states = [Watch(module).state() for module in modules]
    if None in states:
        return [False] * len(modules)
    before, equal = _compared.get(modules[0], (None, []))
    if memo.trusted and before == states:
        return equal
    groups = [dict(module.state_dict(keep_vars=True)) for module in modules]
    facts = [
        ([(n, t.shape, t.dtype, t.device) for n, t in group.items()], _settings_of(module))
        for group, module in zip(groups, modules, strict=True)
    ]
    flags = [
        torch.stack([(a == b).all() for a, b in zip(its.values(), groups[0].values(), strict=True)])
        for its, fact in zip(groups, facts, strict=True)
        if fact == facts[0]
    ]
    told = iter(torch.stack([flag.all() for flag in flags]).tolist())
    _compared[modules[0]] = states, [fact == facts[0] and next(told) for fact in facts]
    return _compared[modules[0]][1]


def _settings_of(module: nn.Module) -> list[Any]:
    return [vars(part)[name] for part in module.modules() for name in settings_of(part)[0]]
