"""Precompute: what a model computes again and again although it is known before the walk.

    part of the model                      plain model            here
    label and caption embedding            every step             once a walk            same bits
    keys and values of the text            every step and block   once a walk and block  same bits
    equal copies of an embedding, in all   every step and block   every step             same bits
        blocks of diffusers' DiT
    timestep embedding of a DiT            every step             once, all T steps      rounding
    modulation (adaLN) of a DiT            every step and block   W steps in a product   rounding

One `Memo` holds what a walk knows. `once` keeps an output as long as its inputs and weights are the
same tensors, unchanged. `Condition` computes several steps in one product; W is as many as fit into
a fiftieth of the model's memory. MODELS says which modules of which model are answered how. A
module that has hooks, wrappers or adapters runs at every step, and so does one that is changed
during the walk. This file does not know schedules, caches or samplers.

    T steps   B samples in the model's batch, guidance included   D hidden size   W steps a product
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


def once(memo: Memo, module: nn.Module, equals: object = None) -> Answer:
    """Answer a module by what it has returned for these inputs before.

    Modules that hold equal weights share a key, `equals`: while their weights stay as they are,
    what one of them returns at a step is the answer of all.
    """
    watch = Watch(module)
    at_first = watch.state()

    def answer(forward: Method, args: Any, kwargs: Any) -> Any:
        owner: object = module
        state, step = watch.state(), None if equals is None else memo.k
        if equals is not None and state == at_first and state is not None:
            state, owner = (), equals
        inputs = (step, *args, *kwargs.values())
        return memo.recall(owner, lambda: forward(*args, **kwargs), *inputs, state=state)

    return answer


class Condition:
    """The vector c = time(t) + label(y), (B, D), which modulates all blocks: all T steps at once.

    `modules` hold the weights of `time`, (T,) -> (T, D), and of `label`, (B,) -> (B, D).
    """

    def __init__(self, memo: Memo, time: Method, label: Method, *modules: nn.Module) -> None:
        self.memo, self._time, self._label, self._watch = memo, time, label, Watch(*modules)

    def times(self, t: Tensor) -> Tensor:
        """Return time(t) of this step, one row for all of t (B,), which are equal: (1, D)."""
        if self.memo.k is None:
            return self._time(t)  # type: ignore[no-any-return]
        times = self.memo.timesteps

        def make() -> Any:  # a list of them would be copied to the device, and waited for
            return self._time(torch.cat([t.new_full((1,), time) for time in times]))

        return self._recall("times", make)[self.memo.k, None]

    def labels(self, y: Tensor) -> Tensor:
        """Return label(y), (B, D)."""
        return self._recall("labels", lambda: self._label(y), y)

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

        def answer(forward: Method, args: Any, kwargs: Any) -> Any:
            known, batch, state = memo.known, len(args[0]), watch.state()
            parts = [known.get((self, part)) for part in ("times", "labels")]
            # The input is c only if both of its parts were made, or looked up, at this step.
            is_c = all(known.get((self, part, "at")) == memo.k for part in ("times", "labels"))
            if memo.k is None or state is None or None in parts or not is_c or room < 2 * batch:
                return forward(*args, **kwargs)
            times, labels = (part[0] for part in parts if part)  # (T, D), (B, D)
            steps = room // batch
            first = memo.k - memo.k % steps

            def make() -> Sequence[Tensor]:
                rows = (times[first : first + steps, None] + labels).flatten(0, 1)  # (W·B, D)
                outputs: Tensor = forward(rows if before is None else before(rows))
                return outputs.view(-1, batch, outputs.shape[1]).unbind()  # W × (B, 6D)

            of = first, id(times), id(labels)
            return memo.recall(product, make, *of, state=state)[memo.k - first]

        return answer


def rows_that_fit(model: nn.Module, products: Sequence[Any]) -> int:
    """Return for how many samples the outputs of these layers fit a fiftieth of the model."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    a_row = sum(layer.out_features * layer.weight.element_size() for layer in products)
    return int(max(LEAST_ROOM, size // 50) // a_row)


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
    norms = [block.norm1 for block in model.transformer_blocks]
    same = equal_to_the_first([norm.emb for norm in norms], memo)
    norms = [norm for norm, equal in zip(norms, same, strict=True) if equal]
    if memo.exact or not norms:
        return [(norm.emb, once(memo, norm.emb, "embedding")) for norm in norms]
    emb, linears = norms[0].emb, [*(norm.linear for norm in norms), model.proj_out_1]

    def time(t: Tensor) -> Any:
        dtype = next(emb.timestep_embedder.parameters()).dtype
        return emb.timestep_embedder(emb.time_proj(t).to(dtype))

    c, room = Condition(memo, time, emb.class_embedder, emb), rows_that_fit(model, linears)
    products = ((linear, c.modulation(linear, room, F.silu)) for linear in linears)
    sums: Answer = lambda forward, args, kwargs: c.times(args[0]) + c.labels(args[1])  # noqa: E731
    return [*((norm.emb, sums) for norm in norms), *products]


def _pixart(model: Any, memo: Memo) -> Answers:
    # The text does not change along a walk, nor do its keys and values in a block.
    attentions = [block.attn2 for block in model.transformer_blocks if block.attn2 is not None]
    text = [model.caption_projection, *(x for attn in attentions for x in (attn.to_k, attn.to_v))]
    return [(module, once(memo, module)) for module in text if module is not None]


MODELS: dict[str, Callable[[Any, Memo], Answers]] = {
    "harmonica.models.dit.DiT": _dit,
    "diffusers.models.transformers.dit_transformer_2d.DiTTransformer2DModel": _stock_dit,
    "diffusers.models.transformers.pixart_transformer_2d.PixArtTransformer2DModel": _pixart,
}
"""Which modules of a model are answered how, by the name of its class, which imports nothing."""


@contextmanager
def precomputed(model: nn.Module, memo: Memo) -> Iterator[None]:
    """Answer for what is known ahead in a model of a known class, or in one that wraps it."""
    kinds = ((f"{type(m).__module__}.{type(m).__qualname__}", m) for m in model.modules())
    answers = next((MODELS[kind](m, memo) for kind, m in kinds if kind in MODELS), [])
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
    settings = [[vars(m)[n] for m in e.modules() for n in settings_of(m)[0]] for e in modules]
    facts = [
        ([(n, t.shape, t.dtype, t.device) for n, t in group.items()], its)
        for group, its in zip(groups, settings, strict=True)
    ]
    flags = [
        torch.stack([(a == b).all() for a, b in zip(its.values(), groups[0].values(), strict=True)])
        for its, fact in zip(groups, facts, strict=True)
        if fact == facts[0]
    ]
    told = iter(torch.stack([flag.all() for flag in flags]).tolist())
    _compared[modules[0]] = states, [fact == facts[0] and next(told) for fact in facts]
    return _compared[modules[0]][1]
