"""check_denoiser: the laws that every other file relies on, held against one denoiser.

Write an adapter for a model of your own, call this in its test, and the rest of the library works with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_all, tree_map

from harmonica.cache import Cache, gated, reuse
from harmonica.denoise import Denoiser, denoise, last


def check_denoiser(denoiser: Denoiser, *, batch_size: int = 2, seed: int = 0) -> None:
    """Hold a denoiser to the laws.

    Each site is asked exactly once in a prediction · no weight asks for a gradient, no site is in training mode · the
    model changes no cached feature in place · computing everything is the plain model bit for bit, walk for walk · a
    forked walk ends where the original does · an image does not depend on its neighbours in the batch, to rounding ·
    the walk leaves torch's generator alone.

    Raises:
        AssertionError: naming the law that is broken.
    """
    x, cond = denoiser.draw(batch_size, torch.Generator().manual_seed(seed))
    asked: list[int] = []

    def count(site: int, compute: Callable[[], Any]) -> Any:
        asked.append(site)
        return compute()

    with torch.no_grad(), gated(denoiser.sites, count):
        denoiser.predict(x, 0, cond)
    assert sorted(asked) == list(range(len(denoiser.sites))), f"each site is asked once in a prediction, not {asked}"
    for name, site in denoiser.sites.items():
        assert not any(p.requires_grad for p in site.parameters()), f"{name}: a weight asks for a gradient; freeze it"
        assert not site.training, f"{name} is in training mode; call eval() on the model"

    everything = [True] * len(denoiser.sites)
    cache: Cache = {}
    with torch.no_grad(), gated(denoiser.sites, reuse(everything, cache)):
        denoiser.predict(x, 0, cond)
    kept = tree_map(torch.clone, cache)
    with torch.no_grad(), gated(denoiser.sites, reuse([False] * len(denoiser.sites), cache)):
        denoiser.predict(x, 0, cond)
    same = tree_map(torch.equal, kept, cache)
    assert tree_all(bool, same), f"the model changes a cached feature in place: {same}"

    random_state = torch.get_rng_state()
    plain = list(denoise(denoiser, x, cond))
    assert torch.equal(random_state, torch.get_rng_state()), "the walk draws from torch's global generator"
    assert len(plain) == denoiser.steps, f"a walk has {denoiser.steps} steps, not {len(plain)}"

    cache, memory = {}, dict[str, Any]()
    fork_at, fork = denoiser.steps // 2, (x, cache.copy(), memory.copy())
    walk = denoise(denoiser, x, cond, lambda k: reuse(everything, cache), memory=memory)
    for k, (one, other) in enumerate(zip(plain, walk, strict=True), start=1):
        assert torch.equal(one, other), f"computing everything differs from the plain model after step {k - 1}"
        if k == fork_at:
            fork = (other, cache.copy(), memory.copy())
    x, cache, memory = fork
    branch = denoise(denoiser, x, cond, lambda k: reuse(everything, cache), start=fork_at, memory=memory)
    assert torch.equal(last(branch), plain[-1]), f"a walk forked at step {fork_at} ends elsewhere than the original"

    if isinstance(cond, torch.Tensor) and batch_size > 1:
        x, _ = denoiser.draw(batch_size, torch.Generator().manual_seed(seed))
        alone = last(denoise(denoiser, x[:1], cond[:1]))
        close = torch.allclose(alone, plain[-1][:1], rtol=1e-3, atol=1e-3)
        assert close, "an image depends on its neighbours in the batch"
