"""Stock diffusers pipelines of a few thousand weights, made of the very classes that the real ones are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = [
    "a",
    "the",
    "of",
    "in",
    "on",
    "blue",
    "red",
    "green",
    "small",
    "large",
    "boat",
    "house",
    "cat",
    "dog",
    "tree",
    "river",
    "at",
    "night",
    "morning",
    "under",
]


def randomised(module: nn.Module, seed: int = 0, std: float = 0.25) -> nn.Module:
    """Draw every weight anew, so that no gate is zero and every site matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * std
    return module.eval().requires_grad_(False)


def vae(channels: int = 4) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            latent_channels=channels, block_out_channels=(4, 4, 4, 4), norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1,
        ).eval().requires_grad_(False)  # fmt: skip


def dit_transformer(seed: int = 0, sample_size: int = 8) -> Any:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    return randomised(
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
            sample_size=sample_size, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
            activation_fn="gelu-approximate",
        ),
        seed,
    )  # fmt: skip


def pixart_transformer(
    seed: int = 0, *, micro: bool = False, sample_size: int | None = None
) -> Any:
    """A PixArt; micro-conditions go with a latent of 128, as in diffusers' pipeline."""
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    size = sample_size or (128 if micro else 8)
    return randomised(
        PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24, caption_channels=12,
            sample_size=size, patch_size=32 if size == 128 else 2, use_additional_conditions=micro,
        ),
        seed,
    )  # fmt: skip


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=len(WORDS) + 3, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2
        )
        return T5EncoderModel(config).eval()


def tokenizer() -> Any:
    """A T5 tokenizer of our own few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def dit_pipe(seed: int = 0, scheduler: Any = None) -> Any:
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    pipe = DiTPipeline(dit_transformer(seed), vae(), scheduler or DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart_pipe(
    kind: str = "alpha", seed: int = 0, *, micro: bool = False, scheduler: Any = None
) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline

    parts = {"tokenizer": tokenizer(), "text_encoder": t5(), "vae": vae()}
    parts |= {"transformer": pixart_transformer(seed, micro=micro)}
    make = PixArtAlphaPipeline if kind == "alpha" else PixArtSigmaPipeline
    pipe = make(**parts, scheduler=scheduler or DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_pipe() -> Any:
    """Dual-stream blocks whose attention returns a tuple, single-stream blocks, shifted flow-matching timesteps."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae(), None, None, None, None, randomised(transformer))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_pipe() -> Any:
    """Video; the transformer is called twice a step, once for each half of guidance."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=12, freq_dim=8, ffn_dim=16, num_layers=2,
    )  # fmt: skip
    autoencoder = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(None, None, autoencoder, scheduler, randomised(transformer))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_embedded(pipe: Any, steps: int = 4) -> torch.Tensor:
    """Return the latents that Flux or Wan makes of drawn prompt embeddings, guided by drawn negative ones."""
    generator = torch.Generator().manual_seed(1)
    text, negative = torch.randn(2, 1, 5, 12, generator=generator)
    options = {"prompt_embeds": text, "negative_prompt_embeds": negative, "generator": generator}
    options |= {"num_inference_steps": steps, "output_type": "latent"}
    if type(pipe).__name__ == "WanPipeline":
        return pipe(height=16, width=16, num_frames=5, **options).frames
    pooled, negative = torch.randn(2, 1, 8, generator=generator)
    options |= {
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative,
        "true_cfg_scale": 3.0,
    }
    return pipe(height=64, width=64, **options).images


def run(pipe: Any, steps: int = 4, *, seed: int = 1, batch: int = 1, **more: Any) -> torch.Tensor:
    """Return what the pipeline makes: DiT's images, PixArt's latents."""
    generator = torch.Generator().manual_seed(seed)
    if type(pipe).__name__ == "DiTPipeline":
        out = pipe(
            [1, 2, 3][:batch],
            generator=generator,
            num_inference_steps=steps,
            output_type="pt",
            **more,
        )
        return out.images
    prompt = ["a blue boat at night", "the cat in the house", "a river"][:batch]
    options = {
        "output_type": "latent",
        "use_resolution_binning": False,
        "clean_caption": False,
        **more,
    }
    return pipe(prompt, generator=generator, num_inference_steps=steps, **options).images


def save(pipe: Any, folder: Path) -> Path:
    """Save as a user's download would lie there."""
    pipe.save_pretrained(folder)
    return folder


def count_calls(modules, run):
    """Return how often each of the modules really ran: calls of the forward of their class."""
    ran = dict.fromkeys(map(id, modules), 0)
    originals = {}
    for kind in {type(module) for module in modules}:
        originals[kind] = kind.forward

        def forward(self, *args, _original=kind.forward, **kwargs):
            if id(self) in ran:
                ran[id(self)] += 1
            return _original(self, *args, **kwargs)

        kind.forward = forward
    try:
        run()
    finally:
        for kind, original in originals.items():
            kind.forward = original
    return [ran[id(module)] for module in modules]
