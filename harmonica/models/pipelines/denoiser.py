"""Stock: a diffusers pipeline as a `Denoiser`, so that a schedule is trained on the very walk that
it will run.

`from_pipeline(pipe)` takes the pipeline's transformer, scheduler and guidance; its walk is the
pipeline's, bit for bit. This file does not know caches, routers or losses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from harmonica.denoise import Denoiser
from harmonica.models.dit import DiTDenoiser
from harmonica.models.pipelines.tracker import open_sessions
from harmonica.models.pixart import PixArtDenoiser, encoded_by
from harmonica.models.prompts import prompts_from
from harmonica.models.sites import sites
from harmonica.samplers import Scheduled
from harmonica.storage.files import StrPath

PIPELINES = ("DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline")
"""What `from_pipeline` knows; a pipeline derived from one of these may walk differently."""


@contextmanager
def original_numerics(transformer: nn.Module) -> Iterator[None]:
    """Make diffusers' DiT compute what the original DiT computes, for as long as the `with` is
    open.

    diffusers shifts the timestep embedding's frequencies by one and has an epsilon of 1e-5 in the
    norm before the feed-forward; the weights were trained with no shift and 1e-6.

    Raises ValueError for any other model.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    if not isinstance(transformer, DiTTransformer2DModel):
        raise ValueError(
            f"parity is for diffusers' DiT; {type(transformer).__name__} needs none that we know of"
        )
    blocks: Any = transformer.transformer_blocks
    before = [(block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps) for block in blocks]
    try:
        for block in blocks:
            block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = 0, 1e-6
        yield
    finally:
        for block, (shift, eps) in zip(blocks, before, strict=True):
            block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = shift, eps


class StockDiT(nn.Module):
    """diffusers' DiT with the face of ours: (x, t, y) -> (B, C or 2C, H, W)."""

    def __init__(self, transformer: Any, *, parity: bool) -> None:
        super().__init__()
        self.transformer, self.parity = transformer, parity
        self.in_channels, self.input_size = (
            transformer.config.in_channels,
            transformer.config.sample_size,
        )
        self.num_classes = transformer.config.num_embeds_ada_norm

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (and variance) in x (B, C, H, W) at timesteps t (B,) for labels y
        (B,).
        """
        with ExitStack() as stack:
            if self.parity:
                stack.enter_context(original_numerics(self.transformer))
            return self.transformer(x, timestep=t, class_labels=y, return_dict=False)[0]  # type: ignore[no-any-return]


def from_pipeline(
    pipe: Any,
    *,
    steps: int = 20,
    guidance: float | None = None,
    prompts: StrPath | Sequence[str] | None = None,
    parity: bool = False,
) -> Denoiser:
    """Return a denoiser that walks as this pipeline does: its transformer, its scheduler, its
    guidance.

    Train on it, then run the pipeline under the schedule:

        router = train_sdt(from_pipeline(pipe, steps=20, guidance=4.5))
        with cached(pipe, router.schedule()):
            images = pipe(prompt, num_inference_steps=20, guidance_scale=4.5).images

    The transformer is shared and frozen; nothing else of the pipeline is touched.

    Args:
        pipe: DiTPipeline, PixArtAlphaPipeline or PixArtSigmaPipeline.
        steps: T, `num_inference_steps`.
        guidance: `guidance_scale`; None for the pipeline's default, 4.0 for DiT and 4.5 for PixArt.
        prompts: for PixArt, what to train on, encoded here by the pipeline's text encoder: a file
            with one prompt a line, or the prompts; None for a bundled list.
        parity: for DiT, train with the original's numerics; run with cached(…, parity=True) then.

    Raises:
        TypeError: if it is another pipeline; write a `Denoiser` for it, and `check_denoiser` says
            whether it is one.
        ValueError: if a number is out of range.
    """
    name = type(pipe).__name__
    if name not in PIPELINES:
        raise TypeError(
            f"from_pipeline knows {', '.join(PIPELINES)}, not {name}. Write a harmonica.Denoiser for it "
            "(harmonica/models/pixart.py is an example) and hold it to check_denoiser"
        )
    for session in open_sessions.get(pipe.transformer, []):
        session.forget()  # of a walk that was interrupted
    sampler = Scheduled(_fresh(pipe.scheduler, steps), type(pipe.scheduler).__name__)
    named = f"{name}-{8 * pipe.transformer.config.sample_size}"  # one class has several sizes
    if name == "DiTPipeline":
        model: Any = StockDiT(pipe.transformer, parity=parity)
        scale = 4.0 if guidance is None else guidance
        return DiTDenoiser(
            model, sampler, guidance=scale, name=named, sites=sites(pipe.transformer)
        )
    if parity:
        raise ValueError("parity is for diffusers' DiT; PixArt needs none")
    tokens = 300 if "Sigma" in name else 120
    encoded = encoded_by(pipe, prompts_from(prompts), tokens)
    return PixArtDenoiser(
        pipe.transformer,
        sampler,
        encoded,
        guidance=4.5 if guidance is None else guidance,
        name=named,
    )


def _fresh(scheduler: Any, steps: int) -> Any:
    """Return a scheduler of the same settings with its timesteps set; the pipeline's own is not
    touched.
    """
    longest = getattr(scheduler.config, "num_train_timesteps", 1000)
    if not 1 <= steps <= longest:
        raise ValueError(f"steps is {steps}; it must be between 1 and {longest}")
    mine = copy.copy(scheduler)
    for name in ("set_timesteps", "step"):
        vars(mine).pop(name, None)  # taps of an open `cached` are the pipeline's, not ours
    mine.set_timesteps(steps)
    if float(getattr(mine, "init_noise_sigma", 0.0)) != 1.0:
        raise ValueError(
            f"{type(scheduler).__name__} scales its inputs or mixes noise in another way, which from_pipeline does not "
            "follow; use a scheduler of unit noise, such as DDIM or DPM-Solver++, or give cached(pipe, …) a schedule "
            "that you have"
        )
    return mine
