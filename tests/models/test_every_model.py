"""Nine models under four samplers, each on a tiny configuration of its real class: one test for each cell.

`python -m pytest tests/models/test_every_model.py -vv` prints the table.
"""

import argparse
import gc
import json
import shutil
import sys
from functools import partial
from pipes import dit_transformer, pixart_pipe, pixart_transformer, vae

import diffusers
import huggingface_hub
import pytest
import torch
from conftest import refused, seeded, with_noise
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from small import SMALL_DIT, SMALL_UVIT, loaded
from transformers import T5EncoderModel

from harmonica import Router, check_denoiser, image_error, sample, sdt, train_sdt
from harmonica.inference.walk import Walk
from harmonica.models import BUNDLED, MODELS, load
from harmonica.models.dit import DiT
from harmonica.models.uvit import UViT
from harmonica.samplers import SAMPLERS
from harmonica.search.flip_effects import flip_effects_at
from harmonica.search.references import Pool

pytestmark = pytest.mark.usefixtures("small_models")
SMALLEST = {"dit-xl": partial(DiT, **SMALL_DIT), "uvit-h": partial(UViT, **SMALL_UVIT)}
NAMES = [name for name in MODELS if name != "garments"]  # it is tiny's class, and larger


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("name", NAMES)
def test_it_walks_is_exact_trains_and_has_a_lambda(name, sampler):
    d = loaded(name, sampler)
    check_denoiser(d)  # computing everything is the plain model bit for bit, forks, frozen …
    generator = seeded(0)
    x, cond = d.draw(2, generator)
    router = Router(d.steps, d.sites, generator=generator, about=d.about)
    lam = image_error(d, router(), x, cond)
    assert lam[0] == 0.0 < lam[1:].min()
    before, updates = router.logits, list(sdt(d, router, [(x, cond)]))
    assert [update.k for update in updates] == [1, 2, 3]
    assert bool((router.logits != before).any(1).all())  # every row moved
    assert not any(p.grad is not None for p in d.model.parameters())
    schedule = router.schedule(0.5)
    image = sample(d, x, cond, schedule)
    assert image.shape == x.shape
    plain = sample(d, x, cond)
    assert not torch.equal(image, plain)
    pool = Pool(x, cond, plain)
    model = flip_effects_at(d, schedule, pool, torch.ones_like(x))  # a walk can be differentiated
    assert (model.gradient.view(3, -1) != 0).any(1).all()
    assert model.gradient.isfinite().all()
    schedule.check(d.steps, tuple(d.sites), d.about["timesteps"])
    longer = d.with_steps(6)  # the same weights and conditions; the sampler of a load with 6 steps
    assert (longer.steps, d.steps, longer.draws_noise) == (6, 4, d.draws_noise)
    assert longer.about == {**d.about, "timesteps": loaded(name, sampler, 6).about["timesteps"]}
    assert not torch.equal(sample(longer, x, cond), plain)


@pytest.mark.parametrize("name", MODELS)
def test_the_defaults_are_the_models_own(name):
    """No matrix of random weights is zero, so that every site matters, and a guidance of one is none."""
    d, x, cond = with_noise(loaded(name, steps=2, guidance=1.0), 2, 0)
    parameters = load(name, weights="random", steps=2).model.parameters()
    assert all(bool(p.any()) for p in parameters if p.dim() > 1)
    own = {"p": ("dpm-solver++", 4.5), "u": ("dpm-solver++", 1.4)}
    about = loaded(name, steps=2).about
    assert (about["sampler"], about["guidance"]) == own.get(name[0], ("ddim", 1.5))
    assert about["model"] == {"dit-xl-256": "dit-xl"}.get(name, name)
    unguided, guided = d.predict(x, 0, cond), loaded(name, guidance=1.0 + 1e-6, steps=2)
    assert len(unguided) == 2
    torch.testing.assert_close(guided.predict(x, 0, cond)[:2], unguided, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_gives_the_same_gradients_bit_for_bit(name):
    """With half precision weights, which train a router in full precision."""
    routers = []
    for again in (False, True):
        d = loaded(name, activation_checkpointing=again, dtype=torch.bfloat16)
        routers.append(train_sdt(d, iterations=3, batch_size=2, lr=0.1, progress=False).logits)
    assert torch.equal(*routers)
    x, cond = d.draw(2, seeded(0))
    assert next(d.model.parameters()).dtype == torch.bfloat16
    assert {x.dtype, d.predict(x, 1, cond).dtype, routers[0].dtype} == {torch.float32}


@pytest.mark.parametrize("name", ["tiny", "dit-xl", "pixart-alpha-256", "uvit-h"])
def test_inputs_that_do_not_fit_the_model_are_named_and_leave_no_trace(name):
    d, x, cond = with_noise(loaded(name, steps=2), 2, 0)
    plain = sample(d, x, cond)
    wrong = [(x, cond[:1]), (x[:1], cond), (x[:, :-1], cond), (x[0], cond), (x, cond.float())]
    wrong += [(x.to("meta"), cond), (x[:0], cond[:0]), (x.long(), cond), (x, cond.bool())]
    if name != "pixart-alpha-256":  # which takes latents of any size
        wrong.append((x[..., :-1], cond))
    for walk in (sample, lambda d, x, cond: Walk(d)(x, cond)):
        for noise, labels in wrong:
            with refused(r"found noise .*, conditions .*; expected \(B, .* B at least 1"):
                walk(d, noise, labels)
        with refused("found noise or conditions of type list; both must be tensors"):
            walk(d, x, cond.tolist())
        for label in (-1, d.conditions + 1, 10**6):
            with refused(rf"out of range, \[{label}\]; pass .* from 0 to {d.conditions - 1}"):
                walk(d, x, torch.tensor([0, label]))
    assert torch.equal(sample(d, x, cond), plain)
    assert sample(d, x.double(), cond).shape == x.shape  # a wider type is no fault


@pytest.mark.parametrize("name", [name for name in MODELS if name not in BUNDLED])
def test_offline_without_weights_is_one_sentence_with_the_ways_out(name, monkeypatch):
    asked = []

    def nothing(repository, **_):
        asked.append(repository)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    errors = (ValueError, FileNotFoundError)
    with pytest.raises(errors, match='pass weights=.*or weights="random" to time it') as error:
        load(name)
    said = str(error.value)
    assert "\n" not in said
    assert name == "uvit-h" or f"{asked[0]} is not on this machine and cannot be fetched" in said


def test_the_hub_is_asked_for_the_parts_that_are_needed(monkeypatch, tmp_path):
    pixart_pipe().save_pretrained(tmp_path)
    asked = []
    download = lambda name, allow_patterns, **_: asked.append((name, allow_patterns)) or tmp_path  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    d = load("pixart-alpha-256", prompts=["a blue boat"], steps=2)
    encoder = ("PixArt-alpha/PixArt-XL-2-1024-MS", ["tokenizer/*", "text_encoder/*"])
    assert asked == [encoder, ("PixArt-alpha/PixArt-XL-2-256x256", ["transformer/*"])]
    check_denoiser(d)


def test_dit_is_diffusers_dit_once_its_two_deviations_are_patched(tmp_path):
    """Loaded from the folder of the whole pipeline or of the transformer alone.

    Diffusers shifts the timestep rates by one and gives the second norm an epsilon of 1e-5.
    """
    transformer = dit_transformer(equal=True)
    diffusers.DiTPipeline(transformer, vae(), diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    for block in transformer.transformer_blocks:  # the original's numerics
        block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = 0, 1e-6
    call = torch.randn(2, 4, 8, 8), torch.tensor([999, 17]), torch.tensor([3, 1000])
    for folder in (tmp_path, tmp_path / "transformer"):
        ours = load("dit-xl", weights=folder, steps=2).model
        with torch.no_grad():
            torch.testing.assert_close(ours(*call), transformer(*call).sample, rtol=1e-4, atol=1e-3)
    message = "has no transformer/config.json; expected a folder saved"
    with pytest.raises(FileNotFoundError, match=message):
        load("dit-xl", weights=tmp_path / "scheduler")


def test_a_diffusers_folder_of_pixart_is_the_stock_pipeline(tmp_path):
    """T5 encodes the prompts once and is gone then; the walk is the pipeline's, bit for bit."""
    encoders = lambda: sum(isinstance(thing, T5EncoderModel) for thing in gc.get_objects())  # noqa: E731
    pipe = pixart_pipe()
    pipe.save_pretrained(tmp_path)
    prompts = ["a blue boat at night", "the cat in the house"]
    gc.collect()
    before = encoders()
    d = load("pixart-alpha-256", weights=tmp_path, prompts=prompts, steps=4)
    assert (d.prompts.texts, encoders()) == (tuple(prompts), before)
    x = torch.randn(2, 4, 8, 8, generator=seeded(1))
    options = {"latents": x, "use_resolution_binning": False, "clean_caption": False}
    options |= {"num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 6}
    assert torch.equal(sample(d, x, torch.tensor([0, 1])), pipe(prompts, **options).images)


def test_the_tokenizer_is_read_as_the_hub_has_it(tmp_path):
    """The original's folder holds a sentencepiece model and no converted tokenizer."""
    import sentencepiece

    pixart_pipe().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "tokenizer")
    (tmp_path / "tokenizer").mkdir()
    text = "a blue boat at night\nthe cat in the house\na river under the tree\n"
    (tmp_path / "words.txt").write_text(text * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"), model_prefix=str(tmp_path / "tokenizer" / "spiece"), vocab_size=20,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    facts = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 120}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(facts))
    d = load("pixart-alpha-256", weights=tmp_path, prompts=["a blue boat", "the cat"], steps=2)
    assert d.prompts.mask[:-1].sum(1).min() > 2  # words, not one unknown token
    assert not torch.equal(d.prompts.embeds[0], d.prompts.embeds[1])


def test_what_t5_needs_is_named_if_it_is_missing(tmp_path, monkeypatch):
    pixart_pipe().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with refused(r"takes sentencepiece; pip install 'harmonica-dit\[pixart\]'"):
        load("pixart-alpha-256", weights=tmp_path, prompts=["a river"])


@pytest.mark.parametrize("how", ["weights alone", "with what training left", "w.safetensors"])
@pytest.mark.parametrize("name", SMALLEST)
def test_an_original_checkpoint_loads_strictly(name, how, tmp_path):
    model, path = SMALLEST[name](), tmp_path / how
    state, rest = model.state_dict(), {"opt": {}, "args": argparse.Namespace(lr=1e-4)}
    if path.suffix:
        save_file(state, path, metadata={"format": "pt"})  # which is theirs
    else:
        torch.save({"model": {}, "ema": state, **rest} if "training" in how else state, path)
    d = load(name, weights=path, steps=2)
    assert all(map(torch.equal, d.model.parameters(), model.parameters()))
    assert name == "uvit-h" or d.guided_channels == 3


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    state, path = SMALLEST["dit-xl"]().state_dict(), tmp_path / "w.pt"
    nan = torch.full_like(state["pos_embed"], torch.nan)
    for change, message in (
        ({"pos_embed": torch.zeros(1, 9, 8)}, "not fit the model: .*size mismatch for pos_embed"),
        ({"stranger": torch.zeros(1)}, "does not fit the model: .*Unexpected key"),
        ({"pos_embed": nan}, "pos_embed that is not finite"),
        ({"args": "text"}, "does not hold tensors by parameter name"),
    ):
        torch.save({**state, **change}, path)
        with refused(message):
            load("dit-xl", weights=path)


OF_ANOTHER_MODEL = [
    ("pixart-alpha-256", "nowhere", "has no transformer/config.json"),
    ("pixart-alpha-256", "dit", "holds a DiTTransformer2DModel; a PixArtTransformer2DModel was"),
    ("pixart-alpha-256", "pixart/transformer", "has no text_encoder/config.json; expected the"),
    ("pixart-alpha-256", "wide", "is for a latent of size 16, not 8"),
    ("dit-xl", "pixart", "holds a PixArtTransformer2DModel; a DiTTransformer2DModel was expected"),
    ("dit-xl", "large", "is for a latent of size 16, not 8"),
    ("uvit-h", "dit", "is a folder; uvit-h takes the original file"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("folders")
    for name in ("pixart", "wide"):
        pixart_pipe().save_pretrained(place / name)
    pixart_transformer(sample_size=16).save_pretrained(place / "wide/transformer")
    dit_transformer().save_pretrained(place / "dit/transformer")
    dit_transformer(sample_size=16).save_pretrained(place / "large/transformer")
    return place


@pytest.mark.parametrize(("name", "folder", "message"), OF_ANOTHER_MODEL)
def test_the_folder_of_another_model_is_refused_by_name(folders, name, folder, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(name, weights=folders / folder, prompts=["a river"] if "pixart" in name else None)
