"""check_denoiser: the laws that every other file relies on, held against one denoiser.

Write an adapter for a model of your own, call this in its test, and the rest of the library works
with it.
"""

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from harmonica.cache import Cache, Compute, Feature, gated, reuse
from harmonica.denoise import Denoiser, denoise, final_image
from harmonica.schedule_fields import checked_facts


def require_denoiser(denoiser: Any) -> None:
    """Raise TypeError, naming what is missing, unless this is a `Denoiser`."""
    members = ("steps", "sites", "about", "predict", "step", "draw")
    lacks = ", ".join(name for name in members if getattr(denoiser, name, None) is None)
    if lacks:
        todo = "load(name) and from_pipeline(pipe, …) give one"
        raise TypeError(f"{type(denoiser).__name__} is no Denoiser, it lacks {lacks}; {todo}")


def identity(denoiser: Denoiser) -> dict[str, Any]:
    """Return what a file must know of its denoiser, as JSON gives it back: its steps, its sites,
    `about`, and a checksum of a few weights.
    """
    sites = list(denoiser.sites.values())
    few = [p.flatten()[:64] for site in (sites[0], sites[-1]) for p in site.parameters()]
    facts = {**checked_facts(denoiser.about), "sites": [*denoiser.sites], "weights": checksum(few)}
    facts = {name: list(v) if isinstance(v, tuple) else v for name, v in facts.items()}
    return {"steps": denoiser.steps, **facts}


def checksum(tensors: Iterable[Tensor]) -> str:
    """Return a checksum of the numbers in tensors."""
    crc = 0
    for each in tensors:
        crc = zlib.crc32(each.detach().cpu().flatten().view(torch.uint8).numpy().tobytes(), crc)
    return f"{crc:08x}"


def check_denoiser(denoiser: Denoiser) -> None:
    """Hold a denoiser to the laws; raise AssertionError naming the one that is broken.

    Each site is asked exactly once in a prediction · no weight asks for a gradient, no site is in
    training mode · the model changes no cached feature in place · computing everything is the plain
    model bit for bit, walk for walk · a forked walk ends where the original does · an image does
    not depend on its neighbours in the batch, to rounding · the walk leaves torch's generator
    alone.
    """
    require_denoiser(denoiser)
    x, cond = denoiser.draw(2, torch.Generator().manual_seed(0))
    _each_site_is_asked_once(denoiser, x, cond)
    for name, site in denoiser.sites.items():
        frozen = not any(p.requires_grad for p in site.parameters())
        assert frozen, f"{name}: a weight asks for a gradient; freeze it"
        assert not site.training, f"{name} is in training mode; call eval() on the model"
    _cached_features_are_left_alone(denoiser, x, cond)
    state = torch.get_rng_state()
    plain = list(denoise(denoiser, x, cond))
    alone = torch.equal(state, torch.get_rng_state())
    assert alone, "the walk draws from torch's global generator"
    assert len(plain) == denoiser.steps, f"a walk has {len(plain)} steps, not {denoiser.steps}"
    _computing_everything_is_the_plain_model_also_from_a_fork(denoiser, x, cond, plain)
    if isinstance(cond, Tensor):  # how to split other conditions is not known here
        one, of_two = final_image(denoise(denoiser, x[:1], cond[:1])), plain[-1][:1]
        close = (one - of_two).norm() <= 1e-3 * (1 + of_two.norm())
        assert close, "an image depends on its neighbours in the batch"


def _each_site_is_asked_once(denoiser: Denoiser, x: Tensor, cond: Any) -> None:
    calls: list[int] = []

    def count(site: int, compute: Compute) -> Feature:
        calls.append(site)
        return compute()

    with torch.no_grad(), gated(denoiser.sites, count):
        denoiser.predict(x, 0, cond)
    # A site that is asked in two calls of its model comes under two keys (`harmonica.calls`).
    assert len(set(calls)) == len(calls), f"a site is asked twice in a call of the model: {calls}"
    every = {*map(int, calls)} == {*range(len(denoiser.sites))}
    assert every, f"each site is asked once in a call of the model, not {calls}"


def _cached_features_are_left_alone(denoiser: Denoiser, x: Tensor, cond: Any) -> None:
    cache, first = Cache(), Cache()
    for everything in (True, False):  # fill the cache, then read all of it
        gate = reuse([everything] * len(denoiser.sites), cache)
        with torch.no_grad(), gated(denoiser.sites, gate):
            denoiser.predict(x, 0, cond)
        first = first or tree_map_only(Tensor, torch.clone, cache)

    pairs = zip(tree_leaves(first), tree_leaves(cache), strict=True)
    same = all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
    assert same, "the model changes a cached feature in place"


def _computing_everything_is_the_plain_model_also_from_a_fork(
    denoiser: Denoiser, x: Tensor, cond: Any, plain: list[Tensor]
) -> None:
    steps, everything = denoiser.steps, [True] * len(denoiser.sites)

    def walk(x: Tensor, cache: Cache, start: int, memory: dict[str, Any]) -> Iterator[Tensor]:
        gates = lambda k: reuse(everything, cache)  # noqa: E731
        return denoise(denoiser, x, cond, gates, start=start, memory=memory)

    cache, memory = Cache(), dict[str, Any]()
    for k, after in enumerate(walk(x, cache, 0, memory), start=1):
        same = torch.equal(plain[k - 1], after)
        assert same, f"computing everything differs from the plain model after step {k - 1}"
        if k < steps and k in (1, steps // 2, steps - 1):
            # The fork walks to its end first, as λ's forks do, and must change nothing here.
            fork = final_image(walk(after, cache.copy(), k, memory.copy()))
            same = torch.equal(fork, plain[-1])
            assert same, f"a walk forked at step {k} ends elsewhere than the original"
