"""What is known of a pipeline's walk, and how it is told: recorded runs, arrivals, digests.

    Recorded   what one whole run showed: a template of each model's output, the scheduler's state
               after each step
    Arrival    what reached the scheduler at one step of one run
    digest     a number that tells two trees of tensors apart, to the bit
    pretended  an answer that has a model's shapes, depends on all its inputs, and costs nothing

This file does not know pipelines or denoisers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class NotFollowedError(ValueError):
    """A run that cannot be followed, and why."""


class Leave(BaseException):
    """Ends a run that has what it wanted; not an Exception, so that no pipeline catches it."""


@dataclass
class Recorded:
    """What one whole run showed."""

    batch: int
    answers: dict[tuple[str, int], Any] = field(default_factory=dict)  # (model, call) at step 0
    inputs: list[list[torch.Size]] = field(default_factory=list)  # of each call, at step 0
    looping: set[str] = field(default_factory=lambda: {"transformer"})  # called at later steps too
    steps: list[dict[str, Any]] = field(default_factory=list)  # digests of what each was given
    after: list[int] = field(default_factory=list)  # digest of x after each step
    states: list[dict[str, Any]] = field(default_factory=list)  # of the scheduler, after each step
    returned: Any = None  # by the scheduler's first step
    first: Tensor = field(default_factory=lambda: torch.empty(0))  # x of step 0
    doubled: bool = False  # the scheduler steps [x; x]
    entry: tuple[str, int, int] | None = None  # where x comes from: source, call, leaf
    timesteps: tuple[float, ...] = ()
    draws_noise: bool = False  # a step of the scheduler does
    random: bool = False  # torch's global generators are drawn from

    def fold(self, x: Tensor) -> Tensor:
        """Return the x of [x; x], if that is what the scheduler steps."""
        return x[: len(x) // 2] if self.doubled else x

    def unfold(self, x: Tensor) -> Tensor:
        """Return what the scheduler steps for x."""
        return torch.cat([x, x]) if self.doubled else x


@dataclass(frozen=True)
class State:
    """What the sampler of one run remembers after a step, or before the first one."""

    scheduler: dict[str, Any]
    carried: list[Any]  # what it returned beside x
    generators: list[Tensor]  # states of the generators among the arguments
    random: list[Tensor]  # states of torch's global ones


@dataclass
class Arrival:
    """What reaches the scheduler at one step of one run."""

    arguments: inspect.BoundArguments  # without the model's output
    sample: Tensor | None  # None where it is x itself, which must not be kept alive
    out: Tensor | None
    carried: dict[str, int]  # argument -> which of the values that the step before returned
    start: State  # right at step 0; later ones are the walk's


def state_of(scheduler: Any) -> dict[str, Any]:
    """Return what a scheduler remembers, its attributes, in copies: PNDM adds to a tensor in place.

    What others have put on the instance to hide its methods is not among it.
    """
    held = scheduler if isinstance(scheduler, Mapping) else vars(scheduler)
    return {
        key: _copied(value) for key, value in held.items() if key not in ("step", "set_timesteps")
    }


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


def bind(
    step: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """Bind the arguments of a scheduler's step to their names."""
    return inspect.signature(step).bind(*args, **kwargs)


def folded_out(recorded: Recorded, out: Any, sample: Tensor) -> Any:
    """Return the model's output for x, if the scheduler is given [out; out] with [x; x]."""
    both = recorded.doubled and isinstance(out, Tensor) and len(out) == len(sample)
    return recorded.fold(out) if both else out


def generators_in(bound: inspect.BoundArguments) -> list[torch.Generator]:
    """Return the generators among the arguments, in their order."""
    leaves = tree_leaves(list(bound.arguments.values()))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]


def global_generators(device: torch.device) -> list[torch.Generator]:
    """Return torch's generators that a pipeline on this device draws from if it is given none."""
    if device.type != "cuda":
        return [torch.default_generator]
    torch.cuda.init()  # type: ignore[no-untyped-call]
    number = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[number]]


def states_of(device: torch.device) -> list[Tensor]:
    """Return the states of these generators."""
    return [generator.get_state() for generator in global_generators(device)]


def scaled(recorded: Recorded, batch: int) -> dict[tuple[str, int], Any]:
    """Guess the answers of a larger batch: first dimensions grow, and so do lists of the
    transformer's.
    """

    def grown(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        size = (len(leaf) * batch // recorded.batch, *leaf.shape[1:])
        return leaf.new_empty(()).expand(size)

    def of_lists(answer: Any) -> Any:
        if isinstance(answer, list):
            return answer * (batch // recorded.batch)
        if isinstance(answer, tuple):
            return tuple(map(of_lists, answer))
        return tree_map(grown, answer)

    return {
        key: of_lists(answer) if key[0] == "transformer" else tree_map(grown, answer)
        for key, answer in recorded.answers.items()
    }


def shape_of(leaf: Tensor) -> Tensor:
    """Return a tensor of this shape, type and place that holds one number."""
    return leaf.new_empty(()).expand(leaf.shape)


def same(leaf: Any) -> Any:
    """Return what is given: a tree mapped by it is another tree of the same leaves."""
    return leaf


def zeros(leaf: Any) -> Any:
    """Return zeros of a tensor's shape, and anything else as it is."""
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf


def pretended(answer: Any, name: str, call: int, inputs: Any) -> Any:
    """Return an answer of these shapes, which depends on all inputs and costs nothing."""
    share = digest(inputs) % 10_007 / 10_007
    generator = torch.Generator().manual_seed(len(name) + 1000 * call)

    def drawn(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator)
        return (noise * (0.5 + share)).to(leaf)

    return tree_map(drawn, answer)


def digest(value: Any) -> int:
    """Return a number that tells trees of tensors apart, to the bit; generators do not count.

    >>> digest((torch.zeros(2), 1)) == digest((torch.zeros(2), 1.5))
    False
    """
    total = 0
    for leaf in tree_leaves(value):
        total = (total * 31 + _digest(leaf)) % (2**61 - 1)
    return total


def _digest(leaf: Any) -> int:
    if not isinstance(leaf, Tensor):
        return hash(leaf) if isinstance(leaf, int | float | str | bool) else 0
    flat = leaf.detach().contiguous().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    bits = flat.view(whole).to(torch.int64)
    return int((bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum())
