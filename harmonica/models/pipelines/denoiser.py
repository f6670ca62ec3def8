"""PipelineDenoiser: a pipeline as a `Denoiser`, whose walk is made of the pipeline's own runs.

    predict(x, k, cond)   runs the pipeline up to step k with x put in, and stops with the output
                          that the model gives to the scheduler there
    step(x, out, k, …)    steps a copy of the scheduler with the other inputs that predict saw there
    cond                  (B, 2) int64: the row of the prompt, the seed of that sample's generator

This file does not verify that a pipeline can be walked like this, nor what happens in a run.
"""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import Context
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from harmonica.cache import gated
from harmonica.calls import in_call
from harmonica.models.pipelines import facts as known
from harmonica.models.pipelines.facts import Facts, NotFollowedError, SamplerState, SchedulerInputs
from harmonica.models.pipelines.inputs import Inputs, Sample
from harmonica.models.pipelines.pipeline_run import Memory, PipelineRun
from harmonica.override import Method, overridden
from harmonica.run_again import run_again
from harmonica.table import require


class PipelineDenoiser:
    """What `from_pipeline` returns: a `Denoiser`.

    Attributes:
        steps, sites, about: see `Denoiser`.
        inputs, facts: what the pipeline is called with, and what is known of its runs.
        batched: whether the pipeline takes several samples at once; otherwise they run one by one,
            and a site has a feature for each.
        predictions: number of steps -> images predicted so far, by this and all its `with_steps`.
    """

    def __init__(self, pipe: Any, inputs: Inputs, sites: Mapping[str, nn.Module]) -> None:
        self.pipe, self.inputs, self.sites, self.facts = pipe, inputs, sites, Facts()
        self.steps, self.batched, self.about = 0, False, _about(pipe, inputs.call)
        self.predictions, self._devices = Counter[int](), dict[torch.device, torch.device]()
        self._outputs: dict[int, known.Outputs] = defaultdict(dict)  # of so many samples at once
        self._memory: Callable[..., Memory] = lru_cache(64)(lambda *_: {})  # of rows or samples
        self._inputs_of: Any = WeakIdKeyDictionary()  # x -> step -> scheduler inputs of each run

    @property
    def draws_noise(self) -> bool:
        """Whether a step of the scheduler draws noise."""
        return self.facts.draws_noise

    def with_steps(self, steps: int) -> PipelineDenoiser:
        """Return the same pipeline with about so many steps; it is not verified again."""
        number = round(self.inputs.call["num_inference_steps"] * steps / self.steps)
        inputs = replace(self.inputs, call={**self.inputs.call, "num_inference_steps": number})
        other = PipelineDenoiser(self.pipe, inputs, self.sites)
        other.facts, other._outputs, other.batched = self.facts, self._outputs, self.batched
        other.predictions = self.predictions
        other.follow((0, 0))
        return other

    def follow(self, sample: Sample) -> None:
        """Learn the facts from a whole run of one sample."""
        self.facts = self.whole_run([sample]).facts
        self.steps, times = len(self.facts.states), self.facts.timesteps
        self.about["timesteps"] = times[: self.steps] if len(times) >= self.steps else ()

    @torch.no_grad()
    def whole_run(self, samples: Sequence[Sample]) -> PipelineRun:
        """Run all steps on made-up outputs; models run once where their outputs' shapes are not
        known for so many samples.
        """
        facts = Facts(self.facts.models_in_loop, self.facts.uses_global_random)
        images = 0 if self._knows_outputs(samples) else len(samples)
        run = self._run(samples, facts, partial(_run_and_check, self.sites))
        if not run.trace:
            raise NotFollowedError("it never steps its scheduler, or steps a copy of it")
        self.predictions[len(run.trace)] += images
        return run

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
            runs = [self._run([sample], self.facts, None, 0) for sample in _samples(cond)]
            firsts = [run.inputs.sample for run in runs if run.inputs is not None]
            return torch.cat([self.facts.first_half(x) for x in firsts if x is not None])

    def predict(self, x: Tensor, k: int, cond: Tensor) -> Tensor:
        """Return the output that the pipeline hands to its scheduler at step k, for x (B, …); raise
        ValueError if x or cond do not fit, or k is no step.
        """
        self._check(x, k, cond)
        samples, pairs = _samples(cond), list[tuple[Tensor, SchedulerInputs]]()
        groups = [samples] if self.batched else [[sample] for sample in samples]
        with without_modes() as modes:
            if k > 0 and not self._knows_outputs(groups[0]):
                Context().run(self.whole_run, groups[0])  # where no gate is open
            for i, (group, part) in enumerate(zip(groups, x.chunk(len(groups)), strict=True)):
                run_model = partial(_run_model, modes, i * len(self.facts.shapes))
                pairs.append(self.predict_at_once(group, part, k, run_model))
        self.predictions[self.steps] += 0 if modes else len(samples)
        self._inputs_of.setdefault(x, {})[k] = [inputs for _, inputs in pairs]
        return pairs[0][0] if len(pairs) == 1 else torch.cat([out for out, _ in pairs])

    def _check(self, x: Tensor, k: int, cond: Tensor) -> None:
        (n, *shape), rows, T = self.facts.x.shape, self.inputs.rows, self.steps
        require(0 <= k < T, f"step {k} of a walk of {T} steps, 0 to {T - 1}")
        fits = cond.dim() == 2 and cond.shape[1] == 2 and not cond.is_floating_point() and len(cond)
        fits = fits and x.shape == (len(cond) * n, *shape)
        sizes = ", ".join(["B" if n == 1 else f"{n}·B", *map(str, shape)])
        pair = f"x {tuple(x.shape)} and cond {tuple(cond.shape)} {cond.dtype}"
        todo = f"expected ({sizes}) and (B, 2) whole numbers, as `draw` returns"
        require(bool(fits), f"found {pair}; {todo}")
        chosen = [row for row, _ in _samples(cond)]
        exist = all(0 <= row < rows for row in chosen)
        require(exist, f"cond names rows {chosen}; there are {rows} prompts")

    def predict_at_once(
        self, samples: Sequence[Sample], x: Tensor, k: int, run_model: Method | None = None
    ) -> tuple[Tensor, SchedulerInputs]:
        """Predict in one run; return the output, made up without `run_model`, and what else the
        scheduler was given.
        """
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
            todo = f"call predict(x, {k}, …) before step"
            raise RuntimeError(f"step {k} of an x that was not predicted; {todo}")
        if k > 0 and "samplers" not in memory:
            left = "what the steps before it left in `memory`"
            raise RuntimeError(f"step {k} needs {left}; pass a copy")
        samplers = memory.get("samplers", [each.start for each in inputs])
        parts = zip(x.chunk(len(inputs)), out.chunk(len(inputs)), inputs, samplers, strict=True)
        pairs = [self.step_at_once(*part) for part in parts]
        memory["samplers"] = tuple(sampler for _, sampler in pairs)
        return pairs[0][0] if len(pairs) == 1 else torch.cat([after for after, _ in pairs])

    def step_at_once(
        self, x: Tensor, out: Tensor, inputs: SchedulerInputs, sampler: SamplerState
    ) -> tuple[Tensor, SamplerState]:
        """Take the step of one run with a copy of the sampler; return x and the sampler then."""
        states, generators = iter(sampler.generators), list[Generator]()
        scheduler = known.copied_scheduler(sampler.scheduler)
        sample = x if inputs.sample is None else inputs.sample
        out = torch.cat([out, out]) if self.facts.doubled else out
        given = {"model_output": out, "sample": sample}
        given |= {name: sampler.carried[i] for name, i in inputs.carried.items()}

        def again(generator: Generator) -> Generator:
            generators.append(Generator(generator.device).set_state(next(states)))
            return generators[-1]

        arguments = tree_map_only(Generator, again, {**inputs.arguments, **given})
        arguments |= arguments.pop("kwargs", {})
        with known.random_states(self._device(), sampler.random) as random:
            result = scheduler.step(**arguments)
        after, *carried = tree_leaves(result)
        states_after = known.states_of(generators)
        return self.facts.first_half(after), SamplerState(scheduler, carried, states_after, random)

    def _run(
        self, samples: Sequence[Sample], facts: Facts, run_model: Method | None,
        stop_at: int | None = None, x: Tensor | None = None,
    ) -> PipelineRun:  # fmt: skip
        """Run the pipeline once for these samples; see `PipelineRun`."""
        memories = self._memory(tuple(row for row, _ in samples)), self._memory(tuple(samples))
        outputs = self._outputs[len(samples)]
        device = self._device()
        run = PipelineRun(self.pipe, device, facts, outputs, *memories, run_model, stop_at, x)
        own = known.global_generators(device) if facts.uses_global_random else []
        seeds = known.states_of(Generator(g.device).manual_seed(samples[0][1]) for g in own)
        with known.random_states(device, seeds) as after:
            run(self.inputs.of(samples))
        if stop_at is None:
            facts.uses_global_random = known.digest(seeds) != known.digest(after)
        return run

    def _device(self) -> torch.device:
        """Return where the pipeline runs; it looks through all its modules, so this remembers."""
        home = next(self.pipe.transformer.parameters()).device
        if home not in self._devices:
            self._devices[home] = torch.device(self.pipe._execution_device)
        return self._devices[home]

    def _knows_outputs(self, samples: Sequence[Sample]) -> bool:
        """Tell whether the shapes of all outputs are known for so many samples at once."""
        looping = {key for key in self._outputs[1] if key[0] in self.facts.models_in_loop}
        return bool(looping) and looping <= self._outputs[len(samples)].keys()


def _samples(cond: Tensor) -> list[Sample]:
    return [(int(row), int(seed)) for row, seed in cond.tolist()]


def _about(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table of this pipeline belongs to, in the words of `Schedule`'s fields."""
    size = "x".join(str(call[side]) for side in ("height", "width") if side in call)
    default = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    scale = call.get("guidance_scale", getattr(default, "default", None))
    guidance = float(scale) if isinstance(scale, int | float) else None
    model = f"{type(pipe).__name__}-{size}".rstrip("-")
    return {"model": model, "sampler": type(pipe.scheduler).__name__, "guidance": guidance}


def _run_and_check(
    sites: Mapping[str, nn.Module], name: str, model: Method, _: int, args: Any, kwargs: Any
) -> Any:
    """Run a model; raise NotFollowedError if it is the transformer and sites do not run once."""
    if name != "transformer":
        return model(*args, **kwargs)
    calls = Counter[int]()

    def gate(site: int, compute: Callable[[], Any]) -> Any:
        calls[site] += 1
        return compute()

    with gated(sites, gate):
        output = model(*args, **kwargs)
    if not calls:
        none = "its transformer ran and asked no site"
        raise NotFollowedError(f"{none}; something else has replaced its modules")
    [(site, count)] = calls.most_common(1)
    if count > 1:
        twice = f"{list(sites)[site]} is called more than once in one call of the transformer"
        todo = "if it runs in chunks, call set_chunk_feed_forward(None, 0) on the blocks"
        raise NotFollowedError(f"{twice}, and has one feature ({todo})")
    return output


def _run_model(
    modes: Sequence[Any], first_call: int, name: str, model: Any, call: int, args: Any, kwargs: Any
) -> Any:
    """Run a model; the transformer runs under the dispatch modes that were on when the prediction
    was asked for, such as a count on fake tensors; `run_again` checkpoints blocks that shall be.
    """
    if name != "transformer":
        return model(*args, **kwargs)
    name, parts = "_gradient_checkpointing_func", model.modules()
    blocks = [part for part in parts if getattr(part, "gradient_checkpointing", False)]
    able = (block for block in blocks if callable(getattr(block, name, None)))
    checkpointed = ((block, name, lambda _, args, kwargs: run_again(*args)) for block in able)
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        if torch.is_grad_enabled():
            stack.enter_context(overridden(checkpointed))
        stack.enter_context(in_call(first_call + call))
        return model(*args, **kwargs)
