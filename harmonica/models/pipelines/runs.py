"""Runs: a pipeline's `__call__` as a walk that can be entered before any step and left after any
prediction.

    Run       what every run does: it is told of latents, encoders, models and steps
    Arrive    skips to step k, puts x in, lets the transformer run there, and leaves with what the
              scheduler is given

At a skipped step no model runs: the transformer answers zeros of its output's shapes, and the
scheduler its own input, the one before step k answers x. What the pipeline reads off the scheduler
meanwhile is as in the recorded run. This file does not know what a step of the scheduler does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from harmonica.calls import in_call
from harmonica.models.pipelines.recorded import (
    Arrival,
    Leave,
    NotFollowedError,
    Recorded,
    State,
    bind,
    generators_in,
    pretended,
    same,
    state_of,
    states_of,
    zeros,
)
from harmonica.override import overridden
from harmonica.run_again import run_again

Method = Callable[..., Any]
Memo = dict[Hashable, Any]


class Run:
    """What a stand-in tells about one run of the pipeline's `__call__`.

    Attributes:
        recorded: what is known of such runs.
        device: where the pipeline runs.
        scheduler: the stand-in's; a pipeline may copy it, and the copies tell nothing.
        draws: whether to tell of what the pipeline's module draws with `randn_tensor`.
        k: step that the run is in.
    """

    draws = True

    def __init__(self, recorded: Recorded, device: torch.device, memos: tuple[Memo, Memo]) -> None:
        self.recorded, self.device, self.k = recorded, device, 0
        self.scheduler: Any = None
        self._of_rows, self._of_samples = memos
        self._counts: dict[str, int] = {}
        self._inside = False  # of something that is remembered

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self

    def _count(self, name: str) -> int:
        count = self._counts[name] = self._counts.get(name, -1) + 1
        return count

    def prepared(self, source: str, result: Any) -> Any:
        """Return the latents to start from, given what `prepare_latents` or `randn_tensor` gave."""
        return result

    def encoded(self, name: str, compute: Callable[[], Any], args: Any) -> Any:
        """Return what a method answers that depends on the condition alone; remember it, unless it
        takes a generator.
        """
        if self._inside or any(isinstance(leaf, torch.Generator) for leaf in tree_leaves(args)):
            return compute()
        return self._remembered(self._of_rows, name, compute)

    def _remembered(self, memo: Memo, name: str, compute: Callable[[], Any]) -> Any:
        key = (name, self._count(name))
        if key not in memo:
            self._inside = True
            before = torch.get_rng_state()
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
        return tree_map(same, answer)

    def called(self, name: str, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what a call of a model answers, whose own answer would be `module(…)`."""
        if self._inside:
            return module(*args, **kwargs)
        if name.endswith(".decode") and self.k > 0:
            raise Leave(self)
        if name in self.recorded.looping:
            return self._looping(name, self._count(name), module, args, kwargs)
        return self._once(name, functools.partial(module, *args, **kwargs), args, kwargs)

    def _once(self, name: str, compute: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Answer a model that runs before the loop."""
        return self._remembered(self._of_samples, name, compute)

    def _looping(self, name: str, call: int, module: Any, args: Any, kwargs: Any) -> Any:
        """Answer a model that runs at every step."""
        raise NotImplementedError

    def stepped(self, step: Method, *args: Any, **kwargs: Any) -> Any:
        """Return what a step of the scheduler answers, whose own answer would be `step(…)`."""
        raise NotImplementedError

    def _next_step(self) -> None:
        self.k += 1
        for name in self.recorded.looping:
            self._counts.pop(name, None)


class Arrive(Run):
    """A run that skips to step k, puts x in, and leaves with what the scheduler is given there.

    Args:
        recorded, device, memos: as `Run` has them.
        k: step to leave at.
        x: as the denoiser has it; None at k = 0 leaves the pipeline's own.
        forward: (name, module, call, args, kwargs) -> what a model of the loop answers at step k;
            None for answers that cost nothing.
    """

    def __init__(
        self,
        recorded: Recorded,
        device: torch.device,
        memos: tuple[Memo, Memo],
        k: int,
        x: Tensor | None,
        forward: Method | None,
    ) -> None:
        super().__init__(recorded, device, memos)
        self.at, self.x, self.forward = k, x, forward
        self.arrival: Arrival | None = None
        self._entry = recorded.entry if k == 0 and x is not None else None
        self.draws = self._entry is not None and self._entry[0] == "randn_tensor"
        self._grad = torch.is_grad_enabled()
        self._placeholders: list[Any] = []

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
            return tree_map(zeros, known[name, call])
        if self.forward is None:
            return pretended(known[name, call], name, call, (args, kwargs))
        torch.set_grad_enabled(self._grad)
        return self.forward(name, module, call, args, kwargs)

    def stepped(self, step: Method, *args: Any, **kwargs: Any) -> Any:
        """Skip the step, or leave with what it is given."""
        bound = bind(step, args, kwargs)
        given, sample = bound.arguments, bound.arguments["sample"]
        if self.k < self.at:
            vars(self.scheduler).update(self.recorded.states[self.k])
            self._next_step()
            if self.k == self.at and self.x is not None:
                torch.set_grad_enabled(self._grad)
                sample = self.recorded.unfold(self.x)
            return self._answer(sample)
        out, given["sample"] = given.pop("model_output"), None
        carried = {
            name: i
            for name, value in given.items()
            for i, placeholder in enumerate(self._placeholders)
            if value is placeholder and isinstance(value, Tensor)
        }
        start = State(
            state_of(self.scheduler) if self.at == 0 else {},
            [],
            [generator.get_state() for generator in generators_in(bound)],
            states_of(self.device) if self.recorded.random else [],
        )
        mine = None if sample is self.x else sample
        self.arrival = Arrival(bound, mine, out, carried, start)
        raise Leave(self)

    def _answer(self, sample: Tensor) -> Any:
        """Return what the scheduler would, around this sample."""
        (like, *others), spec = tree_flatten(self.recorded.returned)
        self._placeholders = [
            torch.zeros_like(sample)
            if isinstance(leaf, Tensor) and leaf.shape[1:] == like.shape[1:]
            else leaf
            for leaf in others
        ]
        return tree_unflatten([sample, *self._placeholders], spec)


def real_forward(
    module: nn.Module, call: int, args: Any, kwargs: Any, modes: Sequence[Any], answer: Any
) -> Any:
    """Run the transformer under the dispatch modes that were on when the prediction was asked for.

    What counts operations on fake tensors sees the transformer; the pipeline goes on with zeros.
    """
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        if torch.is_grad_enabled():
            stack.enter_context(_again_in(call, module))
        stack.enter_context(in_call(call))
        output = module(*args, **kwargs)
    if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(output)):
        return tree_map(zeros, answer)
    return output


def _again_in(call: int, module: nn.Module) -> Any:
    """Let checkpointed blocks, which backward runs again, know the call that they belong to; inside
    a step that is run again they are not.
    """

    def again(run: Method, args: Any, kwargs: Any) -> Any:
        block, *inputs = args

        def forward(*inputs: Any) -> Any:
            with in_call(call):
                return block(*inputs)

        return run_again(forward, *inputs)

    name = "_gradient_checkpointing_func"
    return overridden(
        (part, name, again)
        for part in module.modules()
        if getattr(part, "gradient_checkpointing", False) and callable(getattr(part, name, None))
    )
