"""The zoo, second third: tiny random models of diffusers' transformers, Flux to Lumina, and inputs for one forward.

An *entry* says what is particular to a class: its configuration, two blocks of each kind and widths of 8 to 32, and the
keyword arguments of one call, with as few tokens as the class allows. What all have in common is done once, in `entry`.
Every token mode is given (references, history, audio), so that no block of a model is left asleep.

This file does not know sites or gates: tests/models/test_zoo.py asks the questions.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Draw = Callable[..., Tensor]
Settings = dict[str, Any]

ZOO: dict[str, Callable[[], tuple[nn.Module, Settings]]] = {}
"""Class name → a function that makes the model and the keyword arguments of one forward."""

LEFT_OUT: dict[str, str] = {}
"""Class name → why it has no entry. All twenty-five of this third run."""

HEADS: Settings = {"num_attention_heads": 2, "attention_head_dim": 8}  # a width of 16
ROPE = (4, 2, 2)  # how the 8 channels of a head are shared among the three axes of a position


def entry(module: str, name: str) -> Callable[[Callable[[Draw], tuple[Settings, Settings]]], None]:
    """Put a class into the zoo. The function below says its configuration and its inputs, given `draw(*shape)`.

    diffusers is imported when the model is made, and only the one submodule.
    """

    def register(describe: Callable[[Draw], tuple[Settings, Settings]]) -> None:
        def make() -> tuple[nn.Module, Settings]:
            generator = torch.Generator().manual_seed(1)
            config, inputs = describe(lambda *shape: torch.randn(shape, generator=generator))
            cls = getattr(import_module(f"diffusers.models.transformers.{module}"), name)
            return randomised(cls, config), {**inputs, "return_dict": False}

        ZOO[name] = make

    return register


def randomised(cls: type[nn.Module], config: Settings) -> nn.Module:
    """Build a model and draw all its weights anew: many classes start with gates and outputs at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(**config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data.normal_(std=0.25)
    return model


def time(value: float = 500.0) -> Tensor:
    """Return the timestep of a batch of one."""
    return torch.tensor([value])


def mask(tokens: int) -> Tensor:
    """Return a mask that hides nothing."""
    return torch.ones(1, tokens, dtype=torch.long)


def grid(*sizes: int) -> Tensor:
    """Return the positions of a grid's tokens, one row each, integers."""
    return torch.cartesian_prod(*map(torch.arange, sizes))


# Flux and its kin: image and text tokens, positions as rows of numbers.


@entry("transformer_flux", "FluxTransformer2DModel")
def _(draw):
    config = {
        **HEADS,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "axes_dims_rope": ROPE,
    }
    config |= {"joint_attention_dim": 8, "pooled_projection_dim": 8}
    inputs = {
        "hidden_states": draw(1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(0.5),
    }
    return config, inputs | {
        "pooled_projections": draw(1, 8),
        "img_ids": grid(1, 2, 2),
        "txt_ids": torch.zeros(3, 3),
    }


@entry("transformer_flux2", "Flux2Transformer2DModel")
def _(draw):
    config = {
        **HEADS,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "axes_dims_rope": (2, 2, 2, 2),
    }
    config |= {"joint_attention_dim": 8, "timestep_guidance_channels": 8}
    inputs = {
        "hidden_states": draw(1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(0.5),
    }
    return config, inputs | {
        "guidance": torch.tensor([3.5]),
        "img_ids": grid(1, 2, 2, 1),
        "txt_ids": grid(1, 1, 1, 3),
    }


@entry("transformer_flux3", "Flux3Transformer2DModel")
def _(draw):
    config = {
        **HEADS,
        "in_channels": 4,
        "cond_in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
    }
    config |= {"joint_attention_dim": 8, "timestep_channels": 8, "axes_dims_rope": (2, 2, 2, 2)}
    inputs = {
        "hidden_states": draw(1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(0.5),
    }
    return config, inputs | {
        "img_ids": grid(1, 2, 2, 1),
        "txt_ids": grid(1, 1, 1, 3),
        "image_cond_hidden_states": draw(
            1, 2, 4
        ),  # without a reference image its blocks do not run
        "image_cond_ids": grid(1, 2, 1, 1),
    }


@entry("transformer_longcat_image", "LongCatImageTransformer2DModel")
def _(draw):
    config = {
        **HEADS,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "axes_dims_rope": ROPE,
    }
    config |= {"joint_attention_dim": 8, "pooled_projection_dim": 8}
    inputs = {
        "hidden_states": draw(1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(0.5),
    }
    return config, inputs | {"img_ids": grid(1, 2, 2), "txt_ids": torch.zeros(3, 3)}


@entry("transformer_krea2", "Krea2Transformer2DModel")
def _(draw):
    config = {
        **HEADS,
        "in_channels": 4,
        "num_layers": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
    }
    config |= {
        "text_hidden_dim": 8,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "axes_dims_rope": ROPE,
    }
    config |= {"text_num_key_value_heads": 2, "text_intermediate_size": 16, "timestep_embed_dim": 8}
    inputs = {
        "hidden_states": draw(1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 2, 8),
        "timestep": time(0.5),
    }
    return config, inputs | {"position_ids": grid(7, 1, 1)}


@entry("transformer_ideogram4", "Ideogram4Transformer2DModel")
def _(draw):
    config = {**HEADS, "in_channels": 4, "num_layers": 2, "intermediate_size": 16, "adaln_dim": 8}
    config |= {"llm_features_dim": 8, "mrope_section": (2, 1, 1)}
    inputs = {
        "hidden_states": draw(1, 6, 4),
        "encoder_hidden_states": draw(1, 6, 8),
        "timestep": time(0.5),
    }
    return config, inputs | {
        "position_ids": grid(6, 1, 1)[None],
        "segment_ids": mask(6),
        "indicator": torch.tensor([[3, 3, 2, 2, 2, 2]]),  # two tokens of text, four of the image
    }


@entry("transformer_hidream_image", "HiDreamImageTransformer2DModel")
def _(draw):
    config = {**HEADS, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 2}
    config |= {
        "caption_channels": [8, 8],
        "text_emb_dim": 8,
        "axes_dims_rope": ROPE,
        "max_resolution": (4, 4),
    }
    return config | {
        "llama_layers": [0, 1, 2, 3],
        "num_routed_experts": 2,
        "num_activated_experts": 1,
    }, {
        "hidden_states": draw(1, 4, 4, 4),
        "timesteps": time(),
        "encoder_hidden_states_t5": draw(1, 2, 8),
        "encoder_hidden_states_llama3": draw(4, 1, 2, 8),
        "pooled_embeds": draw(1, 8),
    }


# Images.


@entry("transformer_glm_image", "GlmImageTransformer2DModel")
def _(draw):
    config = {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 8}
    config |= {"time_embed_dim": 8, "condition_dim": 8, "prior_vq_quantizer_codebook_size": 5}
    inputs = {
        "hidden_states": draw(1, 4, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    return config, inputs | {
        "prior_token_id": torch.tensor([[0, 1, 2, 3]]),
        "prior_token_drop": torch.tensor([[False, True, False, False]]),
        "target_size": torch.tensor([[4.0, 4.0]]),
        "crop_coords": torch.zeros(1, 2),
    }


@entry("hunyuan_transformer_2d", "HunyuanDiT2DModel")
def _(draw):
    config = {
        **HEADS,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 4,
        "hidden_size": 16,
        "mlp_ratio": 2.0,
    }
    config |= {"cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 8}
    # the last of four blocks is the first with a skip connection
    config |= {"text_len": 2, "text_len_t5": 3, "num_layers": 4}
    inputs = {
        "hidden_states": draw(1, 4, 4, 4),
        "encoder_hidden_states": draw(1, 2, 8),
        "timestep": time(),
    }
    return config, inputs | {
        "text_embedding_mask": mask(2),
        "encoder_hidden_states_t5": draw(1, 3, 8),
        "text_embedding_mask_t5": mask(3),
        "image_meta_size": torch.full((1, 6), 4.0),
        "style": torch.tensor([0]),
        "image_rotary_emb": (draw(4, 8).cos(), draw(4, 8).sin()),
    }


@entry("transformer_hunyuanimage", "HunyuanImageTransformer2DModel")
def _(draw):
    config = {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2}
    config |= {"text_embed_dim": 8, "rope_axes_dim": (4, 4)}
    inputs = {
        "hidden_states": draw(1, 4, 2, 2),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    return config, inputs | {"encoder_attention_mask": mask(3)}


@entry("transformer_lumina2", "Lumina2Transformer2DModel")
def _(draw):
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "hidden_size": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
    }
    config |= {
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": ROPE,
        "axes_lens": (8, 4, 4),
        "cap_feat_dim": 8,
    }
    inputs = {
        "hidden_states": draw(1, 4, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(0.5),
    }
    return config, inputs | {"encoder_attention_mask": mask(3)}


@entry("lumina_nextdit2d", "LuminaNextDiT2DModel")
def _(draw):
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "hidden_size": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
    }
    config |= {"num_kv_heads": 1, "multiple_of": 8, "cross_attention_dim": 8}
    inputs = {
        "hidden_states": draw(1, 4, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(0.5),
    }
    return config, inputs | {
        "encoder_mask": mask(3),
        "image_rotary_emb": torch.polar(torch.ones(2, 2, 4), draw(2, 2, 4)),
        "cross_attention_kwargs": {},
    }


# Video: latents (B, C, frames, height, width), patches of 1×2×2 unless said.


@entry("transformer_helios", "HeliosTransformer3DModel")
def _(draw):
    config = {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "rope_dim": ROPE}
    config |= {"text_dim": 8, "freq_dim": 8, "ffn_dim": 16}
    inputs = {
        "hidden_states": draw(1, 4, 1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    return config, inputs | {
        "indices_hidden_states": torch.tensor([[1]]),
        "latents_history_short": draw(1, 4, 1, 4, 4),
        "indices_latents_history_short": torch.tensor([[0]]),
    }


@entry("transformer_hunyuan_video", "HunyuanVideoTransformer3DModel")
def _(draw):
    config = {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2}
    config |= {"text_embed_dim": 8, "pooled_projection_dim": 8, "rope_axes_dim": ROPE}
    inputs = {
        "hidden_states": draw(1, 4, 1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    return config, inputs | {
        "encoder_attention_mask": mask(3),
        "pooled_projections": draw(1, 8),
        "guidance": torch.tensor([6.0]),
    }


@entry("transformer_hunyuan_video15", "HunyuanVideo15Transformer3DModel")
def _(draw):
    config = {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "rope_axes_dim": ROPE}
    config |= {"text_embed_dim": 8, "text_embed_2_dim": 8, "image_embed_dim": 8}
    inputs = {
        "hidden_states": draw(1, 4, 1, 2, 2),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    return config, inputs | {
        "encoder_attention_mask": mask(3),
        "encoder_hidden_states_2": draw(1, 2, 8),
        "encoder_attention_mask_2": mask(2),
        "image_embeds": draw(1, 1, 8),
    }


@entry("transformer_hunyuan_video_framepack", "HunyuanVideoFramepackTransformer3DModel")
def _(draw):
    config = {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2}
    config |= {"text_embed_dim": 8, "pooled_projection_dim": 8, "rope_axes_dim": ROPE}
    config |= {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True}
    inputs = {
        "hidden_states": draw(1, 4, 1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    inputs |= {
        "encoder_attention_mask": mask(3),
        "pooled_projections": draw(1, 8),
        "image_embeds": draw(1, 1, 8),
    }
    # seven frames of history in three resolutions, then the frame being made
    return config, inputs | {
        "guidance": torch.tensor([6.0]),
        "indices_latents": torch.tensor([7]),
        "latents_clean": draw(1, 4, 1, 4, 4),
        "indices_latents_clean": torch.tensor([6]),
        "latents_history_2x": draw(1, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.tensor([4, 5]),
        "latents_history_4x": draw(1, 4, 4, 4, 4),
        "indices_latents_history_4x": torch.tensor([0, 1, 2, 3]),
    }


@entry("transformer_joyimage", "JoyImageEditTransformer3DModel")
def _(draw):
    config = {
        "in_channels": 4,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "text_dim": 8,
        "num_layers": 2,
    }
    inputs = {
        "hidden_states": draw(1, 4, 1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    return config | {"rope_dim_list": list(ROPE)}, inputs


@entry("transformer_joyimage_edit_plus", "JoyImageEditPlusTransformer3DModel")
def _(draw):
    config = {
        "in_channels": 4,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "text_dim": 8,
        "num_layers": 2,
    }
    # four patches, of one picture of 2 × 2 patches
    inputs = {
        "hidden_states": draw(1, 4, 4, 1, 2, 2),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    return config | {"rope_dim_list": list(ROPE)}, inputs | {
        "encoder_hidden_states_mask": torch.ones(1, 3),
        "shape_list": [[(1, 2, 2)]],
    }


@entry("transformer_kandinsky", "Kandinsky5Transformer3DModel")
def _(draw):
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 8,
        "in_text_dim2": 8,
        "time_dim": 8,
    }
    config |= {
        "model_dim": 16,
        "ff_dim": 16,
        "num_text_blocks": 2,
        "num_visual_blocks": 2,
        "axes_dims": ROPE,
    }
    inputs = {
        "hidden_states": draw(1, 1, 4, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    return config, inputs | {
        "pooled_projections": draw(1, 8),
        "visual_rope_pos": [torch.arange(n) for n in (1, 2, 2)],
        "text_rope_pos": torch.arange(3),
    }


@entry("transformer_kandinsky6", "Kandinsky6Transformer3DModel")
def _(draw):
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 8,
        "in_text_dim2": 8,
        "time_dim": 8,
    }
    config |= {
        "model_dim": 16,
        "ff_dim": 16,
        "num_text_blocks": 2,
        "num_visual_blocks": 2,
        "axes_dims": ROPE,
    }
    inputs = {
        "hidden_states": draw(1, 1, 4, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    return config | {"visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4}, inputs | {
        "pooled_projections": draw(1, 8),
        "audio_hidden_states": draw(1, 2, 4),  # without sound half of every block does not run
    }


@entry("transformer_kandinsky6_sr", "Kandinsky6SRTransformer3DModel")
def _(draw):
    config = {"in_visual_dim": 2, "out_visual_dim": 4, "time_dim": 8, "model_dim": 16, "ff_dim": 16}
    # its sparse attention works on tiles of 8 × 8 tokens
    return config | {"num_visual_blocks": 2, "axes_dims": ROPE}, {
        "hidden_states": draw(1, 1, 8, 16, 5),
        "timestep": time(),
    }


@entry("transformer_ltx", "LTXVideoTransformer3DModel")
def _(draw):
    config = {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 16,
    }
    inputs = {
        "hidden_states": draw(1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    return config | {"caption_channels": 8}, inputs | {
        "encoder_attention_mask": mask(3),
        "num_frames": 1,
        "height": 2,
        "width": 2,
    }


@entry("transformer_ltx2", "LTX2VideoTransformer3DModel")
def _(draw):
    config = {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 16,
    }
    config |= {
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "caption_channels": 8,
    }
    config |= {"audio_attention_head_dim": 4, "audio_cross_attention_dim": 8}
    inputs = {
        "hidden_states": draw(1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    return config, inputs | {
        "audio_hidden_states": draw(1, 2, 4),
        "audio_encoder_hidden_states": draw(1, 3, 8),
        "num_frames": 1,
        "height": 2,
        "width": 2,
        "audio_num_frames": 2,
    }


@entry("latte_transformer_3d", "LatteTransformer3DModel")
def _(draw):
    config = {
        **HEADS,
        "in_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "sample_size": 4,
    }
    config |= {
        "patch_size": 2,
        "caption_channels": 8,
        "video_length": 2,
        "activation_fn": "gelu-approximate",
    }
    config |= {
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "num_embeds_ada_norm": 10,
    }
    inputs = {
        "hidden_states": draw(1, 4, 2, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(),
    }
    return config, inputs


# Sound.


@entry("transformer_longcat_audio_dit", "LongCatAudioDiTTransformer")
def _(draw):
    config = {"dit_dim": 16, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 8, "latent_dim": 4}
    inputs = {
        "hidden_states": draw(1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "timestep": time(0.5),
    }
    return config, inputs | {"encoder_attention_mask": mask(3), "latent_cond": draw(1, 4, 4)}
