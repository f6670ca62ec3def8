"""sites(): the rule on small models made for it, its messages, and what it says about models of known cost."""

import copy

import diffusers
import pytest
import torch
from conftest import attributes, refused
from torch import nn
from zoo import ZOO

from harmonica import Router
from harmonica.cost import cost_of_call, count
from harmonica.models.sites import is_site, macs_per_token, sites

X = {"x": torch.ones(1, 3, 4)}


class Model(nn.Module):
    """Anything with named children: runs them, and the elements of its lists, on x (B, N, 4)."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        for child in self.children():
            for part in child if isinstance(child, nn.ModuleList) else [child]:
                x = part(x)
        return x


def linear(width: int = 4) -> nn.Module:
    wide = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4))
    return nn.Linear(4, 4) if width == 4 else wide


def stack(*children: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(children)


def blocks(*names: str) -> nn.ModuleList:
    return stack(*(Model(**{name: linear() for name in names}) for _ in range(2)))


def names_of(*parts: str, stem: str = "blocks") -> list[str]:
    return [f"{stem}.{i}.{part}" for i in range(2) for part in parts]


def test_dit_and_pixart_have_the_sites_of_the_paper_in_its_order_which_a_router_takes():
    dit, _ = ZOO["DiTTransformer2DModel"]()
    assert list(sites(dit)) == names_of("attn1", "ff", stem="transformer_blocks")
    pixart, _ = ZOO["PixArtTransformer2DModel"]()
    found = sites(pixart)
    assert list(found) == names_of("attn1", "attn2", "ff", stem="transformer_blocks")
    assert all(found[name] is pixart.get_submodule(name) for name in found)
    assert Router(3, found).schedule(0.1).sites == tuple(found)


def test_a_parent_that_matches_hides_its_children_and_blocks_may_be_nested_in_a_wrapper():
    hidden = Model(attn=Model(attn=linear(), mlp=linear()), ff=linear())
    assert list(sites(Model(blocks=stack(hidden)))) == ["blocks.0.attn", "blocks.0.ff"]
    wrapped = Model(block=Model(attn1=linear(), ff_i=linear()))
    nested = ["layers.0.block.attn1", "layers.0.block.ff_i"]
    assert list(sites(Model(layers=stack(wrapped)))) == nested


def test_a_single_stream_block_is_cached_at_its_projections_and_a_lone_projection_is_not():
    single = blocks("norm", "proj_mlp", "act_mlp", "proj_out", "attn")
    model = Model(single_transformer_blocks=single, vace_blocks=blocks("attn1", "proj_out"))
    one = names_of("proj_mlp", "proj_out", "attn", stem="single_transformer_blocks")
    assert list(sites(model)) == [*one, *names_of("attn1", stem="vace_blocks")]


BESIDE = ("noise_refiner", "context_refiner", "text_transformer_blocks", "caption_projection")


@pytest.mark.parametrize("name", BESIDE)
def test_what_runs_beside_the_denoiser_is_left_out(name):
    model = Model(**{name: blocks("attn", "ff"), "blocks": blocks("attn", "ff")})
    assert list(sites(model)) == names_of("attn", "ff")
    refiner = Model(token_refiner=Model(refiner_blocks=blocks("attn")))
    assert list(sites(Model(context_embedder=refiner, blocks=blocks("attn")))) == names_of("attn")


NAMES = {
    True: "attn attn1 self_attention attn2 cross_attn audio_to_video_attn "
    "ff ffn ff_context feed_forward txt_mlp",
    False: "ff_norm attention_norm1 post_attention_layernorm adaln_mlp act_mlp proj_out offset "
    "img_mod attn_dropout time_mlp diff",
}


@pytest.mark.parametrize("site", NAMES)
def test_whether_a_module_is_a_site_is_read_from_its_name(site):
    assert {is_site(name) for name in NAMES[site].split()} == {site}


def test_what_has_no_sites_is_refused_with_what_was_looked_for_and_what_to_do():
    for thing in (None, {"blocks": 1}, "transformer"):
        with refused("takes the transformer of a pipeline, a torch module; found"):
            sites(thing)
    with refused(r"Linear has no sites .*no list of blocks.*cached\(pipe, schedule, sites="):
        sites(nn.Linear(2, 2))
    with refused(r"looked for attention and feed-forward .* its lists \(stages\)"):
        sites(Model(stages=blocks("conv1", "conv2")))
    shared = linear()
    with refused(r"blocks\.0\.attn and blocks\.1\.attn are one module"):
        sites(Model(blocks=stack(Model(attn=shared), Model(attn=shared))))


def test_a_feed_forward_in_chunks_is_refused():
    dit, _ = ZOO["DiTTransformer2DModel"]()
    for block in dit.transformer_blocks:
        block.set_chunk_feed_forward(2, 1)
    with refused(r"transformer_blocks\.0 runs in chunks.*set_chunk_feed_forward\(None, 0\)"):
        sites(dit)


def counted(model, inputs=X):
    """Return the MACs of the sites in one forward."""
    return cost_of_call(model, sites(model), ((), inputs))


def test_macs_are_counted_with_inputs_and_estimated_without_but_for_modulation():
    model = Model(blocks=blocks("attn", "ff"), head=linear(8))
    estimated = macs_per_token(model, sites(model))
    assert counted(model).sites.tolist() == [3 * 16.0] * 4  # three tokens through 4 × 4
    assert counted(model).rest == 192.0
    assert (estimated.sites.tolist(), estimated.rest) == (
        [16.0] * 4,
        0.0,
    )  # the head is in no block
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # as in the model
        counted(model, {"x": torch.ones(1, 3, 5)})
    block = Model(attn=linear(), adaLN_modulation=linear(8), norm1=linear(), skip_linear=linear())
    whole = Model(blocks=stack(block))
    assert macs_per_token(whole, sites(whole)).rest == 16.0


def test_shapes_alone_count_what_arithmetic_counts_and_a_model_that_looks_at_values_is_counted():
    class Looks(Model):
        def forward(self, x):
            return super().forward(x) if x.sum().item() == 0 else x

    assert counted(Looks(blocks=blocks("attn"))).sites.tolist() == [48.0, 48.0]
    model, inputs = ZOO["PixArtTransformer2DModel"]()
    found = dict(sites(model))
    fake, real = (count(lambda: model(**inputs), found, fake=fake) for fake in (True, False))
    assert (fake.sites.tolist(), fake.rest) == (real.sites.tolist(), real.rest)


def test_counting_is_not_misled_by_a_wrapped_forward_and_leaves_nothing_behind():
    class Keeps(Model):
        def forward(self, x, options):
            self.kept = x
            options.pop("once")
            return super().forward(x)

    model, options = Keeps(blocks=blocks("attn")), {"once": 1}
    before, weights = attributes(model), copy.deepcopy(model.state_dict())
    counted(model, {**X, "options": options})
    assert (attributes(model), options) == (before, {"once": 1})
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    model = Model(blocks=blocks("attn"))
    inner = model.forward
    model.forward = lambda **inputs: inner(**inputs)  # as accelerate does
    assert counted(model).covered == 1.0


def test_published_shares_of_pixart_are_met():
    """GMACs at 256 × 256, and the shares in % of attention, attention to the text and feed-forward."""
    with torch.device("meta"):  # of full size without weights, and inputs without values
        model = diffusers.PixArtTransformer2DModel(sample_size=32, caption_channels=4096).to("meta")
        inputs = {"hidden_states": torch.empty(1, 4, 32, 32), "timestep": torch.empty(1).long()}
        inputs |= {"encoder_hidden_states": torch.empty(1, 120, 4096)}
        inputs |= {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    macs = counted(model.eval(), inputs)
    shares = [100 * float(macs.sites[kind::3].sum()) / macs.total for kind in range(3)]
    assert [macs.total / 1e9, *shares] == pytest.approx([149.1, 28.4, 20.1, 51.1], abs=0.15)


def test_in_flux_like_models_all_of_the_blocks_is_within_reach():
    """With proj_out alone a single-stream block would still compute its attention and its feed-forward."""
    flux, _ = ZOO["FluxTransformer2DModel"]()
    found = sites(flux)
    assert macs_per_token(flux, found).rest == 0.0
    single = {name.rpartition(".")[2] for name in found if "single" in name}
    assert single == {"attn", "proj_mlp", "proj_out"}
