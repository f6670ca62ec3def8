"""The zoo: a tiny random model of every transformer that diffusers exports, and the inputs of one forward.

    ZOO[class name]()    a frozen model, and the keyword arguments of one call
    examine(...)         the laws that the sites of a model break

An entry of the table is the configuration, beyond what SMALL makes of the class's own defaults, and the inputs of one
sample, with as few tokens as the class allows. Every optional kind of token is given (references, history, sound), so
that every block runs. Nothing of diffusers is imported until an entry is called. Who asks: tests/models/test_zoo.py.
"""

# ruff: noqa: C408
import re
import sys
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from conftest import equal, seeded
from torch import Tensor, arange, nn, ones, tensor
from torch.utils._pytree import tree_all, tree_leaves, tree_map, tree_map_only

from harmonica.cache import gated, reuse
from harmonica.models.sites import Modules, sites

LEFT_OUT = {"MiniMaxMusic3RVQDepthDecoder": "no denoiser: it writes audio codes, without timesteps"}
"""Classes that are not in the zoo, and why."""

FLEX = ("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel")
UNCOUNTED = (*FLEX, "WanAnimate2Transformer3DModel")
"""Classes whose MACs are estimated only: torch's counter of operations cannot run flex attention."""

SMALL = {
    "layers|heads|depth|groups|experts|num_(visual|text)_blocks": 2,
    "rope_dim|axes_dim|rope_axes": (4, 4, 4),
    "head_dim|dim_head": 12,
    "max_size|max_seq|^time|^freq|timestep|^t_emb|adaln|condition_dim|multiple_of": 8,
    "visual_dim|audio_dim|latent_dim|(?<!caption_)channels|sample": 4,
    "dim|hidden_size|inter|caption": 24,
}
"""Name of a parameter (the first that fits) → what is given where the class's own default is larger."""


def small(parameter: str, own: Any) -> Any:
    """Return what stands for a class's own default, or None where that is no larger."""
    size = next((size for fits, size in SMALL.items() if re.search(fits, parameter)), None)
    of_three = isinstance(own, tuple | list) and len(own) == 3
    larger = of_three if isinstance(size, tuple) else size and type(own) is int and own > size
    return size if larger else None


def make(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with all weights drawn anew, since many start with gates of zero, and its inputs."""
    config, inputs = TABLE[name]
    kind = getattr(import_module("diffusers.models.transformers"), name)
    parameters = signature(kind.__init__).parameters.items()
    sizes = {key: size for key, own in parameters if (size := small(key, own.default))}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = kind(**sizes | config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(std=0.2)
    call = tree_map_only(Tensor, torch.clone, inputs)
    return model, PREPARE[name](model, call) if name in PREPARE else call


n = partial(torch.randn, generator=seeded(1))
"""Draw noise of a shape."""


def io(*x: int, text: tuple[int, ...] = (1, 3, 24), t: float = 500.0, **more: Any) -> Any:
    """Return what nearly all take: a latent of shape x, text, a timestep."""
    return dict(hidden_states=n(*x), encoder_hidden_states=n(*text), timestep=tensor([t])) | more


def grid(*sizes: int) -> Tensor:
    """Return the positions of a grid's tokens, one row each, integers."""
    return torch.cartesian_prod(*map(arange, sizes))


# fmt: off
LONG, TRUE = (ones(1, 3, dtype=dtype) for dtype in (torch.long, torch.bool))  # a mask of the text that hides nothing
IDS = dict(img_ids=grid(1, 2, 2).float(), txt_ids=torch.zeros(3, 3))
SIZE = tensor([[4.0, 4.0]])
MOTION = dict(timestep=torch.full((1, 2), 500.0), r_timestep=torch.full((1, 2), 250.0))

TABLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AceStepTransformer1DModel": (dict(in_channels=12, num_key_value_heads=1, sliding_window=4), io(
        1, 8, 4, t=0.5, timestep_r=tensor([0.25]), context_latents=n(1, 8, 8))),
    "AllegroTransformer3DModel": (dict(sample_frames=2), io(1, 4, 2, 4, 4, encoder_attention_mask=ones(1, 3))),
    "AnyFlowTransformer3DModel": ({}, io(1, 2, 4, 4, 4) | MOTION),
    "AnyFlowFARTransformer3DModel": (dict(chunk_partition=(1, 1)), io(1, 2, 4, 4, 4, chunk_partition=[1, 1]) | MOTION),
    "AuraFlowTransformer2DModel": ({}, io(1, 4, 4, 4, t=0.5)),
    "BriaFibo2Transformer2DModel": (dict(
        injection_layer_ids=(1,), min_num_gist_tokens=2, max_num_gist_tokens=4, gist_step=2, gist_min_text_len=2,
        gist_max_text_len=8, axes_lens=(16, 16, 16)), io(1, 4, 4, 4, text=(1, 1 + 2, 3, 24), t=0.5)),
    "BriaFiboTransformer2DModel": ({}, io(1, 4, 4, t=0.5, text_encoder_layers=[n(1, 3, 24) for _ in range(4)], **IDS)),
    "BriaTransformer2DModel": ({}, io(1, 4, 4, t=0.5, **IDS)),
    "ChromaTransformer2DModel": (dict(approximator_layers=1), io(1, 4, 4, t=0.5, **IDS)),
    "ChronoEditTransformer3DModel": ({}, io(1, 4, 2, 4, 4)),
    "CogVideoXTransformer3DModel": (dict(attention_head_dim=8, sample_frames=5, max_text_seq_length=3), io(1, 2, 4, 4, 4)),
    "ConsisIDTransformer3DModel": (dict(
        attention_head_dim=8, sample_frames=5, max_text_seq_length=3, is_train_face=True, cross_attn_interval=1,
        LFE_depth=5, LFE_num_id_token=2, LFE_num_querie=2,
        LFE_output_dim=10), io(  # two thirds of the width, as the blocks that read it expect
        1, 2, 4, 4, 4, id_cond=n(1, 24), id_vit_hidden=[n(1, 3, 24) for _ in range(5)])),
    "CogView3PlusTransformer2DModel": ({}, io(1, 4, 4, 4, original_size=SIZE, target_size=SIZE, crop_coords=SIZE * 0)),
    "CogView4Transformer2DModel": (dict(rope_axes_dim=(12, 12)), io(
        1, 4, 4, 4, original_size=SIZE, target_size=SIZE, crop_coords=SIZE * 0)),
    "Cosmos3OmniTransformer": (dict(  # three tokens of text, then one frame of 2 × 2 patches
        latent_channel=4, patch_latent_dim=16, vocab_size=11, num_key_value_heads=1, rope_axes_dim=(2, 2, 2)), dict(
        input_ids=tensor([1, 2, 3]), text_indexes=arange(3), position_ids=arange(7).expand(3, 7), und_len=3,
        sequence_length=7, vision_tokens=[n(1, 4, 1, 4, 4)], vision_token_shapes=[(1, 2, 2)],
        vision_sequence_indexes=arange(3, 7), vision_mse_loss_indexes=arange(3, 7),
        vision_timesteps=torch.full((4,), 500.0), vision_noisy_frame_indexes=[tensor([0])])),
    "CosmosTransformer3DModel": (dict(max_size=(4, 8, 8), concat_padding_mask=False), io(  # which needs torchvision
        1, 4, 2, 4, 4, t=0.5, fps=16)),
    "DiTTransformer2DModel": (dict(num_embeds_ada_norm=10), dict(
        hidden_states=n(1, 4, 4, 4), timestep=tensor([500]), class_labels=tensor([3]))),
    "DreamLiteTransformer2DModel": (dict(in_channels=4, num_layers=2, cross_attention_dim=24, qk_norm="rms_norm"), dict(
        hidden_states=n(1, 4, 4, 4), encoder_hidden_states=n(1, 3, 24))),
    "DualTransformer2DModel": (dict(in_channels=4, num_layers=2, cross_attention_dim=24), dict(
        hidden_states=n(1, 4, 4, 4), encoder_hidden_states=n(1, 5, 24))),
    "EasyAnimateTransformer3DModel": (dict(in_channels=4, out_channels=4, patch_size=2, attention_head_dim=16), io(
        1, 4, 2, 4, 4)),
    "ErnieImageTransformer2DModel": (dict(ffn_hidden_size=32), dict(
        hidden_states=n(1, 4, 2, 2), timestep=tensor([500.0]), text_bth=n(1, 3, 24), text_lens=tensor([3]))),
    "Flux2Transformer2DModel": (dict(axes_dims_rope=(4, 4, 2, 2)), io(
        1, 4, 4, t=0.5, guidance=tensor([3.5]), img_ids=grid(1, 2, 2, 1), txt_ids=grid(1, 1, 1, 3))),
    "Flux3Transformer2DModel": (dict(axes_dims_rope=(4, 4, 2, 2)), io(1, 4, 4, t=0.5, img_ids=grid(1, 2, 2, 1),
        txt_ids=grid(1, 1, 1, 3), image_cond_hidden_states=n(1, 2, 4), image_cond_ids=grid(1, 2, 1, 1))),
    "FluxTransformer2DModel": ({}, io(1, 4, 4, t=0.5, pooled_projections=n(1, 24), **IDS)),
    "GlmImageTransformer2DModel": (dict(prior_vq_quantizer_codebook_size=5), io(
        1, 4, 4, 4, prior_token_id=arange(4)[None], prior_token_drop=tensor([[False, True, False, False]]),
        target_size=SIZE, crop_coords=SIZE * 0)),
    "HeliosTransformer3DModel": ({}, io(1, 4, 1, 4, 4, indices_hidden_states=tensor([[1]]),
        latents_history_short=n(1, 4, 1, 4, 4), indices_latents_history_short=tensor([[0]]))),
    "HiDreamImageTransformer2DModel": (dict(patch_size=2, caption_channels=[24, 24], axes_dims_rope=(4, 4, 4),
        max_resolution=(4, 4), llama_layers=[0, 1, 2, 3], num_activated_experts=1), dict(hidden_states=n(1, 4, 4, 4),
        timesteps=tensor([500.0]), encoder_hidden_states_t5=n(1, 2, 24), encoder_hidden_states_llama3=n(4, 1, 2, 24),
        pooled_embeds=n(1, 24))),
    "HunyuanDiT2DModel": (dict(  # the last of four blocks is the first with a skip connection
        in_channels=4, patch_size=2, num_layers=4, text_len=2, text_len_t5=3), io(
        1, 4, 4, 4, text=(1, 2, 24), text_embedding_mask=LONG[:, :2], encoder_hidden_states_t5=n(1, 3, 24),
        text_embedding_mask_t5=LONG, image_meta_size=torch.full((1, 6), 4.0), style=tensor([0]),
        image_rotary_emb=(n(4, 12).cos(), n(4, 12).sin()))),
    "HunyuanImageTransformer2DModel": (dict(rope_axes_dim=(6, 6)), io(1, 4, 2, 2, encoder_attention_mask=LONG)),
    "HunyuanVideo15Transformer3DModel": ({}, io(1, 4, 1, 2, 2, encoder_attention_mask=LONG,
        encoder_hidden_states_2=n(1, 2, 24), encoder_attention_mask_2=LONG[:, :2], image_embeds=n(1, 1, 24))),
    "HunyuanVideoFramepackTransformer3DModel": (dict(  # seven frames of history in three resolutions, then the new one
        has_image_proj=True, has_clean_x_embedder=True), io(
        1, 4, 1, 4, 4, encoder_attention_mask=LONG, pooled_projections=n(1, 24), guidance=tensor([6.0]),
        image_embeds=n(1, 1, 24), indices_latents=tensor([7]), latents_clean=n(1, 4, 1, 4, 4),
        indices_latents_clean=tensor([6]), latents_history_2x=n(1, 4, 2, 4, 4), indices_latents_history_2x=arange(4, 6),
        latents_history_4x=n(1, 4, 4, 4, 4), indices_latents_history_4x=arange(4))),
    "HunyuanVideoTransformer3DModel": ({}, io(
        1, 4, 1, 4, 4, encoder_attention_mask=LONG, pooled_projections=n(1, 24), guidance=tensor([6.0]))),
    "Ideogram4Transformer2DModel": (dict(mrope_section=(2, 2, 2)), io(  # two tokens of text, four of the image
        1, 6, 4, text=(1, 6, 24), t=0.5, position_ids=grid(6, 1, 1)[None], segment_ids=ones(1, 6).long(),
        indicator=tensor([[3, 3, 2, 2, 2, 2]]))),
    "JoyImageEditPlusTransformer3DModel": ({}, io(  # 2 × 2 patches
        1, 4, 4, 1, 2, 2, encoder_hidden_states_mask=ones(1, 3), shape_list=[[(1, 2, 2)]])),
    "JoyImageEditTransformer3DModel": ({}, io(1, 4, 1, 4, 4)),
    "Kandinsky5Transformer3DModel": ({}, io(1, 1, 4, 4, 4, pooled_projections=n(1, 24),
        visual_rope_pos=[arange(i) for i in (1, 2, 2)], text_rope_pos=arange(3))),
    "Kandinsky6SRTransformer3DModel": (dict(in_visual_dim=2), dict(  # it works on tiles of 8 × 8
        hidden_states=n(1, 1, 8, 16, 5), timestep=tensor([500.0]))),
    "Kandinsky6Transformer3DModel": (dict(visual_cond=False), io(
        1, 1, 4, 4, 4, pooled_projections=n(1, 24), audio_hidden_states=n(1, 2, 4))),
    "Krea2Transformer2DModel": (dict(num_key_value_heads=1), io(
        1, 4, 4, text=(1, 3, 2, 24), t=0.5, position_ids=grid(7, 1, 1))),
    "LTX2VideoTransformer3DModel": ({}, io(1, 4, 4, audio_hidden_states=n(1, 2, 4),
        audio_encoder_hidden_states=n(1, 3, 24), num_frames=1, height=2, width=2, audio_num_frames=2)),
    "LTXVideoTransformer3DModel": ({}, io(1, 4, 4, encoder_attention_mask=LONG, num_frames=1, height=2, width=2)),
    "LatteTransformer3DModel": (dict(in_channels=4, num_layers=2, cross_attention_dim=24, patch_size=2,
        caption_channels=24, video_length=2, activation_fn="gelu-approximate", norm_type="ada_norm_single",
        norm_elementwise_affine=False, num_embeds_ada_norm=10), io(1, 4, 2, 4, 4)),
    "LongCatAudioDiTTransformer": ({}, io(1, 4, 4, t=0.5, encoder_attention_mask=LONG, latent_cond=n(1, 4, 4))),
    "LongCatImageTransformer2DModel": ({}, io(1, 4, 4, t=0.5, **IDS)),
    "Lumina2Transformer2DModel": (dict(num_kv_heads=1, axes_lens=(8, 4, 4)), io(
        1, 4, 4, 4, t=0.5, encoder_attention_mask=LONG)),
    "LuminaNextDiT2DModel": (dict(num_kv_heads=1), io(1, 4, 4, 4, t=0.5, encoder_mask=LONG, cross_attention_kwargs={},
        image_rotary_emb=torch.polar(ones(2, 2, 6), n(2, 2, 6)))),
    "MiniMaxH3Transformer3DModel": (dict(in_channels=2, rope_freq_dim=2), dict(  # 4 tokens of video, 2 text, 2 sound
        io(1, 4, 8, text=(1, 2, 24), t=0.5), audio_hidden_states=n(1, 2, 4), timestep_indices=arange(8) * 0,
        token_tags=tensor([0, 0, 0, 0, 1, 1, 2, 2]), position_ids=arange(8)[:, None].expand(8, 3),
        video_indices=arange(4), text_indices=arange(4, 6), audio_indices=arange(6, 8))),
    "MiniMaxMusic3Transformer1DModel": (dict(rotary_dim=4), io(1, 4, 4, text=(1, 4, 8), t=0.5)),
    "MochiTransformer3DModel": (dict(max_sequence_length=4), io(1, 4, 2, 4, 4, encoder_attention_mask=TRUE)),
    "MotifVideoTransformer3DModel": (dict(
        in_channels=5, num_single_layers=4, num_decoder_layers=2, enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True), io(1, 5, 1, 4, 4, encoder_attention_mask=TRUE)),
    "NucleusMoEImageTransformer2DModel": (dict(  # one dense block, two of experts
        in_channels=8, out_channels=2, num_layers=3, dense_moe_strategy="leave_first_block_dense",
        mlp_ratio=8.0,  # the dense feed-forward's width is rounded down to a multiple of 128; at 4 it would be none
        num_experts=4, capacity_factors=2.0), io(
        1, 4, 8, t=0.5, img_shapes=[(1, 2, 2)], encoder_hidden_states_mask=TRUE)),
    "OmniGenTransformer2DModel": (dict(
        pad_token_id=0, vocab_size=8, max_position_embeddings=16, original_max_position_embeddings=16,
        rope_scaling=dict(short_factor=[1.0] * 6, long_factor=[1.0] * 6)), dict(
        hidden_states=n(1, 4, 4, 4), timestep=tensor([0.5]), input_img_latents=[], input_ids=tensor([[1, 2, 3]]),
        input_image_sizes={}, attention_mask=ones(1, 8, 8), position_ids=arange(8)[None])),  # of text, time, image
    "OvisImageTransformer2DModel": ({}, io(1, 4, 4, t=0.5, **IDS)),
    "PRXTransformer2DModel": (dict(axes_dim=[6, 6]), io(1, 4, 4, 4, t=0.5, attention_mask=TRUE)),
    "PixArtTransformer2DModel": (dict(caption_channels=24, use_additional_conditions=False), io(
        1, 4, 4, 4, added_cond_kwargs=dict(resolution=None, aspect_ratio=None), encoder_attention_mask=ones(1, 3))),
    "PriorTransformer": (dict(num_embeddings=3), io(1, 24, proj_embedding=n(1, 24), attention_mask=TRUE)),
    "QwenImage21Transformer2DModel": ({}, io(
        1, 4, 4, t=0.5, img_shapes=[[(1, 2, 2)]], img_mask=tensor([[False, False, False, True]]))),  # 2 × 2 tokens each
    "QwenImageTransformer2DModel": (dict(in_channels=8, out_channels=2), io(
        1, 4, 8, t=0.5, encoder_hidden_states_mask=TRUE, img_shapes=[(1, 2, 2)])),
    "RFD4ProteinaTransformer": (dict(nlayers=2, nheads=2, feats_seq=("xt_bb_ca", "xt_local_latents"),
        feats_pair_repr=("xt_bb_ca_pair_dists",), feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
        tri_mult_c=8, num_sequence_classes=5), dict(bb_ca=n(1, 3, 3), local_latents=n(1, 3, 4),
        bb_ca_time=tensor([0.5]), padding_mask=TRUE, local_latents_time=tensor([0.5]), conditioning=dict(
        is_in_context_conditioning=~TRUE, supports_local_latent=TRUE))),
    "SD3Transformer2DModel": (dict(  # as 3.5 has it: a second attention in the first blocks only
        qk_norm="rms_norm", dual_attention_layers=(0,)), io(1, 4, 4, 4, pooled_projections=n(1, 24))),
    "SanaTransformer2DModel": ({}, io(1, 4, 4, 4, encoder_attention_mask=ones(1, 3))),
    "SanaVideoTransformer3DModel": ({}, io(1, 4, 2, 4, 4, encoder_attention_mask=ones(1, 3))),
    "SanaWMLTX2RefinerTransformer3DModel": ({}, io(
        1, 4, 4, encoder_attention_mask=ones(1, 3)) | dict(timestep=torch.full((1, 4), 500.0))),
    "SanaWMTransformer3DModel": (dict(  # every second block has another kind of attention
        num_layers=4, hidden_size=32, softmax_every_n=2, linear_head_dim=16, image_size=2), io(
        1, 4, 2, 2, 2, text=(1, 1, 3, 24), encoder_attention_mask=ones(1, 3), chunk_plucker=n(1, 4, 2, 2, 2),
        camera_conditions=torch.cat([torch.eye(4).flatten(), tensor([2.0, 2.0, 1.0, 1.0])]).expand(1, 2, 20),
        ) | dict(timestep=torch.full((1, 1, 2), 500))),  # a camera: to the world, then fx fy cx cy
    "SkyReelsV2Transformer3DModel": (dict(image_dim=24, added_kv_proj_dim=24, inject_sample_info=True), io(
        1, 4, 2, 4, 4, encoder_hidden_states_image=n(1, 2, 24), fps=tensor([1]))),
    "StableAudio3DiTModel": (dict(io_channels=4, num_memory_tokens=2), io(
        1, 4, 4, t=0.5, global_hidden_states=n(1, 24), encoder_attention_mask=TRUE, local_add_cond=n(1, 24, 4))),
    "StableAudioDiTModel": ({}, io(  # the global token and 4 of sound; half of a head's width
        1, 4, 4, t=0.5, global_hidden_states=n(1, 1, 24), rotary_embedding=(n(5, 6).cos(), n(5, 6).sin()))),
    "T5FilmDecoder": (dict(input_dims=4, targets_length=4, d_model=24, d_kv=12, d_ff=24), dict(
        encodings_and_masks=[(n(1, 3, 24), ones(1, 3)), (n(1, 2, 24), ones(1, 2))], decoder_input_tokens=n(1, 4, 4),
        decoder_noise_time=tensor([0.5]))),
    "Transformer2DModel": (dict(in_channels=4, num_layers=2, cross_attention_dim=24), dict(
        hidden_states=n(1, 4, 2, 2), encoder_hidden_states=n(1, 3, 24))),
    "TransformerTemporalModel": (dict(in_channels=4, num_layers=2), dict(hidden_states=n(2, 4, 2, 2), num_frames=2)),
    "WanAnimate2Transformer3DModel": (dict(text_len=3, in_dim=4, out_dim=2, use_img_emb=False), dict(
        hidden_states=[n(2, 2, 4, 4)], timestep=tensor([500]), encoder_hidden_states=[n(3, 24)],
        condition_latents=[n(2, 2, 4, 4)], kv_cache=(n(1, 4, 2, 12), n(1, 4, 2, 12)), kv_cache_mode="cached", seq_len=8,
        reference_grid_sizes=tensor([[1, 2, 2]]), origin_len=1, origin_area=[32, 32])),
    "WanAnimateTransformer3DModel": (dict(  # the reference frame and one more
        in_channels=8, latent_channels=2, added_kv_proj_dim=24, motion_encoder_channel_sizes={"4": 4, "8": 4},
        motion_encoder_size=8, inject_face_latents_blocks=1), io(
        1, 8, 2, 4, 4, encoder_hidden_states_image=n(1, 2, 24), pose_hidden_states=n(1, 2, 1, 4, 4),
        face_pixel_values=n(1, 3, 1, 8, 8))),
    "WanTransformer3DModel": (dict(image_dim=24, added_kv_proj_dim=24), io(
        1, 4, 2, 4, 4, encoder_hidden_states_image=n(1, 2, 24))),
    "WanVACETransformer3DModel": (dict(image_dim=24, added_kv_proj_dim=24, vace_layers=[0, 1], vace_in_channels=3), io(
        1, 4, 2, 4, 4, encoder_hidden_states_image=n(1, 2, 24), control_hidden_states=n(1, 3, 2, 4, 4))),
    "ZImageTransformer2DModel": (dict(axes_lens=[64, 8, 8]), dict(
        x=[n(4, 1, 4, 4)], t=tensor([0.5]), cap_feats=[n(3, 24)])),
}
# fmt: on
"""Class name: configuration, inputs."""


def allegro(model, call):
    rotary = import_module("diffusers.models.embeddings").get_3d_rotary_pos_embed_allegro
    place = {"crops_coords": ((0, 0), (2, 2)), "device": torch.device("cpu")}
    t, h, w, *_ = rotary(embed_dim=12, grid_size=(2, 2), temporal_size=2, **place)
    return call | {"image_rotary_emb": ((t, h, w), grid(2, 2, 2).T[:, None])}  # (3, 1, 8)


def sana_wm_refiner(model, call):
    size = {"batch_size": 1, "frame_positions": [0], "height": 2, "width": 2, "fps": 8.0}
    rotary = model.build_rotary_emb_for_absolute_positions(**size, device=torch.device("cpu"))
    return call | {"video_rotary_emb": rotary}


def wan_animate_2(model, call):
    """Fill the keys and values of the reference frame as an earlier pass would leave them."""
    from torch.nn.attention.flex_attention import create_block_mask

    # The model would make a mask with torch.compile, which needs a C++ compiler; in this one all may see all.
    everything = partial(create_block_mask, lambda b, h, q, k: k >= 0, None, None, device="cpu")
    model.block_masks[1, 4] = everything(128, 256)
    cache = sys.modules[type(model).__module__].WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(*call["kv_cache"])  # one frame of 2 × 2 tokens
    return call | {"kv_cache": cache}


LENGTHS = ("condition_lengths", [2, 3])
PREPARE = {
    "AllegroTransformer3DModel": allegro,
    "DualTransformer2DModel": lambda model, call: setattr(model, *LENGTHS) or call,
    "SanaWMLTX2RefinerTransformer3DModel": sana_wm_refiner,
    "WanAnimate2Transformer3DModel": wan_animate_2,
}
ZOO = {name: partial(make, name) for name in TABLE}
"""Class name → a function that makes a model and the keyword arguments of one forward."""


def leaves(output: Any) -> list[Tensor]:
    """Return copies of the tensors in an output, whatever it is."""
    return [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def called(model: nn.Module, inputs: dict[str, Any]) -> Modules:
    """Return the sites that a forward calls, none of them twice."""
    every, calls = sites(model), []
    with torch.no_grad(), gated(every, lambda site, compute: calls.append(site) or compute()):
        model(**inputs)
    assert len(set(calls)) == len(calls), "a site is called several times in a forward"
    return {name: module for i, (name, module) in enumerate(every.items()) if i in calls}


def examine(model: nn.Module, inputs: dict[str, Any], sites: Modules) -> list[str]:
    """Return the laws that the sites of a model break: none if it is exact."""
    asked, cache, broken, every = [], {}, [], len(sites)
    ones, zeros = reuse([True] * every, cache), lambda: broken.append("a skipped site computes")
    with torch.no_grad():
        plain = leaves(model(**inputs))
        with gated(sites, lambda site, compute: asked.append(site) or ones(site, compute)):
            computed = leaves(model(**inputs))
        kept = tree_map(torch.clone, cache)
        with gated(sites, lambda site, _: reuse([False] * every, cache)(site, zeros)):
            reused = leaves(model(**inputs))
    varied = [bool(x.isfinite().all() and x.std() > 0) for x in plain]
    laws = {
        "the output is finite and not constant": varied and all(varied),
        "computing everything is the plain model bit for bit": equal(plain, computed),
        "each site is asked once": sorted(asked) == list(range(every)),
        "reusing everything at equal inputs is the plain model": equal(plain, reused),
        "cached features are left alone": tree_all(bool, tree_map(torch.equal, kept, cache)),
    }
    return broken + [law for law, holds in laws.items() if not holds]
