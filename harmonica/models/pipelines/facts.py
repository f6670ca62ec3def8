"""What is known of a pipeline's runs, and what is kept of one run between predict and step.

    Facts             what one whole run showed, true of all runs of the same number of steps
    Trace             fingerprints of what happened at each step of a run, to compare two runs
    SchedulerInputs   what one run gave its scheduler at the step where it was stopped
    SamplerState      what the sampler of one walk remembers between two steps

This file does not know pipelines or denoisers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

LatentSource = tuple[str, int, int]
"""A tensor that is drawn: by prepare_latents or randn_tensor, in which call, which leaf."""

Outputs = dict[tuple[str, int], Any]
"""(model, number of its call in a step) -> its output at step 0, of which only shapes are kept."""

Trace = list[tuple[dict[str, int], int]]
"""For each step, the digest of each argument that the scheduler was given, and of x after it."""


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
    x_source: LatentSource | None = None  # None where another x cannot be put in
    doubled: bool = False  # the scheduler steps [x; x]
    timesteps: tuple[float, ...] = ()  # that the scheduler is set to, from the first step's on
    first_result: Any = None  # what the scheduler returned at step 0
    states: list[dict[str, Any]] = field(default_factory=list)  # of the scheduler, after each step

    def first_half(self, x: Tensor) -> Tensor:
        """Return the x of [x; x], or the output for it, if that is what the scheduler steps."""
        return x[: len(x) // 2] if self.doubled else x


@dataclass(frozen=True)
class SamplerState:
    """What the sampler of one walk remembers after a step, or before the first one."""

    scheduler: Any  # a copy of the pipeline's, which nobody steps
    carried: list[Any]  # what the step returned beside x
    generators: list[Tensor]  # states of the generators among its arguments
    random: list[Tensor]  # states of torch's global ones


@dataclass(frozen=True)
class SchedulerInputs:
    """What a run gave its scheduler where it was stopped, beside the output of the model."""

    arguments: dict[str, Any]  # by name, without the sample
    sample: Tensor | None  # None where it is x itself, which must not be kept alive
    carried: dict[str, int]  # argument -> which of the values that the step before returned
    start: SamplerState  # holds for step 0; at others the walk has its own


def copied_scheduler(scheduler: Any) -> Any:
    """Return a scheduler of the same class and state, with tensors of its own: PNDM adds in place.

    What others have put on the instance to hide its methods is left out.
    """
    copied = object.__new__(type(scheduler))
    hidden = ("step", "set_timesteps")
    own = {name: value for name, value in vars(scheduler).items() if name not in hidden}
    vars(copied).update(tree_map_only(Tensor, Tensor.clone, own))
    return copied


def timesteps_from(scheduler: Any, timestep: Any) -> tuple[float, ...]:
    """Return the timesteps that a scheduler is set to, from this one on."""
    times = tuple(map(float, torch.as_tensor(scheduler.timesteps).flatten().tolist()))
    first = None if timestep is None else float(torch.as_tensor(timestep).flatten()[0])
    return times[times.index(first) if first in times else 0 :]


def generators_in(tree: Any) -> list[Generator]:
    """Return the generators among some arguments, in their order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Generator)]


def states_of(generators: Iterable[Generator]) -> list[Tensor]:
    """Return the state of each generator."""
    return [generator.get_state() for generator in generators]


def global_generators(device: torch.device) -> list[Generator]:
    """Return torch's generators that a pipeline on this device draws from if it is given none."""
    if device.type != "cuda":
        return [torch.default_generator]
    torch.cuda.init()  # type: ignore[no-untyped-call]
    number = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[number]]


@contextmanager
def random_states(device: torch.device, states: list[Tensor]) -> Iterator[list[Tensor]]:
    """Set torch's global generators in this `with`, unless `states` is empty; yield a list that
    holds their states afterwards.
    """
    generators = global_generators(device) if states else []
    before, after = states_of(generators), list[Tensor]()
    try:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        yield after
    finally:
        after += states_of(generators)
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def shapes_of(tree: Any) -> Any:
    """Return a tree whose tensors have the shapes, types and devices of these, and no memory."""

    def empty(leaf: Tensor) -> Tensor:
        return torch.empty((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)

    return tree_map_only(Tensor, empty, tree)


def zeros(tree: Any) -> Any:
    """Return zeros in place of the tensors."""
    return tree_map_only(Tensor, torch.zeros_like, tree)


def made_up(output: Any, name: str, call: int, inputs: Any) -> Any:
    """Return an output of these shapes, which depends on all inputs and costs nothing."""
    share = digest(inputs) % 10_007 / 10_007
    generator = Generator().manual_seed(len(name) + 1000 * call)

    def draw(leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=generator) * (0.5 + share)
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
