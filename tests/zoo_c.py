"""Tiny models of diffusers' own transformer classes, MiniMax to Z-Image: what the rule that finds sites is tried on.

`ZOO[class name]()` returns a frozen model of two blocks of each kind and the keyword arguments of one forward.
Weights and inputs are the same at every call; no weight is zero, so that every attention and feed-forward matters.
Nothing of diffusers is imported until then, and then only the submodule of that class.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Any]]

LEFT_OUT: dict[str, str] = {
    "MiniMaxMusic3RVQDepthDecoder": "not a denoiser: it writes audio codes one codebook after another, with no timestep"
}


def _class(module: str, name: str) -> type[nn.Module]:
    return getattr(import_module(f"diffusers.models.transformers.{module}"), name)


def _tiny(module: str, name: str, **config: Any) -> nn.Module:
    """Return a frozen model with all parameters drawn anew: many classes start with gates and outputs at zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = _class(module, name)(**config)
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


def _noise() -> Callable[..., Tensor]:
    """Return a function of a shape that draws from a generator of its own."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, generator=generator)


def _time(value: float = 500) -> Tensor:
    return torch.full((2,), value)


def _minimax_h3() -> Made:
    model = _tiny(
        "transformer_minimax_h3",
        "MiniMaxH3Transformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=2,
        ffn_dim=16,
        in_channels=2,
        audio_in_channels=4,
        text_dim=8,
        freq_dim=8,
        time_embed_hidden_dim=16,
        time_embed_dim=8,
        rope_freq_dim=2,
    )
    noise = _noise()
    places = torch.arange(8)  # one packed sequence: 4 of video, 2 of text, 2 of audio
    return model, {
        "hidden_states": noise(2, 4, 8),
        "audio_hidden_states": noise(2, 2, 4),
        "encoder_hidden_states": noise(2, 2, 8),
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros(8, dtype=torch.long),
        "token_tags": torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]),
        "position_ids": places[:, None].expand(8, 3),
        "video_indices": places[:4],
        "text_indices": places[4:6],
        "audio_indices": places[6:],
    }


def _minimax_music3() -> Made:
    model = _tiny(
        "transformer_minimax_music3",
        "MiniMaxMusic3Transformer1DModel",
        in_channels=4,
        condition_dim=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        ff_inner_dim=16,
        rotary_dim=4,
        fourier_embedding_dim=8,
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 4, 4),
        "timestep": _time(0.5),
        "encoder_hidden_states": noise(2, 4, 8),
    }


def _mochi() -> Made:
    model = _tiny(
        "transformer_mochi",
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=4,
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 4, 2, 4, 4),
        "encoder_hidden_states": noise(2, 4, 16),
        "timestep": _time(),
        "encoder_attention_mask": torch.ones(2, 4, dtype=torch.bool),
    }


def _motif_video() -> Made:
    model = _tiny(
        "transformer_motif_video",
        "MotifVideoTransformer3DModel",
        in_channels=5,
        out_channels=2,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=4,
        num_decoder_layers=2,
        text_embed_dim=8,
        rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 5, 1, 4, 4),
        "timestep": _time(),
        "encoder_hidden_states": noise(2, 3, 8),
        "encoder_attention_mask": torch.ones(2, 3, dtype=torch.bool),
    }


def _nucleusmoe_image() -> Made:
    model = _tiny(
        "transformer_nucleusmoe_image",
        "NucleusMoEImageTransformer2DModel",
        in_channels=8,
        out_channels=2,
        num_layers=3,  # one dense block, two of experts
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 4),
        mlp_ratio=8.0,  # the dense feed-forward's width is rounded down to a multiple of 128; at 4 it would be none
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=8,
        capacity_factors=2.0,
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 4, 8),
        "img_shapes": [(1, 2, 2)],
        "encoder_hidden_states": noise(2, 3, 8),
        "encoder_hidden_states_mask": torch.ones(2, 3, dtype=torch.bool),
        "timestep": _time(0.5),
    }


def _omnigen() -> Made:
    model = _tiny(
        "transformer_omnigen",
        "OmniGenTransformer2DModel",
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        num_layers=2,
        pad_token_id=0,
        vocab_size=8,
        max_position_embeddings=16,
        original_max_position_embeddings=16,
        rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
        pos_embed_max_size=4,
        time_step_dim=8,
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 4, 4, 4),
        "timestep": _time(0.5),
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(2, 8, 8),  # 3 of text, 1 of time, 4 of image
        "position_ids": torch.arange(8).expand(2, 8),
    }


def _ovis_image() -> Made:
    model = _tiny(
        "transformer_ovis_image",
        "OvisImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 4),
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 4, 4),
        "encoder_hidden_states": noise(2, 3, 8),
        "timestep": _time(0.5),
        "img_ids": torch.ones(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }


def _prx() -> Made:
    model = _tiny(
        "transformer_prx",
        "PRXTransformer2DModel",
        in_channels=2,
        context_in_dim=8,
        hidden_size=16,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 2, 4, 4),
        "timestep": _time(0.5),
        "encoder_hidden_states": noise(2, 3, 8),
        "attention_mask": torch.ones(2, 3, dtype=torch.bool),
    }


def _prior() -> Made:
    model = _tiny(
        "prior_transformer",
        "PriorTransformer",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=8,
        num_embeddings=3,
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 8),
        "timestep": _time(),
        "proj_embedding": noise(2, 8),
        "encoder_hidden_states": noise(2, 3, 8),
        "attention_mask": torch.ones(2, 3, dtype=torch.bool),
    }


def _qwenimage21() -> Made:
    model = _tiny(
        "transformer_qwenimage21",
        "QwenImage21Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        context_in_dim=8,
        axes_dims_rope=(4, 4, 4),
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 4, 4),
        "encoder_hidden_states": noise(2, 3, 8),
        "timestep": torch.tensor([0.5]),  # one for the batch: the model adds a row of its own
        "img_shapes": [[(1, 2, 2)], [(1, 2, 2)]],
        "img_mask": torch.tensor([[False, False, False, True]]).expand(
            2, 4
        ),  # a slot is 2 × 2 tokens
    }


def _qwenimage() -> Made:
    model = _tiny(
        "transformer_qwenimage",
        "QwenImageTransformer2DModel",
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 4),
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 4, 8),
        "encoder_hidden_states": noise(2, 3, 8),
        "encoder_hidden_states_mask": torch.ones(2, 3, dtype=torch.bool),
        "timestep": _time(0.5),
        "img_shapes": [(1, 2, 2)] * 2,
    }


def _rfd4_proteina() -> Made:
    model = _tiny(
        "transformer_rfd4_proteina",
        "RFD4ProteinaTransformer",
        nlayers=2,
        token_dim=16,
        nheads=2,
        dim_cond=8,
        pair_repr_dim=8,
        latent_dim=4,
        t_emb_dim=8,
        feats_seq=("xt_bb_ca", "xt_local_latents"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
        feats_pair_repr=("xt_bb_ca_pair_dists",),
        tri_mult_c=8,
        num_sequence_classes=5,
    )
    noise, yes = _noise(), torch.ones(2, 4, dtype=torch.bool)
    return model, {
        "bb_ca": noise(2, 4, 3),
        "local_latents": noise(2, 4, 4),
        "bb_ca_time": _time(0.5),
        "local_latents_time": _time(0.5),
        "padding_mask": yes,
        "conditioning": {"is_in_context_conditioning": ~yes, "supports_local_latent": yes},
    }


def _sd3() -> Made:
    model = _tiny(
        "transformer_sd3",
        "SD3Transformer2DModel",
        sample_size=4,
        in_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=2,
        pos_embed_max_size=2,
        dual_attention_layers=(0,),  # as 3.5 has it: a second attention in the first blocks only
        qk_norm="rms_norm",
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 2, 4, 4),
        "encoder_hidden_states": noise(2, 3, 8),
        "pooled_projections": noise(2, 8),
        "timestep": _time(),
    }


def _sana_config() -> dict[str, Any]:
    """Return what the image and the video model have in common."""
    return {
        "in_channels": 2,
        "out_channels": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 8,
        "sample_size": 2,
    }


def _sana() -> Made:
    model = _tiny("sana_transformer", "SanaTransformer2DModel", **_sana_config())
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 2, 2, 2),
        "encoder_hidden_states": noise(2, 3, 8),
        "timestep": _time(),
        "encoder_attention_mask": torch.ones(2, 3),
    }


def _sana_video() -> Made:
    model = _tiny(
        "transformer_sana_video",
        "SanaVideoTransformer3DModel",
        **_sana_config(),
        rope_max_seq_len=8,
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 2, 2, 4, 4),
        "encoder_hidden_states": noise(2, 3, 8),
        "timestep": _time(),
        "encoder_attention_mask": torch.ones(2, 3),
    }


def _sana_wm_refiner() -> Made:
    model = _tiny(
        "transformer_sana_wm_refiner",
        "SanaWMLTX2RefinerTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=8,
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 4, 4),
        "encoder_hidden_states": noise(2, 3, 8),
        "timestep": torch.full((2, 4), 500.0),
        "video_rotary_emb": model.build_rotary_emb_for_absolute_positions(
            batch_size=2,
            frame_positions=[0],
            height=2,
            width=2,
            device=torch.device("cpu"),
            fps=8.0,
        ),
        "encoder_attention_mask": torch.ones(2, 3),
    }


def _sana_wm() -> Made:
    model = _tiny(
        "transformer_sana_wm",
        "SanaWMTransformer3DModel",
        in_channels=2,
        num_layers=4,
        hidden_size=32,
        num_attention_heads=2,
        softmax_every_n=2,  # every second block has another kind of attention
        linear_head_dim=16,
        chunk_plucker_channels=4,
        caption_channels=8,
        image_size=2,
    )
    noise = _noise()
    cameras = torch.cat(
        [torch.eye(4).flatten(), torch.tensor([2.0, 2.0, 1.0, 1.0])]
    )  # camera to world; fx fy cx cy
    return model, {
        "hidden_states": noise(2, 2, 2, 2, 2),
        "timestep": torch.full((2, 1, 2), 500),
        "encoder_hidden_states": noise(2, 1, 3, 8),
        "encoder_attention_mask": torch.ones(2, 3),
        "camera_conditions": cameras.expand(2, 2, 20),
        "chunk_plucker": noise(2, 4, 2, 2, 2),
    }


def _stable_audio3() -> Made:
    model = _tiny(
        "transformer_stable_audio3",
        "StableAudio3DiTModel",
        io_channels=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        cond_token_dim=8,
        global_cond_dim=8,
        local_add_cond_dim=5,
        timestep_features_dim=8,
        num_memory_tokens=2,
    )
    noise = _noise()
    return model, {
        "hidden_states": noise(2, 4, 4),
        "timestep": _time(0.5),
        "encoder_hidden_states": noise(2, 3, 8),
        "global_hidden_states": noise(2, 8),
        "encoder_attention_mask": torch.ones(2, 3, dtype=torch.bool),
        "local_add_cond": noise(2, 5, 4),
    }


def _stable_audio() -> Made:
    model = _tiny(
        "stable_audio_transformer",
        "StableAudioDiTModel",
        sample_size=4,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=8,
    )
    noise = _noise()
    angles = noise(5, 4)  # the global token and 4 of sound; half of a head's width
    return model, {
        "hidden_states": noise(2, 4, 4),
        "timestep": _time(0.5),
        "encoder_hidden_states": noise(2, 3, 8),
        "global_hidden_states": noise(2, 1, 8),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


def _t5_film() -> Made:
    model = _tiny(
        "t5_film_transformer",
        "T5FilmDecoder",
        input_dims=4,
        targets_length=4,
        d_model=16,
        num_layers=2,
        num_heads=2,
        d_kv=8,
        d_ff=16,
    )
    noise = _noise()
    return model, {
        "encodings_and_masks": [
            (noise(2, 3, 16), torch.ones(2, 3)),
            (noise(2, 2, 16), torch.ones(2, 2)),
        ],
        "decoder_input_tokens": noise(2, 4, 4),
        "decoder_noise_time": _time(0.5),
    }


def _transformer_2d() -> Made:
    model = _tiny(
        "transformer_2d",
        "Transformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        norm_num_groups=2,
        cross_attention_dim=8,
    )
    noise = _noise()
    return model, {"hidden_states": noise(2, 4, 2, 2), "encoder_hidden_states": noise(2, 3, 8)}


def _temporal() -> Made:
    model = _tiny(
        "transformer_temporal",
        "TransformerTemporalModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        norm_num_groups=2,
    )
    return model, {"hidden_states": _noise()(4, 4, 2, 2), "num_frames": 2}


def _wan_config() -> dict[str, Any]:
    """Return what the Wan family has in common, the branch for an image prompt included."""
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 2,
        "out_channels": 2,
        "text_dim": 8,
        "freq_dim": 8,
        "ffn_dim": 16,
        "num_layers": 2,
        "image_dim": 8,
        "added_kv_proj_dim": 24,
        "rope_max_seq_len": 8,
    }


def _wan_inputs() -> dict[str, Any]:
    noise = _noise()
    return {
        "hidden_states": noise(2, 2, 2, 4, 4),
        "timestep": _time(),
        "encoder_hidden_states": noise(2, 3, 8),
        "encoder_hidden_states_image": noise(2, 2, 8),
    }


def _wan() -> Made:
    return _tiny("transformer_wan", "WanTransformer3DModel", **_wan_config()), _wan_inputs()


def _skyreels_v2() -> Made:
    model = _tiny(
        "transformer_skyreels_v2",
        "SkyReelsV2Transformer3DModel",
        **_wan_config(),
        inject_sample_info=True,
    )
    return model, _wan_inputs() | {"fps": torch.tensor([0, 1])}


def _wan_vace() -> Made:
    model = _tiny(
        "transformer_wan_vace",
        "WanVACETransformer3DModel",
        **_wan_config(),
        vace_layers=[0, 1],
        vace_in_channels=3,
    )
    return model, _wan_inputs() | {"control_hidden_states": _noise()(2, 3, 2, 4, 4)}


def _wan_animate() -> Made:
    model = _tiny(
        "transformer_wan_animate",
        "WanAnimateTransformer3DModel",
        **_wan_config() | {"in_channels": 8, "latent_channels": 2},
        motion_encoder_channel_sizes={"4": 4, "8": 4},
        motion_encoder_size=8,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )
    noise = _noise()
    return model, _wan_inputs() | {
        "hidden_states": noise(2, 8, 2, 4, 4),  # the reference frame and one more
        "pose_hidden_states": noise(2, 2, 1, 4, 4),
        "face_pixel_values": noise(2, 3, 1, 8, 8),
    }


def _wan_animate_2() -> Made:
    """Return a denoising pass: the keys and values of the reference frame are as an earlier pass would leave them."""
    from torch.nn.attention.flex_attention import create_block_mask

    model = _tiny(
        "transformer_wan_animate_2",
        "WanAnimate2Transformer3DModel",
        text_len=3,
        in_dim=4,
        dim=24,
        ffn_dim=16,
        freq_dim=8,
        text_dim=8,
        out_dim=2,
        num_heads=2,
        num_layers=2,
        use_img_emb=False,
    )
    # The model would make a mask with torch.compile, which needs a C++ compiler; in this one all may see all.
    model.block_masks[1, 4] = create_block_mask(
        lambda b, h, q, k: k >= 0, None, None, 128, 256, device="cpu"
    )
    noise = _noise()
    cache = _class("transformer_wan_animate_2", "WanAnimate2KVCache")(2)
    for layer in cache.layer_caches:
        layer.store(noise(1, 4, 2, 12), noise(1, 4, 2, 12))  # one frame of 2 × 2 tokens
    return model, {
        "hidden_states": [noise(2, 2, 4, 4)],
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": [noise(3, 8)],
        "condition_latents": [noise(2, 2, 4, 4)],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": 8,
        "reference_grid_sizes": torch.tensor([[1, 2, 2]]),
        "origin_len": 1,
        "origin_area": [32, 32],
    }


def _z_image() -> Made:
    model = _tiny(
        "transformer_z_image",
        "ZImageTransformer2DModel",
        in_channels=2,
        dim=24,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 4, 4],
        axes_lens=[64, 8, 8],
    )
    noise = _noise()
    return model, {
        "x": [noise(2, 1, 4, 4), noise(2, 1, 4, 4)],
        "t": _time(0.5),
        "cap_feats": [noise(3, 8), noise(3, 8)],
    }


ZOO: dict[str, Callable[[], Made]] = {
    "MiniMaxH3Transformer3DModel": _minimax_h3,
    "MiniMaxMusic3Transformer1DModel": _minimax_music3,
    "MochiTransformer3DModel": _mochi,
    "MotifVideoTransformer3DModel": _motif_video,
    "NucleusMoEImageTransformer2DModel": _nucleusmoe_image,
    "OmniGenTransformer2DModel": _omnigen,
    "OvisImageTransformer2DModel": _ovis_image,
    "PRXTransformer2DModel": _prx,
    "PriorTransformer": _prior,
    "QwenImage21Transformer2DModel": _qwenimage21,
    "QwenImageTransformer2DModel": _qwenimage,
    "RFD4ProteinaTransformer": _rfd4_proteina,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
    "SanaVideoTransformer3DModel": _sana_video,
    "SanaWMLTX2RefinerTransformer3DModel": _sana_wm_refiner,
    "SanaWMTransformer3DModel": _sana_wm,
    "SkyReelsV2Transformer3DModel": _skyreels_v2,
    "StableAudio3DiTModel": _stable_audio3,
    "StableAudioDiTModel": _stable_audio,
    "T5FilmDecoder": _t5_film,
    "Transformer2DModel": _transformer_2d,
    "TransformerTemporalModel": _temporal,
    "WanAnimate2Transformer3DModel": _wan_animate_2,
    "WanAnimateTransformer3DModel": _wan_animate,
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": _wan_vace,
    "ZImageTransformer2DModel": _z_image,
}
