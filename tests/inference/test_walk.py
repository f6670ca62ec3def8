"""The fast walk: the images of the plain one, less work, nothing left behind."""

import time
from pipes import StockDiT, count_calls, dit_transformer, randomised

import pytest
import torch
from conftest import make, refused, seeds, start, tables, with_noise
from hypothesis import given
from test_blocks import MADE, in_double, table
from test_every_model import (
    loaded,
    small,  # noqa: F401 (a fixture: every model on a small configuration)
)
from torch import nn

from harmonica import Macs, Schedule, sample, train_sdt
from harmonica.inference.timing import milliseconds
from harmonica.inference.walk import Accelerated, Walk
from harmonica.models import MODELS, load
from harmonica.models.dit import DiTDenoiser
from harmonica.models.memo import Memo
from harmonica.models.precompute import equal_to_the_first, precomputed
from harmonica.models.sites import sites
from harmonica.samplers import DDIM, SAMPLERS


def relative(a, b):
    return float((a - b).norm() / b.norm())


@given(tables(), seeds)
def test_an_exact_walk_is_sample_bit_for_bit(schedule, seed):
    d, x, y = with_noise(make(), seed=seed)
    assert torch.equal(Walk(d, schedule, exact=True)(x, y), sample(d, x, y, schedule))


@given(tables(), seeds)
def test_a_walk_is_sample_to_rounding(schedule, seed):
    d, x, y = with_noise(make(), seed=seed)
    assert relative(Walk(d, schedule)(x, y), sample(d, x, y, schedule)) < 1e-11


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("small")
def test_every_model_under_every_sampler(name, sampler):
    d, x, cond = with_noise(in_double(loaded(name, sampler)), 2, 0)
    schedule = table(d)
    plain = sample(d, x, cond, schedule)
    assert torch.equal(Walk(d, schedule, exact=True)(x, cond), plain)
    assert relative(Walk(d, schedule)(x, cond), plain) < 1e-9
    assert relative(Walk(d)(x, cond), sample(d, x, cond)) < 1e-9


def test_the_bundled_model_agrees_to_1e_5_in_float32():
    d, x, y = with_noise(load("tiny"), 64, 0)
    for seed in range(3):
        assert (
            relative(Walk(d, table(d, seed=seed))(x, y), sample(d, x, y, table(d, seed=seed)))
            < 1e-5
        )


def test_half_precision_agrees_to_its_rounding():
    d, x, y = with_noise(load("tiny", dtype=torch.bfloat16), 16, 0)
    assert relative(Walk(d, table(d))(x, y), sample(d, x, y, table(d))) < 0.05
    assert torch.equal(Walk(d, table(d), exact=True)(x, y), sample(d, x, y, table(d)))


@pytest.mark.parametrize("name", MADE)
def test_nothing_is_left_on_the_model_exception_or_not(name):
    d, x, cond = with_noise(MADE[name](), 1, 0)
    before = {name: dict(vars(module)) for name, module in d.model.named_modules()}
    Walk(d, table(d))(x, cond)
    assert {name: dict(vars(module)) for name, module in d.model.named_modules()} == before
    step = d.step

    def broken(x, out, k, memory):
        if k == 2:
            raise RuntimeError("broken")
        return step(x, out, k, memory)

    d.step = broken
    with pytest.raises(RuntimeError, match="broken"):
        Walk(d, table(d))(x, cond)
    assert {name: dict(vars(module)) for name, module in d.model.named_modules()} == before


@pytest.mark.parametrize("name", MADE)
def test_a_walk_remembers_nothing_of_the_one_before(name):
    d = in_double(MADE[name]())
    walk = Walk(d, table(d))
    first, second = (start(d, b, b) for b in (3, 2))
    walk(*first)
    assert torch.equal(walk(*second), Walk(d, table(d))(*second))


def test_modulations_of_all_steps_are_one_product_per_block():
    d, x, y = with_noise(make(5))
    linears = [block.adaLN_modulation[1] for block in d.model.blocks] + [
        d.model.final_layer.adaLN_modulation[1]
    ]
    assert count_calls(linears, lambda: sample(d, x, y)) == [5, 5, 5]
    assert count_calls(linears, lambda: Walk(d)(x, y)) == [1, 1, 1]
    assert count_calls(linears, lambda: Walk(d, exact=True)(x, y)) == [5, 5, 5]
    embedders = [d.model.t_embedder, d.model.y_embedder]
    assert count_calls(embedders, lambda: Walk(d)(x, y)) == [1, 1]


def test_modulations_are_made_for_as_many_steps_as_fit(monkeypatch):
    from harmonica.models import precompute as module

    d, x, y = with_noise(make(5))
    linears = [block.adaLN_modulation[1] for block in d.model.blocks] + [
        d.model.final_layer.adaLN_modulation[1]
    ]
    for steps, products in ((2, 3), (1, 5), (5, 1), (4, 2)):
        monkeypatch.setattr(module, "rows_that_fit", lambda *_, steps=steps: steps * 4)
        assert count_calls(linears, lambda: Walk(d)(x, y)) == [products] * 3
        assert relative(Walk(d)(x, y), sample(d, x, y)) < 1e-11


def test_equal_copies_of_an_embedding_run_once():
    d, x, cond = _stock(equal=True)
    embeddings = [block.norm1.emb for block in d.model.transformer.transformer_blocks]
    ran = count_calls(embeddings, lambda: Walk(d, exact=True)(x, cond))
    assert sum(ran) == d.steps  # by whichever asked first
    assert torch.equal(Walk(d, exact=True)(x, cond), sample(d, x, cond))
    assert relative(Walk(d)(x, cond), sample(d, x, cond)) < 1e-10
    labels = [emb.class_embedder for emb in embeddings]
    assert sum(count_calls(labels, lambda: Walk(d)(x, cond))) == 1


def test_different_copies_of_an_embedding_each_run():
    d, x, cond = _stock(equal=False)
    embeddings = [block.norm1.emb for block in d.model.transformer.transformer_blocks]
    assert equal_to_the_first(embeddings, Memo()) == [True, False]
    assert count_calls(embeddings, lambda: Walk(d, exact=True)(x, cond)) == [d.steps] * 2
    assert torch.equal(Walk(d, exact=True)(x, cond), sample(d, x, cond))


def _stock(*, equal):
    transformer = dit_transformer().double()
    first, second = (block.norm1.emb for block in transformer.transformer_blocks)
    if equal:
        second.load_state_dict(first.state_dict())
    d = DiTDenoiser(StockDiT(transformer), DDIM(4), sites=sites(transformer))
    return d, *start(d, 2, 0)


def test_embeddings_of_other_settings_are_not_the_same():
    first, second = (block.norm1.emb for block in dit_transformer().transformer_blocks)
    second.load_state_dict(first.state_dict())
    assert equal_to_the_first([first, second], Memo()) == [True, True]
    second.time_proj.downscale_freq_shift = 0
    assert equal_to_the_first([first, second], Memo()) == [True, False]


def test_the_text_is_projected_once_a_walk():
    d, x, cond = with_noise(MADE["pixart"](), 2, 0)
    blocks = d.model.transformer_blocks
    text = [
        d.model.caption_projection,
        *(layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)),
    ]
    assert count_calls(text, lambda: sample(d, x, cond)) == [4] * 5
    assert count_calls(text, lambda: Walk(d, exact=True)(x, cond)) == [1] * 5


class Foreign:
    """A denoiser that nobody knows."""

    def __init__(self, inner):
        self.inner, self.steps = inner, inner.steps
        self.sites, self.about = inner.sites, inner.about
        self.predict, self.step, self.draw = inner.predict, inner.step, inner.draw


def test_an_unknown_denoiser_walks_by_overriding_sites():
    d, x, y = with_noise(Foreign(make()))
    assert not isinstance(d, Accelerated)
    assert torch.equal(Walk(d, table(d))(x, y), sample(d, x, y, table(d)))


def test_an_unknown_model_has_nothing_ahead():
    model = nn.Linear(2, 2)
    with precomputed(model, Memo()):
        assert "forward" not in vars(model)


def test_a_schedule_that_does_not_fit_is_refused():
    with refused("this schedule has 2 steps"):
        Walk(make(), Schedule([[1] * 4, [0] * 4]))


def test_weights_changed_between_two_walks_are_seen():
    d, x, y = with_noise(make())
    walk = Walk(d, table(d))
    walk(x, y)
    randomised(d.model, seed=9)
    assert relative(walk(x, y), sample(d, x, y, table(d))) < 1e-11


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["tiny", "dit-xl", "pixart-alpha-1024", "uvit-h"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
@pytest.mark.usefixtures("small")
def test_a_walk_waits_for_nothing(name, sampler):
    d, x, cond = with_noise(loaded(name, sampler, device="cuda"), 2, 0)
    walk = Walk(d, table(d))
    walk(x, cond)  # libraries start
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        walk(x, cond)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def slowed(function, seconds):
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


def test_milliseconds_are_the_sites_own_and_the_rest_is_what_no_schedule_saves(monkeypatch):
    d = make()
    slow = d.sites["blocks.1.attn"]
    monkeypatch.setattr(slow, "forward", slowed(slow.forward, 0.02))
    monkeypatch.setattr(d.sampler, "step", slowed(d.sampler.step, 0.06))
    found = milliseconds(d, 2, repeats=3)
    site = list(d.sites).index("blocks.1.attn")
    assert 20 <= found.sites[site] < 40
    assert 60 <= found.rest < 79  # not the slow site as well
    assert all(0 < float(each) < 20 for i, each in enumerate(found.sites) if i != site)
    without = Schedule([[True] * 4] + [[i != site for i in range(4)]] * 3)
    assert 1.1 < without.speedup(found) < 1.4  # 80 + … a step, or 60 + … in three of four


def test_a_table_lands_on_a_target_in_milliseconds():
    d = make(dtype=torch.float32)
    cost = Macs(torch.tensor([1.0, 5.0, 1.0, 1.0], dtype=torch.float64), 2.0)
    how = {"iterations": 12, "batch_size": 2, "lr": 0.2, "refine": 0, "progress": False}
    schedule = train_sdt(d, target_speedup=1.5, cost=cost, **how).schedule(0.1)
    assert schedule.speedup(cost) >= 1.5


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"repeats": 0}])
def test_milliseconds_of_nothing_are_refused(bad):
    with refused("expected 1 or more of each"):
        milliseconds(make(), **bad)
