"""Blocks with all of a branch inside the gate: the same numbers as overriding sites, and nothing else runs."""

import copy
from pipes import StockDiT, dit_transformer, pixart_transformer, randomised

import pytest
import torch
from conftest import make, seeded, seeds, start, tables, with_noise
from hypothesis import given
from test_uvit import make as make_uvit
from torch import nn

from harmonica import Schedule, gated, reuse, sample
from harmonica.denoise import final_image
from harmonica.models.blocks import form_of, gated_blocks
from harmonica.models.dit import DiTDenoiser
from harmonica.models.pixart import PixArtDenoiser, random_prompts
from harmonica.models.sites import sites
from harmonica.samplers import DDIM


def stock(steps=4):
    """Return diffusers' DiT as a denoiser."""
    transformer = dit_transformer()
    return DiTDenoiser(StockDiT(transformer), DDIM(steps), sites=sites(transformer))


def pixart(steps=4):
    return PixArtDenoiser(pixart_transformer(), DDIM(steps), random_prompts(["a", "b"], 6, 12))


def in_double(d):
    d.model.double()
    if isinstance(d, PixArtDenoiser):
        d.prompts = d.prompts.to(torch.zeros(0, dtype=torch.float64))
    return d


MADE = {"dit": make, "stock": stock, "pixart": pixart, "uvit": make_uvit}


def walk(d, schedule, x, cond, **options):
    """Walk as `sample` does, with the blocks overridden."""
    cache = {}

    def steps():
        moved, memory = x, {}
        for k in range(d.steps):
            with (
                torch.no_grad(),
                gated_blocks(d.model, d.sites, reuse(schedule.compute[k], cache), **options),
            ):
                moved = d.step(moved, d.predict(moved, k, cond), k, memory)
            yield moved

    return final_image(steps())


def table(d, share=0.5, seed=0):
    rows = torch.rand(d.steps, len(d.sites), generator=seeded(seed)) > share
    rows[0] = True
    return Schedule(rows, sites=tuple(d.sites))


@pytest.mark.parametrize("name", MADE)
def test_overridden_blocks_give_the_images_of_overridden_sites_bit_for_bit(name):
    d, x, cond = with_noise(MADE[name](), 2, 3)
    for seed in range(5):
        schedule = table(d, seed=seed)
        assert torch.equal(walk(d, schedule, x, cond), sample(d, x, cond, schedule))


@pytest.mark.parametrize("name", MADE)
def test_fused_arithmetic_differs_by_rounding_alone(name):
    d, x, cond = with_noise(in_double(MADE[name]()), 2, 3)
    schedule = table(d)
    fused, exact = walk(d, schedule, x, cond, exact=False), sample(d, x, cond, schedule)
    assert float((fused - exact).norm() / exact.norm()) < 1e-11


@given(tables(), seeds)
def test_it_holds_for_any_schedule(schedule, seed):
    d, x, y = with_noise(make(), seed=seed)
    assert torch.equal(walk(d, schedule, x, y), sample(d, x, y, schedule))


def calls_of(d, run):
    """Return the names of the modules with no children that `run` calls."""
    called, taken = [], []
    for name, module in d.model.named_modules():
        kind = type(module)
        if not list(module.children()) and "forward" in vars(kind):
            taken.append((name, module))
    by_id = {id(module): name for name, module in taken}

    def note(module, args):
        called.append(by_id.get(id(module)))

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        run()
    finally:
        handle.remove()
    return [name for name in called if name]


@pytest.mark.parametrize("name", MADE)
def test_a_skipped_site_runs_neither_its_norm_nor_anything_else_of_its_branch(name):
    d, x, cond = with_noise(MADE[name](2), 1, 0)
    nothing = Schedule([[True] * len(d.sites), [False] * len(d.sites)], sites=tuple(d.sites))
    with torch.no_grad():
        whole = calls_of(d, lambda: d.predict(x, 0, cond))
        both = calls_of(d, lambda: walk(d, nothing, x, cond))
    skipped = both[len(whole) :]
    assert [name for name in whole if "norm1" in name or "norm2" in name or "norm3" in name]
    left = [name for name in skipped if "block" in name]
    may = ("adaLN_modulation", "norm1.emb", "norm1.linear", "norm1.silu", "skip_linear")
    assert all(any(word in name for word in may) for name in left), left


@pytest.mark.parametrize("name", MADE)
def test_every_block_of_the_model_is_known(name):
    d = MADE[name]()
    blocks = [
        module
        for module in d.model.modules()
        if type(module).__name__ in ("Block", "BasicTransformerBlock")
    ]
    assert blocks
    assert all(map(form_of, blocks))


def hooked(block):
    block.norm1.register_forward_hook(lambda *_: None)


def site_hooked(block):
    block.attn1.register_forward_hook(lambda *_: None)


def wrapped(block):
    block.forward = block.forward


def norm_wrapped(block):
    block.norm1.forward = block.norm1.forward


def training(block):
    block.train()


@pytest.mark.parametrize("change", [hooked, site_hooked, wrapped, norm_wrapped, training])
@pytest.mark.parametrize("name", ["stock", "pixart"])
def test_an_unusual_block_is_run_as_it_stands_with_the_same_numbers(name, change):
    d = MADE[name]()
    transformer = d.model if name == "pixart" else d.model.transformer
    change(transformer.transformer_blocks[1])
    assert form_of(transformer.transformer_blocks[0])
    assert form_of(transformer.transformer_blocks[1]) is None
    if change is not training:
        x, cond = start(d, 1, 3)
        assert torch.equal(walk(d, table(d), x, cond), sample(d, x, cond, table(d)))


def test_another_kind_of_norm_is_not_known():
    from diffusers.models.attention import BasicTransformerBlock

    for kind in ("layer_norm", "ada_norm", "layer_norm_i2vgen"):
        assert (
            form_of(BasicTransformerBlock(8, 2, 4, norm_type=kind, num_embeds_ada_norm=10).eval())
            is None
        )
    positions = {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 4}
    block = BasicTransformerBlock(
        8, 2, 4, norm_type="ada_norm_single", cross_attention_dim=8, **positions
    )
    assert form_of(block.eval()) is None


def unusual_calls():
    text = torch.randn(1, 3, 24)
    usual = {"timestep": torch.randn(1, 6 * 24), "encoder_hidden_states": text}
    yield usual | {"cross_attention_kwargs": {"scale": 0.5}}
    yield usual | {"class_labels": torch.zeros(1, dtype=torch.long)}
    yield usual  # in chunks


@pytest.mark.parametrize("call", range(3))
def test_an_unusual_call_asks_the_gate_at_the_sites(call):
    block = pixart_transformer().transformer_blocks[0]
    kwargs = list(unusual_calls())[call]
    if call == 2:
        block.set_chunk_feed_forward(2, 1)
    h, asked = torch.randn(1, 4, 24), []
    expected = block(h, **kwargs)
    holder = nn.ModuleList([block])
    named = {"a": block.attn1, "b": block.attn2, "c": block.ff}

    def gate(site, compute):
        asked.append(site)
        return compute()

    with gated_blocks(holder, named, gate):
        assert torch.equal(block(h, **kwargs), expected)
    assert asked == (
        [0, 1, 2] if call < 2 else [0, 1, 2, 2]
    )  # a chunked feed-forward is asked twice, and is refused


def test_a_module_that_is_no_site_computes():
    d = make(2)
    some = {name: module for name, module in d.sites.items() if name.endswith("mlp")}
    x, y = start(d)
    asked = []

    def gate(site, compute):
        asked.append(site)
        return compute()

    with torch.no_grad():
        plain = d.predict(x, 0, y)
        with gated_blocks(d.model, some, gate):
            assert torch.equal(d.predict(x, 0, y), plain)
    assert asked == [0, 1]


def test_nothing_is_left_on_the_model_exception_or_not():
    d, x, y = with_noise(make(2))
    before = {name: dict(vars(module)) for name, module in d.model.named_modules()}

    def broken(site, compute):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), gated_blocks(d.model, d.sites, broken):
        d.predict(x, 0, y)
    assert {name: dict(vars(module)) for name, module in d.model.named_modules()} == before


def test_a_model_copied_while_overridden_runs_its_own_weights():
    d, x, y = with_noise(make(2))
    with torch.no_grad(), gated_blocks(d.model, d.sites, _compute):
        twin = copy.deepcopy(d.model)
        randomised(twin.blocks[0].attn, seed=5)
        args = torch.cat([x, x]), torch.zeros(4), torch.cat([y, y])
        assert not torch.equal(twin(*args), d.model(*args))
        own = twin(*args)
    for block in twin.blocks:
        vars(block).pop("forward")
    assert torch.equal(twin(*args), own)


def _compute(site, compute):
    return compute()


def test_overriding_blocks_inside_overridden_sites_asks_both():
    d, x, y = with_noise(make(2))
    asked = []

    def gate(name):
        def ask(site, compute):
            asked.append((name, site))
            return compute()

        return ask

    for outer, inner in (
        (gated, gated_blocks),
        (gated_blocks, gated),
        (gated_blocks, gated_blocks),
    ):
        first = (d.model,) if outer is gated_blocks else ()
        second = (d.model,) if inner is gated_blocks else ()
        asked.clear()
        with (
            outer(*first, d.sites, gate("outer")),
            inner(*second, d.sites, gate("inner")),
            torch.no_grad(),
        ):
            d.predict(x, 0, y)
        assert sorted(asked) == [(name, site) for name in ("inner", "outer") for site in range(4)]
