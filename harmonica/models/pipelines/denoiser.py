"""from_pipeline: a pipeline as a `Denoiser`, to learn a schedule on the walk that it runs.

One run of the pipeline is watched, and the denoiser made from it (`general.py`) must walk as the
pipeline does. The transformer runs once, for the shapes of its outputs. After that every model of
the loop answers numbers that depend on all its inputs and cost nothing, so a difference in anything
that reaches a model or the scheduler is seen at the next step, and named with its number.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from harmonica.cache import gated
from harmonica.models.pipelines.general import PipelineDenoiser
from harmonica.models.pipelines.inputs import inputs_of
from harmonica.models.pipelines.recorded import NotFollowedError, Recorded, digest
from harmonica.models.pipelines.standin import StandIns
from harmonica.models.sites import sites
from harmonica.storage.files import StrPath

SEEDS = 20_000_003, 20_000_005


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
    once here, to learn its shapes; nothing else of the pipeline is touched.

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
    call |= {"steps": steps, "guidance": guidance}
    inputs, transformer = inputs_of(pipe, prompts, each, call), pipe.transformer
    transformer.eval().requires_grad_(False)
    denoiser = PipelineDenoiser(
        StandIns(pipe), inputs, sites(transformer), _about(pipe, inputs.call)
    )
    try:
        _verify_one(denoiser)
    except NotFollowedError as mismatch:
        can = "harmonica.tune can still choose whole steps from runs of the pipeline, and "
        can += "cached(pipe, schedule) runs any table"
        name = type(pipe).__name__
        raise NotFollowedError(
            f"{name} cannot be followed step by step: {mismatch}. {can}"
        ) from None
    # With one generator for a whole batch, a sample would depend on its neighbours.
    if not denoiser.recorded[1].random:
        with suppress(Exception):  # whatever a pipeline raises that does not take two at once
            denoiser.batched = _takes_two(denoiser)
    return denoiser


def _about(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table of this pipeline belongs to, in the words of `Schedule`'s fields."""
    size = "x".join(str(call[side]) for side in ("height", "width") if side in call)
    default = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    scale = call.get("guidance_scale", getattr(default, "default", None))
    return {
        "model": "-".join([type(pipe).__name__, *([size] if size else [])]),
        "sampler": type(pipe.scheduler).__name__,
        "guidance": float(scale) if isinstance(scale, int | float) else None,
    }


def _verify_one(denoiser: PipelineDenoiser) -> None:
    """Raise NotFollowedError unless the walk of one sample is the pipeline's."""
    recorded, cond = denoiser.recorded[1], torch.tensor([[0, SEEDS[0]]])
    if "step" in vars(denoiser.stand_ins.pipe.scheduler):
        raise NotFollowedError("somebody has wrapped the step of its scheduler, which is copied")
    denoiser.watch(cond, recorded, _ran_once(denoiser.sites))
    if len(recorded.looping) > 1:  # known only now, so that the first step ran them
        recorded = recorded.again(1)
        denoiser.watch(cond, recorded)
    _verify(denoiser, recorded, cond)


def _takes_two(denoiser: PipelineDenoiser) -> bool:
    """Tell whether two samples in a run start from the noise that each starts from alone, and their
    walk is the pipeline's (or raise NotFollowedError).
    """
    two = denoiser.recorded[1].again(2)
    cond = torch.tensor([[0, SEEDS[0]], [min(1, denoiser.inputs.rows - 1), SEEDS[1]]])
    denoiser.watch(cond, two)
    ones = denoiser.noise(cond)
    if (ones - two.first).norm() > 1e-3 * ones.norm():
        return False
    denoiser.batched = True
    try:
        _verify(denoiser, two, cond)
    finally:
        denoiser.batched = False
    return True


def _ran_once(sites: Mapping[str, nn.Module]) -> Callable[..., Any]:
    """Return what runs the transformer for real: (module, args, kwargs) -> its output's shapes."""

    def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
        calls = Counter[int]()

        def gate(site: int, compute: Callable[[], Any]) -> Any:
            calls[site] += 1
            return compute()

        with gated(sites, gate):
            output = module(*args, **kwargs)
        if not calls:
            none = "its transformer ran and asked no site"
            raise NotFollowedError(f"{none}; something else has replaced its modules")
        [(site, count)] = calls.most_common(1)
        if count > 1:
            raise NotFollowedError(
                f"{list(sites)[site]} is called more than once in one call of the transformer, and "
                "has one feature (if its feed-forward runs in chunks, call "
                "set_chunk_feed_forward(None, 0) on the blocks)"
            )
        return tree_map_only(Tensor, lambda x: x.new_empty(()).expand(x.shape), output)

    return run


@torch.no_grad()
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
        for argument, value in {**arrival.arguments, "model_output": out, "sample": sample}.items():
            if argument not in arrival.carried and given.get(argument) != digest(value):
                raise NotFollowedError(
                    f"at {at} the scheduler's {argument} is not that of the pipeline's own run; "
                    "something that is neither x nor the scheduler's is carried from step to step "
                    "(guidance with a memory, a second latent, noise drawn in the loop)"
                )
        x = denoiser.step(x, out, k, memory)
        if digest(x) != after:
            elsewhere = "a copy of the scheduler steps elsewhere than the pipeline's own"
            raise NotFollowedError(f"at {at} {elsewhere}")
