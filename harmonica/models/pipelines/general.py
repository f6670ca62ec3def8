"""A denoiser of any pipeline: the pipeline's own `__call__` is the walk.

    predict(x, k, cond)   runs the pipeline up to step k with x put in, and leaves with the output
                          of the model
    step(x, out, k, …)    steps a copy of the scheduler with the arguments that predict saw there
    cond                  (B, 2) int64: the row of the prompt, the seed of that sample's generator

Nothing here knows a model. That the pipeline can be followed is verified when the denoiser is made
(`harmonica.models.pipelines.probe`); what cannot be followed is refused there.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from harmonica.models.pipelines.inputs import Inputs, Sample
from harmonica.models.pipelines.recorded import (
    Arrival,
    NotFollowedError,
    Recorded,
    State,
    folded_out,
    global_generators,
    scaled,
)
from harmonica.models.pipelines.runs import Arrive, Memo, real_forward
from harmonica.models.pipelines.standin import StandIns, plain_scheduler

CONDITIONS, ARRIVALS = 64, 8
"""How many conditions' encodings, and steps' arguments, are remembered."""


class PipelineDenoiser:
    """What `from_pipeline` returns.

    Attributes:
        steps, sites, about: as `Denoiser` says.
        batched: whether the pipeline takes several samples at once; otherwise they run one by one,
            and a site has a feature for each.
    """

    def __init__(
        self,
        stand_ins: StandIns,
        inputs: Inputs,
        recorded: Recorded,
        sites: Mapping[str, nn.Module],
        about: Mapping[str, Any],
    ) -> None:
        self.sites, self.about, self.inputs = sites, dict(about), inputs
        self.steps, self.batched = 0, False
        self.again: Callable[[int], PipelineDenoiser]  # with another num_inference_steps
        self.stand_ins, self.recorded = stand_ins, {1: recorded}
        self._memos: OrderedDict[Hashable, Memo] = OrderedDict()
        self._arrivals: OrderedDict[tuple[int, int], tuple[Any, list[Arrival]]] = OrderedDict()

    @property
    def calls(self) -> int:
        """Calls of the transformer in a prediction of one sample."""
        return len(self.recorded[1].inputs)

    @property
    def draws_noise(self) -> bool:
        """Whether a step of the scheduler draws noise."""
        return self.recorded[1].draws_noise

    def with_steps(self, steps: int) -> PipelineDenoiser:
        """Return the same pipeline with about so many steps."""
        return self.again(round(self.inputs.call["num_inference_steps"] * steps / self.steps))

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw prompts and seeds; return the noise that the pipeline draws for them, and cond."""
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        rows = torch.randint(self.inputs.rows, (batch_size,), **options)
        seeds = torch.randint(2**32, (batch_size,), **options)
        cond = torch.stack([rows, seeds], 1).cpu()
        return self.noise(cond), cond

    def noise(self, cond: Tensor) -> Tensor:
        """Return the x that the pipeline starts from for these prompts and seeds, (B, …)."""
        with torch.no_grad(), without_modes():
            arrivals = [self._run([sample], None, 0, pretend=True) for sample in samples_of(cond)]
            firsts = [a.sample for a in arrivals if a.sample is not None]
            return torch.cat([self.recorded[1].fold(first) for first in firsts])

    def predict(self, x: Tensor, k: int, cond: Tensor) -> Tensor:
        """Return the output that the pipeline hands to its scheduler at step k, for x (B, …).

        Raises ValueError if x or cond do not fit, or k is no step.
        """
        return self._predict(x, k, cond, pretend=False)

    def pretend(self, x: Tensor, k: int, cond: Tensor) -> tuple[Tensor, Arrival]:
        """Predict without running a model, and return what reached the scheduler as well."""
        return self._predict(x, k, cond, pretend=True), self._arrivals[id(x), k][1][0]

    def _predict(self, x: Tensor, k: int, cond: Tensor, *, pretend: bool) -> Tensor:
        samples, parts = self._checked(x, k, cond)
        with without_modes() as modes:
            arrivals = [
                self._run(group, part, k, pretend=pretend, modes=modes, first_call=i)
                for i, (group, part) in enumerate(zip(samples, parts, strict=True))
            ]
            outs = [self._left(a, part, k) for a, part in zip(arrivals, parts, strict=True)]
        self._arrivals[id(x), k] = weakref.ref(x), arrivals
        while len(self._arrivals) > ARRIVALS:
            self._arrivals.popitem(last=False)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _left(self, arrival: Arrival, x: Tensor, k: int) -> Tensor:
        """Return the model's output for x at step k, which the arrival need not keep."""
        recorded = self.recorded[1]
        sample = x if arrival.sample is None else arrival.sample
        if k == 0 and recorded.entry is None and not torch.equal(recorded.fold(sample), x):
            raise ValueError(
                f"{self.about['model']} starts from noise of its own and lets none be put in; pass "
                "x and cond as `draw` returned them"
            )
        out: Tensor = folded_out(recorded, arrival.out, sample)
        arrival.out = None
        return out

    def step(self, x: Tensor, out: Tensor, k: int, memory: dict[str, Any]) -> Tensor:
        """Return x after step k, where `predict` was asked with this x and k before.

        Raises RuntimeError if it was not, or if `memory` lacks what the steps before left in it.
        """
        known, arrivals = self._arrivals.get((id(x), k), (None, []))
        if known is None or known() is not x:
            raise RuntimeError(
                f"step {k} of an x that was not predicted; call predict(x, {k}, …) before step"
            )
        if k > 0 and "walks" not in memory:
            raise RuntimeError(
                f"step {k} needs what the steps before it left in `memory`; pass a copy"
            )
        starts = memory.get("walks", [arrival.start for arrival in arrivals])
        parts = zip(arrivals, starts, x.chunk(len(arrivals)), out.chunk(len(arrivals)), strict=True)
        ends = [self._take(*part) for part in parts]
        memory["walks"] = tuple(state for _, state in ends)
        return ends[0][0] if len(ends) == 1 else torch.cat([end for end, _ in ends])

    def _take(self, a: Arrival, start: State, x: Tensor, out: Tensor) -> tuple[Tensor, State]:
        """Take one run's step with a scheduler of the walk's own."""
        recorded = self.recorded[1]
        scheduler = plain_scheduler(self.stand_ins.pipe.scheduler, start.scheduler)
        sample = recorded.unfold(x) if a.sample is None else a.sample
        doubled = recorded.doubled and 2 * len(out) == len(sample)
        given = {"model_output": torch.cat([out, out]) if doubled else out, "sample": sample}
        given |= {name: start.carried[i] for name, i in a.carried.items()}
        states, mine = iter(start.generators), list[torch.Generator]()

        def again(generator: torch.Generator) -> torch.Generator:
            mine.append(torch.Generator(generator.device).set_state(next(states)))
            return mine[-1]

        arguments = tree_map_only(torch.Generator, again, {**a.arguments.arguments, **given})
        arguments |= arguments.pop("kwargs", {})
        with self._random(start.random) as random:
            result = scheduler.step(**arguments)
        after, *carried = tree_leaves(result)
        state = State(vars(scheduler), carried, [g.get_state() for g in mine], random)
        return recorded.fold(after), state

    @contextmanager
    def _random(self, states: list[Tensor]) -> Iterator[list[Tensor]]:
        """Set torch's global generators for a while; yields a list that then holds their states."""
        generators = global_generators(self.stand_ins.device) if states else []
        before, after = [g.get_state() for g in generators], list[Tensor]()
        try:
            _set(generators, states)
            yield after
        finally:
            after.extend(g.get_state() for g in generators)
            _set(generators, before)

    def _run(
        self, samples: Sequence[Sample], x: Tensor | None, k: int, *, pretend: bool,
        modes: Sequence[Any] = (), first_call: int = 0,
    ) -> Arrival:  # fmt: skip
        """Run the pipeline to step k."""
        batch, calls = len(samples), self.calls
        if batch not in self.recorded:  # guessed from runs of one sample
            one = self.recorded[1]
            self.recorded[batch] = replace(one, batch=batch, answers=scaled(one, batch))
        recorded = self.recorded[batch]

        def forward(name: str, module: Any, call: int, args: Any, kwargs: Any) -> Any:
            if name != "transformer":
                return module(*args, **kwargs)
            known = recorded.answers.get((name, call))
            return real_forward(module, first_call * calls + call, args, kwargs, modes, known)

        answer, memos = None if pretend else forward, self.memos(samples)
        run = Arrive(recorded, self.stand_ins.device, memos, k, x, answer)
        with self.seeded(samples):
            self.stand_ins.run(run, self.inputs.of(samples))
        if run.arrival is None:
            raise NotFollowedError(f"the pipeline ends before step {k}")
        return run.arrival

    def memos(self, samples: Sequence[Sample]) -> tuple[Memo, Memo]:
        """Return what is remembered for these rows, and for these rows with these seeds."""
        return self._memo(tuple(row for row, _ in samples)), self._memo(tuple(samples))

    def _memo(self, key: Hashable) -> Memo:
        memo = self._memos[key] = self._memos.pop(key, {})
        while len(self._memos) > CONDITIONS:
            self._memos.popitem(last=False)
        return memo

    def _checked(self, x: Tensor, k: int, cond: Tensor) -> tuple[list[list[Sample]], Any]:
        """Return the samples and the parts of x of each run."""
        one = self.recorded[1].first
        if not 0 <= k < self.steps:
            raise ValueError(f"step {k} of a walk of {self.steps} steps, 0 to {self.steps - 1}")
        fits = cond.dim() == 2 and cond.shape[1] == 2 and not cond.is_floating_point() and len(cond)
        if not fits or x.shape != (len(cond) * len(one), *one.shape[1:]):
            batch = "B" if len(one) == 1 else f"{len(one)}·B"
            shape = ", ".join([batch, *map(str, one.shape[1:])])
            raise ValueError(
                f"found x {tuple(x.shape)} and cond {tuple(cond.shape)} {cond.dtype}; expected "
                f"({shape}) and (B, 2) whole numbers, as `draw` returns"
            )
        samples = samples_of(cond)
        rows = [row for row, _ in samples]
        if min(rows) < 0 or max(rows) >= self.inputs.rows:
            raise ValueError(f"cond names rows {rows}; there are {self.inputs.rows} prompts")
        if self.batched:
            return [samples], [x]
        return [[sample] for sample in samples], x.chunk(len(samples))

    @contextmanager
    def seeded(self, samples: Sequence[Sample]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Seed torch's global generators by the first sample, if the pipeline draws from them.

        Yields their states, and a list that holds their states afterwards.
        """
        states: list[Tensor] = []
        if self.recorded[1].random:
            for generator in global_generators(self.stand_ins.device):
                own = torch.Generator(generator.device).manual_seed(samples[0][1])
                states.append(own.get_state())
        with self._random(states) as after:
            yield states, after


def samples_of(cond: Tensor) -> list[Sample]:
    """Return the rows and seeds of cond (B, 2)."""
    return [(int(row), int(seed)) for row, seed in cond.tolist()]


def _set(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
