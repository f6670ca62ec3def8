"""A denoiser of any pipeline: the pipeline's own `__call__` is the walk.

    predict(x, k, cond)   runs the pipeline up to step k with x put in, and leaves with the output
                          of the model
    step(x, out, k, …)    steps a copy of the scheduler with the arguments that predict saw there
    cond                  (B, 2) int64: the row of the prompt, the seed of that sample's generator

Nothing here knows a model. `harmonica.models.pipelines.denoiser` verifies, when a denoiser is made,
that its pipeline can be followed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from harmonica.calls import in_call
from harmonica.models.pipelines import recorded as record
from harmonica.models.pipelines.inputs import Inputs, Sample
from harmonica.models.pipelines.recorded import Arrival, NotFollowedError, Recorded, State
from harmonica.models.pipelines.runs import Arrive, Memo, Method, Whole
from harmonica.models.pipelines.standin import StandIns, plain_scheduler
from harmonica.override import overridden
from harmonica.run_again import run_again
from harmonica.table import require

CONDITIONS = 64
"""How many conditions' encodings are remembered."""


class PipelineDenoiser:
    """What `from_pipeline` returns: a `Denoiser`.

    Attributes:
        batched: whether the pipeline takes several samples at once; otherwise they run one by one,
            and a site has a feature for each.
        predictions: number of steps -> images predicted so far, by this and all its `with_steps`.
        recorded: batch size -> what is known of its runs; of others than 1 it may be guessed.
    """

    def __init__(
        self, stand_ins: StandIns, inputs: Inputs, sites: Mapping[str, nn.Module], about: Any
    ) -> None:
        self.sites, self.about, self.inputs = sites, dict(about), inputs
        self.steps, self.batched = 0, False
        self.stand_ins, self.recorded = stand_ins, {1: Recorded(batch=1)}
        self.predictions = Counter[int]()
        self._memo: Callable[[Hashable], Memo] = lru_cache(CONDITIONS)(lambda _: {})
        self._arrivals: Any = WeakIdKeyDictionary()  # x -> step -> what reached the scheduler

    @property
    def draws_noise(self) -> bool:
        """Whether a step of the scheduler draws noise."""
        return self.recorded[1].draws_noise

    @property
    def timesteps(self) -> tuple[float, ...]:
        """All timesteps of the scheduler; a walk from an image (strength) takes the last T."""
        return self.recorded[1].timesteps

    def with_steps(self, steps: int) -> PipelineDenoiser:
        """Return the same pipeline with about so many steps; it is not verified again."""
        number = round(self.inputs.call["num_inference_steps"] * steps / self.steps)
        inputs = replace(self.inputs, call={**self.inputs.call, "num_inference_steps": number})
        other = PipelineDenoiser(self.stand_ins, inputs, self.sites, self.about)
        other.predictions = self.predictions
        other.watch(torch.tensor([[0, 0]]), self.recorded[1].again(1))
        other.batched = self.batched
        return other

    @torch.no_grad()
    def watch(self, cond: Tensor, recorded: Recorded, run_once: Method | None = None) -> None:
        """Run the pipeline once and fill in `recorded`, which says what is known from now on; see
        `Whole` for `run_once`.
        """
        samples, device = samples_of(cond), self.stand_ins.device
        run = Whole(recorded, device, self._remembered(samples), run_once)
        before = self._seeds(samples)
        with record.random_states(device, before) as after:
            self.stand_ins.run(run, self.inputs.of(samples))
        if not recorded.steps:
            raise NotFollowedError("it never steps its scheduler, or steps a copy of it")
        recorded.random = any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
        self.steps, self.recorded[recorded.batch] = len(recorded.steps), recorded
        times = self.timesteps[-self.steps :]
        self.about["timesteps"] = times if len(times) == self.steps else ()
        self.predictions[self.steps] += run_once is not None

    def draw(self, batch_size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw prompts and seeds; return the noise that the pipeline draws for them, and cond."""
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        rows = torch.randint(self.inputs.rows, (batch_size,), **options)
        seeds = torch.randint(2**32, (batch_size,), **options)
        cond = torch.stack([rows, seeds], 1).cpu()
        return self.noise(cond), cond

    def noise(self, cond: Tensor) -> Tensor:
        """Return the x that the pipeline starts from for these prompts and seeds, (B, …)."""
        with torch.no_grad(), without_modes():
            arrivals = [self._run([sample], None, 0, None) for sample in samples_of(cond)]
            firsts = [a.sample for a in arrivals if a.sample is not None]
            return torch.cat([self.recorded[1].fold(first) for first in firsts])

    def predict(self, x: Tensor, k: int, cond: Tensor) -> Tensor:
        """Return the output that the pipeline hands to its scheduler at step k, for x (B, …); raise
        ValueError if x or cond do not fit, or k is no step.
        """
        return self._predict(x, k, cond, pretend=False)

    def pretend(self, x: Tensor, k: int, cond: Tensor) -> tuple[Tensor, Arrival]:
        """Predict without running a model, and return what reached the scheduler as well."""
        return self._predict(x, k, cond, pretend=True), self._arrivals[x][k][0]

    def _predict(self, x: Tensor, k: int, cond: Tensor, *, pretend: bool) -> Tensor:
        self._check(x, k, cond)
        samples = samples_of(cond)
        groups = [samples] if self.batched else [[sample] for sample in samples]
        arrivals, outs = list[Arrival](), list[Tensor]()
        with without_modes() as modes:
            for i, (group, part) in enumerate(zip(groups, x.chunk(len(groups)), strict=True)):
                first_call = i * len(self.recorded[1].inputs)
                forward = None if pretend else self._forward(len(group), first_call, modes)
                arrivals.append(self._run(group, part, k, forward))
                outs.append(self._output(arrivals[-1], part, k))
        self.predictions[self.steps] += 0 if pretend or modes else len(samples)
        self._arrivals.setdefault(x, {})[k] = arrivals
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _check(self, x: Tensor, k: int, cond: Tensor) -> None:
        (n, *shape), rows = self.recorded[1].first.shape, self.inputs.rows
        within = f"step {k} of a walk of {self.steps} steps, 0 to {self.steps - 1}"
        require(0 <= k < self.steps, within)
        fits = cond.dim() == 2 and cond.shape[1] == 2 and not cond.is_floating_point() and len(cond)
        require(
            bool(fits) and x.shape == (len(cond) * n, *shape),
            f"found x {tuple(x.shape)} and cond {tuple(cond.shape)} {cond.dtype}; expected "
            f"({', '.join(['B' if n == 1 else f'{n}·B', *map(str, shape)])}) and (B, 2) whole "
            "numbers, as `draw` returns",
        )
        chosen = [row for row, _ in samples_of(cond)]
        known = all(0 <= row < rows for row in chosen)
        require(known, f"cond names rows {chosen}; there are {rows} prompts")

    def _output(self, arrival: Arrival, x: Tensor, k: int) -> Tensor:
        """Return the model's output for x at step k, which the arrival need not keep."""
        recorded = self.recorded[1]
        sample = x if arrival.sample is None else arrival.sample
        fixed = f"{self.about['model']} starts from noise of its fixed and lets none be put in"
        allowed = k > 0 or recorded.entry is not None or torch.equal(recorded.fold(sample), x)
        require(allowed, f"{fixed}; pass x and cond as `draw` returned them")
        out: Tensor = recorded.fold_out(arrival.out, sample)
        arrival.out = None
        return out

    def step(self, x: Tensor, out: Tensor, k: int, memory: dict[str, Any]) -> Tensor:
        """Return x after step k; raise RuntimeError unless `predict` was asked with this x and k
        before, and `memory` holds what the steps before left in it.
        """
        arrivals: list[Arrival] = self._arrivals.get(x, {}).get(k, [])
        if not arrivals:
            todo = f"call predict(x, {k}, …) before step"
            raise RuntimeError(f"step {k} of an x that was not predicted; {todo}")
        if k > 0 and "walks" not in memory:
            left = "what the steps before it left in `memory`"
            raise RuntimeError(f"step {k} needs {left}; pass a copy")
        starts = memory.get("walks", [arrival.start for arrival in arrivals])
        parts = zip(arrivals, starts, x.chunk(len(arrivals)), out.chunk(len(arrivals)), strict=True)
        ends = [self._step_alone(*part) for part in parts]
        memory["walks"] = tuple(state for _, state in ends)
        return ends[0][0] if len(ends) == 1 else torch.cat([end for end, _ in ends])

    def _step_alone(self, a: Arrival, start: State, x: Tensor, out: Tensor) -> tuple[Tensor, State]:
        """Take one run's step with a scheduler of the walk's own."""
        recorded, states, generators = self.recorded[1], iter(start.generators), list[Generator]()
        scheduler = plain_scheduler(self.stand_ins.pipe.scheduler, start.scheduler)
        sample = x if a.sample is None else a.sample
        doubled = recorded.doubled and 2 * len(out) == len(sample)
        given = {"model_output": torch.cat([out, out]) if doubled else out, "sample": sample}
        given |= {name: start.carried[i] for name, i in a.carried.items()}

        def again(generator: Generator) -> Generator:
            generators.append(Generator(generator.device).set_state(next(states)))
            return generators[-1]

        arguments = tree_map_only(Generator, again, {**a.arguments, **given})
        arguments |= arguments.pop("kwargs", {})
        with record.random_states(self.stand_ins.device, start.random) as random:
            result = scheduler.step(**arguments)
        after, *carried = tree_leaves(result)
        state = State(vars(scheduler), carried, [g.get_state() for g in generators], random)
        return recorded.fold(after), state

    def _run(
        self, samples: Sequence[Sample], x: Tensor | None, k: int, forward: Method | None
    ) -> Arrival:
        """Run the pipeline to step k, where the models answer by `forward`, if it is given."""
        memos, device = self._remembered(samples), self.stand_ins.device
        run = Arrive(self._recorded_of(len(samples)), device, memos, k, x, forward)
        with record.random_states(device, self._seeds(samples)):
            self.stand_ins.run(run, self.inputs.of(samples))
        if run.arrival is None:
            raise NotFollowedError(f"the pipeline ends before step {k}")
        return run.arrival

    def _recorded_of(self, batch: int) -> Recorded:
        if batch not in self.recorded:  # guessed from runs of one sample
            one = self.recorded[1]
            self.recorded[batch] = replace(one, batch=batch, answers=one.scaled(batch))
        return self.recorded[batch]

    def _forward(self, batch: int, first_call: int, modes: Sequence[Any]) -> Method:
        answers = self._recorded_of(batch).answers

        def forward(name: str, module: Any, call: int, args: Any, kwargs: Any) -> Any:
            if name != "transformer":
                return module(*args, **kwargs)
            output = _run_transformer(module, first_call + call, args, kwargs, modes)
            fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(output))
            return record.zeros(answers.get((name, call))) if fake else output

        return forward

    def _remembered(self, samples: Sequence[Sample]) -> tuple[Memo, Memo]:
        """Return what is remembered for these rows, and for these rows with these seeds."""
        return self._memo(tuple(row for row, _ in samples)), self._memo(tuple(samples))

    def _seeds(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Return states of torch's global generators for a run of these samples, if it draws."""
        own = record.global_generators(self.stand_ins.device) if self.recorded[1].random else []
        return [Generator(g.device).manual_seed(samples[0][1]).get_state() for g in own]


def samples_of(cond: Tensor) -> list[Sample]:
    """Return the rows and seeds of cond (B, 2)."""
    return [(int(row), int(seed)) for row, seed in cond.tolist()]


def _run_transformer(
    module: nn.Module, call: int, args: Any, kwargs: Any, modes: Sequence[Any]
) -> Any:
    """Run the transformer under the dispatch modes that were on when the prediction was asked for,
    such as a count on fake tensors; `run_again` checkpoints the blocks that shall be.
    """
    name, parts = "_gradient_checkpointing_func", module.modules()
    blocks = [part for part in parts if getattr(part, "gradient_checkpointing", False)]
    able = (block for block in blocks if callable(getattr(block, name, None)))
    checkpointed = ((block, name, lambda _, args, kwargs: run_again(*args)) for block in able)
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        if torch.is_grad_enabled():
            stack.enter_context(overridden(checkpointed))
        stack.enter_context(in_call(call))
        return module(*args, **kwargs)
