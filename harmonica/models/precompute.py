"""Precompute: what a model computes again and again although it is known before the walk.

    part of the model                  plain model            here
    label and caption embedding        every step             once a walk            same bits
    keys and values of the text        every step and block   once a walk and block  same bits
    timestep embedding of a DiT        every step             once, all T steps      rounding
    modulation (adaLN) of a DiT        every step and block   W steps in a product   rounding

Weights and conditions must stay as they are from the first step of a walk to the last, so what was
computed once holds until the end. W is as many steps as fit into a fiftieth of the model's memory,
or into 16 MiB if that is more. This file does not know schedules, caches or samplers.

    T steps   B samples in the model's batch, guidance included   D hidden size   W steps a product
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.override import Answer, overridden

LEAST_ROOM = 16 * 2**20
"""Bytes that modulations of several steps may always take."""

Pair = tuple[nn.Module, Answer]


class Memo:
    """What one walk knows, and its step k."""

    def __init__(self, timesteps: Sequence[float]) -> None:
        self.timesteps, self.k = timesteps, 0  # T of them, as the model is given them
        self.known = dict[nn.Module, tuple[int, Any]]()

    def get_or_make(self, owner: nn.Module, make: Callable[[], Any], version: int = 0) -> Any:
        """Return what is known under `owner` in this version; make it if nothing is."""
        if owner not in self.known or self.known[owner][0] != version:
            self.known[owner] = version, make()
        return self.known[owner][1]


def once(memo: Memo, module: nn.Module) -> Pair:
    """Answer a module, whose inputs are always the same, by what it returned at the first step."""
    return module, lambda f, args, kw: memo.get_or_make(module, partial(f, *args, **kw))


def every_time(memo: Memo, embedder: nn.Module) -> Pair:
    """Answer for t (B,), which are equal, by one row (1, D) of the embedding of all timesteps."""

    def answer(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        def make() -> Any:  # a list of them would be copied to the device, and waited for
            return forward(torch.cat([args[0].new_full((1,), time) for time in memo.timesteps]))

        return memo.get_or_make(embedder, make)[memo.k, None]

    return embedder, answer


def modulation(memo: Memo, layer: nn.Module, time: nn.Module, label: nn.Module, room: int) -> Pair:
    """Answer a layer of c = time(t) + label(y), (B, D) -> (B, 6D), by one product for W steps.

    As many steps as fit into `room` rows; below two it runs as it is.
    """

    def answer(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        batch = len(args[0])
        steps = room // batch
        if steps < 2:
            return forward(*args, **kwargs)
        first = memo.k - memo.k % steps

        def make() -> Sequence[Tensor]:
            times, labels = memo.known[time][1], memo.known[label][1]  # (T, D), (B, D)
            rows = (times[first : first + steps, None] + labels).flatten(0, 1)  # (W·B, D)
            return forward(rows).unflatten(0, (-1, batch)).unbind()  # type: ignore[no-any-return]

        return memo.get_or_make(layer, make, first)[memo.k - first]  # of W × (B, 6D)

    return layer, answer


def rows_that_fit(model: nn.Module, products: Sequence[Any]) -> int:
    """Return for how many samples the outputs of these layers fit."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    a_row = sum(layer.out_features * layer.weight.element_size() for layer in products)
    return int(max(LEAST_ROOM, size // 50) // a_row)


def _dit(model: Any, memo: Memo, exact: bool) -> list[Pair]:
    time, label = model.t_embedder, model.y_embedder
    if exact:
        return [once(memo, label)]
    products = [part.adaLN_modulation for part in (*model.blocks, model.final_layer)]
    room = rows_that_fit(model, [product[1] for product in products])
    of_steps = [modulation(memo, product, time, label, room) for product in products]
    return [every_time(memo, time), once(memo, label), *of_steps]


def _pixart(model: Any, memo: Memo, exact: bool) -> list[Pair]:
    # The text does not change along a walk, nor do its keys and values in a block.
    attentions = [block.attn2 for block in model.transformer_blocks if block.attn2 is not None]
    text = [model.caption_projection, *(x for attn in attentions for x in (attn.to_k, attn.to_v))]
    return [once(memo, module) for module in text if module is not None]


ANSWERED: dict[str, Callable[[Any, Memo, bool], list[Pair]]] = {
    "harmonica.models.dit.DiT": _dit,
    "diffusers.models.transformers.pixart_transformer_2d.PixArtTransformer2DModel": _pixart,
}
"""Which modules of a model are answered how, by the name of its class, which imports nothing."""


@contextmanager
def precomputed(
    model: nn.Module, timesteps: Sequence[float], *, exact: bool
) -> Iterator[Callable[[int], None]]:
    """Answer in one walk for what is known ahead; gives a function to call with k before each step.

    A model of another class runs as it is. `exact` leaves out what differs by rounding.
    """
    memo, kind = Memo(timesteps), f"{type(model).__module__}.{type(model).__qualname__}"
    answers = ANSWERED[kind](model, memo, exact) if kind in ANSWERED else []
    with overridden((module, "forward", answer) for module, answer in answers):
        yield partial(setattr, memo, "k")
