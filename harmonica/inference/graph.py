"""Graph: the whole walk as one CUDA graph, captured once and replayed for each batch.

A table does not look at the input, so T steps, guidance and a deterministic sampler are the same
list of operations every time. Captured once, it is replayed with no Python in between; only noise
and condition are copied in.

    draw = GraphWalk(Walk(denoiser, schedule))
    images = draw(x, cond)         the first batch of its shape captures, the following ones replay
    draw.reason                    why the last batch ran without a graph, or None

    key       shapes, types and devices of noise and condition; at most `most` graphs are kept, the latest used ones
    inputs    the tensors that the graph reads; a batch is copied into them
    output    the tensor that it writes; every caller gets a copy

A graph reads the weights where they lay when it was captured: change them in place, or make another
GraphWalk. This file does not know models, schedules or samplers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from harmonica.inference.walk import Walk

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""run, which takes nothing -> (replay, the tensor that each replay writes)."""


@dataclass(frozen=True)
class Captured:
    """One graph: where it reads, how it runs, where it writes."""

    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    output: Tensor

    def run(self, tensors: list[Tensor]) -> Tensor:
        """Copy a batch in, replay, and return a copy of what came out."""
        for mine, theirs in zip(self.inputs, tensors, strict=True):
            mine.copy_(theirs, non_blocking=True)
        self.replay()
        return self.output.clone()


def capture_on_cuda(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture `run` on the current device, after one run on a side stream in which libraries
    start.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


class GraphWalk:
    """A walk that is captured once for each shape of its batch: draw(x, cond) -> x₀.

    Where no graph can be had the walk runs as it is, and `reason` says why.

    Args:
        walk: what is captured.
        most: graphs kept; the one that was not used for longest makes room.
        capture: how; another one is for tests.

    Raises:
        ValueError: if most is below 1.
    """

    def __init__(self, walk: Walk, *, most: int = 4, capture: Capture = capture_on_cuda) -> None:
        if most < 1:
            raise ValueError(f"most is {most}; it must be 1 graph or more")
        self.walk, self.most = walk, most
        self.reason: str | None = None
        self._capture = capture
        self._graphs: OrderedDict[Any, Captured] = OrderedDict()
        self._refused: dict[Any, str] = {}

    @property
    def graphs(self) -> int:
        """How many graphs are kept."""
        return len(self._graphs)

    def __call__(self, x: Tensor, cond: Any) -> Tensor:
        """Return the images (B, C, H, W) that noise x (B, C, H, W) becomes under conditions for
        it.
        """
        leaves, shape = tree_flatten((x, cond))
        key = key_of(x, cond)
        self.reason = self.why_not(x) or self._refused.get(key)
        if self.reason is None and key not in self._graphs:
            self.reason = self._add(key, leaves, shape)
        if self.reason is not None:
            return self.walk(x, cond)
        self._graphs.move_to_end(key)
        return self._graphs[key].run([leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def why_not(self, x: Tensor) -> str | None:
        """Return why a batch like x cannot run as a graph, or None."""
        if self._capture is capture_on_cuda and not x.is_cuda:
            return f"x is on {x.device}; graphs are for CUDA devices"
        if self.walk.draws_noise:
            return "the sampler draws noise at every step, on the CPU; a graph would repeat that of its first batch"
        return None

    def _add(self, key: Any, leaves: list[Any], shape: Any) -> str | None:
        """Capture a graph for batches of this key; return why not, if it cannot be."""
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        while len(self._graphs) >= self.most:
            self._graphs.popitem(last=False)
        try:
            replay, output = self._capture(lambda: self.walk(*tree_unflatten(inputs, shape)))
        except (
            RuntimeError,
            NotImplementedError,
        ) as error:  # torch.OutOfMemoryError is a RuntimeError
            said = str(error).strip().partition("\n")[0]
            reason = f"capturing failed: {said or type(error).__name__}"
            if isinstance(error, torch.OutOfMemoryError):
                return reason  # there may be more room next time
            self._refused[key] = reason
            return reason
        self._graphs[key] = Captured(
            tuple(leaf for leaf in inputs if isinstance(leaf, Tensor)), replay, output
        )
        return None


def key_of(x: Tensor, cond: Any) -> Any:
    """Return what two batches have in common that one graph can run: structure, shapes, types,
    devices, other values.

    >>> key_of(torch.zeros(2, 3), torch.zeros(2)) == key_of(torch.ones(2, 3), torch.ones(2))
    True
    """
    leaves, shape = tree_flatten((x, cond))
    each = (
        (tuple(leaf.shape), leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor)
        else (type(leaf), leaf)
        for leaf in leaves
    )
    return str(shape), tuple(each)
