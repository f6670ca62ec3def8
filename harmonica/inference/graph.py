"""Graph: the whole walk as one CUDA graph, captured once and replayed for each batch.

A table does not look at the input, so T steps, guidance and a deterministic sampler are the same
list of operations every time. Captured once, it is replayed with no Python in between; only noise
and condition are copied in.

    draw = GraphWalk(Walk(denoiser, schedule))
    images = draw(x, cond)         the first batch of its shape captures, the following ones replay
    draw.reason                    why the last batch ran without a graph, or None

A graph reads the weights where they lay when it was captured: change them in place, or make another
GraphWalk. This file does not know models, schedules or samplers.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from harmonica.inference.walk import Refinable, Walk
from harmonica.table import require

Capture = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]
"""(run, which takes nothing, and its device) -> (replay, the tensor that each replay writes)."""


class Captured(NamedTuple):
    """One graph: a batch is copied into its inputs, and every caller gets a copy of its output."""

    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    output: Tensor

    def run(self, tensors: list[Tensor]) -> Tensor:
        """Return what a batch becomes."""
        for mine, theirs in zip(self.inputs, tensors, strict=True):
            mine.copy_(theirs, non_blocking=True)
        self.replay()
        return self.output.clone()


Pools = dict[torch.device, Any]
"""Memory that the graphs of one walk share, since no two of them run at once."""


def cuda_graph(
    pools: Pools, run: Callable[[], Tensor], device: torch.device
) -> tuple[Callable[[], None], Tensor]:
    """Capture `run` on a device, after runs on a side stream in which libraries start.

    A run that waits for the device raises RuntimeError before anything is captured.
    """
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        try:
            torch.cuda.set_stream(side)
            run()
            with _waiting_raises():
                run()
            pool = pools.setdefault(device, torch.cuda.graph_pool_handle())
            graph, mode = torch.cuda.CUDAGraph(), "thread_local"
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode=mode):
                output = run()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails would leave its own
        current.wait_stream(side)
        return graph.replay, output


@contextmanager
def _waiting_raises() -> Iterator[None]:
    """Let torch raise RuntimeError at any wait for a device, if this is the only Python thread: in
    others it would raise too.
    """
    before = torch.cuda.get_sync_debug_mode()
    if threading.active_count() == 1:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class GraphWalk:
    """A walk that is captured once for each shape of its batch: draw(x, cond) -> x₀.

    Where no graph can be had the walk runs as it is, and `reason` says why.

    Args:
        walk: what is captured.
        most: graphs kept, at least 1; the one that was not used for longest makes room.
        capture: how to capture; as a CUDA graph if None.
    """

    def __init__(self, walk: Walk, *, most: int = 4, capture: Capture | None = None) -> None:
        require(most >= 1, f"most is {most}; it must be 1 graph or more")
        self.walk, self.most = walk, most
        self.reason: str | None = None
        self._for_cuda, self._capture = capture is None, capture or partial(cuda_graph, Pools())
        self.graphs: OrderedDict[Any, Captured] = OrderedDict()
        self._refused: dict[Any, str] = {}

    def __call__(self, x: Tensor, cond: Any) -> Tensor:
        """Return the images that noise x becomes, both (B, C, H, W), under conditions for it."""
        leaves, shape = tree_flatten((x, cond))
        key = key_of(x, cond)
        self.reason = self.why_not(x) or self._refused.get(key)
        if self.reason is None and key not in self.graphs:
            self.reason = self._add(key, leaves, shape)
        if self.reason is not None:
            return self.walk(x, cond)
        self.graphs.move_to_end(key)
        return self.graphs[key].run([leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def why_not(self, x: Tensor) -> str | None:
        """Return why no batch like x runs as a graph, or None."""
        if self._for_cuda and not x.is_cuda:
            return f"x is on {x.device}; graphs are for CUDA devices"
        denoiser = self.walk.denoiser
        if isinstance(denoiser, Refinable) and denoiser.draws_noise:
            return "the sampler draws noise at every step; a graph would repeat its first batch's"
        return None

    def _add(self, key: Any, leaves: list[Any], shape: Any) -> str | None:
        """Capture a graph for batches of this key; return why not, if it cannot be."""
        inputs, outer = tree_map_only(Tensor, Tensor.clone, leaves), sys.exc_info()[1]
        tensors = tuple(leaf for leaf in inputs if isinstance(leaf, Tensor))
        try:
            run = partial(self.walk, *tree_unflatten(inputs, shape))
            replay, output = self._capture(run, tensors[0].device)
        except (RuntimeError, NotImplementedError) as error:
            cause = _first_cause(error, outer)
            said = str(cause).strip().partition("\n")[0]
            reason = f"capturing failed: {said or type(cause).__name__}"
            if not isinstance(cause, torch.OutOfMemoryError):  # there may be more room next time
                self._refused[key] = reason
            return reason
        self.graphs[key] = Captured(tensors, replay, output)
        if len(self.graphs) > self.most:
            self.graphs.popitem(last=False)
        return None


def _first_cause(error: BaseException, outer: BaseException | None) -> BaseException:
    """Return the error that the others followed from: to end a failed capture fails as well."""
    while error.__context__ not in (None, outer):
        error = error.__context__
    return error


def key_of(x: Tensor, cond: Any) -> Any:
    """Return what two batches that one graph can run have in common: all but the tensors' numbers.

    >>> key_of(torch.zeros(2, 3), torch.zeros(2)) == key_of(torch.ones(2, 3), torch.ones(2))
    True
    """
    leaves, shape = tree_flatten((x, cond))

    def fact(leaf: Any) -> Any:
        tensor = isinstance(leaf, Tensor)
        return (leaf.shape, leaf.dtype, leaf.device) if tensor else (type(leaf), leaf)

    return str(shape), tuple(map(fact, leaves))
