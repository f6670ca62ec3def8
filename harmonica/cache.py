"""Cache and gates: how a site's output is kept and used again.

A *site* is a module whose output can be reused (attention or feed-forward of a block). While a
model is `gated`, every site asks a *gate* for its output:

    a block: h + α·attn(…) → site i forward → gate(i, compute) ─┬─ compute() → fresh ─┬→ output
                                                                └─ cache[i]  → kept  ─┘

α is the model's own factor (which DiT calls a gate, too). The cache keeps the output before α, so a
reused feature is multiplied by the α of the step that reuses it.

    gate     output                                    what it keeps
    reuse    fresh where the row is true, else kept    the fresh output, where it computes
    blend    r·fresh + (1 − r)·kept, with gradients    the output, where r is above τ

    Cache     site → feature    owned by a walk; a new walk is a new dict
    Feature   a tensor, or a tree of them (dual-stream attention returns a tuple)
    r         scores of one step, 1 = compute, 0 = reuse                                   (N,)
    τ (tau)   a score above it computes at inference, and renews the cache in training

Features are kept by reference and never written to. This file does not know steps, samplers,
routers or losses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from harmonica.override import overridden

Feature = Any
Cache = dict[int, Feature]
Compute = Callable[[], Feature]
Gate = Callable[[int, Compute], Feature]


def reuse(row: Tensor | Sequence[bool], cache: Cache) -> Gate:
    """Return the gate of inference: compute and keep where `row` is true, else return the kept.

    A skipped site never calls `compute`; it costs one dict lookup. Where nothing was kept, the gate
    raises RuntimeError.

    Args:
        row: (N,) bool, one step of a schedule; TypeError for scores, which belong to `blend`.
        cache: of the walk; written where the row computes.

    >>> cache = {}
    >>> reuse([True], cache)(0, lambda: "fresh"), reuse([False], cache)(0, lambda: "never called")
    ('fresh', 'fresh')
    """
    row = row.tolist() if isinstance(row, Tensor) else row
    if isinstance(row[0], float):
        todo = "reuse takes bools: router.schedule(tau).compute[k]"
        raise TypeError(f"row holds scores such as {row[0]:.2g}; {todo}")

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

    Where r > τ the blended feature, detached, replaces the cached one, so no gradient reaches an
    earlier step. At r = 1 and r = 0 the output is that of `reuse`, bit for bit.

    Args:
        r: (N,) scores in [0, 1], one row of a router.
        cache: of the walk; empty at its first step, whose row is all ones.
        tau: τ.
    """
    scores = r.unbind()  # N × ()
    ones, renews = torch.stack([r == 1, r > tau]).tolist()  # one transfer a step
    if not cache and not all(ones):
        raise RuntimeError("the cache is empty; the first step of a walk computes, so r is ones")
    # Reads see the cache as it was before this step, writes are for the next step. So a block that
    # runs twice in one step, as under activation checkpointing, blends the same old feature twice.
    before = cache.copy()

    def gate(site: int, compute: Compute) -> Feature:
        feature = compute()
        if before:
            if site not in before:
                raise never_computed(site, len(scores))
            feature = tree_map(partial(_mix, scores[site]), before[site], feature)
        if renews[site]:
            cache[site] = tree_map_only(Tensor, Tensor.detach, feature)
        return feature

    return gate


def _mix(r: Tensor, kept: Any, fresh: Any) -> Any:
    """Return r·fresh + (1−r)·kept in one pass, exact at 1 and 0; None stays None."""
    return torch.lerp(kept, fresh, r.to(fresh)) if isinstance(fresh, Tensor) else fresh


def never_computed(site: int, n_sites: int) -> RuntimeError:
    """Return the error of a site that shall be reused although nothing was kept of it."""
    todo = "start at step 0 with an empty cache, or fork with a copy of a filled one"
    what = f"site {site} of {n_sites} is to be reused but this walk has not computed it"
    return RuntimeError(f"{what}; {todo}, under a table for this model")


@contextmanager
def gated(sites: Mapping[str, nn.Module] | Sequence[nn.Module], gate: Gate) -> Iterator[None]:
    """Override the `forward` of each site so that it asks `gate`; put everything back afterwards.

    The gate is asked in the thread or task that opened the `with`; others run the plain model
    (`harmonica.override`). A site that was compiled in place asks before its compiled code.

    Args:
        sites: modules in the order of the table's columns, no module twice.
        gate: asked as gate(index of the site, compute).
    """
    modules = list(sites.values() if isinstance(sites, Mapping) else sites)
    if len(set(map(id, modules))) < len(modules):
        raise ValueError("a module stands at two sites; each site needs a module of its own")
    with overridden((each, called_by(each), (gate, i)) for i, each in enumerate(modules)):
        yield


def called_by(module: nn.Module) -> str:
    """Return the attribute by which torch calls a module: another one where it was compiled."""
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
