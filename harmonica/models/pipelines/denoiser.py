"""PipelineDenoiser: a pipeline as a `Denoiser`, whose walk is made of the pipeline's own runs.

    predict(x, k, cond)   runs the pipeline up to step k with x put in, and stops with the output
                          that the model gives to the scheduler there
    step(x, out, k, …)    steps a copy of the scheduler with the other inputs that predict saw there
    verify(samples)       compares such a walk with a whole run of the pipeline
    cond                  (B, 2) int64: the row of the prompt, the seed of that sample's generator

When walks are compared, the models run for the shapes of their outputs only. After that, made-up
outputs depend on all inputs and cost nothing, so a difference in anything that reaches a model or
the scheduler is seen at the next step. This file does not know what happens in a run.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from contextvars import Context
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils.weak import WeakIdKeyDictionary

from harmonica.cache import gated
from harmonica.models.pipelines import schedulers
from harmonica.models.pipelines.facts import Facts, NotFollowedError, digest
from harmonica.models.pipelines.inputs import Inputs, Sample, about
from harmonica.models.pipelines.pipeline_run import Outputs, PipelineRun
from harmonica.models.pipelines.schedulers import SamplerState, SchedulerInputs
from harmonica.override import Method, in_call, overridden
from harmonica.run_again import run_again
from harmonica.values import require

SEEDS = 20_000_003, 20_000_005  # of the samples that walks are verified with
ENCODED = 64  # prompts at once; later ones when they are met


class PipelineDenoiser:
    """What `from_pipeline` returns: a `Denoiser`.

    Attributes:
        steps, sites, about, draws_noise: see `Denoiser` and `Refinable`.
        inputs, facts: what the pipeline is called with, and what is known of its runs.
        predictions: number of steps -> images predicted so far, by this and all its `with_steps`.

    Raises NotFollowedError, with the reason, if the walk of one sample is not the pipeline's.
    """

    def __init__(self, pipe: Any, inputs: Inputs, sites: Mapping[str, nn.Module]) -> None:
        self.pipe, self.inputs, self.sites, self.facts = pipe, inputs, sites, Facts()
        self.steps, self.about = 0, about(pipe, inputs.call)
        self.predictions, self._devices = Counter[int](), dict[torch.device, torch.device]()
        self._outputs: dict[int, Outputs] = defaultdict(dict)  # of so many samples at once
        self._memory: dict[Any, Any] = {}  # what models outside the loop have returned
        self._inputs_of: Any = WeakIdKeyDictionary()  # x -> step -> scheduler inputs of each run
        self._parts = pipe.transformer, pipe.scheduler
        self._learn()
        if len(self.facts.models_in_loop) > 1:  # known only now: others ran as if before it
            self._learn()
        self.verify([(0, SEEDS[0])])
        if "prompt" in inputs.each:  # encode them now, so that the encoders may be let go
            self.noise(torch.tensor([[row, 0] for row in range(min(inputs.rows, ENCODED))]))

    @cached_property
    def batched(self) -> bool:
        """Whether the pipeline takes several samples at once, verified at the first question.

        Otherwise they run one by one, and a site has a feature for each.
        """
        samples = [(0, SEEDS[0]), (min(1, self.inputs.rows - 1), SEEDS[1])]
        # With one generator for a whole batch, a sample would depend on its neighbours.
        if self.facts.uses_global_random:
            return False
        with suppress(Exception), without_modes():  # whatever it raises that does not take two
            Context().run(self.verify, samples)  # where no gate is open
            return True
        return False

    def with_steps(self, steps: int) -> "PipelineDenoiser":
        """Return the same pipeline with about so many steps; it is not verified again."""
        other, call = copy.copy(self), dict(self.inputs.call)
        call["num_inference_steps"] = round(call["num_inference_steps"] * steps / self.steps)
        other.inputs, other.about = replace(self.inputs, call=call), dict(self.about)
        other._inputs_of = WeakIdKeyDictionary()
        other._learn()
        moved = (other.steps > self.steps) == (steps > self.steps)
        require(moved, f"the pipeline runs {other.steps} steps; are its timesteps or sigmas given?")
        return other

    def _learn(self) -> None:
        """Learn the facts from a whole run of one sample."""
        self.facts = self._whole_run([(0, SEEDS[0])]).facts
        self.draws_noise = self.facts.draws_noise
        self.steps, times = len(self.facts.states), self.facts.timesteps
        self.about["timesteps"] = times[: self.steps] if len(times) >= self.steps else ()

    @torch.no_grad()
    def _whole_run(self, samples: Sequence[Sample]) -> PipelineRun:
        """Run all steps on made-up outputs; a model runs once where their shapes are not known."""
        facts = Facts(self.facts.models_in_loop, self.facts.uses_global_random)
        images = 0 if self._knows_outputs(samples) else len(samples)
        run = self._run(samples, facts, partial(_run_checked, self.sites))
        if not run.trace:
            raise NotFollowedError("it never steps its scheduler, or steps a copy of it")
        self.predictions[len(run.trace)] += images
        return run

    @torch.no_grad()
    def verify(self, samples: Sequence[Sample]) -> None:
        """Raise NotFollowedError unless a walk of these samples, all in one run, is the pipeline's,
        to the bit, in all that the denoiser gives or hands on.
        """
        whole, facts, sampler = self._whole_run(samples), self.facts, None
        x, alone = whole.facts.x, self.noise(torch.tensor(samples))
        if (alone - x).norm() > 1e-3 * alone.norm():
            raise NotFollowedError("a sample starts from another noise beside others")
        if facts.x_source is not None:  # see whether another x than the pipeline's can be put in
            sample = self._predict_at_once(samples, 0.5 * x, 0)[1].sample
            if sample is not None and not torch.equal(facts.first_half(sample), 0.5 * x):
                facts.x_source = None
        for k, (digests, after) in enumerate(whole.trace):
            at = f"at step {k} of {len(whole.trace)}"
            out, inputs = self._predict_at_once(samples, x, k)
            sample = x if inputs.sample is None else facts.first_half(inputs.sample)
            for name, value in {**inputs.arguments, "model_output": out, "sample": sample}.items():
                if name not in inputs.carried and digests.get(name) != digest(value):
                    other = "something that is neither x nor the scheduler's is carried from step "
                    other += "to step (guidance with a memory, a second latent, noise of the loop)"
                    what = f"the scheduler's {name} is not that of the pipeline's own run"
                    raise NotFollowedError(f"{at} {what}; {other}")
            x, sampler = self._step_at_once(x, out, inputs, sampler or inputs.start)
            if digest(x) != after:
                raise NotFollowedError(f"{at} a copy of its scheduler steps elsewhere")

    def draw(self, batch_size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw prompts and seeds; return the noise that the pipeline draws for them, and cond."""
        randint = partial(torch.randint, generator=generator, device=generator.device)
        rows, seeds = (randint(n, (batch_size,)) for n in (self.inputs.rows, 2**32))
        cond = torch.stack([rows, seeds], 1).cpu()
        return self.noise(cond), cond

    def noise(self, cond: Tensor) -> Tensor:
        """Return the x that the pipeline starts from for these prompts and seeds, (B, …)."""
        with torch.no_grad(), without_modes():
            runs = [self._run([it], self.facts, None, 0) for it in self.inputs.samples(cond)]
            firsts = [run.inputs.sample for run in runs if run.inputs is not None]
            return torch.cat([self.facts.first_half(x) for x in firsts if x is not None])

    def predict(self, x: Tensor, k: int, cond: Tensor) -> Tensor:
        """Return the output that the pipeline hands to its scheduler at step k, for x (B, …)."""
        self._check(x, k, cond)
        samples, pairs = self.inputs.samples(cond), list[tuple[Tensor, SchedulerInputs]]()
        together = len(samples) == 1 or self.batched
        groups = [samples] if together else [[sample] for sample in samples]
        with without_modes() as modes:
            if k > 0 and not self._knows_outputs(groups[0]):
                Context().run(self._whole_run, groups[0])  # where no gate is open
            for i, (group, part) in enumerate(zip(groups, x.chunk(len(groups)), strict=True)):
                run_model = partial(_run_model, modes, i * len(self.facts.shapes))
                pairs.append(self._predict_at_once(group, part, k, run_model))
        self.predictions[self.steps] += 0 if modes else len(samples)
        self._inputs_of.setdefault(x, {})[k] = [inputs for _, inputs in pairs]
        return pairs[0][0] if together else torch.cat([out for out, _ in pairs])

    def _check(self, x: Tensor, k: int, cond: Tensor) -> None:
        (n, *shape), T = self.facts.x.shape, self.steps
        require(0 <= k < T, f"step {k} of a walk of {T} steps, 0 to {T - 1}")
        pairs = cond.shape[1:] == (2,) and not cond.is_floating_point() and len(cond) > 0
        sizes = ", ".join(["B" if n == 1 else f"{n}·B", *map(str, shape)])
        todo = f"expected ({sizes}) and (B, 2) whole numbers, as `draw` returns"
        given = f"x {tuple(x.shape)} and cond {tuple(cond.shape)} {cond.dtype}"
        require(pairs and x.shape == (len(cond) * n, *shape), f"found {given}; {todo}")

    def _predict_at_once(
        self, samples: Sequence[Sample], x: Tensor, k: int, run_model: Method | None = None
    ) -> tuple[Tensor, SchedulerInputs]:
        """Predict in one run; without `run_model` the output that is returned is made up."""
        run, facts = self._run(samples, self.facts, run_model, k, x), self.facts
        if run.inputs is None:
            raise NotFollowedError(f"the pipeline ends before step {k}")
        sample = x if run.inputs.sample is None else run.inputs.sample
        allowed = k > 0 or facts.x_source is not None or torch.equal(facts.first_half(sample), x)
        fixed = f"{self.about['model']} starts from noise of its own and lets none be put in"
        require(allowed, f"{fixed}; pass x and cond as `draw` returned them")
        return facts.first_half(run.out), run.inputs

    def step(self, x: Tensor, out: Tensor, k: int, memory: dict[str, Any]) -> Tensor:
        """Return x after step k; raise RuntimeError unless `predict` was called with this very x
        and k before, and `memory` holds what the steps before left in it.
        """
        inputs: list[SchedulerInputs] = self._inputs_of.get(x, {}).get(k, [])
        if not inputs:
            raise RuntimeError(f"step {k} of an x that was not predicted; call predict(x, {k}, …)")
        if k > 0 and "samplers" not in memory:
            raise RuntimeError(f"step {k} needs what the steps before it left in `memory`")
        samplers = memory.get("samplers", [each.start for each in inputs])
        parts = zip(x.chunk(len(inputs)), out.chunk(len(inputs)), inputs, samplers, strict=True)
        pairs = [self._step_at_once(*part) for part in parts]
        memory["samplers"] = tuple(sampler for _, sampler in pairs)
        return pairs[0][0] if len(pairs) == 1 else torch.cat([after for after, _ in pairs])

    def _step_at_once(
        self, x: Tensor, out: Tensor, inputs: SchedulerInputs, sampler: SamplerState
    ) -> tuple[Tensor, SamplerState]:
        sample = x if inputs.sample is None else inputs.sample
        out = torch.cat([out, out]) if self.facts.doubled else out
        after, sampler = schedulers.step_again(inputs, sampler, out, sample)
        return self.facts.first_half(after), sampler

    def _run(
        self, samples: Sequence[Sample], facts: Facts, run_model: Method | None,
        stop_at: int | None = None, x: Tensor | None = None,
    ) -> PipelineRun:  # fmt: skip
        """Run the pipeline once for these samples; see `PipelineRun`."""
        pipe, (transformer, scheduler) = self.pipe, self._parts
        same = pipe.transformer is transformer and pipe.scheduler is scheduler
        require(same, "the pipeline has another transformer or scheduler; call from_pipeline again")
        home = next(transformer.parameters()).device
        if home not in self._devices:  # a pipeline looks for it through all its modules
            self._devices[home] = torch.device(pipe._execution_device)
        device, rows = self._devices[home], tuple(row for row, _ in samples)
        kept = self._outputs[len(samples)], self._memory, rows
        run = PipelineRun(pipe, device, facts, *kept, run_model, stop_at, x)
        own = schedulers.global_generators(device) if facts.uses_global_random else []
        seeds = schedulers.states_of(Generator(g.device).manual_seed(samples[0][1]) for g in own)
        with schedulers.random_states(device, seeds) as after:
            run(self.inputs.of(samples))
        if stop_at is None:
            facts.uses_global_random = digest(seeds) != digest(after)
        return run

    def _knows_outputs(self, samples: Sequence[Sample]) -> bool:
        """Tell whether the shapes of all outputs are known for so many samples at once."""
        looping = {key for key in self._outputs[1] if key[0] in self.facts.models_in_loop}
        return bool(looping) and looping <= self._outputs[len(samples)].keys()


def _run_checked(sites: Mapping[str, nn.Module], model: Method, _: int, args: Any, kw: Any) -> Any:
    """Run the transformer; raise NotFollowedError if its sites do not run once."""
    calls = Counter[int]()

    def gate(site: int, compute: Callable[[], Any]) -> Any:
        calls[site] += 1
        return compute()

    with gated(sites, gate):
        output = model(*args, **kw)
    if not calls:
        raise NotFollowedError("its transformer asked no site; have its modules been replaced?")
    [(site, count)] = calls.most_common(1)
    if count > 1:
        twice = f"{list(sites)[site]} is called more than once in one call of the transformer"
        todo = "if it runs in chunks, call set_chunk_feed_forward(None, 0) on the blocks"
        raise NotFollowedError(f"{twice}, and has one feature ({todo})")
    return output


def _run_model(modes: Sequence[Any], first: int, model: Any, call: int, args: Any, kw: Any) -> Any:
    """Run the transformer under the dispatch modes that were on when the prediction was asked for,
    such as a count on fake tensors; `run_again` checkpoints blocks that shall be.
    """
    name, parts = "_gradient_checkpointing_func", model.modules()
    blocks = [part for part in parts if getattr(part, "gradient_checkpointing", False)]
    able = (block for block in blocks if callable(getattr(block, name, None)))
    checkpointed = ((block, name, lambda _, args, kwargs: run_again(*args)) for block in able)
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        if torch.is_grad_enabled():
            stack.enter_context(overridden(checkpointed))
        stack.enter_context(in_call(first + call))
        return model(*args, **kw)
