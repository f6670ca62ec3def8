"""PipelineRun: one run of a pipeline's own `__call__`, in which models run only where they must.

What runs is a *stand-in*: a copy of the pipeline whose methods, models and scheduler come here
first when they are called. The pipeline itself is never changed. `PipelineDenoiser` makes two kinds
of runs:

    stop_at None   all steps on made-up outputs of the models, to note Facts and a trace
    stop_at k      skip to step k, put x in, stop when the scheduler is called, and keep its inputs

At a skipped step a model returns zeros of its output's shapes, and the scheduler its own sample,
the one before step k returns x. This file does not know denoisers, schedules or gates.
"""

import copy
import inspect
import re
import sys
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from harmonica.models.pipelines import schedulers
from harmonica.models.pipelines.facts import Facts, NotFollowedError, digest, made_up, shapes_of
from harmonica.override import Answer, Method, overridden

MOST_RESULTS, MOST_BYTES = 512, 2**30  # that are remembered; the oldest goes first

ENCODES_OR_DRAWS = re.compile(r"_?(encode|get)_\w*(prompt|text|embed)\w*|prepare_latents")
"""Methods of pipelines whose result depends on the condition alone, and the one that draws x."""

Outputs = dict[tuple[str, int], Any]
"""(model, number of its call in a step) -> its output at step 0, of which only shapes are kept."""


class StopRun(BaseException):
    """Ends a run that has what it wanted; not an Exception, so that no pipeline catches it."""


@dataclass(eq=False)
class PipelineRun:
    """One run of a pipeline, which begins when this is called with the pipeline's arguments."""

    pipe: Any
    device: torch.device  # where the pipeline runs
    facts: Facts  # what is known of its runs; a whole run adds to it
    outputs: Outputs  # of the models for this number of samples; a model that runs adds to it
    memory: dict[Hashable, Any]  # what models outside the loop have returned, for all runs
    rows: tuple[int, ...]  # the prompts
    run_model: Method | None  # (forward, number of its call in this step, args, kwargs) -> output
    # of the transformer where it must run; None makes outputs up
    stop_at: int | None = None
    x: Tensor | None = None  # at stop_at; None at step 0 leaves the pipeline's own

    # A whole run fills the trace: for each step, the digest of each argument that the scheduler
    # was given, and that of x after it. A run that stops fills the others.
    trace: list[tuple[dict[str, int], int]] = field(default_factory=list)
    inputs: schedulers.SchedulerInputs | None = None
    out: Tensor = field(default_factory=lambda: torch.empty(0))  # what the model gave the scheduler

    def __post_init__(self) -> None:
        self.k = 0  # the step that the run is in
        self._scheduler = schedulers.copied_scheduler(self.pipe.scheduler)
        self._calls = Counter[str]()  # of each method, and of each model in this step
        self._remembering = False  # inside a call whose result is remembered
        self._drawn: list[tuple[tuple[str, int, int], Any]] = []
        self._placeholders: list[Any] = []  # for what a skipped step returns beside x
        self._grad = torch.is_grad_enabled()  # pipelines run under no_grad

    def __call__(self, arguments: Mapping[str, Any]) -> None:
        """Run the pipeline until it ends or this run has what it wants."""
        kind: Any = type(self.pipe)
        stand_in: Any = object.__new__(_on_one_device(kind))
        own = vars(stand_in)
        own.update(vars(self.pipe), scheduler=self._scheduler, _known_device=self.device)
        own["_progress_bar_config"] = {"disable": True}
        models = {name: it for name, it in own.items() if isinstance(it, nn.Module)}
        own |= {name: self._stand_in_of(name, model) for name, model in models.items()}
        try:
            with overridden(self._answers(stand_in)):
                stand_in(**arguments)
        except StopRun as stop:
            if stop.args != (self,):
                raise

    def _answers(self, stand_in: Any) -> Iterator[tuple[Any, str, Answer]]:
        yield self._scheduler, "step", self._step
        kind: Any = type(self.pipe)
        if hasattr(module := sys.modules[kind.__module__], "randn_tensor"):
            yield module, "randn_tensor", partial(self._draw, "randn_tensor")
        for name in _encoding_or_drawing(kind):
            answer = self._draw if name == "prepare_latents" else self._encode
            yield stand_in, name, partial(answer, name)

    def _stand_in_of(self, name: str, model: nn.Module) -> nn.Module:
        """Return a shallow copy whose forward, encode and decode come here first, without the hooks
        of the original, which is what runs in the end.
        """
        stand_in = copy.copy(model)
        own = vars(stand_in)
        hooks = {key for key, it in own.items() if "_hooks" in key and isinstance(it, dict)}
        own |= {key: type(own[key])() for key in hooks}
        own["forward"] = partial(self._call, name, model)
        own["cache_context"] = lambda *_, **__: nullcontext()  # diffusers' walks all modules
        for method in ("encode", "decode"):
            if callable(getattr(model, method, None)):
                own[method] = partial(self._call, f"{name}.{method}", getattr(model, method))
        return stand_in

    def _draw(self, source: str, original: Method, args: Any, kwargs: Any) -> Any:
        """Draw latents: note where x may come from, or put x in where it does."""
        result, call = original(*args, **kwargs), self._count(source)
        leaves, spec = tree_flatten(result)
        if self.stop_at is None and self.k == 0:
            self._drawn += [((source, call, i), leaf) for i, leaf in enumerate(leaves)]
        place = self.facts.x_source
        if self.stop_at != 0 or self.x is None or place is None or (source, call) != place[:2]:
            return result
        leaves[place[2]] = self.x
        torch.set_grad_enabled(self._grad)  # pipelines put theirs back
        return tree_unflatten(leaves, spec)

    def _encode(self, name: str, original: Method, args: Any, kwargs: Any) -> Any:
        compute = partial(original, *args, **kwargs)
        alone = self._remembering or schedulers.generators_in((args, kwargs))
        return compute() if alone else self._remember((name, self._count(name), self.rows), compute)

    def _remember(self, key: Hashable, compute: Method) -> Any:
        """Return what was computed once before, unless that drew random numbers."""
        if key not in self.memory:
            self._remembering, before = True, torch.get_rng_state()
            try:
                with torch.inference_mode(False), torch.no_grad():
                    result = compute()
            finally:
                self._remembering = False
            if not torch.equal(before, torch.get_rng_state()):
                return result
            while _is_full([*self.memory.values()]):
                self.memory.pop(next(iter(self.memory)), None)
            self.memory[key] = result
        return tree_map(lambda leaf: leaf, self.memory[key])  # transformers empty lists

    def _call(self, name: str, model: Method, *args: Any, **kwargs: Any) -> Any:
        """Return the output of a model or of its encode or decode: `model(…)` if it runs."""
        if self._remembering:
            return model(*args, **kwargs)
        if name.endswith(".decode") and self.k > 0:
            raise StopRun(self)
        call, looping = self._count(name), self.facts.models_in_loop
        if name not in looping and (self.k == 0 or self.stop_at is not None):
            key = (name, call, self.rows, digest((args, kwargs)))
            output = self._remember(key, partial(model, *args, **kwargs))
            self.outputs.setdefault((name, call), shapes_of(output))
            return output
        if name not in looping:  # it ran at step 0 as if it ran before the loop only
            looping.add(name)
            call, self._calls[name] = 0, 1
        if name == "transformer" and self.stop_at is None:
            self._note_shapes(call, (args, kwargs))
        return self._output(name, call, model, args, kwargs)

    def _output(self, name: str, call: int, model: Method, args: Any, kwargs: Any) -> Any:
        """Return the output of a model of the loop: a real one at the step where the run stops;
        zeros at the steps before it; a made-up one of the same shapes in a run of all steps. Where
        shapes are not known yet, the model runs for them alone, and its numbers are dropped.
        """
        key, at_stop = (name, call), self.k == self.stop_at
        if self.k > 0 and key not in self.outputs:
            raise NotFollowedError(f"{name} is called {call + 1} times, and {call} times at step 0")
        if self.run_model is not None and (at_stop or key not in self.outputs):
            torch.set_grad_enabled(self._grad)
            plain = name != "transformer"
            output = model(*args, **kwargs) if plain else self.run_model(model, call, args, kwargs)
            self.outputs.setdefault(key, shapes_of(output))
            if at_stop and not any(isinstance(it, FakeTensor) for it in tree_leaves(output)):
                return output
        if self.stop_at is None or (at_stop and self.run_model is None):
            return made_up(self.outputs[key], (name, call, args, kwargs))
        return tree_map_only(Tensor, torch.zeros_like, self.outputs[key])

    def _note_shapes(self, call: int, inputs: Any) -> None:
        shapes = [x.shape for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        if self.k == 0:
            self.facts.shapes.append(shapes)
        elif call < len(self.facts.shapes) and shapes != self.facts.shapes[call]:
            then = [tuple(shape) for shape in self.facts.shapes[call]]
            now = f"the transformer's inputs have shapes {[tuple(shape) for shape in shapes]}"
            raise NotFollowedError(f"{now}, and had {then} at step 0")

    def _step(self, step: Method, args: Any, kwargs: Any) -> Any:
        """Take a step of a whole run, skip a step, or stop with what the scheduler is given."""
        given = schedulers.step_arguments(self._scheduler, args, kwargs)
        if self.stop_at is None:
            return self._record(partial(step, *args, **kwargs), given)
        if self.k == self.stop_at:
            self._stop(given)
        return self._skip(given["sample"])

    def _record(self, step: Method, given: dict[str, Any]) -> Any:
        facts, calls, sample = self.facts, self._calls["transformer"], given.get("sample")
        if calls != len(facts.shapes) or not calls:
            why = "(guidance that begins or ends midway, or a step without the transformer)"
            times = f"{calls} times, {len(facts.shapes)} times at step 0"
            raise NotFollowedError(f"the transformer is called {times} {why}")
        if not isinstance(sample, Tensor) or not sample.is_floating_point():
            raise NotFollowedError("its scheduler steps no noisy image, a tensor `sample`")
        if self.k == 0:
            self._note_x(sample)
            facts.timesteps = schedulers.timesteps_from(self._scheduler, given.get("timestep"))
        own = {name: facts.first_half(given[name]) for name in ("model_output", "sample")}
        digests = {name: digest(value) for name, value in {**given, **own}.items()}
        sources = [*schedulers.generators_in(given), *schedulers.global_generators(self.device)]
        before = digest(schedulers.states_of(sources))
        result = step()
        facts.draws_noise |= digest(schedulers.states_of(sources)) != before
        facts.first_result = result if self.k == 0 else facts.first_result
        facts.states.append(vars(schedulers.copied_scheduler(self._scheduler)))
        self.trace.append((digests, digest(facts.first_half(tree_leaves(result)[0]))))
        self._next_step()
        return result

    def _note_x(self, sample: Tensor) -> None:
        """Note the x of step 0, and where it comes from."""
        facts, halves = self.facts, sample.chunk(2)
        facts.doubled = len(sample) % 2 == 0 and torch.equal(*halves)
        facts.x = facts.first_half(sample).clone()
        tensors = ((place, it) for place, it in self._drawn if isinstance(it, Tensor))
        alike = (place for place, it in tensors if it.shape == facts.x.shape and it.equal(facts.x))
        facts.x_source = next(alike, None)

    def _skip(self, sample: Tensor) -> Any:
        """Return what the scheduler would, around this sample, or x before the last step."""
        vars(self._scheduler).update(self.facts.states[self.k])
        self._next_step()
        if self.k == self.stop_at and self.x is not None:
            torch.set_grad_enabled(self._grad)
            sample = torch.cat([self.x, self.x]) if self.facts.doubled else self.x
        (like, *others), spec = tree_flatten(self.facts.first_result)
        for i, leaf in enumerate(others):
            if isinstance(leaf, Tensor) and leaf.shape[1:] == like.shape[1:]:
                others[i] = torch.zeros_like(sample)
        self._placeholders = others
        return tree_unflatten([sample, *others], spec)

    def _stop(self, given: dict[str, Any]) -> None:
        sample, self.out = given.pop("sample"), given.pop("model_output")
        places = {id(it): i for i, it in enumerate(self._placeholders) if isinstance(it, Tensor)}
        carried = {name: places[id(it)] for name, it in given.items() if id(it) in places}
        torchs = schedulers.global_generators(self.device) if self.facts.uses_global_random else []
        states = schedulers.states_of(schedulers.generators_in(given)), schedulers.states_of(torchs)
        start = schedulers.SamplerState(schedulers.copied_scheduler(self._scheduler), [], *states)
        kept = None if sample is self.x else sample
        self.inputs = schedulers.SchedulerInputs(given, kept, carried, start, self.device)
        raise StopRun(self)

    def _count(self, name: str) -> int:
        """Return how often this was called before, and count this call."""
        self._calls[name] += 1
        return self._calls[name] - 1

    def _next_step(self) -> None:
        self.k += 1
        for name in self.facts.models_in_loop:
            self._calls.pop(name, None)


def _is_full(results: list[Any]) -> bool:
    sizes = (leaf.nbytes for leaf in tree_leaves(results) if isinstance(leaf, Tensor))
    return len(results) >= MOST_RESULTS or sum(sizes) > MOST_BYTES


@cache
def _encoding_or_drawing(kind: type) -> list[str]:
    names = filter(ENCODES_OR_DRAWS.fullmatch, dir(kind))
    return [name for name in names if inspect.isfunction(inspect.getattr_static(kind, name))]


@cache
def _on_one_device(kind: Any) -> Any:
    """Return a class derived from a pipeline's, whose instances know their device; a pipeline looks
    through all modules for it, at every call.
    """
    known_device = property(lambda stand_in: stand_in._known_device)
    members = {"__module__": kind.__module__, "_execution_device": known_device}
    return type(kind.__name__, (kind,), members)
