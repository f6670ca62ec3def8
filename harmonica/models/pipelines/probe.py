"""Probe: watch one run of a pipeline, and verify that a denoiser made from it walks as the pipeline
does.

The transformer runs once, for the shapes of its outputs. After that every model of the loop answers
numbers that depend on all its inputs and cost nothing, so a difference in anything that reaches a
model or the scheduler is seen at the next step. What differs is named with the step's number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from harmonica.cache import gated
from harmonica.models.pipelines.general import PipelineDenoiser, samples_of
from harmonica.models.pipelines.inputs import Inputs
from harmonica.models.pipelines.recorded import (
    NotFollowedError,
    Recorded,
    bind,
    digest,
    folded_out,
    generators_in,
    global_generators,
    pretended,
    same,
    scaled,
    shape_of,
    state_of,
)
from harmonica.models.pipelines.runs import Memo, Method, Run
from harmonica.models.pipelines.standin import StandIns

SEEDS = 20_000_003, 20_000_005


class Whole(Run):
    """A run of all steps on answers that cost nothing; what it shows is in `recorded`.

    Args:
        recorded, device, memos: as `Run` has them.
        run_once: (module, args, kwargs) -> the output of a transformer's call at step 0, for its
            shapes; None if `recorded` has the answers already.
    """

    def __init__(
        self,
        recorded: Recorded,
        device: torch.device,
        memos: tuple[Memo, Memo],
        run_once: Method | None,
    ) -> None:
        super().__init__(recorded, device, memos)
        self.run_once = run_once
        self._latents: list[tuple[tuple[str, int, int], Tensor]] = []

    def prepared(self, source: str, result: Any) -> Any:
        """Note the tensors that x may come from."""
        if self.k == 0:
            call = self._count(source)
            for i, leaf in enumerate(tree_leaves(result)):
                if isinstance(leaf, Tensor):
                    self._latents.append(((source, call, i), leaf))
        return result

    def _once(self, name: str, compute: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        if self.k > 0:  # it was taken for something that runs before the loop
            self.recorded.looping.add(name)
            self._counts.pop(name, None)
            return self._looping(name, self._count(name), compute, args, kwargs)
        answer = super()._once(name, compute, args, kwargs)
        # A tree of its own: some transformers take what they read out of a list.
        self.recorded.answers.setdefault((name, self._counts[name]), tree_map(same, answer))
        return answer

    def _looping(self, name: str, call: int, module: Any, args: Any, kwargs: Any) -> Any:
        answers, at_first = self.recorded.answers, self.recorded.inputs
        if name == "transformer":
            tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            shapes = [leaf.shape for leaf in tensors]
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
        return pretended(answers[name, call], name, call, (args, kwargs))

    def stepped(self, step: Method, *args: Any, **kwargs: Any) -> Any:
        """Note what the step is given, step, and note what comes of it."""
        recorded, calls = self.recorded, self._counts.get("transformer", -1) + 1
        if calls != len(recorded.inputs) or not calls:
            raise NotFollowedError(
                f"the transformer is called {calls} times, {len(recorded.inputs)} times at step 0 "
                "(guidance that begins or ends midway, or a step without the transformer)"
            )
        bound = bind(step, args, kwargs)
        given, sample = bound.arguments, bound.arguments.get("sample")
        if not isinstance(sample, Tensor) or not sample.is_floating_point():
            raise NotFollowedError(
                "its scheduler does not step a noisy image, a tensor called sample"
            )
        if self.k == 0:
            self._enter(sample)
        out = folded_out(recorded, given["model_output"], sample)
        own = {"sample": recorded.fold(sample), "model_output": out}
        recorded.steps.append({name: digest(value) for name, value in (given | own).items()})
        sources = [*generators_in(bound), *global_generators(self.device)]
        before = [generator.get_state() for generator in sources]
        result = step(*args, **kwargs)
        drew = (not torch.equal(g.get_state(), b) for g, b in zip(sources, before, strict=True))
        recorded.draws_noise |= any(drew)
        if self.k == 0:
            recorded.returned = result
        recorded.after.append(digest(recorded.fold(tree_leaves(result)[0])))
        recorded.states.append(state_of(self.scheduler))
        self._next_step()
        return result

    def _enter(self, sample: Tensor) -> None:
        """Find where the x of the first step comes from."""
        recorded, half = self.recorded, len(sample) // 2
        recorded.doubled = len(sample) == 2 * recorded.batch and torch.equal(
            sample[:half], sample[half:]
        )
        recorded.first = recorded.fold(sample).clone()
        times = torch.as_tensor(self.scheduler.timesteps).flatten().tolist()
        recorded.timesteps = tuple(map(float, times))
        for place, leaf in self._latents:
            if leaf.shape == recorded.first.shape and torch.equal(leaf, recorded.first):
                recorded.entry = place
                return


def probed(
    pipe: Any, inputs: Inputs, sites: Mapping[str, nn.Module], about: Mapping[str, Any]
) -> PipelineDenoiser:
    """Return a denoiser that was verified; raises NotFollowedError, a ValueError that says the
    reason, where none can be.
    """
    name = type(pipe).__name__
    stand_ins, recorded = StandIns(pipe), Recorded(batch=1, random=True)
    denoiser = PipelineDenoiser(stand_ins, inputs, recorded, sites, about)
    denoiser.again = partial(_unverified, denoiser)
    cond = torch.tensor([[0, SEEDS[0]], [min(1, inputs.rows - 1), SEEDS[1]]])
    try:
        if "step" in vars(pipe.scheduler):
            raise NotFollowedError(
                "somebody has wrapped the step of its scheduler, which is copied"
            )
        with torch.no_grad():
            _watch(denoiser, recorded, cond[:1], _once(sites))
            if len(recorded.looping) > 1:  # known only now, so that the first step ran them
                recorded = _again(recorded, 1, recorded.answers)
                denoiser.recorded[1] = recorded
                _watch(denoiser, recorded, cond[:1])
            _verify(denoiser, recorded, cond[:1])
    except NotFollowedError as mismatch:
        raise NotFollowedError(
            f"{name} cannot be followed step by step: {mismatch}. harmonica.tune can still choose "
            "whole steps from runs of the pipeline, and cached(pipe, schedule) runs any table"
        ) from None
    denoiser.about["timesteps"] = recorded.timesteps
    if recorded.random:  # one generator for a whole batch: a sample would depend on its neighbours
        return denoiser
    try:
        with torch.no_grad():
            two = _again(recorded, 2, scaled(recorded, 2))
            _watch(denoiser, two, cond)
            ones = denoiser.noise(cond)
            if (ones - two.first).norm() > 1e-3 * ones.norm():
                return denoiser  # a batch starts from other noise than its samples
            denoiser.batched = True
            _verify(denoiser, two, cond)
    except Exception:  # whatever a pipeline raises that does not take two samples at once
        denoiser.batched = False
    return denoiser


def _unverified(denoiser: PipelineDenoiser, steps: int) -> PipelineDenoiser:
    """Return the denoiser of another number of steps, of a pipeline that was verified with one."""
    inputs = replace(denoiser.inputs, call={**denoiser.inputs.call, "num_inference_steps": steps})
    recorded = _again(denoiser.recorded[1], 1, denoiser.recorded[1].answers)
    other = PipelineDenoiser(denoiser.stand_ins, inputs, recorded, denoiser.sites, denoiser.about)
    with torch.no_grad():
        _watch(other, recorded, torch.tensor([[0, SEEDS[0]]]))
    other.batched, other.again = denoiser.batched, denoiser.again
    other.about["timesteps"] = recorded.timesteps
    return other


def _again(recorded: Recorded, batch: int, answers: Mapping[tuple[str, int], Any]) -> Recorded:
    """Return what to record another run in, in which no model need run."""
    return Recorded(batch, dict(answers), looping=recorded.looping, random=recorded.random)


def _watch(
    denoiser: PipelineDenoiser, recorded: Recorded, cond: Tensor, run_once: Method | None = None
) -> None:
    """Run the pipeline once and fill in `recorded`."""
    samples, stand_ins = samples_of(cond), denoiser.stand_ins
    run = Whole(recorded, stand_ins.device, denoiser.memos(samples), run_once)
    with denoiser.seeded(samples) as (before, after):
        stand_ins.run(run, denoiser.inputs.of(samples))
    if not recorded.steps:
        raise NotFollowedError("it never steps its scheduler, or steps a copy of it")
    denoiser.steps = len(recorded.steps)
    recorded.random = any(not torch.equal(*pair) for pair in zip(before, after, strict=True))


def _once(sites: Mapping[str, nn.Module]) -> Method:
    """Return what runs the transformer for real: (module, args, kwargs) -> its output's shapes."""

    def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
        asked: set[int] = set()

        def gate(site: int, compute: Callable[[], Any]) -> Any:
            if site in asked:
                raise NotFollowedError(
                    f"{list(sites)[site]} is called more than once in one call of the transformer, "
                    "and has one feature (if its feed-forward runs in chunks, call "
                    "set_chunk_feed_forward(None, 0) on the blocks)"
                )
            asked.add(site)
            return compute()

        with gated(sites, gate):
            output = module(*args, **kwargs)
        if not asked:
            raise NotFollowedError(
                "its transformer ran and asked no site; something else has replaced its modules"
            )
        return tree_map_only(Tensor, shape_of, output)

    return run


def _verify(denoiser: PipelineDenoiser, recorded: Recorded, cond: Tensor) -> None:
    """Raise NotFollowedError unless predict and step give what the whole run showed, to the bit."""
    x, memory, steps = recorded.first, dict[str, Any](), len(recorded.steps)
    if recorded.entry is not None:  # see whether another x than the pipeline's own can be put in
        arrival = denoiser.pretend(0.5 * x, 0, cond)[1]
        if arrival.sample is not None and not torch.equal(recorded.fold(arrival.sample), 0.5 * x):
            recorded.entry = None
    for k, (given, after) in enumerate(zip(recorded.steps, recorded.after, strict=True)):
        at = f"step {k} of {steps}"
        out, arrival = denoiser.pretend(x, k, cond)
        sample = x if arrival.sample is None else recorded.fold(arrival.sample)
        own = arrival.arguments.arguments | {"model_output": out, "sample": sample}
        for argument, value in own.items():
            if argument not in arrival.carried and given.get(argument) != digest(value):
                raise NotFollowedError(
                    f"at {at} the scheduler's {argument} is not that of the pipeline's own run; "
                    "something that is neither x nor the scheduler's is carried from step to step "
                    "(guidance with a memory, a second latent, noise drawn in the loop)"
                )
        x = denoiser.step(x, out, k, memory)
        if digest(x) != after:
            raise NotFollowedError(
                f"at {at} a copy of the scheduler steps elsewhere than the pipeline's own"
            )
