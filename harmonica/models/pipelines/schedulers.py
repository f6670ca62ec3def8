"""Schedulers: what `cached` and `from_pipeline` read off a diffusers scheduler, of any class.

A scheduler is set to its timesteps, then steps once for each that a run goes through. A run that
begins from an image leaves out the first ones, others leave out the last one. A *sampler* is a
scheduler with the random generators that it draws from; `from_pipeline` steps copies of it.

    SchedulerInputs   what one run gave its scheduler at the step where it was stopped
    SamplerState      what the sampler of one walk remembers between two steps
"""

import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_random = threading.RLock()


@cache
def _signature_of_step(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.step)


def step_arguments(scheduler: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call of `scheduler.step` by name."""
    kind: Any = type(scheduler)
    arguments = _signature_of_step(kind).bind(scheduler, *args, **kwargs).arguments
    named: dict[str, Any] = dict(list(arguments.items())[1:])
    named.update(named.pop("kwargs", {}))
    return named


def place_of(timestep: Any, own: Any, times: Sequence[float]) -> int | None:
    """Return which of a scheduler's timesteps `own` this is; `times` are the same in numbers.

    One of its own is known by where it lies, so nobody waits for the device, and Heun has each
    twice. None, of a scheduler that is told no timestep, is the first.
    """
    if timestep is None:
        return 0
    if isinstance(timestep, Tensor) and isinstance(own, Tensor) and own.dtype == timestep.dtype:
        place, rest = divmod(timestep.data_ptr() - own.data_ptr(), own.element_size())
        if own.is_contiguous() and rest == 0 and 0 <= place < len(own):
            return place
    number = float(torch.as_tensor(timestep).flatten()[0])
    return times.index(number) if number in times else None


def timesteps_from(scheduler: Any, timestep: Any) -> tuple[float, ...]:
    """Return the timesteps that a scheduler is set to, from that of a step on."""
    times = torch.as_tensor(scheduler.timesteps).flatten().tolist()
    return tuple(map(float, times[place_of(timestep, scheduler.timesteps, times) or 0 :]))


def copied_scheduler(scheduler: Any) -> Any:
    """Return a scheduler of the same class and state, with tensors of its own: PNDM adds in place.

    What others have put on the instance to hide its methods is left out.
    """
    copied = object.__new__(type(scheduler))
    hidden = ("step", "set_timesteps")
    own = {name: value for name, value in vars(scheduler).items() if name not in hidden}
    vars(copied).update(tree_map_only(Tensor, Tensor.clone, own))
    return copied


class SamplerState(NamedTuple):
    """What the sampler of one walk remembers after a step, or before the first one."""

    scheduler: Any  # a copy of the pipeline's, which nobody steps
    carried: list[Any]  # what the step returned beside x
    generators: list[Tensor]  # states of the generators among its arguments
    random: list[Tensor]  # states of torch's global ones


class SchedulerInputs(NamedTuple):
    """What a run gave its scheduler where it was stopped, beside the output of the model."""

    arguments: dict[str, Any]  # by name, without the sample
    sample: Tensor | None  # None where it is x itself, which must not be kept alive
    carried: dict[str, int]  # argument -> which of the values that the step before returned
    start: SamplerState  # holds for step 0; at others the walk has its own
    device: torch.device  # where the pipeline runs


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
    holds their states afterwards. All threads draw from them, so one `with` waits for another.
    """
    generators, after = global_generators(device) if states else [], list[Tensor]()
    forked = torch.random.fork_rng([g.device for g in generators[1:]], enabled=bool(states))
    with _random if states else nullcontext(), forked:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        yield after
        after += states_of(generators)


def step_again(
    inputs: SchedulerInputs, sampler: SamplerState, out: Tensor, sample: Tensor
) -> tuple[Tensor, SamplerState]:
    """Take a stopped run's step with a copy of the sampler; return x and the sampler after it."""
    states, generators = iter(sampler.generators), list[Generator]()
    scheduler = copied_scheduler(sampler.scheduler)
    given = {"model_output": out, "sample": sample}
    given |= {name: sampler.carried[i] for name, i in inputs.carried.items()}

    def again(generator: Generator) -> Generator:
        generators.append(Generator(generator.device).set_state(next(states)))
        return generators[-1]

    arguments = tree_map_only(Generator, again, {**inputs.arguments, **given})
    with random_states(inputs.device, sampler.random) as random:
        after, *carried = tree_leaves(scheduler.step(**arguments))
    return after, SamplerState(scheduler, carried, states_of(generators), random)
