"""from_pipeline: any pipeline as a `Denoiser`, after a check that its walk is the pipeline's own.

The check compares a walk with a whole run of the pipeline. The models run for the shapes of their
outputs only, once for one sample and once for two; after that, made-up outputs depend on all inputs
and cost nothing. So a difference in anything that reaches a model or the scheduler is seen at the
next step, and named with its number. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from harmonica.models.pipelines.denoiser import PipelineDenoiser
from harmonica.models.pipelines.facts import NotFollowedError, digest
from harmonica.models.pipelines.inputs import Sample, inputs_of
from harmonica.models.sites import sites
from harmonica.storage.files import StrPath

SEEDS = 20_000_003, 20_000_005
OTHERWISE = "harmonica.tune can still choose whole steps from runs of the pipeline, and "
OTHERWISE += "cached(pipe, schedule) runs any table"


def from_pipeline(
    pipe: Any, *, steps: int | None = None, prompts: StrPath | Sequence[str] | None = None,
    each: Mapping[str, Any] | None = None, guidance: float | None = None, **call: Any,
) -> PipelineDenoiser:  # fmt: skip
    """Return a denoiser whose walk is the pipeline's own, bit for bit.

        denoiser = from_pipeline(pipe, steps=28, prompts="prompts.txt", guidance=3.5, height=1024)
        router = train_sdt(denoiser)
        with cached(pipe, router.schedule()):
            image = pipe("…", num_inference_steps=28, guidance_scale=3.5, height=1024).images[0]

    Any pipeline will do that runs one transformer step by step. The transformer is frozen, and runs
    here for one sample and for two; nothing else of the pipeline is touched.

    Args:
        pipe: as it will be used: adapters loaded, offloading switched on, scheduler set.
        steps: another name for `num_inference_steps`; T is read off the walk.
        prompts: a file with one prompt a line, or the prompts; None for a bundled list, if the
            pipeline takes prompts.
        each: arguments that every sample has its own of, by name, instead of prompts or beside
            them: tensors (rows, …) or lists of one length, such as `prompt_embeds`, `image`.
        guidance: another name for `guidance_scale`.
        **call: other arguments of the pipeline, the same for all samples.

    Raises TypeError if it has no transformer or two, or does not take an argument; ValueError if
    its walk cannot be followed, with the reason: `tune` then chooses whole steps.
    """
    inputs = inputs_of(pipe, prompts, each, call | {"steps": steps, "guidance": guidance})
    pipe.transformer.eval().requires_grad_(False)
    denoiser, name = PipelineDenoiser(pipe, inputs, sites(pipe.transformer)), type(pipe).__name__
    one, two = (0, SEEDS[0]), (min(1, inputs.rows - 1), SEEDS[1])
    try:
        if "step" in vars(pipe.scheduler):
            raise NotFollowedError(
                "somebody has wrapped the step of its scheduler, which is copied"
            )
        denoiser.follow(one)
        if len(denoiser.facts.models_in_loop) > 1:  # known only now: others ran as if before it
            denoiser.follow(one)
        _verify(denoiser, [one])
    except NotFollowedError as why:
        text = f"{name} cannot be followed step by step: {why}. {OTHERWISE}"
        raise NotFollowedError(text) from None
    # With one generator for a whole batch, a sample would depend on its neighbours.
    if not denoiser.facts.uses_global_random:
        with suppress(Exception):  # whatever a pipeline raises that does not take two at once
            _verify(denoiser, [one, two])
            denoiser.batched = True
    return denoiser


@torch.no_grad()
def _verify(denoiser: PipelineDenoiser, samples: Sequence[Sample]) -> None:
    """Raise NotFollowedError unless a walk of these samples, all in one run, is the pipeline's:
    whatever the denoiser gives or hands on is what a whole run showed, to the bit.
    """
    whole, facts, sampler = denoiser.whole_run(samples), denoiser.facts, None
    x, alone = whole.facts.x, denoiser.noise(torch.tensor(samples))
    if (alone - x).norm() > 1e-3 * alone.norm():
        raise NotFollowedError("a sample starts from another noise beside others")
    if facts.x_source is not None:  # see whether another x than the pipeline's own can be put in
        sample = denoiser.predict_at_once(samples, 0.5 * x, 0)[1].sample
        if sample is not None and not torch.equal(facts.first_half(sample), 0.5 * x):
            facts.x_source = None
    for k, (digests, after) in enumerate(whole.trace):
        at = f"at step {k} of {len(whole.trace)}"
        out, inputs = denoiser.predict_at_once(samples, x, k)
        sample = x if inputs.sample is None else facts.first_half(inputs.sample)
        for name, value in {**inputs.arguments, "model_output": out, "sample": sample}.items():
            if name not in inputs.carried and digests.get(name) != digest(value):
                raise NotFollowedError(
                    f"{at} the scheduler's {name} is not that of the pipeline's own run; "
                    "something that is neither x nor the scheduler's is carried from step to step "
                    "(guidance with a memory, a second latent, noise drawn in the loop)"
                )
        x, sampler = denoiser.step_at_once(x, out, inputs, sampler or inputs.start)
        if digest(x) != after:
            elsewhere = "a copy of the scheduler steps elsewhere than the pipeline's own"
            raise NotFollowedError(f"{at} {elsewhere}")
