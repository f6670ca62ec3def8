"""Facts: what one whole run of a pipeline shows, true of all its runs of the same number of steps.

Two runs are compared by a `digest` of each tensor, a fingerprint. This file does not know pipelines
or denoisers.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class NotFollowedError(ValueError):
    """A run that cannot be followed, and why."""


@dataclass
class Facts:
    """What one whole run showed."""

    models_in_loop: set[str] = field(default_factory=lambda: {"transformer"})  # run at every step
    uses_global_random: bool = True  # draws from torch's global generators
    draws_noise: bool = False  # a step of the scheduler does
    shapes: list[list[torch.Size]] = field(default_factory=list)  # of each call's inputs, one step
    x: Tensor = field(default_factory=lambda: torch.empty(0))  # at step 0
    # What x comes from: a method that draws it, in which call, which leaf; None where another x
    # cannot be put in.
    x_source: tuple[str, int, int] | None = None
    doubled: bool = False  # the scheduler steps [x; x]
    timesteps: tuple[float, ...] = ()  # that the scheduler is set to, from the first step's on
    first_result: Any = None  # what the scheduler returned at step 0
    states: list[dict[str, Any]] = field(default_factory=list)  # of the scheduler, after each step

    def first_half(self, x: Tensor) -> Tensor:
        """Return the x of [x; x], or the output for it, if that is what the scheduler steps."""
        return x[: len(x) // 2] if self.doubled else x


def shapes_of(tree: Any) -> Any:
    """Return a tree whose tensors have the shapes, types and devices of these, and no memory."""

    def empty(leaf: Tensor) -> Tensor:
        return torch.empty((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)

    return tree_map_only(Tensor, empty, tree)


def made_up(output: Any, inputs: Any) -> Any:
    """Return an output of these shapes, which depends on all inputs and costs nothing."""
    generator = Generator().manual_seed(digest(inputs))

    def draw(leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=generator)
        return noise.to(leaf) if leaf.is_floating_point() else leaf

    return tree_map_only(Tensor, draw, output)


def digest(value: Any) -> int:
    """Return a number that tells trees of tensors apart, to the bit; generators do not count.

    >>> digest((torch.zeros(2), 1)) == digest((torch.zeros(2), 1.5))
    False
    """
    whole = hashlib.blake2b(digest_size=8)
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
            whole.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(leaf, int | float | str):
            whole.update(repr(leaf).encode())
    return int.from_bytes(whole.digest(), "big")
