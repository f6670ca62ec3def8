"""Runs: a pipeline's `__call__` as a walk that can be entered before any step and left after any
prediction.

    Run       is told of latents, encoders, models and steps, and says what each answers
    Whole     runs all steps on answers that cost nothing, and records what it sees
    Arrive    skips to step k, puts x in, and leaves with what the scheduler is given

At a skipped step no model runs: the transformer answers zeros of its output's shapes, and the
scheduler its own input, the one before step k answers x. What the pipeline reads off the scheduler
meanwhile is as in the recorded run. This file does not know what a step of the scheduler does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from harmonica.models.pipelines import recorded as record
from harmonica.models.pipelines.recorded import Arrival, Leave, NotFollowedError, Recorded, State

Method = Callable[..., Any]
Place = tuple[str, int, int]
"""Where a tensor comes from: prepare_latents or randn_tensor, number of the call, leaf."""
Memo = dict[Hashable, Any]


@dataclass(eq=False)
class Run:
    """What a stand-in tells about one run of the pipeline's `__call__`."""

    recorded: Recorded  # what is known of such runs
    device: torch.device  # where the pipeline runs
    memos: tuple[Memo, Memo]  # what is remembered for its rows, and for its rows and seeds
    scheduler: Any = field(default=None, init=False)  # the stand-in's, not a copy of it
    k: int = field(default=0, init=False)  # step that the run is in
    _counts: dict[str, int] = field(default_factory=dict, init=False)
    _inside: bool = field(default=False, init=False)  # of something that is remembered

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self

    def _count(self, name: str) -> int:
        count = self._counts[name] = self._counts.get(name, -1) + 1
        return count

    def prepared(self, source: str, result: Any) -> Any:
        """Return the latents to start from, given what `prepare_latents` or `randn_tensor` gave."""
        raise NotImplementedError

    def encoded(self, name: str, compute: Method, args: Any) -> Any:
        """Return what a method answers that depends on the condition alone; remember it, unless it
        takes a generator.
        """
        if self._inside or any(isinstance(leaf, torch.Generator) for leaf in tree_leaves(args)):
            return compute()
        return self._remembered(self.memos[0], name, compute)

    def _remembered(self, memo: Memo, name: str, compute: Method) -> Any:
        key = (name, self._count(name))
        if key not in memo:
            self._inside, before = True, torch.get_rng_state()
            try:
                with torch.inference_mode(False), torch.no_grad():
                    answer = compute()
            finally:
                self._inside = False
            drew = not torch.equal(before, torch.get_rng_state())
            memo[key] = answer, torch.get_rng_state() if drew else None
        answer, after = memo[key]
        if after is not None:
            torch.set_rng_state(after)
        return record.copied(answer)

    def called(self, name: str, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what a call of a model answers, whose own answer would be `module(…)`."""
        if self._inside:
            return module(*args, **kwargs)
        if name.endswith(".decode") and self.k > 0:
            raise Leave(self)
        if name not in self.recorded.looping:  # it runs before the loop
            return self._once(name, module, args, kwargs)
        return self._looping(name, self._count(name), module, args, kwargs)

    def _once(self, name: str, module: Any, args: Any, kwargs: Any) -> Any:
        return self._remembered(self.memos[1], name, partial(module, *args, **kwargs))

    def _looping(self, name: str, call: int, module: Any, args: Any, kwargs: Any) -> Any:
        """Answer a model that runs at every step."""
        raise NotImplementedError

    def stepped(self, step: Method, given: dict[str, Any]) -> Any:
        """Return what a step that is given these arguments answers; its own answer is `step()`."""
        raise NotImplementedError

    def _next_step(self) -> None:
        self.k += 1
        for name in self.recorded.looping:
            self._counts.pop(name, None)


@dataclass(eq=False)
class Whole(Run):
    """A run of all steps on answers that cost nothing; what it shows is in `recorded`.

    At step 0, `run_once(module, args, kwargs)` gives the output of a transformer's call, for its
    shapes; None if `recorded` has the answers already.
    """

    run_once: Method | None
    _latents: list[tuple[Place, Tensor]] = field(default_factory=list, init=False)

    def prepared(self, source: str, result: Any) -> Any:
        """Note the tensors that x may come from."""
        if self.k == 0:
            call, leaves = self._count(source), enumerate(tree_leaves(result))
            self._latents += [((source, call, i), x) for i, x in leaves if isinstance(x, Tensor)]
        return result

    def _once(self, name: str, module: Any, args: Any, kwargs: Any) -> Any:
        if self.k > 0:  # it was taken for something that runs before the loop
            self.recorded.looping.add(name)
            self._counts.pop(name, None)
            return self._looping(name, self._count(name), module, args, kwargs)
        answer = super()._once(name, module, args, kwargs)
        self.recorded.answers.setdefault((name, self._counts[name]), record.copied(answer))
        return answer

    def _looping(self, name: str, call: int, module: Any, args: Any, kwargs: Any) -> Any:
        answers, at_first = self.recorded.answers, self.recorded.inputs
        if name == "transformer":
            shapes = [x.shape for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if self.k == 0:
                at_first.append(shapes)
                if self.run_once is not None:
                    answers[name, call] = self.run_once(module, args, kwargs)
            elif call < len(at_first) and shapes != at_first[call]:
                now, then = ([tuple(shape) for shape in each] for each in (shapes, at_first[call]))
                raise NotFollowedError(
                    f"the transformer's inputs have shapes {now}, and had {then} at step 0"
                )
        if (name, call) not in answers:
            raise NotFollowedError(f"{name} is called {call + 1} times, and {call} times at step 0")
        return record.pretended(answers[name, call], name, call, (args, kwargs))

    def stepped(self, step: Method, given: dict[str, Any]) -> Any:
        """Note what the step is given, step, and note what comes of it."""
        recorded, calls = self.recorded, self._counts.get("transformer", -1) + 1
        if calls != len(recorded.inputs) or not calls:
            raise NotFollowedError(
                f"the transformer is called {calls} times, {len(recorded.inputs)} times at step 0 "
                "(guidance that begins or ends midway, or a step without the transformer)"
            )
        sample, none = given.get("sample"), "its scheduler steps no noisy image, a tensor `sample`"
        if not isinstance(sample, Tensor) or not sample.is_floating_point():
            raise NotFollowedError(none)
        if self.k == 0:
            self._enter(sample)
        out = recorded.fold_out(given["model_output"], sample)
        own = given | {"sample": recorded.fold(sample), "model_output": out}
        recorded.steps.append({name: record.digest(value) for name, value in own.items()})
        sources = [*record.generators_in(given), *record.global_generators(self.device)]
        before = [generator.get_state() for generator in sources]
        result = step()
        drew = (not torch.equal(g.get_state(), b) for g, b in zip(sources, before, strict=True))
        recorded.draws_noise |= any(drew)
        if self.k == 0:
            recorded.returned = result
        recorded.after.append(record.digest(recorded.fold(tree_leaves(result)[0])))
        recorded.states.append(record.state_of(vars(self.scheduler)))
        self._next_step()
        return result

    def _enter(self, sample: Tensor) -> None:
        """Find where the x of the first step comes from."""
        recorded, halves = self.recorded, sample.chunk(2)
        twice = len(sample) == 2 * recorded.batch
        recorded.doubled = twice and torch.equal(halves[0], halves[-1])
        recorded.first = first = recorded.fold(sample).clone()
        recorded.timesteps = record.timesteps_of(self.scheduler)
        same = (place for place, x in self._latents if x.shape == first.shape and x.equal(first))
        recorded.entry = next(same, None)


@dataclass(eq=False)
class Arrive(Run):
    """A run that skips to step k, puts x in, and leaves with what the scheduler is given there.

    There `forward(name, module, call, args, kwargs)` gives what a model of the loop answers; None
    for answers that cost nothing.
    """

    at: int  # step to leave at
    x: Tensor | None  # as the denoiser has it; None at step 0 leaves the pipeline's own
    forward: Method | None
    arrival: Arrival | None = field(default=None, init=False)
    _placeholders: list[Any] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._entry = self.recorded.entry if self.at == 0 and self.x is not None else None
        self._grad = torch.is_grad_enabled()

    def prepared(self, source: str, result: Any) -> Any:
        """Put x in, if this is where it comes from."""
        if self._entry is None or (source, self._count(source)) != self._entry[:2]:
            return result
        leaves, spec = tree_flatten(result)
        leaves[self._entry[2]] = self.x
        torch.set_grad_enabled(self._grad)  # pipelines run under no_grad, and put theirs back
        return tree_unflatten(leaves, spec)

    def _looping(self, name: str, call: int, module: Any, args: Any, kwargs: Any) -> Any:
        arrived, known = self.k == self.at, self.recorded.answers
        if (name, call) not in known and not (arrived and name == "transformer"):
            raise NotFollowedError(f"{name} is called more often than in the first run")
        if not arrived:
            return record.zeros(known[name, call])
        if self.forward is None:
            return record.pretended(known[name, call], name, call, (args, kwargs))
        torch.set_grad_enabled(self._grad)
        return self.forward(name, module, call, args, kwargs)

    def stepped(self, step: Method, given: dict[str, Any]) -> Any:
        """Skip the step, or leave with what it is given."""
        recorded, sample = self.recorded, given["sample"]
        if self.k < self.at:
            vars(self.scheduler).update(recorded.states[self.k])
            self._next_step()
            if self.k == self.at and self.x is not None:
                torch.set_grad_enabled(self._grad)
                sample = torch.cat([self.x, self.x]) if recorded.doubled else self.x
            return self._answer(sample)
        others = {name: it for name, it in given.items() if name not in ("sample", "model_output")}
        places = {id(it): i for i, it in enumerate(self._placeholders) if isinstance(it, Tensor)}
        carried = {name: places[id(it)] for name, it in others.items() if id(it) in places}
        torchs = record.global_generators(self.device) if recorded.random else []
        sources = record.generators_in(others), torchs
        generators = ([generator.get_state() for generator in some] for some in sources)
        scheduler = record.state_of(vars(self.scheduler)) if self.at == 0 else {}
        start, kept = State(scheduler, [], *generators), None if sample is self.x else sample
        self.arrival = Arrival(others, kept, given["model_output"], carried, start)
        raise Leave(self)

    def _answer(self, sample: Tensor) -> Any:
        """Return what the scheduler would, around this sample."""
        (like, *others), spec = tree_flatten(self.recorded.returned)
        alike = (isinstance(leaf, Tensor) and leaf.shape[1:] == like.shape[1:] for leaf in others)
        pairs = zip(others, alike, strict=True)
        self._placeholders = [torch.zeros_like(sample) if same else leaf for leaf, same in pairs]
        return tree_unflatten([sample, *self._placeholders], spec)
