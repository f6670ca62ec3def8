"""Runs: a pipeline's `__call__` as a walk that can be entered before any step and left after any
prediction.

    Arrive     skips to step k, puts x in, lets the transformer run there, and leaves with what the scheduler is given

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
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from harmonica.calls import in_call
from harmonica.models.pipelines.recorded import (
    Arrival,
    NotFollowedError,
    Recorded,
    bind,
    generators_in,
    global_generators,
    pretended,
    same,
    zeros,
)
from harmonica.models.pipelines.standin import Leave, state_of
from harmonica.override import overridden

Forward = Callable[..., Any]
Memo = dict[Hashable, Any]


class Followed:
    """What all runs do: remember what depends on the condition alone, count steps and calls."""

    def __init__(
        self, recorded: Recorded, device: torch.device, memos: tuple[Memo, Memo], draws: bool
    ) -> None:
        self.recorded, self.device, self.draws = recorded, device, draws
        self._of_rows, self._of_samples = memos
        self.scheduler: Any = None
        self.k = 0
        self._counts: dict[str, int] = {}
        self._inside = False  # of something that is remembered

    def __deepcopy__(self, memo: dict[int, Any]) -> Followed:
        return self

    def _count(self, name: str) -> int:
        count = self._counts[name] = self._counts.get(name, -1) + 1
        return count

    def encoded(self, name: str, compute: Callable[[], Any], args: Any) -> Any:
        """Remember an answer for this condition, unless it takes a generator."""
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
        """Answer a model's call."""
        if self._inside:
            return module(*args, **kwargs)
        if name.endswith(".decode") and self.k > 0:
            raise Leave(self)
        if name in self.recorded.looping:
            return self._looping(name, self._count(name), module, args, kwargs)
        return self._once(name, functools.partial(module, *args, **kwargs), args, kwargs)

    def _once(
        self, name: str, compute: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return self._remembered(self._of_samples, name, compute)

    def _looping(
        self, name: str, call: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        raise NotImplementedError

    def _next_step(self) -> None:
        self.k += 1
        for name in self.recorded.looping:
            self._counts.pop(name, None)


class Arrive(Followed):
    """A run that skips to step k, puts x in, and leaves with what the scheduler is given there.

    Args:
        x: as the denoiser has it; None at k = 0 leaves the pipeline's own.
        forward: (name, module, call, args, kwargs) -> what a model of the loop answers at step k; None
            for answers that cost nothing.
    """

    def __init__(
        self,
        recorded: Recorded,
        device: torch.device,
        memos: tuple[Memo, Memo],
        *,
        k: int,
        x: Tensor | None,
        forward: Forward | None,
    ) -> None:
        entry = recorded.entry if k == 0 and x is not None else None
        super().__init__(
            recorded, device, memos, draws=entry is not None and entry[0] == "randn_tensor"
        )
        self.at, self.x, self.forward = k, x, forward
        self.arrival: Arrival | None = None
        self._entry, self._grad = entry, torch.is_grad_enabled()
        self._placeholders: list[Any] = []

    def prepared(self, source: str, result: Any) -> Any:
        """Put x in, if this is where it comes from."""
        if self._entry is None or (source, self._count(source)) != self._entry[:2]:
            return result
        leaves, spec = tree_flatten(result)
        assert self.x is not None
        leaves[self._entry[2]] = self.x
        torch.set_grad_enabled(self._grad)  # pipelines run under no_grad, and put theirs back
        return tree_unflatten(leaves, spec)

    def _looping(
        self, name: str, call: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        arrived = self.k == self.at
        if (name, call) not in self.recorded.answers and not (arrived and name == "transformer"):
            raise NotFollowedError(f"{name} is called more often than in the first run")
        if not arrived:
            return tree_map(zeros, self.recorded.answers[name, call])
        if self.forward is None:
            return pretended(self.recorded.answers[name, call], name, call, (args, kwargs))
        torch.set_grad_enabled(self._grad)
        return self.forward(name, module, call, args, kwargs)

    def stepped(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Skip the step, or leave with what it is given."""
        bound = bind(step, args, kwargs)
        sample = bound.arguments["sample"]
        if self.k < self.at:
            vars(self.scheduler).update(self.recorded.states[self.k])
            last = self.k == self.at - 1 and self.x is not None
            self._next_step()
            if last:
                torch.set_grad_enabled(self._grad)
                assert self.x is not None
                sample = self.recorded.unfold(self.x)
            return self._answer(sample)
        out = bound.arguments.pop("model_output")
        self.arrival = Arrival(
            arguments=bound,
            sample=None if sample is self.x else sample,
            out=out,
            carried={
                name: i
                for name, value in bound.arguments.items()
                for i, placeholder in enumerate(self._placeholders)
                if value is placeholder and isinstance(value, Tensor)
            },
            state=state_of(self.scheduler) if self.at == 0 else {},
            generators=[g.get_state() for g in generators_in(bound)],
            random=[g.get_state() for g in global_generators(self.device)] if self.recorded.random else [],
            timestep=bound.arguments.get("timestep"),
        )  # fmt: skip
        bound.arguments["sample"] = None
        raise Leave(self)

    def _answer(self, sample: Tensor) -> Any:
        """Return what the scheduler would, around this sample."""
        leaves, spec = tree_flatten(self.recorded.returned)
        like = leaves[0]
        self._placeholders = [
            torch.zeros_like(sample) if isinstance(leaf, Tensor) and leaf.shape[1:] == like.shape[1:] else leaf
            for leaf in leaves
        ]  # fmt: skip
        self._placeholders[0] = sample
        answer = tree_unflatten(self._placeholders, spec)
        self._placeholders = self._placeholders[1:]
        return answer


def real_forward(module: nn.Module, call: int, args: tuple[Any, ...], kwargs: dict[str, Any],
                 modes: Sequence[Any], answer: Any) -> Any:  # fmt: skip
    """Run the transformer under the dispatch modes that were on when the prediction was asked for.

    What counts operations on fake tensors sees the transformer, and the pipeline goes on with zeros.
    """
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        if call and torch.is_grad_enabled():
            stack.enter_context(_again_in(call, module))
        stack.enter_context(in_call(call))
        output = module(*args, **kwargs)
    if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(output)):
        return tree_map(zeros, answer)
    return output


def _again_in(call: int, module: nn.Module) -> Any:
    """Let checkpointed blocks, which backward runs again, know the call that they belong to."""

    def again(run: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block, *inputs = args

        def forward(*inputs: Any) -> Any:
            with in_call(call):
                return block(*inputs)

        return run(forward, *inputs, **kwargs)

    name = "_gradient_checkpointing_func"
    return overridden(
        (part, name, again)
        for part in module.modules()
        if getattr(part, "gradient_checkpointing", False) and callable(getattr(part, name, None))
    )


def without_modes() -> Any:
    """Switch dispatch modes off, as a context manager that yields them."""
    return _disable_current_modes()
