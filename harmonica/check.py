"""check_denoiser: the laws that every other file relies on, held against one denoiser.

Write an adapter for a model of your own, call this in its test, and the rest of the library works
with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_all, tree_map, tree_map_only

from harmonica.cache import Cache, Gate, gated, reuse
from harmonica.denoise import Denoiser, denoise, final_image


def check_denoiser(denoiser: Denoiser, *, batch_size: int = 2, seed: int = 0) -> None:
    """Hold a denoiser to the laws.

    Each site is asked exactly once in a prediction · no weight asks for a gradient, no site is in
    training mode · the model changes no cached feature in place · computing everything is the plain
    model bit for bit, walk for walk · a forked walk ends where the original does · an image does
    not depend on its neighbours in the batch, to rounding · the walk leaves torch's generator
    alone.

    Raises:
        AssertionError: naming the law that is broken.
    """
    x, cond = denoiser.draw(batch_size, torch.Generator().manual_seed(seed))
    _each_site_is_asked_once(denoiser, x, cond)
    _the_model_is_frozen(denoiser)
    _cached_features_are_left_alone(denoiser, x, cond)
    random_state = torch.get_rng_state()
    plain = list(denoise(denoiser, x, cond))
    assert torch.equal(random_state, torch.get_rng_state()), (
        "the walk draws from torch's global generator"
    )
    assert len(plain) == denoiser.steps, f"a walk has {denoiser.steps} steps, not {len(plain)}"
    _computing_everything_is_the_plain_model_also_from_a_fork(denoiser, x, cond, plain)
    if isinstance(cond, Tensor):  # other conditions have no first half that we know of
        alone = final_image(denoise(denoiser, x[:1], cond[:1]))
        close = (alone - plain[-1][:1]).norm() <= 1e-3 * (1 + plain[-1][:1].norm())
        assert close, "an image depends on its neighbours in the batch"


def _each_site_is_asked_once(denoiser: Denoiser, x: Tensor, cond: Any) -> None:
    asked: list[int] = []

    def count(site: int, compute: Callable[[], Any]) -> Any:
        asked.append(site)
        return compute()

    with torch.no_grad(), gated(denoiser.sites, count):
        denoiser.predict(x, 0, cond)
    # A site that is asked in two calls of its model comes under two keys (`harmonica.calls`).
    once = len(set(asked)) == len(asked)
    assert once, f"a site is asked twice in a call of the model: {asked}"
    assert set(map(int, asked)) == set(range(len(denoiser.sites))), (
        f"each site is asked once in a call of the model, not {asked}"
    )


def _the_model_is_frozen(denoiser: Denoiser) -> None:
    for name, site in denoiser.sites.items():
        assert not any(p.requires_grad for p in site.parameters()), (
            f"{name}: a weight asks for a gradient; freeze it"
        )
        assert not site.training, f"{name} is in training mode; call eval() on the model"


def _cached_features_are_left_alone(denoiser: Denoiser, x: Tensor, cond: Any) -> None:
    cache: Cache = {}
    kept: Cache = {}
    for everything in (True, False):  # fill the cache, then read all of it
        with (
            torch.no_grad(),
            gated(denoiser.sites, reuse([everything] * len(denoiser.sites), cache)),
        ):
            denoiser.predict(x, 0, cond)
        kept = kept or tree_map_only(Tensor, torch.clone, cache)
    same = tree_map(
        lambda a, b: torch.equal(a, b) if isinstance(a, Tensor) else a == b, kept, cache
    )
    assert tree_all(bool, same), "the model changes a cached feature in place"


def _computing_everything_is_the_plain_model_also_from_a_fork(
    denoiser: Denoiser, x: Tensor, cond: Any, plain: list[Tensor]
) -> None:
    def everything(cache: Cache) -> Callable[[int], Gate]:
        return lambda k: reuse([True] * len(denoiser.sites), cache)

    cache: Cache = {}
    memory: dict[str, Any] = {}
    forked = {1, denoiser.steps // 2, denoiser.steps - 1} - {0, denoiser.steps}
    walk = denoise(denoiser, x, cond, everything(cache), memory=memory)
    for k, (one, other) in enumerate(zip(plain, walk, strict=True), start=1):
        assert torch.equal(one, other), (
            f"computing everything differs from the plain model after step {k - 1}"
        )
        if (
            k in forked
        ):  # to its end before the trunk goes on, as λ does: neither may change what the other remembers
            fork = denoise(
                denoiser, other, cond, everything(cache.copy()), start=k, memory=memory.copy()
            )
            assert torch.equal(final_image(fork), plain[-1]), (
                f"a walk forked at step {k} ends elsewhere than the original"
            )
