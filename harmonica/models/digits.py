"""Digits: a stock diffusers DiTPipeline that draws the bundled model's digits, to learn on and to
test with.

`pipeline()` is made of diffusers' own classes, so everything that works on it works on DiT-XL/2.
Only the weights are the bundled ones, and the autoencoder is none, since the bundled model draws
pixels.
"""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from harmonica.models import DITS
from harmonica.models.dit import DiTDenoiser
from harmonica.models.weights import dit_to_diffusers

CLASSES = 1000
"""DiTPipeline takes class 1000 for the null class; here class i < 1000 is the digit i mod 10."""


class Pixels:
    """An autoencoder that changes nothing: the latent is the picture."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: Tensor) -> SimpleNamespace:  # diffusers looks for `sample`
        return SimpleNamespace(sample=latents)


def pipeline(denoiser: DiTDenoiser) -> Any:
    """Return a DiTPipeline around the weights of `load("tiny")`, with DPM-Solver++.

    Its timestep embedding and norms are set to those of the original DiT, for which the weights
    were trained; diffusers shifts the frequencies by one, and its norms have another epsilon.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    tiny, heads = DITS["tiny"], DITS["tiny"]["num_heads"]
    transformer = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=tiny["hidden_size"] // heads, in_channels=1,
        out_channels=1, num_layers=tiny["depth"], sample_size=tiny["input_size"],
        patch_size=tiny["patch_size"], num_embeds_ada_norm=CLASSES, norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
    )  # fmt: skip
    state = dict(denoiser.model.state_dict())
    name, rows = "y_embedder.embedding_table.weight", [*(i % 10 for i in range(CLASSES)), 10]
    state[name] = state[name][rows]  # (11, D) -> (1001, D)
    transformer.load_state_dict(dit_to_diffusers(state))
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = 0, 1e-6
    transformer.eval().requires_grad_(False)
    pipe: Any = DiTPipeline(transformer, Pixels(), DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
