"""The zoo: a tiny random model of every transformer that diffusers exports, and the inputs of one forward.

    ZOO[class name]()    a frozen model, and the keyword arguments of one call

An entry of the table is the submodule of diffusers, the configuration (two blocks of each kind, widths of 8 to 32) and
a function of `n`, which draws noise of a shape, that returns the inputs, with as few tokens as the class allows. Every
optional kind of token is given (references, history, sound), so that every block runs. Nothing of diffusers is imported
until an entry is called. This file does not know sites or gates: tests/models/test_zoo.py asks the questions.
"""

# ruff: noqa: C408
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from conftest import seeded
from torch import Tensor, nn, ones, tensor

LEFT_OUT = {
    "MiniMaxMusic3RVQDepthDecoder": "not a denoiser: it writes audio codes one codebook after another, with no timestep"
}
"""Classes that are not in the zoo, and why."""


def submodule(name: str) -> Any:
    return import_module(f"diffusers.models.transformers.{name}")


def make(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with all weights drawn anew, since many start with gates of zero, and its inputs."""
    module, config, inputs = TABLE[name]
    generator = seeded(1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(submodule(module), name)(**config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(std=0.2)
    call = inputs(lambda *shape: torch.randn(shape, generator=generator))
    return model, PREPARE.get(name, lambda model, call: call)(model, call)


def io(n: Callable[..., Tensor], x: tuple[int, ...], text: tuple[int, ...] = (1, 3, 8), t: float = 500.0, **more: Any):  # fmt: skip
    """Return what nearly all take: a latent of shape x, text of shape `text`, one timestep for each of the batch."""
    return dict(hidden_states=n(*x), encoder_hidden_states=n(*text), timestep=torch.full(text[:1], t), **more)  # fmt: skip


def grid(*sizes: int) -> Tensor:
    """Return the positions of a grid's tokens, one row each, integers."""
    return torch.cartesian_prod(*map(torch.arange, sizes))


def mask(*shape: int) -> Tensor:
    """Return a mask that hides nothing, of whole numbers."""
    return torch.ones(shape, dtype=torch.long)


def true(*shape: int) -> Tensor:
    """Return a mask that hides nothing, of booleans."""
    return torch.ones(shape, dtype=torch.bool)


# fmt: off
T16 = (1, 3, 16)
H = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2)  # a width of 16, two blocks
H12 = dict(H, attention_head_dim=12)
IO4 = dict(in_channels=4, out_channels=4)
ROPE = (4, 2, 2)  # how the 8 channels of a head are shared among the three axes of a position
FLUX = dict(H, in_channels=4, num_single_layers=2, joint_attention_dim=8)
FLUX12 = dict(H12, in_channels=4, num_single_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 4))
WAN16 = dict(H12, **IO4, text_dim=16, freq_dim=16, ffn_dim=32, rope_max_seq_len=32)
WAN = dict(H12, in_channels=2, out_channels=2, text_dim=8, freq_dim=8, ffn_dim=16, image_dim=8, added_kv_proj_dim=24,
           rope_max_seq_len=8)
COGVIDEO = dict(H, **IO4, time_embed_dim=8, text_embed_dim=16, sample_width=4, sample_height=4, sample_frames=5,
                max_text_seq_length=3)
COGVIEW = dict(H, **IO4, text_embed_dim=16, time_embed_dim=8, condition_dim=8, pos_embed_max_size=8, sample_size=4)
HUNYUAN = dict(H, **IO4, num_single_layers=2, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=ROPE)
LUMINA = dict(sample_size=4, in_channels=4, hidden_size=16, num_layers=2, num_attention_heads=2, num_kv_heads=1,
              multiple_of=8)
KANDINSKY = dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=8, model_dim=16, ff_dim=16,
                 num_text_blocks=2, num_visual_blocks=2, axes_dims=ROPE)
JOY = dict(in_channels=4, hidden_size=16, num_attention_heads=2, text_dim=8, num_layers=2, rope_dim_list=list(ROPE))
LTX = dict(H, **IO4, cross_attention_dim=16, caption_channels=8)
SANA = dict(H12, in_channels=2, out_channels=2, num_cross_attention_heads=2, cross_attention_head_dim=12,
            cross_attention_dim=24, caption_channels=8, sample_size=2)
QWEN = dict(H12, axes_dims_rope=(4, 4, 4))


def flux(n, **more):
    return io(n, (1, 4, 4), T16, 0.5, img_ids=grid(1, 2, 2).float(), txt_ids=torch.zeros(3, 3), **more)


def cogview(n):
    size = tensor([[4.0, 4.0]])
    return io(n, (1, 4, 4, 4), T16, original_size=size, target_size=size, crop_coords=size * 0)


def wan(n, **more):
    return {**io(n, (2, 2, 2, 4, 4), (2, 3, 8), encoder_hidden_states_image=n(2, 2, 8)), **more}


def framepack(n):  # seven frames of history in three resolutions, then the frame being made
    return io(n, (1, 4, 1, 4, 4), encoder_attention_mask=mask(1, 3), pooled_projections=n(1, 8),
              image_embeds=n(1, 1, 8), guidance=tensor([6.0]), indices_latents=tensor([7]),
              latents_clean=n(1, 4, 1, 4, 4), indices_latents_clean=tensor([6]),
              latents_history_2x=n(1, 4, 2, 4, 4), indices_latents_history_2x=tensor([4, 5]),
              latents_history_4x=n(1, 4, 4, 4, 4), indices_latents_history_4x=tensor([0, 1, 2, 3]))


def cosmos3(n):  # three tokens of text, then one frame of 2 × 2 patches
    places = torch.arange(3, 7)
    return dict(input_ids=tensor([1, 2, 3]), text_indexes=torch.arange(3), position_ids=torch.arange(7).expand(3, 7),
                und_len=3, sequence_length=7, vision_tokens=[n(1, 4, 1, 4, 4)], vision_token_shapes=[(1, 2, 2)],
                vision_sequence_indexes=places, vision_mse_loss_indexes=places,
                vision_timesteps=torch.full((4,), 500.0), vision_noisy_frame_indexes=[tensor([0])])


def minimax_h3(n):  # one packed sequence: 4 tokens of video, 2 of text, 2 of sound
    i = torch.arange(8)
    return dict(io(n, (2, 4, 8), (2, 2, 8)), audio_hidden_states=n(2, 2, 4), timestep=tensor([0.5]),
                timestep_indices=i * 0, token_tags=tensor([0, 0, 0, 0, 1, 1, 2, 2]),
                position_ids=i[:, None].expand(8, 3), video_indices=i[:4], text_indices=i[4:6], audio_indices=i[6:])


def sana_wm(n):  # a camera: to the world, then fx fy cx cy
    camera = torch.cat([torch.eye(4).flatten(), tensor([2.0, 2.0, 1.0, 1.0])]).expand(2, 2, 20)
    return dict(io(n, (2, 2, 2, 2, 2), (2, 1, 3, 8)), timestep=torch.full((2, 1, 2), 500),
                encoder_attention_mask=ones(2, 3), camera_conditions=camera, chunk_plucker=n(2, 4, 2, 2, 2))


def stable_audio(n):
    angles = n(5, 4)  # the global token and 4 of sound; half of a head's width
    return io(n, (2, 4, 4), (2, 3, 8), 0.5, global_hidden_states=n(2, 1, 8),
              rotary_embedding=(angles.cos(), angles.sin()))


TABLE: dict[str, tuple[str, dict[str, Any], Callable[[Callable[..., Tensor]], dict[str, Any]]]] = {
    "AceStepTransformer1DModel": ("ace_step_transformer", dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4),
        lambda n: io(n, (1, 8, 4), T16, 0.5, timestep_r=tensor([0.25]), context_latents=n(1, 8, 8))),
    "AllegroTransformer3DModel": ("transformer_allegro", dict(
        H12, cross_attention_dim=24, sample_height=4, sample_width=4, sample_frames=2, caption_channels=16),
        lambda n: io(n, (1, 4, 2, 4, 4), T16, encoder_attention_mask=ones(1, 3))),
    "AnyFlowTransformer3DModel": ("transformer_anyflow", WAN16, lambda n: dict(
        io(n, (1, 2, 4, 4, 4), T16), timestep=torch.full((1, 2), 500.0), r_timestep=torch.full((1, 2), 250.0))),
    "AnyFlowFARTransformer3DModel": ("transformer_anyflow_far", dict(WAN16, chunk_partition=(1, 1)), lambda n: dict(
        io(n, (1, 2, 4, 4, 4), T16), timestep=torch.full((1, 2), 500.0), r_timestep=torch.full((1, 2), 250.0),
        chunk_partition=[1, 1])),
    "AuraFlowTransformer2DModel": ("auraflow_transformer_2d", dict(
        sample_size=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=16),
        lambda n: io(n, (1, 4, 4, 4), T16, 0.5)),
    "BriaFibo2Transformer2DModel": ("transformer_bria_fibo2", dict(
        in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=16, injection_layer_ids=(1,),
        perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=4, gist_step=2, gist_min_text_len=2,
        gist_max_text_len=8, axes_dims=(4, 4, 4), axes_lens=(16, 16, 16)),
        lambda n: io(n, (1, 4, 4, 4), (1, 1 + 2, 3, 16), 0.5)),
    "BriaFiboTransformer2DModel": ("transformer_bria_fibo", dict(FLUX12, text_encoder_dim=16),
        lambda n: flux(n, text_encoder_layers=[n(1, 3, 16) for _ in range(4)])),
    "BriaTransformer2DModel": ("transformer_bria", FLUX12, flux),
    "ChromaTransformer2DModel": ("transformer_chroma", dict(
        FLUX12, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1), flux),
    "ChronoEditTransformer3DModel": ("transformer_chronoedit", WAN16, lambda n: io(n, (1, 4, 2, 4, 4), T16)),
    "CogVideoXTransformer3DModel": ("cogvideox_transformer_3d", COGVIDEO, lambda n: io(n, (1, 2, 4, 4, 4), T16)),
    "ConsisIDTransformer3DModel": ("consisid_transformer_3d", dict(
        COGVIDEO, is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=8, cross_attn_num_heads=2,
        LFE_id_dim=8, LFE_vit_dim=8, LFE_depth=5, LFE_dim_head=4, LFE_num_heads=2, LFE_num_id_token=2,
        LFE_num_querie=2, LFE_output_dim=10),  # two thirds of the width, as the blocks that read it expect
        lambda n: io(n, (1, 2, 4, 4, 4), T16, id_cond=n(1, 8), id_vit_hidden=[n(1, 3, 8) for _ in range(5)])),
    "CogView3PlusTransformer2DModel": ("transformer_cogview3plus", COGVIEW, cogview),
    "CogView4Transformer2DModel": ("transformer_cogview4", dict(COGVIEW, rope_axes_dim=(8, 8)), cogview),
    "Cosmos3OmniTransformer": ("transformer_cosmos3", dict(
        head_dim=8, hidden_size=16, intermediate_size=32, latent_channel=4, num_attention_heads=2, num_hidden_layers=2,
        num_key_value_heads=1, patch_latent_dim=16, vocab_size=11, rope_axes_dim=(2, 1, 1)), cosmos3),
    "CosmosTransformer3DModel": ("transformer_cosmos", dict(  # the padding mask needs torchvision
        H12, **IO4, text_embed_dim=16, adaln_lora_dim=8, max_size=(4, 8, 8), concat_padding_mask=False),
        lambda n: io(n, (1, 4, 2, 4, 4), T16, 0.5, fps=16)),
    "DiTTransformer2DModel": ("dit_transformer_2d", dict(H, sample_size=4, num_embeds_ada_norm=10),
        lambda n: dict(hidden_states=n(1, 4, 4, 4), timestep=tensor([500]), class_labels=tensor([3]))),
    "DreamLiteTransformer2DModel": ("transformer_2d_dreamlite", dict(
        H, in_channels=4, norm_num_groups=2, cross_attention_dim=16, qk_norm="rms_norm"),
        lambda n: dict(hidden_states=n(1, 4, 4, 4), encoder_hidden_states=n(1, 3, 16))),
    "DualTransformer2DModel": ("dual_transformer_2d", dict(
        H, in_channels=4, norm_num_groups=2, cross_attention_dim=16),
        lambda n: dict(hidden_states=n(1, 4, 4, 4), encoder_hidden_states=n(1, 5, 16))),
    "EasyAnimateTransformer3DModel": ("transformer_easyanimate", dict(
        H, **IO4, patch_size=2, sample_width=4, sample_height=4, mmdit_layers=2, time_embed_dim=8,
        text_embed_dim=16) | dict(attention_head_dim=16), lambda n: io(n, (1, 4, 2, 4, 4), T16)),
    "ErnieImageTransformer2DModel": ("transformer_ernie_image", dict(
        hidden_size=24, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, **IO4, text_in_dim=16,
        rope_axes_dim=(4, 4, 4)), lambda n: dict(
        hidden_states=n(1, 4, 2, 2), timestep=tensor([500.0]), text_bth=n(1, 3, 16), text_lens=tensor([3]))),
    "Flux2Transformer2DModel": ("transformer_flux2", dict(
        FLUX, axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=8), lambda n: io(
        n, (1, 4, 4), t=0.5, guidance=tensor([3.5]), img_ids=grid(1, 2, 2, 1), txt_ids=grid(1, 1, 1, 3))),
    "Flux3Transformer2DModel": ("transformer_flux3", dict(
        FLUX, cond_in_channels=4, timestep_channels=8, axes_dims_rope=(2, 2, 2, 2)), lambda n: io(
        n, (1, 4, 4), t=0.5, img_ids=grid(1, 2, 2, 1), txt_ids=grid(1, 1, 1, 3),
        image_cond_hidden_states=n(1, 2, 4), image_cond_ids=grid(1, 2, 1, 1))),
    "FluxTransformer2DModel": ("transformer_flux", dict(FLUX, axes_dims_rope=ROPE, pooled_projection_dim=8),
        lambda n: io(n, (1, 4, 4), t=0.5, pooled_projections=n(1, 8), img_ids=grid(1, 2, 2),
                     txt_ids=torch.zeros(3, 3))),
    "GlmImageTransformer2DModel": ("transformer_glm_image", dict(
        H, **IO4, text_embed_dim=8, time_embed_dim=8, condition_dim=8, prior_vq_quantizer_codebook_size=5),
        lambda n: io(n, (1, 4, 4, 4), prior_token_id=tensor([[0, 1, 2, 3]]), target_size=tensor([[4.0, 4.0]]),
                     prior_token_drop=tensor([[False, True, False, False]]), crop_coords=torch.zeros(1, 2))),
    "HeliosTransformer3DModel": ("transformer_helios", dict(
        H, **IO4, rope_dim=ROPE, text_dim=8, freq_dim=8, ffn_dim=16), lambda n: io(
        n, (1, 4, 1, 4, 4), indices_hidden_states=tensor([[1]]), latents_history_short=n(1, 4, 1, 4, 4),
        indices_latents_history_short=tensor([[0]]))),
    "HiDreamImageTransformer2DModel": ("transformer_hidream_image", dict(
        H, patch_size=2, in_channels=4, num_single_layers=2, caption_channels=[8, 8], text_emb_dim=8,
        axes_dims_rope=ROPE, max_resolution=(4, 4), llama_layers=[0, 1, 2, 3], num_routed_experts=2,
        num_activated_experts=1), lambda n: dict(
        hidden_states=n(1, 4, 4, 4), timesteps=tensor([500.0]), encoder_hidden_states_t5=n(1, 2, 8),
        encoder_hidden_states_llama3=n(4, 1, 2, 8), pooled_embeds=n(1, 8))),
    "HunyuanDiT2DModel": ("hunyuan_transformer_2d", dict(  # the last of four blocks is the first with a skip connection
        H, in_channels=4, patch_size=2, sample_size=4, hidden_size=16, mlp_ratio=2.0, cross_attention_dim=8,
        cross_attention_dim_t5=8, pooled_projection_dim=8, text_len=2, text_len_t5=3) | dict(num_layers=4),
        lambda n: io(n, (1, 4, 4, 4), (1, 2, 8), text_embedding_mask=mask(1, 2), encoder_hidden_states_t5=n(1, 3, 8),
                     text_embedding_mask_t5=mask(1, 3), image_meta_size=torch.full((1, 6), 4.0), style=tensor([0]),
                     image_rotary_emb=(n(4, 8).cos(), n(4, 8).sin()))),
    "HunyuanImageTransformer2DModel": ("transformer_hunyuanimage", dict(
        H, **IO4, num_single_layers=2, text_embed_dim=8, rope_axes_dim=(4, 4)),
        lambda n: io(n, (1, 4, 2, 2), encoder_attention_mask=mask(1, 3))),
    "HunyuanVideo15Transformer3DModel": ("transformer_hunyuan_video15", dict(
        H, **IO4, rope_axes_dim=ROPE, text_embed_dim=8, text_embed_2_dim=8, image_embed_dim=8), lambda n: io(
        n, (1, 4, 1, 2, 2), encoder_attention_mask=mask(1, 3), encoder_hidden_states_2=n(1, 2, 8),
        encoder_attention_mask_2=mask(1, 2), image_embeds=n(1, 1, 8))),
    "HunyuanVideoFramepackTransformer3DModel": ("transformer_hunyuan_video_framepack", dict(
        HUNYUAN, has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True), framepack),
    "HunyuanVideoTransformer3DModel": ("transformer_hunyuan_video", HUNYUAN, lambda n: io(
        n, (1, 4, 1, 4, 4), encoder_attention_mask=mask(1, 3), pooled_projections=n(1, 8), guidance=tensor([6.0]))),
    "Ideogram4Transformer2DModel": ("transformer_ideogram4", dict(
        H, in_channels=4, intermediate_size=16, adaln_dim=8, llm_features_dim=8, mrope_section=(2, 1, 1)),
        lambda n: io(n, (1, 6, 4), (1, 6, 8), 0.5, position_ids=grid(6, 1, 1)[None], segment_ids=mask(1, 6),
                     indicator=tensor([[3, 3, 2, 2, 2, 2]]))),  # two tokens of text, four of the image
    "JoyImageEditPlusTransformer3DModel": ("transformer_joyimage_edit_plus", JOY, lambda n: io(  # 2 × 2 patches
        n, (1, 4, 4, 1, 2, 2), encoder_hidden_states_mask=ones(1, 3), shape_list=[[(1, 2, 2)]])),
    "JoyImageEditTransformer3DModel": ("transformer_joyimage", JOY, lambda n: io(n, (1, 4, 1, 4, 4))),
    "Kandinsky5Transformer3DModel": ("transformer_kandinsky", KANDINSKY, lambda n: io(
        n, (1, 1, 4, 4, 4), pooled_projections=n(1, 8), visual_rope_pos=[torch.arange(i) for i in (1, 2, 2)],
        text_rope_pos=torch.arange(3))),
    "Kandinsky6SRTransformer3DModel": ("transformer_kandinsky6_sr", dict(  # its attention works on tiles of 8 × 8
        in_visual_dim=2, out_visual_dim=4, time_dim=8, model_dim=16, ff_dim=16, num_visual_blocks=2, axes_dims=ROPE),
        lambda n: dict(hidden_states=n(1, 1, 8, 16, 5), timestep=tensor([500.0]))),
    "Kandinsky6Transformer3DModel": ("transformer_kandinsky6", dict(
        KANDINSKY, visual_cond=False, in_audio_dim=4, out_audio_dim=4), lambda n: io(
        n, (1, 1, 4, 4, 4), pooled_projections=n(1, 8), audio_hidden_states=n(1, 2, 4))),
    "Krea2Transformer2DModel": ("transformer_krea2", dict(
        H, in_channels=4, num_key_value_heads=1, intermediate_size=16, text_hidden_dim=8, num_text_layers=2,
        text_num_attention_heads=2, axes_dims_rope=ROPE, text_num_key_value_heads=2, text_intermediate_size=16,
        timestep_embed_dim=8), lambda n: io(n, (1, 4, 4), (1, 3, 2, 8), 0.5, position_ids=grid(7, 1, 1))),
    "LTX2VideoTransformer3DModel": ("transformer_ltx2", dict(
        LTX, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8), lambda n: io(
        n, (1, 4, 4), audio_hidden_states=n(1, 2, 4), audio_encoder_hidden_states=n(1, 3, 8), num_frames=1, height=2,
        width=2, audio_num_frames=2)),
    "LTXVideoTransformer3DModel": ("transformer_ltx", LTX, lambda n: io(
        n, (1, 4, 4), encoder_attention_mask=mask(1, 3), num_frames=1, height=2, width=2)),
    "LatteTransformer3DModel": ("latte_transformer_3d", dict(
        H, in_channels=4, cross_attention_dim=16, sample_size=4, patch_size=2, caption_channels=8, video_length=2,
        activation_fn="gelu-approximate", norm_type="ada_norm_single", norm_elementwise_affine=False,
        num_embeds_ada_norm=10), lambda n: io(n, (1, 4, 2, 4, 4))),
    "LongCatAudioDiTTransformer": ("transformer_longcat_audio_dit", dict(
        dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=8, latent_dim=4),
        lambda n: io(n, (1, 4, 4), t=0.5, encoder_attention_mask=mask(1, 3), latent_cond=n(1, 4, 4))),
    "LongCatImageTransformer2DModel": ("transformer_longcat_image", dict(
        FLUX, axes_dims_rope=ROPE, pooled_projection_dim=8),
        lambda n: io(n, (1, 4, 4), t=0.5, img_ids=grid(1, 2, 2), txt_ids=torch.zeros(3, 3))),
    "Lumina2Transformer2DModel": ("transformer_lumina2", dict(
        LUMINA, axes_dim_rope=ROPE, axes_lens=(8, 4, 4), cap_feat_dim=8),
        lambda n: io(n, (1, 4, 4, 4), t=0.5, encoder_attention_mask=mask(1, 3))),
    "LuminaNextDiT2DModel": ("lumina_nextdit2d", dict(LUMINA, cross_attention_dim=8), lambda n: io(
        n, (1, 4, 4, 4), t=0.5, encoder_mask=mask(1, 3), cross_attention_kwargs={},
        image_rotary_emb=torch.polar(ones(2, 2, 4), n(2, 2, 4)))),
    "MiniMaxH3Transformer3DModel": ("transformer_minimax_h3", dict(
        num_attention_heads=2, attention_head_dim=12, hidden_size=16, num_layers=2, num_refiner_layers=2, ffn_dim=16,
        in_channels=2, audio_in_channels=4, text_dim=8, freq_dim=8, time_embed_hidden_dim=16, time_embed_dim=8,
        rope_freq_dim=2), minimax_h3),
    "MiniMaxMusic3Transformer1DModel": ("transformer_minimax_music3", dict(
        H, in_channels=4, condition_dim=8, ff_inner_dim=16, rotary_dim=4, fourier_embedding_dim=8),
        lambda n: io(n, (2, 4, 4), (2, 4, 8), 0.5)),
    "MochiTransformer3DModel": ("transformer_mochi", dict(
        H, pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=4),
        lambda n: io(n, (2, 4, 2, 4, 4), (2, 4, 16), encoder_attention_mask=true(2, 4))),
    "MotifVideoTransformer3DModel": ("transformer_motif_video", dict(
        H12, in_channels=5, out_channels=2, num_single_layers=4, num_decoder_layers=2, text_embed_dim=8,
        rope_axes_dim=(4, 4, 4), enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True),
        lambda n: io(n, (2, 5, 1, 4, 4), (2, 3, 8), encoder_attention_mask=true(2, 3))),
    "NucleusMoEImageTransformer2DModel": ("transformer_nucleusmoe_image", dict(  # one dense block, two of experts
        QWEN, in_channels=8, out_channels=2, joint_attention_dim=8, dense_moe_strategy="leave_first_block_dense",
        mlp_ratio=8.0,  # the dense feed-forward's width is rounded down to a multiple of 128; at 4 it would be none
        num_experts=4, moe_intermediate_dim=8, capacity_factors=2.0) | dict(num_layers=3), lambda n: io(
        n, (2, 4, 8), (2, 3, 8), 0.5, img_shapes=[(1, 2, 2)], encoder_hidden_states_mask=true(2, 3))),
    "OmniGenTransformer2DModel": ("transformer_omnigen", dict(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16, num_layers=2,
        pad_token_id=0, vocab_size=8, max_position_embeddings=16, original_max_position_embeddings=16,
        rope_scaling=dict(short_factor=[1.0] * 4, long_factor=[1.0] * 4), pos_embed_max_size=4, time_step_dim=8),
        lambda n: dict(hidden_states=n(2, 4, 4, 4), timestep=torch.full((2,), 0.5), input_img_latents=[],
                       input_ids=tensor([[1, 2, 3], [4, 5, 6]]), input_image_sizes={},
                       attention_mask=ones(2, 8, 8),  # 3 of text, 1 of time, 4 of image
                       position_ids=torch.arange(8).expand(2, 8))),
    "OvisImageTransformer2DModel": ("transformer_ovis_image", dict(QWEN, **IO4, num_single_layers=2,
        joint_attention_dim=8), lambda n: io(n, (2, 4, 4), (2, 3, 8), 0.5, img_ids=ones(4, 3), txt_ids=ones(3, 3) * 0)),
    "PRXTransformer2DModel": ("transformer_prx", dict(
        in_channels=2, context_in_dim=8, hidden_size=16, num_heads=2, depth=2, axes_dim=[4, 4]),
        lambda n: io(n, (2, 2, 4, 4), (2, 3, 8), 0.5, attention_mask=true(2, 3))),
    "PixArtTransformer2DModel": ("pixart_transformer_2d", dict(
        H, cross_attention_dim=16, sample_size=4, caption_channels=8, use_additional_conditions=False),
        lambda n: io(n, (1, 4, 4, 4), added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
                     encoder_attention_mask=ones(1, 3))),
    "PriorTransformer": ("prior_transformer", dict(H, embedding_dim=8, num_embeddings=3),
        lambda n: io(n, (2, 8), (2, 3, 8), proj_embedding=n(2, 8), attention_mask=true(2, 3))),
    "QwenImage21Transformer2DModel": ("transformer_qwenimage21", dict(QWEN, **IO4, context_in_dim=8), lambda n: dict(
        io(n, (2, 4, 4), (2, 3, 8)), timestep=tensor([0.5]),  # one for the batch: the model adds a row of its own
        img_shapes=[[(1, 2, 2)], [(1, 2, 2)]],
        img_mask=tensor([[False, False, False, True]]).expand(2, 4))),  # a slot is 2 × 2 tokens
    "QwenImageTransformer2DModel": ("transformer_qwenimage", dict(
        QWEN, in_channels=8, out_channels=2, joint_attention_dim=8), lambda n: io(
        n, (2, 4, 8), (2, 3, 8), 0.5, encoder_hidden_states_mask=true(2, 3), img_shapes=[(1, 2, 2)] * 2)),
    "RFD4ProteinaTransformer": ("transformer_rfd4_proteina", dict(
        nlayers=2, token_dim=16, nheads=2, dim_cond=8, pair_repr_dim=8, latent_dim=4, t_emb_dim=8,
        feats_seq=("xt_bb_ca", "xt_local_latents"), feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
        feats_pair_repr=("xt_bb_ca_pair_dists",), tri_mult_c=8, num_sequence_classes=5), lambda n: dict(
        bb_ca=n(2, 4, 3), local_latents=n(2, 4, 4), bb_ca_time=torch.full((2,), 0.5), padding_mask=true(2, 4),
        local_latents_time=torch.full((2,), 0.5),
        conditioning=dict(is_in_context_conditioning=~true(2, 4), supports_local_latent=true(2, 4)))),
    "SD3Transformer2DModel": ("transformer_sd3", dict(
        H, sample_size=4, in_channels=2, out_channels=2, joint_attention_dim=8, caption_projection_dim=16,
        pooled_projection_dim=8, pos_embed_max_size=2, qk_norm="rms_norm",
        dual_attention_layers=(0,)),  # as 3.5 has it: a second attention in the first blocks only
        lambda n: io(n, (2, 2, 4, 4), (2, 3, 8), pooled_projections=n(2, 8))),
    "SanaTransformer2DModel": ("sana_transformer", SANA,
        lambda n: io(n, (2, 2, 2, 2), (2, 3, 8), encoder_attention_mask=ones(2, 3))),
    "SanaVideoTransformer3DModel": ("transformer_sana_video", dict(SANA, rope_max_seq_len=8),
        lambda n: io(n, (2, 2, 2, 4, 4), (2, 3, 8), encoder_attention_mask=ones(2, 3))),
    "SanaWMLTX2RefinerTransformer3DModel": ("transformer_sana_wm_refiner", dict(
        H12, **IO4, cross_attention_dim=24, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=8, audio_cross_attention_dim=16, caption_channels=8), lambda n: dict(
        io(n, (2, 4, 4), (2, 3, 8)), timestep=torch.full((2, 4), 500.0), encoder_attention_mask=ones(2, 3))),
    "SanaWMTransformer3DModel": ("transformer_sana_wm", dict(  # every second block has another kind of attention
        in_channels=2, num_layers=4, hidden_size=32, num_attention_heads=2, softmax_every_n=2, linear_head_dim=16,
        chunk_plucker_channels=4, caption_channels=8, image_size=2), sana_wm),
    "SkyReelsV2Transformer3DModel": ("transformer_skyreels_v2", dict(WAN, inject_sample_info=True),
        lambda n: wan(n, fps=tensor([0, 1]))),
    "StableAudio3DiTModel": ("transformer_stable_audio3", dict(
        io_channels=4, embed_dim=16, depth=2, num_heads=2, cond_token_dim=8, global_cond_dim=8, local_add_cond_dim=5,
        timestep_features_dim=8, num_memory_tokens=2), lambda n: io(
        n, (2, 4, 4), (2, 3, 8), 0.5, global_hidden_states=n(2, 8), encoder_attention_mask=true(2, 3),
        local_add_cond=n(2, 5, 4))),
    "StableAudioDiTModel": ("stable_audio_transformer", dict(
        H, **IO4, sample_size=4, num_key_value_attention_heads=2, cross_attention_dim=16, time_proj_dim=8,
        global_states_input_dim=8, cross_attention_input_dim=8), stable_audio),
    "T5FilmDecoder": ("t5_film_transformer", dict(
        input_dims=4, targets_length=4, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=16), lambda n: dict(
        encodings_and_masks=[(n(2, 3, 16), ones(2, 3)), (n(2, 2, 16), ones(2, 2))],
        decoder_input_tokens=n(2, 4, 4), decoder_noise_time=torch.full((2,), 0.5))),
    "Transformer2DModel": ("transformer_2d", dict(H, in_channels=4, norm_num_groups=2, cross_attention_dim=8),
        lambda n: dict(hidden_states=n(2, 4, 2, 2), encoder_hidden_states=n(2, 3, 8))),
    "TransformerTemporalModel": ("transformer_temporal", dict(H, in_channels=4, norm_num_groups=2),
        lambda n: dict(hidden_states=n(4, 4, 2, 2), num_frames=2)),
    "WanAnimate2Transformer3DModel": ("transformer_wan_animate_2", dict(
        text_len=3, in_dim=4, dim=24, ffn_dim=16, freq_dim=8, text_dim=8, out_dim=2, num_heads=2, num_layers=2,
        use_img_emb=False), lambda n: dict(
        hidden_states=[n(2, 2, 4, 4)], timestep=tensor([500]), encoder_hidden_states=[n(3, 8)],
        condition_latents=[n(2, 2, 4, 4)], kv_cache=(n(1, 4, 2, 12), n(1, 4, 2, 12)), kv_cache_mode="cached",
        seq_len=8, reference_grid_sizes=tensor([[1, 2, 2]]), origin_len=1, origin_area=[32, 32])),
    "WanAnimateTransformer3DModel": ("transformer_wan_animate", dict(
        WAN, latent_channels=2, motion_encoder_channel_sizes={"4": 4, "8": 4}, motion_encoder_size=8,
        motion_style_dim=8, motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
        inject_face_latents_blocks=1) | dict(in_channels=8), lambda n: wan(  # the reference frame and one more
        n, hidden_states=n(2, 8, 2, 4, 4), pose_hidden_states=n(2, 2, 1, 4, 4), face_pixel_values=n(2, 3, 1, 8, 8))),
    "WanTransformer3DModel": ("transformer_wan", WAN, wan),
    "WanVACETransformer3DModel": ("transformer_wan_vace", dict(WAN, vace_layers=[0, 1], vace_in_channels=3),
        lambda n: wan(n, control_hidden_states=n(2, 3, 2, 4, 4))),
    "ZImageTransformer2DModel": ("transformer_z_image", dict(
        in_channels=2, dim=24, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[4, 4, 4], axes_lens=[64, 8, 8]), lambda n: dict(
        x=[n(2, 1, 4, 4), n(2, 1, 4, 4)], t=torch.full((2,), 0.5), cap_feats=[n(3, 8), n(3, 8)])),
}
# fmt: on
"""Class name: submodule, configuration, inputs."""


def allegro(model, call):
    rotary = import_module("diffusers.models.embeddings").get_3d_rotary_pos_embed_allegro
    crops, place = ((0, 0), (2, 2)), torch.device("cpu")
    t, h, w, *_ = rotary(
        embed_dim=12, crops_coords=crops, grid_size=(2, 2), temporal_size=2, device=place
    )
    return call | {"image_rotary_emb": ((t, h, w), grid(2, 2, 2).T[:, None])}  # (3, 1, 8)


def dual(model, call):
    model.condition_lengths = [2, 3]
    return call


def sana_wm_refiner(model, call):
    rotary = model.build_rotary_emb_for_absolute_positions(
        batch_size=2, frame_positions=[0], height=2, width=2, device=torch.device("cpu"), fps=8.0
    )
    return call | {"video_rotary_emb": rotary}


def wan_animate_2(model, call):
    """Fill the keys and values of the reference frame as an earlier pass would leave them."""
    from torch.nn.attention.flex_attention import create_block_mask

    # The model would make a mask with torch.compile, which needs a C++ compiler; in this one all may see all.
    everything = partial(create_block_mask, lambda b, h, q, k: k >= 0, None, None, device="cpu")
    model.block_masks[1, 4] = everything(128, 256)
    cache = submodule("transformer_wan_animate_2").WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(*call["kv_cache"])  # one frame of 2 × 2 tokens
    return call | {"kv_cache": cache}


PREPARE = {
    "AllegroTransformer3DModel": allegro,
    "DualTransformer2DModel": dual,
    "SanaWMLTX2RefinerTransformer3DModel": sana_wm_refiner,
    "WanAnimate2Transformer3DModel": wan_animate_2,
}
ZOO = {name: partial(make, name) for name in TABLE}
"""Class name → a function that makes a model and the keyword arguments of one forward."""
