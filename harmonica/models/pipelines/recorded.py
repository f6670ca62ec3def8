"""What runs of a pipeline have shown, and how two of them are held against each other.

    Recorded   what a whole run showed: shapes of each model's output, what each step was given
    Arrival    what reached the scheduler at one step of one run
    State      what the sampler of one run remembers between two steps
    digest     a number that tells two trees of tensors apart, to the bit
    pretended  an answer that has a model's shapes, depends on all its inputs, and costs nothing

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
            if not leaf.dim():
                return leaf
            return leaf.new_empty(()).expand(len(leaf) * batch, *leaf.shape[1:])

        def of_lists(answer: Any) -> Any:
            if isinstance(answer, list):
                return answer * batch
            many = isinstance(answer, tuple)
            return tuple(map(of_lists, answer)) if many else tree_map_only(Tensor, grown, answer)

        def of(name: str, answer: Any) -> Any:
            loops = name == "transformer"
            return of_lists(answer) if loops else tree_map_only(Tensor, grown, answer)

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


def same(leaf: Any) -> Any:
    """Return what is given: a tree mapped by it is another tree of the same leaves."""
    return leaf


def zeros(leaf: Any) -> Any:
    """Return zeros of a tensor's shape, and anything else as it is."""
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf


def pretended(answer: Any, name: str, call: int, inputs: Any) -> Any:
    """Return an answer of these shapes, which depends on all inputs and costs nothing."""
    share = digest(inputs) % 10_007 / 10_007
    generator = Generator().manual_seed(len(name) + 1000 * call)

    def drawn(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return (torch.randn(leaf.shape, generator=generator) * (0.5 + share)).to(leaf)

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
