"""The zoo, A to E and PixArt: a tiny random model of each diffusers transformer, and the arguments of one forward.

Each entry is a function so that nothing is imported or built until it is asked for. Every weight is random and none is
zero: many classes start with gates of zero, and then no site would matter.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Entry = tuple[nn.Module, dict[str, Any]]

LEFT_OUT: dict[str, str] = {}
"""Classes that are not in the zoo, and why."""


def built(module: str, name: str, *, std: float = 0.2, **config: Any) -> nn.Module:
    """Return diffusers.models.transformers.MODULE.NAME(**config) with small random weights, frozen, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = getattr(import_module(f"diffusers.models.transformers.{module}"), name)(
            **config
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=std)
    return model.eval().requires_grad_(False)


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Return normal noise of a shape, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def called(**inputs: Any) -> dict[str, Any]:
    """Return keyword arguments of a forward that gives a tuple."""
    return {**inputs, "return_dict": False}


T1 = torch.tensor([500.0])
SEEN: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
"""What many classes call their size: 16 wide, two blocks."""


def ace_step() -> Entry:
    model = built(
        "ace_step_transformer",
        "AceStepTransformer1DModel",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=4,
    )
    t = torch.tensor([0.5])
    return model, called(
        hidden_states=noise(1, 8, 4),
        timestep=t,
        timestep_r=t / 2,
        encoder_hidden_states=noise(1, 3, 16, seed=2),
        context_latents=noise(1, 8, 8, seed=3),
    )


def allegro() -> Entry:
    model = built(
        "transformer_allegro",
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_height=4,
        sample_width=4,
        sample_frames=2,
        caption_channels=16,
    )
    embeddings = import_module("diffusers.models.embeddings")
    t, h, w, *_ = embeddings.get_3d_rotary_pos_embed_allegro(
        embed_dim=12,
        crops_coords=((0, 0), (2, 2)),
        grid_size=(2, 2),
        temporal_size=2,
        device=torch.device("cpu"),
    )
    positions = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).T[
        :, None
    ]  # (3, 1, 8)
    return model, called(
        hidden_states=noise(1, 4, 2, 4, 4),
        encoder_hidden_states=noise(1, 3, 16, seed=2),
        timestep=T1,
        encoder_attention_mask=torch.ones(1, 3),
        image_rotary_emb=((t, h, w), positions),
    )


def anyflow() -> Entry:
    model = built(
        "transformer_anyflow",
        "AnyFlowTransformer3DModel",
        **(SEEN | {"attention_head_dim": 12}),
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        rope_max_seq_len=32,
    )
    return model, called(
        hidden_states=noise(1, 2, 4, 4, 4),
        timestep=torch.full((1, 2), 500.0),
        r_timestep=torch.full((1, 2), 250.0),
        encoder_hidden_states=noise(1, 3, 16, seed=2),
    )


def anyflow_far() -> Entry:
    model = built(
        "transformer_anyflow_far",
        "AnyFlowFARTransformer3DModel",
        **(SEEN | {"attention_head_dim": 12}),
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        rope_max_seq_len=32,
        chunk_partition=(1, 1),
    )
    return model, called(
        hidden_states=noise(1, 2, 4, 4, 4),
        timestep=torch.full((1, 2), 500.0),
        r_timestep=torch.full((1, 2), 250.0),
        encoder_hidden_states=noise(1, 3, 16, seed=2),
        chunk_partition=[1, 1],
    )


def auraflow() -> Entry:
    model = built(
        "auraflow_transformer_2d",
        "AuraFlowTransformer2DModel",
        sample_size=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return model, called(
        hidden_states=noise(1, 4, 4, 4),
        encoder_hidden_states=noise(1, 3, 16, seed=2),
        timestep=torch.tensor([0.5]),
    )


def bria_fibo2() -> Entry:
    model = built(
        "transformer_bria_fibo2",
        "BriaFibo2Transformer2DModel",
        in_channels=4,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=4,
        gist_step=2,
        gist_min_text_len=2,
        gist_max_text_len=8,
        axes_dims=(4, 4, 4),
        axes_lens=(16, 16, 16),
    )
    return model, called(
        hidden_states=noise(1, 4, 4, 4),
        timestep=torch.tensor([0.5]),
        encoder_hidden_states=noise(1, 1 + 2, 3, 16, seed=2),
    )


def flux_like(**more: Any) -> dict[str, Any]:
    """Return the inputs of Flux and its kin: four image tokens of 4 channels, three of text of 16."""
    image = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(2.0))
    ids = {"img_ids": image, "txt_ids": torch.zeros(3, 3)}
    return called(
        hidden_states=noise(1, 4, 4),
        encoder_hidden_states=noise(1, 3, 16, seed=2),
        timestep=T1 / 1000,
        **ids,
        **more,
    )


FLUX: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 4),
}


def bria_fibo() -> Entry:
    model = built(
        "transformer_bria_fibo", "BriaFiboTransformer2DModel", **FLUX, text_encoder_dim=16
    )
    return model, flux_like(text_encoder_layers=[noise(1, 3, 16, seed=3 + i) for i in range(4)])


def bria() -> Entry:
    return built("transformer_bria", "BriaTransformer2DModel", **FLUX), flux_like()


def chroma() -> Entry:
    model = built(
        "transformer_chroma",
        "ChromaTransformer2DModel",
        **FLUX,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return model, flux_like()


WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "rope_max_seq_len": 32,
}


def chronoedit() -> Entry:
    model = built("transformer_chronoedit", "ChronoEditTransformer3DModel", **WAN)
    return model, called(
        hidden_states=noise(1, 4, 2, 4, 4),
        timestep=T1,
        encoder_hidden_states=noise(1, 3, 16, seed=2),
    )


COGVIDEO: dict[str, Any] = {
    **SEEN,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 3,
}


def cogvideox() -> Entry:
    model = built("cogvideox_transformer_3d", "CogVideoXTransformer3DModel", **COGVIDEO)
    return model, called(
        hidden_states=noise(1, 2, 4, 4, 4),
        encoder_hidden_states=noise(1, 3, 16, seed=2),
        timestep=T1,
    )


def consisid() -> Entry:
    model = built(
        "consisid_transformer_3d",
        "ConsisIDTransformer3DModel",
        **COGVIDEO,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=5,
        LFE_dim_head=4,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=2,
        LFE_output_dim=10,  # two thirds of the width, as the blocks that read it expect
    )
    return model, called(
        hidden_states=noise(1, 2, 4, 4, 4),
        encoder_hidden_states=noise(1, 3, 16, seed=2),
        timestep=T1,
        id_cond=noise(1, 8, seed=3),
        id_vit_hidden=[noise(1, 3, 8, seed=4 + i) for i in range(5)],
    )


def cogview(module: str, name: str) -> Entry:
    more = {"rope_axes_dim": (8, 8)} if name.startswith("CogView4") else {}
    model = built(
        module,
        name,
        **SEEN,
        in_channels=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=4,
        **more,
    )
    size = torch.tensor([[4.0, 4.0]])
    return model, called(
        hidden_states=noise(1, 4, 4, 4),
        encoder_hidden_states=noise(1, 3, 16, seed=2),
        timestep=T1,
        original_size=size,
        target_size=size,
        crop_coords=size * 0,
    )


def cosmos3() -> Entry:
    model = built(
        "transformer_cosmos3",
        "Cosmos3OmniTransformer",
        head_dim=8,
        hidden_size=16,
        intermediate_size=32,
        latent_channel=4,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=16,
        vocab_size=11,
        rope_axes_dim=(2, 1, 1),
    )
    return model, called(  # three tokens of text, then one frame of 2 × 2 patches
        input_ids=torch.tensor([1, 2, 3]),
        text_indexes=torch.arange(3),
        position_ids=torch.arange(7).expand(3, 7),
        und_len=3,
        sequence_length=7,
        vision_tokens=[noise(1, 4, 1, 4, 4)],
        vision_token_shapes=[(1, 2, 2)],
        vision_sequence_indexes=torch.arange(3, 7),
        vision_mse_loss_indexes=torch.arange(3, 7),
        vision_timesteps=torch.full((4,), 500.0),
        vision_noisy_frame_indexes=[torch.tensor([0])],
    )


def cosmos() -> Entry:
    model = built(
        "transformer_cosmos",
        "CosmosTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        text_embed_dim=16,
        adaln_lora_dim=8,
        max_size=(4, 8, 8),
        concat_padding_mask=False,  # needs torchvision
    )
    return model, called(
        hidden_states=noise(1, 4, 2, 4, 4),
        timestep=torch.tensor([0.5]),
        encoder_hidden_states=noise(1, 3, 16, seed=2),
        fps=16,
    )


def dit() -> Entry:
    model = built(
        "dit_transformer_2d", "DiTTransformer2DModel", **SEEN, sample_size=4, num_embeds_ada_norm=10
    )
    return model, called(
        hidden_states=noise(1, 4, 4, 4), timestep=T1.long(), class_labels=torch.tensor([3])
    )


def dreamlite() -> Entry:
    model = built(
        "transformer_2d_dreamlite",
        "DreamLiteTransformer2DModel",
        **SEEN,
        in_channels=4,
        norm_num_groups=2,
        cross_attention_dim=16,
        qk_norm="rms_norm",
    )
    return model, called(
        hidden_states=noise(1, 4, 4, 4), encoder_hidden_states=noise(1, 3, 16, seed=2)
    )


def dual() -> Entry:
    model = built(
        "dual_transformer_2d",
        "DualTransformer2DModel",
        **SEEN,
        in_channels=4,
        norm_num_groups=2,
        cross_attention_dim=16,
    )
    model.condition_lengths = [2, 3]
    return model, called(
        hidden_states=noise(1, 4, 4, 4), encoder_hidden_states=noise(1, 5, 16, seed=2)
    )


def easyanimate() -> Entry:
    model = built(
        "transformer_easyanimate",
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=4,
        sample_height=4,
        num_layers=2,
        mmdit_layers=2,
        time_embed_dim=8,
        text_embed_dim=16,
    )
    return model, called(
        hidden_states=noise(1, 4, 2, 4, 4),
        timestep=T1,
        encoder_hidden_states=noise(1, 3, 16, seed=2),
    )


def ernie() -> Entry:
    model = built(
        "transformer_ernie_image",
        "ErnieImageTransformer2DModel",
        hidden_size=24,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        text_in_dim=16,
        rope_axes_dim=(4, 4, 4),
    )
    return model, called(
        hidden_states=noise(1, 4, 2, 2),
        timestep=T1,
        text_bth=noise(1, 3, 16, seed=2),
        text_lens=torch.tensor([3]),
    )


def pixart() -> Entry:
    model = built(
        "pixart_transformer_2d",
        "PixArtTransformer2DModel",
        **SEEN,
        cross_attention_dim=16,
        sample_size=4,
        caption_channels=8,
        use_additional_conditions=False,
    )
    return model, called(
        hidden_states=noise(1, 4, 4, 4),
        encoder_hidden_states=noise(1, 3, 8, seed=2),
        timestep=T1,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=torch.ones(1, 3),
    )


ZOO: dict[str, Callable[[], Entry]] = {
    "AceStepTransformer1DModel": ace_step,
    "AllegroTransformer3DModel": allegro,
    "AnyFlowFARTransformer3DModel": anyflow_far,
    "AnyFlowTransformer3DModel": anyflow,
    "AuraFlowTransformer2DModel": auraflow,
    "BriaFibo2Transformer2DModel": bria_fibo2,
    "BriaFiboTransformer2DModel": bria_fibo,
    "BriaTransformer2DModel": bria,
    "ChromaTransformer2DModel": chroma,
    "ChronoEditTransformer3DModel": chronoedit,
    "CogVideoXTransformer3DModel": cogvideox,
    "CogView3PlusTransformer2DModel": lambda: cogview(
        "transformer_cogview3plus", "CogView3PlusTransformer2DModel"
    ),
    "CogView4Transformer2DModel": lambda: cogview(
        "transformer_cogview4", "CogView4Transformer2DModel"
    ),
    "ConsisIDTransformer3DModel": consisid,
    "Cosmos3OmniTransformer": cosmos3,
    "CosmosTransformer3DModel": cosmos,
    "DiTTransformer2DModel": dit,
    "DreamLiteTransformer2DModel": dreamlite,
    "DualTransformer2DModel": dual,
    "EasyAnimateTransformer3DModel": easyanimate,
    "ErnieImageTransformer2DModel": ernie,
    "PixArtTransformer2DModel": pixart,
}
"""Class name -> a function that makes (model, keyword arguments of one forward)."""
