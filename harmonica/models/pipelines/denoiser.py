"""from_pipeline: a pipeline as a `Denoiser`, to learn a schedule on the walk that it runs.

This file knows what a pipeline can be called with. How its `__call__` becomes a walk is in
`harmonica.models.pipelines.general`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from harmonica.models.pipelines.general import PipelineDenoiser
from harmonica.models.pipelines.inputs import inputs_of
from harmonica.models.pipelines.probe import probed
from harmonica.models.sites import sites
from harmonica.storage.files import StrPath


def from_pipeline(
    pipe: Any,
    *,
    steps: int | None = None,
    prompts: StrPath | Sequence[str] | None = None,
    each: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    **call: Any,
) -> PipelineDenoiser:
    """Return a denoiser whose walk is the pipeline's own, bit for bit.

        denoiser = from_pipeline(pipe, steps=28, prompts="prompts.txt", guidance=3.5, height=1024)
        router = train_sdt(denoiser)
        with cached(pipe, router.schedule()):
            image = pipe("…", num_inference_steps=28, guidance_scale=3.5, height=1024).images[0]

    Any pipeline will do that runs one transformer step by step. The transformer is frozen, and runs
    once here, to learn its shapes; nothing else of the pipeline is touched.

    Args:
        pipe: as it will be used: adapters loaded, offloading switched on, scheduler set.
        steps: `num_inference_steps`, the pipeline's own if None. T, the number of predictions, is
            read off the walk.
        prompts: a file with one prompt a line, or the prompts; None for a bundled list, if the
            pipeline takes prompts.
        each: arguments that every sample has its own of, by name, instead of prompts or beside
            them: tensors (rows, …) or lists of one length, such as `prompt_embeds`, `image`,
            `class_labels`.
        guidance: another name for `guidance_scale`.
        **call: other arguments of the pipeline, the same for all samples.

    Raises:
        TypeError: if it has no transformer or two, or does not take an argument.
        ValueError: if its walk cannot be followed, with the reason; `tune` then chooses whole
            steps.
    """
    if guidance is not None:
        call["guidance_scale"] = guidance
    inputs, transformer = inputs_of(pipe, steps, prompts, each, call), pipe.transformer
    transformer.eval().requires_grad_(False)
    parameters = inspect.signature(type(pipe).__call__).parameters
    scale = call.get("guidance_scale", getattr(parameters.get("guidance_scale"), "default", None))
    size = [str(call[side]) for side in ("height", "width") if side in call]
    about = {
        "model": "-".join([type(pipe).__name__, *(["x".join(size)] if size else [])]),
        "sampler": type(pipe.scheduler).__name__,
        "timesteps": (),
        "guidance": float(scale) if isinstance(scale, int | float) else None,
    }
    return probed(pipe, inputs, sites(transformer), about)
