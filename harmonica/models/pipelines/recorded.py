"""What runs of a pipeline have shown, and how two of them are held against each other.

    Recorded   what a whole run showed: shapes of each model's output, what each step was given
    Arrival    what reached the scheduler at one step of one run
    State      what the sampler of one run remembers between two steps

This file does not know pipelines or denoisers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

Answers = dict[tuple[str, int], Any]
"""(model, number of its call) -> the output of that call at step 0, of which only shapes count."""


class NotFollowedError(ValueError):
    """A run that cannot be followed, and why."""


class Leave(BaseException):
    """Ends a run that has what it wanted; not an Exception, so that no pipeline catches it."""


@dataclass
class Recorded:
    """What one whole run showed; every list has an entry for each step."""

    batch: int
    answers: Answers = field(default_factory=dict)
    inputs: list[list[torch.Size]] = field(default_factory=list)  # of each call, at step 0
    looping: set[str] = field(default_factory=lambda: {"transformer"})  # called at later steps too
    steps: list[dict[str, int]] = field(default_factory=list)  # digests of what it was given
    after: list[int] = field(default_factory=list)  # digest of x after it
    states: list[dict[str, Any]] = field(default_factory=list)  # of the scheduler after it
    returned: Any = None  # by the scheduler's first step
    first: Tensor = field(default_factory=lambda: torch.empty(0))  # x of step 0
    doubled: bool = False  # the scheduler steps [x; x]
    entry: tuple[str, int, int] | None = None  # where x comes from: source, call, leaf
    timesteps: tuple[float, ...] = ()
    draws_noise: bool = False  # a step of the scheduler does
    random: bool = True  # torch's global generators may be drawn from

    def fold(self, x: Tensor) -> Tensor:
        """Return the x of [x; x], if that is what the scheduler steps."""
        return x[: len(x) // 2] if self.doubled else x

    def fold_out(self, out: Any, sample: Tensor) -> Any:
        """Return the model's output for x, if the scheduler is given [out; out] with [x; x]."""
        return self.fold(out) if isinstance(out, Tensor) and len(out) == len(sample) else out

    def again(self, batch: int) -> Recorded:
        """Return what to record another run in, in which no model need run."""
        answers = dict(self.answers) if batch == 1 else self.scaled(batch)
        return Recorded(batch, answers, looping=self.looping, random=self.random)

    def scaled(self, batch: int) -> Answers:
        """Guess the answers of a batch from those of one sample: first dimensions grow, and so do
        lists of the transformer's.
        """

        def grown(leaf: Tensor) -> Tensor:
            rows = leaf.shape[:1].numel() * batch
            return leaf.new_empty(()).expand(rows, *leaf.shape[1:]) if leaf.dim() else leaf

        def of(name: str, answer: Any) -> Any:
            if name != "transformer" or not isinstance(answer, list | tuple):
                return tree_map_only(Tensor, grown, answer)
            many = isinstance(answer, list)
            return answer * batch if many else tuple(of(name, part) for part in answer)

        return {key: of(key[0], answer) for key, answer in self.answers.items()}


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

    arguments: dict[str, Any]  # by name, without the model's output and the sample
    sample: Tensor | None  # None where it is x itself, which must not be kept alive
    out: Any  # None once it was used
    carried: dict[str, int]  # argument -> which of the values that the step before returned
    start: State  # right at step 0; later ones are the walk's


def state_of(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return what a scheduler remembers, its attributes, in copies: PNDM adds to a tensor in place.

    What others have put on the instance to hide its methods is not among it.
    """
    own = {key: it for key, it in attributes.items() if key not in ("step", "set_timesteps")}
    return tree_map_only(Tensor, Tensor.clone, own)  # type: ignore[no-any-return]


def timesteps_of(scheduler: Any) -> tuple[float, ...]:
    """Return all timesteps that a scheduler was set to."""
    return tuple(map(float, torch.as_tensor(scheduler.timesteps).flatten().tolist()))


def generators_in(arguments: dict[str, Any]) -> list[Generator]:
    """Return the generators among the arguments of a step, in their order."""
    return [leaf for leaf in tree_leaves(list(arguments.values())) if isinstance(leaf, Generator)]


def global_generators(device: torch.device) -> list[Generator]:
    """Return torch's generators that a pipeline on this device draws from if it is given none."""
    if device.type != "cuda":
        return [torch.default_generator]
    torch.cuda.init()  # type: ignore[no-untyped-call]
    number = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[number]]


@contextmanager
def random_states(device: torch.device, states: list[Tensor]) -> Iterator[list[Tensor]]:
    """Set torch's global generators in this `with`, unless `states` is empty.

    Yields a list that holds their states afterwards.
    """
    generators = global_generators(device) if states else []
    before, after = [g.get_state() for g in generators], list[Tensor]()
    try:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        yield after
    finally:
        for generator, state in zip(generators, before, strict=True):
            after.append(generator.get_state())
            generator.set_state(state)


def copied(tree: Any) -> Any:
    """Return another tree of the same leaves: transformers take what they read out of a list."""
    return tree_map(lambda leaf: leaf, tree)


def zeros(tree: Any) -> Any:
    """Return zeros in place of the tensors."""
    return tree_map_only(Tensor, torch.zeros_like, tree)


def pretended(answer: Any, name: str, call: int, inputs: Any) -> Any:
    """Return an answer of these shapes, which depends on all inputs and costs nothing."""
    share = digest(inputs) % 10_007 / 10_007
    generator = Generator().manual_seed(len(name) + 1000 * call)

    def drawn(leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=generator) * (0.5 + share)
        return noise.to(leaf) if leaf.is_floating_point() else leaf

    return tree_map_only(Tensor, drawn, answer)


def digest(value: Any) -> int:
    """Return a number that tells trees of tensors apart, to the bit; generators do not count.

    >>> digest((torch.zeros(2), 1)) == digest((torch.zeros(2), 1.5))
    False
    """
    total = 0
    for leaf in tree_leaves(value):
        one = hash(leaf) if isinstance(leaf, int | float | str | bool) else 0
        if isinstance(leaf, Tensor):
            flat = leaf.detach().contiguous().flatten()
            flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
            whole = (torch.uint8, torch.int16, torch.int32, torch.int64)
            bits = flat.view(whole[flat.element_size().bit_length() - 1]).to(torch.int64)
            one = int((bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum())
        total = (total * 31 + one) % (2**61 - 1)
    return total
