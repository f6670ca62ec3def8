"""Stock diffusers pipelines of a few thousand weights, of the classes of the real ones."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from conftest import seeded
from torch import nn

from harmonica import Schedule
from harmonica.models.dit import DiTDenoiser
from harmonica.models.pipelines import cached
from harmonica.models.pipelines.tune import steps_of_run
from harmonica.models.sites import sites
from harmonica.samplers import DDIM

WORDS = "a the of in on under blue red green small boat house cat dog tree river at night morning"


def randomised(module: nn.Module, seed: int = 0, std: float = 0.25) -> nn.Module:
    """Draw every weight anew, so that no gate is zero and every site matters."""
    generator = seeded(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * std
    return module.eval().requires_grad_(False)


def silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


# fmt: off
def vae(channels: int = 4) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.AutoencoderKL(
            latent_channels=channels, block_out_channels=(4,) * 4, norm_num_groups=2,
            layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).eval().requires_grad_(False)


def dit_transformer(seed: int = 0, sample_size: int = 8, *, equal: bool = False) -> Any:
    """A DiT; with `equal`, its timestep embeddings are copies of one, as in a real checkpoint."""
    model = randomised(diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=sample_size, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
        activation_fn="gelu-approximate"), seed)
    first, second = (block.norm1.emb for block in model.transformer_blocks)
    if equal:
        second.load_state_dict(first.state_dict())
    return model


def pixart_transformer(seed=0, *, micro=False, sample_size=None) -> Any:
    """A PixArt; micro-conditions go with a latent of 128, as in diffusers' pipeline."""
    size = sample_size or (128 if micro else 8)
    return randomised(diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24,
        caption_channels=12, sample_size=size, patch_size=32 if size == 128 else 2,
        use_additional_conditions=micro), seed)


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        return T5EncoderModel(T5Config(vocab_size=len(WORDS.split()) + 3, **size)).eval()


def tokenizer() -> Any:
    """A T5 tokenizer of our own few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    end = {"single": "$A </s>", "special_tokens": [("</s>", 1)]}
    backend.post_processor = processors.TemplateProcessing(**end)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def dit_pipe(seed: int = 0, scheduler: Any = None) -> Any:
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False)
    return silent(diffusers.DiTPipeline(dit_transformer(seed), vae(), scheduler))


def pixart_pipe(kind="Alpha", seed=0, *, micro=False, scheduler=None) -> Any:
    return silent(getattr(diffusers, f"PixArt{kind}Pipeline")(
        tokenizer(), t5(), vae(), pixart_transformer(seed, micro=micro),
        scheduler or diffusers.DPMSolverMultistepScheduler()))


def flux_pipe() -> Any:
    """Dual-stream blocks whose attention returns a tuple, single streams, shifted timesteps."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return silent(diffusers.FluxPipeline(scheduler, vae(), *[None] * 4, randomised(transformer)))


def wan_pipe() -> Any:
    """Video; the transformer is called twice a step, once for each half of guidance."""
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
        out_channels=16, text_dim=12, freq_dim=8, ffn_dim=16, num_layers=2)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = diffusers.UniPCMultistepScheduler(**flow)
    return silent(diffusers.WanPipeline(None, None, vae, scheduler, randomised(transformer)))


def sd3_controlnet_pipe() -> Any:
    """A second model runs at every step, and its output goes into the transformer."""
    size = {
        "sample_size": 8, "patch_size": 1, "in_channels": 4, "attention_head_dim": 8,
        "num_attention_heads": 4, "joint_attention_dim": 12, "caption_projection_dim": 32,
        "pooled_projection_dim": 8}
    transformer = diffusers.SD3Transformer2DModel(num_layers=2, out_channels=4, **size)
    net = randomised(diffusers.SD3ControlNetModel(num_layers=1, **size), 1, std=0.1)
    autoencoder = vae()
    autoencoder.register_to_config(shift_factor=0.1)
    return silent(diffusers.StableDiffusion3ControlNetPipeline(
        randomised(transformer, std=0.1), diffusers.FlowMatchEulerDiscreteScheduler(), autoencoder,
        *[None] * 6, net))


def flux_img2img_pipe() -> Any:
    parts = flux_pipe().components
    parts["vae"].register_to_config(shift_factor=0.1)
    del parts["image_encoder"], parts["feature_extractor"]
    return silent(diffusers.FluxImg2ImgPipeline(**parts))


def ltx_image_to_video_pipe() -> Any:
    """Its scheduler steps the frames after the first one only."""
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2,
        attention_head_dim=12, cross_attention_dim=24, num_layers=1, caption_channels=12)
    two = (True, True, False, False)
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1, patch_size_t=1,
        spatio_temporal_scaling=two, decoder_spatio_temporal_scaling=two,
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4)
    autoencoder.use_framewise_encoding = False
    return silent(diffusers.LTXImageToVideoPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), randomised(autoencoder, std=0.1), None, None,
        randomised(transformer)))


def cogvideox_pipe() -> Any:
    """Its scheduler returns a second value, which the pipeline hands to the next step."""
    transformer = randomised(diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=2, text_embed_dim=12, num_layers=1, sample_width=2, sample_height=2,
        sample_frames=9, max_text_seq_length=5))
    scheduler = diffusers.CogVideoXDPMScheduler()
    return silent(diffusers.CogVideoXPipeline(None, None, None, transformer, scheduler))


def qwen_pipe() -> Any:
    """Two calls a step, of texts of two lengths."""
    transformer = randomised(diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(8, 4, 4)))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return silent(diffusers.QwenImagePipeline(scheduler, None, None, None, transformer))
# fmt: on


def run_embedded(pipe: Any, steps: int = 4) -> torch.Tensor:
    """Return the latents that Flux or Wan makes of drawn embeddings and drawn negative ones."""
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
    options = {"use_resolution_binning": False, "clean_caption": False, "output_type": "latent"}
    options |= {"num_inference_steps": steps, **more}
    return pipe(prompt, generator=generator, **options).images


def table(pipe: Any, steps: int = 4, every: int = 2) -> Schedule:
    """Compute everything at every so many steps, and nothing at the others."""
    names = tuple(sites(pipe.transformer))
    return Schedule([[k % every == 0] * len(names) for k in range(steps)], sites=names)


def everything(pipe: Any, steps: int = 4) -> Schedule:
    return Schedule(torch.ones(steps, len(sites(pipe.transformer))))


def under(pipe: Any, schedule: Schedule, call: Any, *args: Any, **options: Any) -> torch.Tensor:
    """Return what a call returns while a pipeline is cached under a schedule."""
    with cached(pipe, schedule):
        return call(*args, **options)


def count_calls(modules, run):
    """Return how often each of the modules really ran: calls of the forward of their class."""
    ran = dict.fromkeys(map(id, modules), 0)
    with ExitStack() as stack:
        for kind in {type(module) for module in modules}:

            def forward(self, *args, _original=kind.forward, **kwargs):
                if id(self) in ran:
                    ran[id(self)] += 1
                return _original(self, *args, **kwargs)

            stack.enter_context(patch.object(kind, "forward", forward))
        run()
    return [ran[id(module)] for module in modules]


def in_threads(jobs):
    """Run all jobs at once, taking turns far more often than they would; return their results."""
    barrier, before = threading.Barrier(len(jobs)), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(jobs)) as pool:
            run = lambda job: barrier.wait() * 0 or job()  # noqa: E731
            return list(pool.map(run, jobs))
    finally:
        sys.setswitchinterval(before)


def embeds(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def walks() -> dict[str, Any]:
    two = {"prompt_embeds": embeds(2, 5, 12), "negative_prompt_embeds": embeds(2, 5, 12, seed=4)}
    pooled = {"pooled_prompt_embeds": embeds(2, 8)}
    four = {**two, **pooled, "negative_pooled_prompt_embeds": embeds(2, 8, seed=4)}
    flux = {"prompt_embeds": two["prompt_embeds"], **pooled}
    image = embeds(1, 3, 64, 64).clamp(0, 1)
    mask, square = torch.ones(2, 5, dtype=torch.long), {"height": 64, "width": 64}
    masks = {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    attention = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return {
        "dit": (dit_pipe, {"each": {"class_labels": [1, 2]}, "guidance": 3.0}),
        "pixart": (pixart_pipe, {"prompts": ["a blue boat", "the cat"],
                                 "use_resolution_binning": False, "clean_caption": False}),
        "flux": (flux_pipe, {"each": flux, **square}),
        "flux-two-calls": (flux_pipe, {"each": four, "true_cfg_scale": 3.0, **square}),
        "flux-img2img": (
            flux_img2img_pipe, {"each": flux, "image": image, "strength": 0.8, **square}),
        "sd3-controlnet": (sd3_controlnet_pipe, {"each": four, "control_image": image, **square}),
        "wan": (wan_pipe, {"each": two, "height": 16, "width": 16, "num_frames": 5}),
        "qwen": (qwen_pipe, {"each": {**two, **masks}, "true_cfg_scale": 3.0, **square}),
        "cogvideox": (cogvideox_pipe, {"each": two, "height": 16, "width": 16, "num_frames": 9}),
        "ltx-image-to-video": (ltx_image_to_video_pipe, {
            "each": {**two, **attention}, "image": embeds(1, 3, 32, 32), "height": 32,
            "width": 32, "num_frames": 9}),
    }  # fmt: skip


WALKS = walks()
"""Name -> function that returns a pipeline, and what `from_pipeline` takes beside `steps`."""


def walked(pipe: Any, call: dict[str, Any], seed: int = 0) -> list[torch.Tensor]:
    """Return what the scheduler returns at each step of the pipeline's own run."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return steps_of_run(pipe, call)[0]


class StockDiT(nn.Module):
    """diffusers' DiT with the face of ours: (x, t, y) -> (B, C or 2C, H, W)."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer, config = transformer, transformer.config
        self.in_channels, self.input_size = config.in_channels, config.sample_size
        self.num_classes = config.num_embeds_ada_norm

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.transformer(x, timestep=t, class_labels=y, return_dict=False)[0]


def stock_dit(steps: int = 4) -> DiTDenoiser:
    """Return diffusers' DiT as a denoiser."""
    transformer = dit_transformer()
    return DiTDenoiser(StockDiT(transformer), DDIM(steps), sites=sites(transformer))
