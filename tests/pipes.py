"""Stock diffusers pipelines of a few thousand weights, made of the very classes that the real ones are made of."""

from pathlib import Path
from typing import Any

import torch
from conftest import seeded
from torch import nn

from harmonica import Schedule
from harmonica.models.pipelines.tune import steps_of_run
from harmonica.models.sites import sites

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
]
WORDS += ["morning", "under"]


def randomised(module: nn.Module, seed: int = 0, std: float = 0.25) -> nn.Module:
    """Draw every weight anew, so that no gate is zero and every site matters."""
    generator = seeded(seed)
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
    generator = seeded(1)
    text, negative = torch.randn(2, 1, 5, 12, generator=generator)
    options = {"prompt_embeds": text, "negative_prompt_embeds": negative, "generator": generator}
    options |= {"num_inference_steps": steps, "output_type": "latent"}
    if type(pipe).__name__ == "WanPipeline":
        return pipe(height=16, width=16, num_frames=5, **options).frames
    pooled, negative = torch.randn(2, 1, 8, generator=generator)
    options |= {"pooled_prompt_embeds": pooled, "true_cfg_scale": 3.0}
    options["negative_pooled_prompt_embeds"] = negative
    return pipe(height=64, width=64, **options).images


def run(pipe: Any, steps: int = 4, *, seed: int = 1, batch: int = 1, **more: Any) -> torch.Tensor:
    """Return what the pipeline makes: DiT's images, PixArt's latents."""
    generator = seeded(seed)
    if type(pipe).__name__ == "DiTPipeline":
        how = {"num_inference_steps": steps, "output_type": "pt", **more}
        return pipe([1, 2, 3][:batch], generator=generator, **how).images
    prompt = ["a blue boat at night", "the cat in the house", "a river"][:batch]
    options = {"output_type": "latent", "use_resolution_binning": False, "clean_caption": False}
    options |= more
    return pipe(prompt, generator=generator, num_inference_steps=steps, **options).images


def table(pipe: Any, steps: int = 4, every: int = 2) -> Schedule:
    """Compute everything at every so many steps, and nothing at the others."""
    names = tuple(sites(pipe.transformer))
    return Schedule([[k % every == 0] * len(names) for k in range(steps)], sites=names)


def everything(pipe: Any, steps: int = 4) -> Schedule:
    return Schedule(torch.ones(steps, len(sites(pipe.transformer))))


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


def embeds(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def sd3_controlnet_pipe() -> Any:
    """A second model runs at every step, and its output goes into the transformer."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3ControlNetPipeline
    from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetModel
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    size = {
        "sample_size": 8, "patch_size": 1, "in_channels": 4, "attention_head_dim": 8, "num_attention_heads": 4,
        "joint_attention_dim": 12, "caption_projection_dim": 32, "pooled_projection_dim": 8,
    }  # fmt: skip
    transformer = randomised(SD3Transformer2DModel(num_layers=2, out_channels=4, **size), std=0.1)
    net = randomised(SD3ControlNetModel(num_layers=1, **size), 1, std=0.1)
    autoencoder = vae()
    autoencoder.register_to_config(shift_factor=0.1)
    return StableDiffusion3ControlNetPipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), autoencoder,
        None, None, None, None, None, None, net,
    )  # fmt: skip


def flux_img2img_pipe() -> Any:
    from diffusers import FluxImg2ImgPipeline

    parts = flux_pipe().components
    parts["vae"].register_to_config(shift_factor=0.1)
    unused = ("image_encoder", "feature_extractor")
    return FluxImg2ImgPipeline(**{k: part for k, part in parts.items() if k not in unused})


def ltx_image_to_video_pipe() -> Any:
    """Its scheduler steps the frames after the first one only."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXImageToVideoPipeline,
    )
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel

    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=12,
        cross_attention_dim=24, num_layers=1, caption_channels=12,
    )  # fmt: skip
    autoencoder = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        patch_size=1, patch_size_t=1,
    )  # fmt: skip
    autoencoder.use_framewise_encoding = False
    return LTXImageToVideoPipeline(
        FlowMatchEulerDiscreteScheduler(), randomised(autoencoder, std=0.1), None, None, randomised(transformer)
    )  # fmt: skip


def cogvideox_pipe() -> Any:
    """Its scheduler returns a second value, which the pipeline hands to the next step."""
    from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=12, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=5,
    )  # fmt: skip
    return CogVideoXPipeline(None, None, None, randomised(transformer), CogVideoXDPMScheduler())


def qwen_pipe() -> Any:
    """Two calls a step, of texts of two lengths."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, randomised(transformer)
    )  # fmt: skip


def walks() -> dict[str, Any]:
    """Name -> function that returns a pipeline, and what `from_pipeline` takes beside `steps`."""
    two = {"prompt_embeds": embeds(2, 5, 12), "negative_prompt_embeds": embeds(2, 5, 12, seed=4)}
    pooled = {"pooled_prompt_embeds": embeds(2, 8)}
    other = {"negative_pooled_prompt_embeds": embeds(2, 8, seed=4)}
    flux = {"prompt_embeds": two["prompt_embeds"], **pooled}
    image = embeds(1, 3, 64, 64).clamp(0, 1)
    masks = {
        name: torch.ones(2, 5, dtype=torch.long)
        for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask", "prompt_attention_mask")
    }
    square = {"height": 64, "width": 64}
    return {
        "dit": (dit_pipe, {"each": {"class_labels": [1, 2]}, "guidance": 3.0}),
        "pixart": (pixart_pipe, {"prompts": ["a blue boat", "the cat"], "use_resolution_binning": False,
                                 "clean_caption": False}),
        "flux": (flux_pipe, {"each": flux, **square}),
        "flux-two-calls": (flux_pipe, {"each": {**two, **pooled, **other}, "true_cfg_scale": 3.0, **square}),
        "flux-img2img": (flux_img2img_pipe, {"each": flux, "image": image, "strength": 0.8, **square}),
        "sd3-controlnet": (sd3_controlnet_pipe, {"each": {**two, **pooled, **other}, "control_image": image, **square}),
        "wan": (wan_pipe, {"each": two, "height": 16, "width": 16, "num_frames": 5}),
        "qwen": (qwen_pipe, {"each": {**two, **{k: v for k, v in masks.items() if "embeds" in k}},
                             "true_cfg_scale": 3.0, **square}),
        "cogvideox": (cogvideox_pipe, {"each": two, "height": 16, "width": 16, "num_frames": 9}),
        "ltx-image-to-video": (ltx_image_to_video_pipe, {
            "each": {**two, "prompt_attention_mask": masks["prompt_attention_mask"],
                     "negative_prompt_attention_mask": masks["prompt_attention_mask"]},
            "image": embeds(1, 3, 32, 32), "height": 32, "width": 32, "num_frames": 9}),
    }  # fmt: skip


def walked(pipe: Any, call: dict[str, Any], seed: int = 0) -> list[torch.Tensor]:
    """Return what the pipeline's scheduler returns at each step of its own run with these arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return steps_of_run(pipe, call)


class StockDiT(nn.Module):
    """diffusers' DiT with the face of ours: (x, t, y) -> (B, C or 2C, H, W)."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer, config = transformer, transformer.config
        self.in_channels, self.input_size = config.in_channels, config.sample_size
        self.num_classes = config.num_embeds_ada_norm

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.transformer(x, timestep=t, class_labels=y, return_dict=False)[0]
