"""Blocks with all of a branch inside the gate: the numbers of overridden sites, and nothing else runs."""

import contextlib
import itertools
from pipes import pixart_transformer

import pytest
import torch
from conftest import attributes, make, noting, start, with_noise
from diffusers.models.attention import BasicTransformerBlock
from small import MADE, random_table
from torch import nn

from harmonica import Schedule, gated, reuse, sample
from harmonica.models.blocks import gated_blocks, known_block


def walk(d, schedule, x, cond, **options):
    """Walk as `sample` does, with the blocks overridden."""
    cache, memory = {}, {}
    for k in range(d.steps):
        gate = reuse(schedule.compute[k], cache)
        with torch.no_grad(), gated_blocks(d.model, d.sites, gate, **options):
            x = d.step(x, d.predict(x, k, cond), k, memory)
    return x


@pytest.mark.parametrize("name", MADE)
def test_every_block_is_known_and_gives_the_images_of_overridden_sites_bit_for_bit(name):
    """And to rounding if not exact: test_walk.py."""
    d, x, cond = with_noise(MADE[name](), 2, 3)
    kinds = ("Block", "BasicTransformerBlock")
    blocks = [module for module in d.model.modules() if type(module).__name__ in kinds]
    assert blocks
    assert all(map(known_block, blocks))
    assert torch.equal(walk(d, random_table(d), x, cond), sample(d, x, cond, random_table(d)))


def calls_of(d, run):
    """Return the names of the modules with no children that `run` calls."""
    called = []
    names = {module: name for name, module in d.model.named_modules()}
    note = lambda module, _: called.append(names.get(module))  # noqa: E731
    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        run()
    finally:
        handle.remove()
    return [name for name in called if name and not list(d.model.get_submodule(name).children())]


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


UNUSUAL = {
    "a hook": lambda block: block.norm1.register_forward_hook(lambda *_: None),
    "a hook on a site": lambda block: block.attn1.register_forward_hook(lambda *_: None),
    "wrapped": lambda block: setattr(block, "forward", block.forward),
    "its norm wrapped": lambda block: setattr(block.norm1, "forward", block.norm1.forward),
    "training": lambda block: block.train(),
}


@pytest.mark.parametrize("change", UNUSUAL)
@pytest.mark.parametrize("name", ["stock", "pixart"])
def test_an_unusual_block_is_run_as_it_stands_with_the_same_numbers(name, change):
    d = MADE[name]()
    transformer = d.model if name == "pixart" else d.model.transformer
    UNUSUAL[change](transformer.transformer_blocks[1])
    assert known_block(transformer.transformer_blocks[0])
    assert known_block(transformer.transformer_blocks[1]) is None
    if change != "training":
        x, cond = start(d, 1, 3)
        assert torch.equal(walk(d, random_table(d), x, cond), sample(d, x, cond, random_table(d)))


def test_another_kind_of_norm_is_not_known():
    kinds = ("layer_norm", "ada_norm", "layer_norm_i2vgen")
    of_kind = {kind: {"num_embeds_ada_norm": 10} for kind in kinds}
    positions = {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 4}
    of_kind["ada_norm_single"] = {"cross_attention_dim": 8, **positions}
    for kind, options in of_kind.items():
        assert known_block(BasicTransformerBlock(8, 2, 4, norm_type=kind, **options).eval()) is None


UNUSUAL_CALLS = {"scaled": {"cross_attention_kwargs": {"scale": 0.5}}, "chunks": {}}
UNUSUAL_CALLS |= {"labels": {"class_labels": torch.zeros(1, dtype=torch.long)}}


@pytest.mark.parametrize("call", UNUSUAL_CALLS)
def test_an_unusual_call_asks_the_gate_at_the_sites(call):
    block, asked = pixart_transformer().transformer_blocks[0], []
    usual = {"timestep": torch.randn(1, 6 * 24), "encoder_hidden_states": torch.randn(1, 3, 24)}
    if call == "chunks":
        block.set_chunk_feed_forward(2, 1)
    run, x = lambda: block(x, **usual, **UNUSUAL_CALLS[call]), torch.randn(1, 4, 24)
    expected, named = run(), {"a": block.attn1, "b": block.attn2, "c": block.ff}
    with gated_blocks(nn.ModuleList([block]), named, noting(asked)):
        assert torch.equal(run(), expected)
    assert asked == [0, 1, 2] + [2] * (call == "chunks")  # the second chunk, which is refused


def test_a_module_that_is_no_site_computes_and_nothing_is_left_on_the_model():
    d, x, y = with_noise(make(2))
    some = {name: module for name, module in d.sites.items() if name.endswith("mlp")}
    asked, before = [], attributes(d.model)
    with torch.no_grad():
        plain = d.predict(x, 0, y)
        with gated_blocks(d.model, some, noting(asked)):
            assert torch.equal(d.predict(x, 0, y), plain)
    assert (asked, attributes(d.model)) == ([0, 1], before)


def test_overriding_blocks_inside_overridden_sites_asks_both():
    d, x, y = with_noise(make(2))
    ways = (gated, gated_blocks)
    for outer, inner in [pair for pair in itertools.product(ways, ways) if pair != (gated, gated)]:
        logs = [], []
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for way, log in zip((outer, inner), logs, strict=True):
                model = (d.model,) if way is gated_blocks else ()
                stack.enter_context(way(*model, d.sites, noting(log)))
            d.predict(x, 0, y)
        assert [sorted(log) for log in logs] == [[0, 1, 2, 3]] * 2
