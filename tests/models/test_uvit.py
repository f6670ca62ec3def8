"""U-ViT: names and counts of the original, a forward pass written a second time, and the laws on its two calls."""

import math
from functools import cache
from pipes import count_calls

import pytest
import torch
import torch.nn.functional as F
from conftest import noting, refused, seeded, seeds, start, tables, with_noise
from hypothesis import given
from hypothesis import strategies as st
from small import make_uvit, uvit_model

from harmonica import Router, Schedule, check_denoiser, macs, sample
from harmonica.cache import blend, gated, reuse
from harmonica.denoise import denoise
from harmonica.models.layers import sinusoids
from harmonica.models.uvit import UVIT_H, UViT, UViTDenoiser
from harmonica.samplers import DDIM

SITES = 6  # of the small one: attn and mlp of three blocks


@cache
def of_full_size():
    with torch.device("meta"):
        model = UViT(**UVIT_H)
    return UViTDenoiser(model, DDIM(2), guidance=1.0)


def block_shapes(name, d, *, skip=False):
    """Names and shapes of one block's parameters."""
    norms = [f"{name}.{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")]
    shapes = dict.fromkeys(norms, (d,))
    shapes |= {f"{name}.attn.qkv.weight": (3 * d, d)}  # and no bias
    layers = [("attn.proj", d, d), ("mlp.fc1", 4 * d, d), ("mlp.fc2", d, 4 * d)]
    layers += [("skip_linear", d, 2 * d)] if skip else []
    for layer, out, into in layers:
        shapes |= {f"{name}.{layer}.weight": (out, into), f"{name}.{layer}.bias": (out,)}
    return shapes


def test_h2_has_the_names_and_shapes_of_the_original_checkpoint():
    d = 1152
    expected = {
        "patch_embed.proj.weight": (d, 4, 2, 2), "patch_embed.proj.bias": (d,), "label_emb.weight": (1001, d),
        "pos_embed": (1, 258, d), "norm.weight": (d,), "norm.bias": (d,), "decoder_pred.weight": (16, d),
        "decoder_pred.bias": (16,), **block_shapes("mid_block", d),
    }  # fmt: skip
    for i in range(14):
        expected |= block_shapes(f"in_blocks.{i}", d)
        expected |= block_shapes(f"out_blocks.{i}", d, skip=True)
    model = of_full_size().model
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    count = sum(p.numel() for p in model.parameters())
    assert count == 500_832_016  # Bao et al. 2023, table 1: 501 M


def test_the_sites_are_those_of_every_block_in_the_order_they_run():
    sides = [[f"{side}_blocks.{i}" for i in range(14)] for side in ("in", "out")]
    blocks = [*sides[0], "mid_block", *sides[1]]
    sites = [f"{block}.{kind}" for block in blocks for kind in ("attn", "mlp")]
    assert list(of_full_size().sites) == sites
    d, asked = make_uvit(depth=4), []
    x, y = start(d)
    with gated(d.sites, noting(asked)):
        d.predict(x, 0, y)
    assert list(map(int, asked)) == 2 * list(range(10))  # both calls of guidance


def test_macs_of_h2_are_the_published_ones_and_guidance_doubles_them():
    one = macs(of_full_size())
    assert one.total == pytest.approx(133e9, rel=0.005)
    assert float(one.sites[0::2].sum()) / one.total == pytest.approx(0.332, abs=0.001)
    assert float(one.sites[1::2].sum()) / one.total == pytest.approx(0.596, abs=0.001)
    long_skips, tokens = 14 * 258 * 2 * 1152**2, 256 * 16 * 1152
    assert long_skips / one.total == pytest.approx(0.072, abs=0.001)
    # The decoder projects the two extra tokens too.
    assert one.rest == long_skips + tokens + 258 * 16 * 1152
    one, two = (macs(make_uvit(guidance=guidance)) for guidance in (1.0, 1.4))
    assert torch.equal(two.sites, 2 * one.sites)
    assert two.total == 2 * one.total


def waves(t, dim):
    """All cosines, then all sines, number by number."""
    rates = [10000 ** (-2 * i / dim) for i in range(dim // 2)]
    angles = [[float(n) * rate for rate in rates] for n in t]
    return torch.tensor([[f(a) for f in (math.cos, math.sin) for a in row] for row in angles])


def written_again(w, x, t, y, *, heads=2, patch=2):
    """U-ViT as one plain function on the parameters w by name, with none of the library's code."""

    def linear(name, h):
        return F.linear(h, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name, h):
        return F.layer_norm(h, h.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def attention(name, h):
        parts = linear(f"{name}.qkv", h).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        mixed = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return linear(f"{name}.proj", mixed.transpose(1, 2).flatten(2))

    def block(name, h):
        h = h + attention(f"{name}.attn", norm(f"{name}.norm1", h))
        inner = F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", h)))
        return h + linear(f"{name}.mlp.fc2", inner)

    dim = w["pos_embed"].shape[-1]
    time = waves(t, dim).to(x.dtype)
    cut = x.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, C, row, column, p, p)
    pixels = cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    patches = pixels @ w["patch_embed.proj.weight"].view(dim, -1).T + w["patch_embed.proj.bias"]
    label = w["label_emb.weight"][y][:, None]
    h = torch.cat([label, time[:, None], patches], dim=1) + w["pos_embed"]
    kept, pairs = [], sum(n.startswith("in_blocks") and n.endswith("qkv.weight") for n in w)
    for i in range(pairs):
        h = block(f"in_blocks.{i}", h)
        kept.append(h)
    h = block("mid_block", h)
    for i in range(pairs):
        joined = torch.cat([h, kept[-1 - i]], dim=-1)
        h = block(f"out_blocks.{i}", linear(f"out_blocks.{i}.skip_linear", joined))
    flat = linear("decoder_pred", norm("norm", h))[:, 2:]  # row, column and channel within a patch
    grid = flat.unflatten(2, (patch, patch, -1)).unflatten(1, (x.shape[-1] // patch, -1))
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


@pytest.mark.parametrize("depth", [2, 4])
def test_the_model_is_the_one_written_again_its_timesteps_as_cosines_then_sines(depth):
    model = uvit_model(depth=depth)
    x = torch.randn(3, 2, 4, 4, generator=seeded(1), dtype=torch.float64)
    y, t = torch.tensor([0, 3, 2]), torch.tensor([0.0, 1.0, 0.5])  # which float32 holds well
    with torch.no_grad():
        expected = written_again(model.state_dict(), x, t, y)
        noise = model(x, t, y)
    torch.testing.assert_close(noise, expected, rtol=1e-6, atol=1e-6)
    t = torch.tensor([1000.0, 333.3, 1.0, 0.5])
    # Up to 1000 radians in float32.
    torch.testing.assert_close(sinusoids(t, 1152), waves(t, 1152), rtol=0, atol=2e-4)


def two_calls(d, gate_of, x, k, y):
    """Guide as the original does: one call of the model for each label, each with a cache of its own."""
    t, noise = torch.full((len(x),), d.sampler.timesteps[k] + 1.0), []
    for cache_of_the_call, labels in enumerate((y, torch.full_like(y, 3))):
        with torch.no_grad(), gated(d.sites, gate_of(k, cache_of_the_call)):
            noise.append(d.model(x, t, labels))
    return noise[1] + d.guidance * (noise[0] - noise[1])


@given(tables(sites=SITES), st.booleans(), seeds)
def test_one_cache_is_a_cache_for_each_call_of_the_original(schedule, soft, seed):
    d, x, y = with_noise(make_uvit(), seed=seed)
    caches = {}, {}, {}
    scores = Router(4, SITES, generator=seeded(seed))().detach().double()
    r = torch.where(schedule.compute, scores, 0.01)

    def gate_of(k, i):
        return blend(r[k], caches[i], 0.1) if soft else reuse(schedule.compute[k], caches[i])

    theirs = x
    for k, ours in enumerate(denoise(d, x, y, lambda k: gate_of(k, 2))):
        theirs = d.step(theirs, two_calls(d, gate_of, theirs, k, y), k, {})
        assert torch.equal(ours, theirs)
    for site, feature in caches[2].items():
        assert torch.equal(feature, caches[getattr(site, "call", 0)][int(site)])


def test_guidance_is_the_originals_with_one_added_to_its_scale():
    small, x, y = with_noise(make_uvit())
    t = torch.full((2,), small.sampler.timesteps[1] + 1.0)
    with torch.no_grad():
        conditional, null = (small.model(x, t, labels) for labels in (y, torch.tensor([3, 3])))
        out = small.predict(x, 1, y)
        assert torch.equal(make_uvit(guidance=1.0).predict(x, 1, y), conditional)
    torch.testing.assert_close(out, conditional + 0.4 * (conditional - null))
    assert (out.shape, UViTDenoiser(small.model, small.sampler).guidance) == (x.shape, 1.4)
    with refused(r"guidance is 0.4; expected a number, 1 or more"):
        make_uvit(guidance=0.4)


@pytest.mark.parametrize("guidance", [1.0, 1.4])
def test_the_model_counts_timesteps_from_one(guidance):
    d, seen = make_uvit(guidance=guidance), []
    d.model.register_forward_pre_hook(lambda _, call: seen.append(call[1].tolist()))
    sample(d, *start(d))
    calls = 1 if guidance == 1.0 else 2
    assert seen == [[n, n] for n in (1000.0, 667.0, 334.0, 1.0) for _ in range(calls)]
    d.sampler.timesteps = (0.25,)
    d.predict(start(d)[0], 0, start(d)[1])
    assert seen[-calls:] == [[1.25, 1.25]] * calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_guidance_of_half_weights_is_not_rounded_to_half(dtype):
    d, x, y = with_noise(make_uvit(dtype=dtype))
    calls = (d.model(x.to(dtype), torch.full((2,), 1000.0), z).float() for z in (y, y * 0 + 3))
    conditional, null = calls
    assert torch.equal(d.predict(x, 0, y), null + 1.4 * (conditional - null))
    check_denoiser(make_uvit(guidance=1.0))


def test_the_long_skips_compute_where_every_site_is_reused():
    d, x, y = with_noise(make_uvit())
    once, long_skip = Schedule([[True] * SITES, *[[False] * SITES] * 3]), d.model.out_blocks[0]
    calls = count_calls([long_skip.skip_linear], lambda: sample(d, x, y, once))
    assert calls == [4 * 2]  # steps × calls
