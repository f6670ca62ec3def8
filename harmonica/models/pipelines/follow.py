"""from_pipeline: any pipeline as a `Denoiser`, once it is sure that its walk is the pipeline's."""

from collections.abc import Mapping, Sequence
from typing import Any

from harmonica.models.pipelines.checks import transformers_of
from harmonica.models.pipelines.denoiser import PipelineDenoiser
from harmonica.models.pipelines.facts import NotFollowedError
from harmonica.models.pipelines.inputs import inputs_of
from harmonica.models.sites import sites
from harmonica.values import StrPath


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
    here once; nothing else of the pipeline is touched.

    Args:
        pipe: as it will be used: adapters loaded, offloading switched on, scheduler set.
        steps: another name for `num_inference_steps`; T is read off the walk.
        prompts: a file with one prompt a line, or the prompts; None for a bundled list, if the
            pipeline takes prompts. The first 64 are encoded here, so encoders may be let go; of
            encodings, the latest GiB is remembered.
        each: arguments that every sample has its own of, by name, instead of prompts or beside
            them: tensors (rows, …) or lists of one length, such as `prompt_embeds`, `image`.
        guidance: another name for `guidance_scale`.
        **call: other arguments of the pipeline, the same for all samples.

    Raises TypeError if it has no transformer, or does not take an argument; ValueError if its walk
    cannot be followed, with the reason: `tune` then chooses whole steps.
    """
    inputs = inputs_of(pipe, prompts, each, call | {"steps": steps, "guidance": guidance})
    pipe.transformer.eval().requires_grad_(False)
    try:
        if len(transformers_of(pipe)) > 1:
            raise NotFollowedError("it runs two transformers in one walk")
        if "step" in vars(pipe.scheduler):
            raise NotFollowedError("somebody wrapped the step of its scheduler, which is copied")
        return PipelineDenoiser(pipe, inputs, sites(pipe.transformer))
    except NotFollowedError as why:
        what = f"{type(pipe).__name__} cannot be followed step by step: {why}. harmonica.tune can"
        todo = "still choose whole steps from runs of it, and cached(pipe, schedule) runs any table"
        raise NotFollowedError(f"{what} {todo}") from None
