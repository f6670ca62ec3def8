"""sites(): the rule on small models made for it, its messages, and what it says about models of known cost."""

import copy
import warnings

import pytest
import torch
from conftest import refused
from torch import nn
from zoo import ZOO

from harmonica import Router
from harmonica.cost import count
from harmonica.models.sites import kind_of, sites


class Block(nn.Module):
    """Anything with named children that runs them one after the other on x (B, N, 4)."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class Model(Block):
    """Runs the elements of its lists."""

    def forward(self, x):
        for child in self.children():
            for part in child if isinstance(child, nn.ModuleList) else [child]:
                x = part(x)
        return x


def linear(width: int = 4) -> nn.Linear:
    return (
        nn.Linear(4, width)
        if width == 4
        else nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4))
    )


def blocks(*names: str) -> nn.ModuleList:
    return nn.ModuleList([Block(**{name: linear() for name in names}) for _ in range(2)])


X = {"x": torch.ones(1, 3, 4)}


def test_dit_and_pixart_have_the_sites_of_the_paper_in_its_order():
    dit, _ = ZOO["DiTTransformer2DModel"]()
    assert list(sites(dit)) == [
        f"transformer_blocks.{i}.{part}" for i in range(2) for part in ("attn1", "ff")
    ]
    pixart, inputs = ZOO["PixArtTransformer2DModel"]()
    parts = ("attn1", "attn2", "ff")
    assert list(sites(pixart)) == [
        f"transformer_blocks.{i}.{part}" for i in range(2) for part in parts
    ]
    found = sites(pixart, inputs)
    assert found.kinds == ("attention", "cross-attention", "feed-forward") * 2
    assert all(found[name] is pixart.get_submodule(name) for name in found)


def test_a_router_takes_sites_as_its_columns():
    dit, _ = ZOO["DiTTransformer2DModel"]()
    found = sites(dit)
    assert Router(3, found).schedule(0.1).sites == tuple(found)


def test_a_parent_that_matches_hides_its_children():
    model = Model(
        blocks=nn.ModuleList([Block(attn=Block(attn=linear(), mlp=linear()), ff=linear())])
    )
    assert list(sites(model)) == ["blocks.0.attn", "blocks.0.ff"]


def test_blocks_may_be_nested_in_a_wrapper():
    wrapped = nn.ModuleList([Block(block=Block(attn1=linear(), ff_i=linear()))])
    assert list(sites(Model(layers=wrapped))) == ["layers.0.block.attn1", "layers.0.block.ff_i"]


def test_a_single_stream_block_is_cached_at_its_projections_and_a_lone_projection_is_not():
    single = Model(
        single_transformer_blocks=blocks("norm", "proj_mlp", "act_mlp", "proj_out", "attn"),
        vace_blocks=blocks("attn1", "proj_out"),
    )
    found = sites(single)
    one = ["proj_mlp", "proj_out", "attn"]
    assert list(found)[:3] == [f"single_transformer_blocks.0.{name}" for name in one]
    assert list(found)[6:] == ["vace_blocks.0.attn1", "vace_blocks.1.attn1"]
    assert found.kinds[:3] == ("feed-forward", "both", "attention")


@pytest.mark.parametrize(
    "name", ["noise_refiner", "context_refiner", "text_transformer_blocks", "caption_projection"]
)
def test_what_runs_beside_the_denoiser_is_left_out(name):
    model = Model(**{name: blocks("attn", "ff"), "blocks": blocks("attn", "ff")})
    assert list(sites(model)) == [f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "ff")]
    inside = Model(
        context_embedder=Model(token_refiner=Model(refiner_blocks=blocks("attn"))),
        blocks=blocks("attn"),
    )
    assert list(sites(inside)) == ["blocks.0.attn", "blocks.1.attn"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("attn", "attention"),
        ("attn1", "attention"),
        ("attn2", "cross-attention"),
        ("self_attention", "attention"),
        ("cross_attn", "cross-attention"),
        ("audio_to_video_attn", "cross-attention"),
        ("ff", "feed-forward"),
        ("ffn", "feed-forward"),
        ("ff_context", "feed-forward"),
        ("feed_forward", "feed-forward"),
        ("txt_mlp", "feed-forward"),
        *(
            (name, None)
            for name in (
                "ff_norm",
                "attention_norm1",
                "post_attention_layernorm",
                "adaln_mlp",
                "act_mlp",
            )
        ),
        *(
            (name, None)
            for name in ("proj_out", "offset", "img_mod", "attn_dropout", "time_mlp", "diff")
        ),
    ],
)
def test_the_kind_of_a_module_is_read_from_its_name(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize("thing", [None, {"blocks": 1}, "transformer"])
def test_what_is_not_a_module_is_refused(thing):
    with refused("takes the transformer of a pipeline, a torch module; found"):
        sites(thing)


def test_a_model_without_sites_is_refused_with_what_was_looked_for_and_what_to_do():
    with refused(r"Linear has no sites .*no list of blocks.*cached\(pipe, schedule, sites="):
        sites(nn.Linear(2, 2))
    with refused(r"looked for attention and feed-forward .* its lists \(stages\)"):
        sites(Model(stages=blocks("conv1", "conv2")))


def test_a_module_at_two_sites_is_refused():
    shared = linear()
    model = Model(blocks=nn.ModuleList([Block(attn=shared), Block(attn=shared)]))
    with refused(r"blocks\.0\.attn and blocks\.1\.attn are one module"):
        sites(model)


def test_a_module_called_several_times_is_refused():
    class Twice(Model):
        def forward(self, x):
            return super().forward(super().forward(x))

    with refused(r"Twice: blocks\.0\.attn is called 2 times in a forward"):
        sites(Twice(blocks=blocks("attn", "ff")), X)


def test_a_chunked_feed_forward_is_refused():
    dit, _ = ZOO["DiTTransformer2DModel"]()
    for block in dit.transformer_blocks:
        block.set_chunk_feed_forward(2, 1)
    with refused(r"transformer_blocks\.0 runs in chunks.*set_chunk_feed_forward\(None, 0\)"):
        sites(dit)


def test_a_module_that_a_forward_never_calls_is_no_site_of_it():
    class Video(Model):
        def forward(self, x):
            return self.blocks[0](x)

    model = Video(blocks=blocks("attn", "ff"))
    assert list(sites(model, X)) == ["blocks.0.attn", "blocks.0.ff"]
    assert len(sites(model)) == 4
    with refused("none of the 2 modules that look like sites is called"):
        sites(Video(blocks=nn.ModuleList([linear(), *blocks("attn")])), X)


def test_wrong_inputs_raise_what_the_model_raises():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        sites(Model(blocks=blocks("attn")), {"x": torch.ones(1, 3, 5)})


def test_macs_are_counted_with_inputs_and_estimated_without():
    model = Model(blocks=blocks("attn", "ff"), head=linear(8))
    counted, estimated = sites(model, X), sites(model)
    assert counted.macs.sites.tolist() == [3 * 16.0] * 4  # three tokens through 4 × 4
    assert counted.macs.rest == 3 * 64.0
    assert estimated.macs.sites.tolist() == [16.0] * 4
    assert estimated.macs.rest == 0.0  # the head is in no block
    assert counted.uncovered == (("head", 192.0),)
    assert "counted in one forward" in str(counted)
    assert "estimated per token" in str(estimated)


def test_modulation_does_not_count_in_the_estimate_and_other_layers_do():
    block = Block(attn=linear(), adaLN_modulation=linear(8), norm1=linear(), skip_linear=linear())
    found = sites(Model(blocks=nn.ModuleList([block])))
    assert (found.macs.rest, found.uncovered) == (16.0, (("blocks.0.skip_linear", 16.0),))


def test_a_model_that_looks_at_values_is_counted_all_the_same():
    class Looks(Model):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else x

    assert sites(Looks(blocks=blocks("attn")), X).macs.sites.tolist() == [48.0, 48.0]


@pytest.mark.filterwarnings("ignore")
def test_shapes_alone_count_what_arithmetic_counts():
    model, inputs = ZOO["PixArtTransformer2DModel"]()
    found = dict(sites(model))
    fake, real = (count(lambda: model(**inputs), found, fake=fake) for fake in (True, False))
    assert fake.macs.sites.tolist() == real.macs.sites.tolist()
    assert (fake.macs.rest, fake.calls, fake.modules) == (real.macs.rest, real.calls, real.modules)


def test_counting_leaves_nothing_behind_in_the_model_or_its_inputs():
    class Keeps(Model):
        def forward(self, x, options):
            self.kept = x
            options.pop("once")
            return super().forward(x)

    model, options = Keeps(blocks=blocks("attn")), {"once": 1}
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    sites(model, {**X, "options": options})
    assert before == {name: dict(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert options == {"once": 1}


def test_a_wrapped_forward_does_not_hide_the_sites_from_the_count():
    model = Model(blocks=blocks("attn"))
    inner = model.forward
    model.forward = lambda **inputs: inner(**inputs)  # as accelerate does
    assert sites(model, X).macs.covered == 1.0


def test_a_model_covered_by_less_than_half_warns_and_names_what_is_not():
    model = Model(blocks=blocks("attn"), head=linear(32))
    with pytest.warns(
        UserWarning, match=r"2 sites of Model cover 11\.1 % .* left out are head \(88\.9 %\)"
    ):
        sites(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sites(model)


def test_the_table_has_a_line_for_each_site_and_one_of_coverage():
    lines = str(sites(Model(blocks=blocks("attn", "ff")), X)).splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["site", "kind"],
        ["blocks.0.attn", "attention"],
        ["blocks.0.ff", "feed-forward"],
    ]
    assert lines[1].split()[2:] == ["48", "25.0", "%"]
    assert lines[-1] == "4 sites cover 100.0 % of the MACs, counted in one forward"
    assert len(lines) == 6


def test_sites_cannot_be_changed():
    found = sites(Model(blocks=blocks("attn")))
    with pytest.raises(TypeError):
        found.modules["other"] = nn.Linear(2, 2)
    with pytest.raises(AttributeError):
        found.kinds = ()


def on_meta(load, **inputs):
    """Return a model of full size without weights, and inputs without values."""
    with torch.device("meta"):
        model = load()
    return model.to("meta").eval(), inputs


@pytest.mark.filterwarnings("ignore")
def test_published_shares_of_dit_and_pixart_are_met():
    """DiT-XL/2: 118.6 G, attention 35.6 %, feed-forward 64.1 %. PixArt 256: 149.1 G, 28.4, 20.1 and 51.1 %."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    meta = torch.device("meta")
    with meta:
        x, t, y = (
            torch.empty(1, 4, 32, 32),
            torch.empty(1, dtype=torch.long),
            torch.empty(1, dtype=torch.long),
        )
        text = torch.empty(1, 120, 4096)
    dit, inputs = on_meta(
        lambda: DiTTransformer2DModel(out_channels=8), hidden_states=x, timestep=t, class_labels=y
    )
    assert shares(sites(dit, inputs)) == pytest.approx((118.6, 35.6, 64.1), abs=0.12)
    pixart, inputs = on_meta(
        lambda: PixArtTransformer2DModel(sample_size=32, caption_channels=4096),
        hidden_states=x,
        encoder_hidden_states=text,
        timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    assert shares(sites(pixart, inputs)) == pytest.approx((149.1, 28.4, 20.1, 51.1), abs=0.15)


def shares(found):
    """Return total MACs in G, then the share of each kind in %."""
    kinds = dict.fromkeys(found.kinds, 0.0)
    for kind, macs in zip(found.kinds, found.macs.sites.tolist(), strict=True):
        kinds[kind] += 100 * macs / found.macs.total
    return (found.macs.total / 1e9, *kinds.values())


@pytest.mark.filterwarnings("ignore")
def test_in_flux_like_models_all_of_the_blocks_is_within_reach():
    """With proj_out alone a single-stream block would still compute its attention and its feed-forward."""
    flux, inputs = ZOO["FluxTransformer2DModel"]()
    found = sites(flux, inputs)
    assert not any(
        name.startswith("single_transformer_blocks") and "norm" not in name
        for name, _ in found.uncovered
    )
    assert {kind for name, kind in zip(found, found.kinds, strict=True) if "single" in name} == {
        "attention",
        "feed-forward",
        "both",
    }
