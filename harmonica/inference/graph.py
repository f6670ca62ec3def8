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

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from harmonica.inference.walk import Refinable, Walk
from harmonica.values import whole

Capture = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]
"""(run, which takes nothing, and its device) -> (replay, the tensor that each replay writes)."""
Replay = Callable[[list[Any]], Tensor]  # the tensors of a batch -> its images


def cuda_graph(
    pools: dict[torch.device, Any], run: Callable[[], Tensor], device: torch.device
) -> tuple[Callable[[], None], Tensor]:
    """Capture `run` on a device, after runs on a side stream in which libraries start.

    A run that waits for the device raises RuntimeError before anything is captured, if this is the
    only Python thread: in others it would raise too. `pools` holds the memory that the graphs of
    one walk share, since no two of them run at once.
    """
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        waiting = torch.cuda.get_sync_debug_mode()
        try:
            torch.cuda.set_stream(side)
            run()
            if threading.active_count() == 1:
                torch.cuda.set_sync_debug_mode("error")
            run()
            torch.cuda.set_sync_debug_mode(waiting)
            pool = pools.setdefault(device, torch.cuda.graph_pool_handle())
            graph, mode = torch.cuda.CUDAGraph(), "thread_local"
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode=mode):
                output = run()
        finally:
            torch.cuda.set_sync_debug_mode(waiting)
            torch.cuda.set_stream(current)  # a capture that fails would leave its own
        current.wait_stream(side)
        return graph.replay, output


class GraphWalk:
    """A walk that is captured once for each shape of its batch: draw(x, cond) -> x₀.

    Where no graph can be had the walk runs as it is, and `reason` says why. At most `most` graphs
    are kept; the one that was not used for longest makes room. They share memory, so threads take
    turns; all of them must call on one CUDA stream. `capture` is for tests.
    """

    def __init__(self, walk: Walk, *, most: int = 4, capture: Capture | None = None) -> None:
        self.walk, self.most, self._for_cuda = walk, whole("most", most), capture is None
        self.reason: str | None = None
        self.graphs: dict[Any, Replay] = {}  # used last comes last
        self._capture, self._refused = capture or partial(cuda_graph, {}), dict[Any, str]()
        self._turn = threading.Lock()

    def __call__(self, x: Tensor, cond: Any) -> Tensor:
        """Return the images that noise x becomes, both (B, C, H, W), under conditions for it."""
        with self._turn:
            return self._drawn(x, cond)

    def _drawn(self, x: Tensor, cond: Any) -> Tensor:
        leaves, shape = tree_flatten((x, cond))
        key = key_of(x, cond)
        self.reason = self._why_not(x) or self._refused.get(key)
        graph = self.graphs.pop(key, None)
        if graph is None and self.reason is None:
            graph = self._captured(key, leaves, shape)
        if graph is None:
            return self.walk(x, cond)
        self.graphs[key] = graph
        if len(self.graphs) > self.most:
            del self.graphs[next(iter(self.graphs))]
        return graph([leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def _why_not(self, x: Tensor) -> str | None:
        """Return why no batch like x runs as a graph, or None."""
        if self._for_cuda and not x.is_cuda:
            return f"x is on {x.device}; graphs are for CUDA devices"
        denoiser = self.walk.denoiser
        if isinstance(denoiser, Refinable) and denoiser.draws_noise:
            return "the sampler draws noise at every step; a graph would repeat its first batch's"
        return None

    def _captured(self, key: Any, leaves: list[Any], shape: Any) -> Replay | None:
        """Return what runs a batch of this key as a graph; None, and say why, if it cannot be."""
        copies, outer = tree_map_only(Tensor, Tensor.clone, leaves), sys.exc_info()[1]
        inputs = [leaf for leaf in copies if isinstance(leaf, Tensor)]
        try:
            run = partial(self.walk, *tree_unflatten(copies, shape))
            replay, output = self._capture(run, inputs[0].device)
        except (RuntimeError, NotImplementedError) as error:
            cause: BaseException = error  # the first one: to end a failed capture fails as well
            while cause.__context__ not in (None, outer):
                cause = cause.__context__
            said = str(cause).strip().partition("\n")[0]
            self.reason = f"capturing failed: {said or type(cause).__name__}"
            if not isinstance(cause, torch.OutOfMemoryError):  # there may be more room next time
                self._refused[key] = self.reason
            return None

        def images_of(tensors: list[Any]) -> Tensor:
            for mine, theirs in zip(inputs, tensors, strict=True):
                mine.copy_(theirs, non_blocking=True)
            replay()
            return output.clone()  # every caller gets a copy

        return images_of


def key_of(x: Tensor, cond: Any) -> Any:
    """Return what two batches that one graph can run have in common: all but the tensors' numbers.

    >>> key_of(torch.zeros(2, 3), torch.zeros(2)) == key_of(torch.ones(2, 3), torch.ones(2))
    True
    """
    leaves, shape = tree_flatten((x, cond))
    keys = [(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else (type(t), t) for t in leaves]
    return str(shape), tuple(keys)
