"""Cache and gates: the only code that touches a model.

A *site* is a module whose output can be reused (attention or feed-forward of a block). While a
model is `gated`, every site asks a *gate* for its output:

    block i: h + scale·attn(…) → site.forward → gate(i, compute) ─┬─ compute() → fresh
                                                                  └─ cache[i]  → the last feature
                                                                  kept

    Cache     site → feature    owned by a trajectory; a new trajectory is a new dict, nothing is ever reset
    Feature   a tensor, or a tree of them (dual-stream attention returns a tuple)
    r         scores of one step, 1 = compute, 0 = reuse                                            (N,)
    τ (tau)   a score above it computes at inference, and renews the cache in training

This file does not know steps, samplers, routers or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from harmonica.override import overridden

Feature = Any
Cache = dict[int, Feature]
Compute = Callable[[], Feature]
Gate = Callable[[int, Compute], Feature]


def reuse(row: Tensor | Sequence[bool], cache: Cache) -> Gate:
    """Return the gate of inference: compute and keep where `row` is true, else read what was kept.

    A skipped site never calls `compute`; it costs one dict lookup. Nothing there to reuse is a
    RuntimeError.

    Args:
        row: (N,) bool, one step of a schedule; a TypeError if it holds scores, which belong to
            `blend`.
        cache: of the trajectory; written where the row computes.

    >>> cache = {}
    >>> reuse([True], cache)(0, lambda: "fresh"), reuse([False], cache)(0, lambda: "never called")
    ('fresh', 'fresh')
    """
    if isinstance(row, Tensor):
        if row.is_floating_point():
            raise TypeError(
                f"row is {row.dtype}; reuse takes the bools of a schedule, router.schedule(tau).compute[k]"
            )
        row = row.tolist()

    def gate(site: int, compute: Compute) -> Feature:
        try:
            if not row[site]:
                return cache[site]
        except LookupError:
            raise never_computed(site, len(row)) from None
        feature = cache[site] = compute()
        return feature

    return gate


def blend(r: Tensor, cache: Cache, tau: float) -> Gate:
    """Return the gate of training: the output is r·fresh + (1−r)·cached (paper, "Router").

    The blended feature, detached, replaces the cached one where r > τ: gradients reach the scores
    of this step through this step's features only. At r = 1 and r = 0 this is `reuse`, bit for bit.

    Args:
        r: (N,) scores in [0, 1], one row of a router.
        cache: of the trajectory; empty at its first step, whose row is all ones.
        tau: τ.
    """
    if not cache and not bool((r == 1).all()):
        raise RuntimeError(
            "the cache is empty and this row is not all ones; the first step of a trajectory computes"
        )
    scores = r.unbind()  # N × ()
    renew = (r.detach() > tau).tolist()  # asked of the device once a step, not once a site
    # Reads see the cache as this step found it, writes are for the next. So a block that runs twice
    # in one step, as it does under activation checkpointing, blends with the same old feature both
    # times.
    before = cache.copy()

    def gate(site: int, compute: Compute) -> Feature:
        feature = compute()
        if before:
            if site not in before:
                raise never_computed(site, len(scores))
            score, old = scores[site], before[site]
            feature = tree_map(
                lambda new, kept: score * new + (1 - score) * kept if _soft(new) else new,
                feature,
                old,
            )
        if renew[site]:
            cache[site] = tree_map(lambda new: new.detach() if _soft(new) else new, feature)
        return feature

    return gate


def _soft(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)  # attention may return (output, None)


def never_computed(site: int, sites: int) -> RuntimeError:
    """Return what to raise where a site is to be reused and nothing was kept."""
    todo = "start at step 0 with an empty cache, or fork with a copy of a filled one, under a table for this model"
    return RuntimeError(
        f"site {site} of {sites} is to be reused but this trajectory has not computed it; {todo}"
    )


@contextmanager
def gated(sites: Mapping[str, nn.Module] | Sequence[nn.Module], gate: Gate) -> Iterator[None]:
    """Shadow the `forward` of each site so that it asks `gate`, and put everything back as it was.

    An attribute of the instance shadows the method of its class (`harmonica.override`); a hook
    could not skip the computation. Another `gated` inside or outside, other libraries' wrappers and
    exceptions are all borne.

    Args:
        sites: modules in the order of the table's columns, no module twice.
        gate: asked as gate(index of the site, compute).
    """
    modules = list(sites.values() if isinstance(sites, Mapping) else sites)
    if len(set(map(id, modules))) < len(modules):
        raise ValueError(
            "a module stands at two sites; each needs a feature, hence a module, of its own"
        )
    with overridden(
        "forward",
        ((module, partial(_ask, gate, i, module.forward)) for i, module in enumerate(modules)),
    ):
        yield


def _ask(
    gate: Gate, site: int, forward: Callable[..., Feature], /, *args: Any, **kwargs: Any
) -> Feature:
    # Shadows are partials of this function: copying a module copies them with it, forward included,
    # so that a copy made while gated runs its own weights.
    return gate(site, lambda: forward(*args, **kwargs))
