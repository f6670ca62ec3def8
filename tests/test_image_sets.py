"""Samples on disk: image i is image i, whoever makes it and however often it was interrupted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scores import clip_score, fid_inception, inception_score, read_images
from test_processes import torchrun

from harmonica import Schedule, image_sets, models, sample
from harmonica.evaluation import image_files
from harmonica.evaluation.image_files import pieces_of, to_uint8
from harmonica.image_sets import draw_images, generator_of, write_images

COUNT = 11
HALF = Schedule([[1] * 4, [0] * 4, [1, 0, 1, 0], [0] * 4])


def decode(x):
    return torch.tanh(x[:, :1])  # grey


def written(out, *, batch=4, count=COUNT, seed=5, schedule=HALF, decode=decode, denoiser=None):
    """Write samples of a small model; return images and labels as they are on disk."""
    d = denoiser or make()
    path = write_images(
        d, schedule, decode, count=count, batch_size=batch, seed=seed, out=out, progress=False
    )
    assert path == Path(out)
    return arrays(path)


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file) == ["arr_0", "arr_1"]
        return file["arr_0"], file["arr_1"]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return written(tmp_path_factory.mktemp("whole") / "x.npz")


# ------------------------------------------------------------ image i is image i


@pytest.mark.parametrize("batch", [1, 3, 8, 100])
def test_an_image_does_not_depend_on_the_batch_size(batch, whole, tmp_path):
    assert same(written(tmp_path / "x.npz", batch=batch), whole)


def test_an_image_does_not_depend_on_how_many_there_are(whole, tmp_path):
    images, labels = written(tmp_path / "x.npz", count=3)
    assert same((images, labels), (whole[0][:3], whole[1][:3]))


@pytest.mark.parametrize(("batch", "processes"), [(4, 2), (1, 3), (3, 5)])
def test_an_image_does_not_depend_on_the_processes(batch, processes, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "world", lambda: processes)
    calls = []

    def counting(x):
        calls.append(len(x))
        return decode(x)

    shares = [
        sum(len(b) for b in list(torch.arange(COUNT).split(batch))[n::processes])
        for n in range(processes)
    ]
    for number in reversed(range(processes)):
        monkeypatch.setattr(image_sets, "rank", lambda number=number: number)
        if number > 0:  # alone, a process has only its share
            with pytest.raises(
                FileNotFoundError, match="lacks image 0; all processes must see one folder"
            ):
                written(tmp_path / "x.npz", batch=batch, decode=counting)
        else:
            assert same(written(tmp_path / "x.npz", batch=batch, decode=counting), whole)
        assert sum(calls) == sum(shares[number:])  # its share, and nothing that another has made


def test_torchrun_writes_what_one_process_does(tmp_path):
    options = ["--steps", "3", "--count", "7", "--batch-size", "2", "--seed", "3"]
    done = torchrun("-m", "harmonica.image_sets", *options, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("7 images of seed 3") == 1
    assert image_sets.main([*options, "--out", str(tmp_path / "one.npz")]) == 0
    images, labels = arrays(tmp_path / "one.npz")
    assert np.array_equal(torch.cat(list(read_images(tmp_path / "two"))).numpy(), images)
    assert (tmp_path / "two.labels.txt").read_text().split() == [str(label) for label in labels]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.npz", "two", "two.labels.txt"]


def test_other_seeds_are_other_images_and_conditions(whole, tmp_path):
    images, labels = written(tmp_path / "x.npz", seed=6)
    assert not np.array_equal(images, whole[0])
    assert not np.array_equal(labels, whole[1])
    assert len(np.unique(whole[0], axis=0)) == COUNT


def test_labels_are_what_the_images_were_made_of(whole):
    d = make()
    x, cond = draw_images(d, range(COUNT), 5)
    assert np.array_equal(whole[1], cond.numpy())
    assert np.array_equal(whole[0], to_uint8(decode(sample(d, x, cond, HALF))).numpy())
    one, label = d.draw(1, generator_of(5, 7))
    assert torch.equal(x[7:8], one)
    assert torch.equal(cond[7:8], label)


@given(seed=st.integers(-(2**70), 2**70), first=st.integers(0, 2**31))
def test_no_two_images_of_a_seed_share_a_generator(seed, first):
    """The generator on the CPU reads 32 bits of its seed: seeds that differ above them are one."""
    assert torch.equal(
        noise(torch.Generator().manual_seed(5)), noise(torch.Generator().manual_seed(5 + 2**32))
    )
    begun = {generator_of(seed, i).initial_seed() for i in range(first, first + 200)}
    assert len(begun) == 200
    assert max(begun) < 2**32


def noise(generator):
    return torch.randn(3, generator=generator)


# ------------------------------------------------------------ interruptions


def stopping(after):
    """Return a decoder that is interrupted at its call number `after`, and the sizes of what it finished."""
    sizes = []

    def interrupted(x):
        if len(sizes) == after:
            raise KeyboardInterrupt
        sizes.append(len(x))
        return decode(x)

    return interrupted, sizes


@pytest.mark.parametrize(
    ("after", "first", "then", "made"), [(0, 4, 4, 11), (2, 4, 4, 3), (2, 3, 4, 7), (1, 8, 1, 3)]
)
def test_an_interrupted_run_goes_on_and_ends_the_same(after, first, then, made, whole, tmp_path):
    out = tmp_path / "x.npz"
    with pytest.raises(
        KeyboardInterrupt, match=r"finished images are in .*x\.npz\.parts, run the same again"
    ):
        written(out, batch=first, decode=stopping(after)[0])
    assert not out.exists()
    assert len(list((tmp_path / "x.npz.parts").glob("*.safetensors"))) == after
    decoder, sizes = stopping(None)
    assert same(written(out, batch=then, decode=decoder), whole)
    assert (
        sum(sizes) == made
    )  # what was finished is not made again, whole batches of the new size at least
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_what_a_killed_process_left_half_written_is_not_taken_for_an_image(whole, tmp_path):
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    (parts / "00000000-00000011.safetensors.123.part").write_bytes(b"half")
    assert same(written(tmp_path / "x.npz"), whole)


def test_an_interruption_while_the_whole_is_written_costs_no_image(whole, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_files, "write_labels", stop)
        with pytest.raises(KeyboardInterrupt, match="run the same again"):
            write_images(
                make(),
                HALF,
                decode,
                count=COUNT,
                batch_size=4,
                seed=5,
                out=tmp_path / "x",
                progress=False,
            )
    assert len(list((tmp_path / "x").glob("*.png"))) == COUNT
    nobody = stopping(0)[0]
    write_images(
        make(), HALF, nobody, count=COUNT, batch_size=4, seed=5, out=tmp_path / "x", progress=False
    )
    assert np.array_equal(torch.cat(list(read_images(tmp_path / "x"))).numpy(), whole[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "x.labels.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed 5 -> 6"),
        ({"schedule": None}, "schedule .* -> none"),
        ({"schedule": Schedule([[1] * 4] * 4)}, "schedule "),
        ({"denoiser": make(guidance=2.0)}, "guidance 1.5 -> 2.0"),
    ],
)
def test_other_settings_do_not_go_on_where_these_stopped(change, message, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "x.npz", decode=stopping(1)[0])
    with pytest.raises(ValueError, match=f"was begun with other settings: {message}"):
        written(tmp_path / "x.npz", **change)


cuts = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), max_size=6)


@settings(max_examples=100)
@given(cuts=cuts, batch=st.integers(1, 8), whole=st.booleans(), count=st.integers(1, 24))
def test_overlapping_pieces_give_each_image_once_or_say_which_is_missing(
    cuts, batch, whole, count, tmp_path_factory
):
    parts = tmp_path_factory.mktemp("parts")
    there = set()
    for start, length in [*cuts, *((start, batch) for start in range(0, count, batch) if whole)]:
        (parts / f"{start:08}-{start + length:08}.safetensors").touch()
        there |= set(range(start, start + length))
    missing = sorted(set(range(count)) - there)
    if missing:
        with pytest.raises(FileNotFoundError, match=f"lacks image {missing[0]};"):
            pieces_of(parts, count)
        return
    position = 0
    for piece in pieces_of(parts, count):
        start, stop = map(int, piece.path.stem.split("-"))
        assert piece.first == position == start + piece.skip
        position += piece.images
        assert position <= stop
    assert position == count


# ------------------------------------------------------------ what is on disk


def test_an_npz_is_what_the_adm_evaluator_reads(whole):
    images, labels = whole
    assert (images.shape, images.dtype) == ((COUNT, 4, 4, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((COUNT,), np.int64)
    assert set(labels.tolist()) <= {0, 1, 2}


def test_a_folder_holds_the_same_images_and_nothing_that_is_no_image(whole, tmp_path):
    out = tmp_path / "deep/er"
    write_images(make(), HALF, decode, count=COUNT, batch_size=3, seed=5, out=out, progress=False)
    assert sorted(p.name for p in out.iterdir()) == [f"{i:06}.png" for i in range(COUNT)]
    with Image.open(out / "000004.png") as picture:
        assert picture.mode == "RGB"
        assert np.array_equal(np.array(picture), whole[0][4])
    labels = (tmp_path / "deep/er.labels.txt").read_text().split()
    assert labels == [str(label) for label in whole[1]]


def test_values_go_to_the_nearest_level_and_grey_becomes_rgb():
    levels = torch.arange(256)
    exact = levels / 127.5 - 1
    for nudge in (-0.49, 0.0, 0.49):
        made = to_uint8((exact + nudge / 127.5).view(1, 1, 16, 16))
        assert made.shape == (1, 16, 16, 3)
        for channel in range(3):
            assert torch.equal(made[0, :, :, channel].flatten().long(), levels)
    colours = torch.tensor([-1.0, 0.0, 5.0]).view(1, 3, 1, 1)
    assert to_uint8(colours)[0, 0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (lambda x: x, r"decode made \(4, 2, 4, 4\); expected \(B, 1 or 3, H, W\)"),
        (lambda x: x[:, 0], r"decode made \(4, 4, 4\)"),
        (lambda x: x[:, :1] * float("nan"), "decode made values that are not finite"),
    ],
)
def test_what_is_no_picture_is_refused(decode, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "x.npz", decode=decode)
    assert not (tmp_path / "x.npz").exists()


def test_images_that_differ_in_size_do_not_go_into_one_array(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "x.npz", decode=stopping(1)[0])
    with pytest.raises(
        ValueError, match=r"images differ in size: \(2, 2, 3\) in .*, \(4, 4, 3\) in "
    ):
        written(tmp_path / "x.npz", decode=lambda x: decode(x)[:, :, :2, :2])


def test_bad_requests_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="count is 0"):
        written(tmp_path / "x.npz", count=0)
    with pytest.raises(ValueError, match="batch_size is -1"):
        written(tmp_path / "x.npz", batch=-1)
    (tmp_path / "x.npz").write_text("a day of work")
    with pytest.raises(FileExistsError, match=r"x\.npz exists; choose another name"):
        written(tmp_path / "x.npz")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/000000.png").touch()
    with pytest.raises(FileExistsError, match="folder exists"):
        written(tmp_path / "folder")
    with pytest.raises(ValueError, match="this schedule has 1 steps"):
        written(tmp_path / "y.npz", schedule=Schedule([[1] * 4]))


def test_conditions_that_are_no_whole_numbers_are_refused(tmp_path):
    d = make()
    draw = d.draw
    for cond, found in (
        (torch.zeros(1), r"\(1,\) torch.float32"),
        ((1, 2), "tuple"),
        (torch.zeros(1, 2), r"\(1, 2\)"),
    ):
        d.draw = lambda batch, g, cond=cond: (draw(batch, g)[0], cond)
        with pytest.raises(ValueError, match=f"the denoiser draws conditions {found}"):
            written(tmp_path / "x.npz", denoiser=d)


# ------------------------------------------------------------ reading, FID, IS, CLIP score


def test_reading_refuses_what_is_no_set_of_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz: no such file"):
        list(read_images(tmp_path / "none.npz"))
    with pytest.raises(FileNotFoundError, match="has no image; expected files in .png"):
        list(read_images(tmp_path))
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"text\.npz is neither an \.npz nor a folder"):
        list(read_images(tmp_path / "text.npz"))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.zeros(3))
    with pytest.raises(ValueError, match="has arrays mu, sigma; expected arr_0 of uint8"):
        list(read_images(tmp_path / "other.npz"))
    np.savez(tmp_path / "float.npz", np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"has arr_0 float64 \(2, 4, 4, 3\)"):
        list(read_images(tmp_path / "float.npz"))
    for name, size in (("a.png", (4, 4)), ("b.JPG", (5, 4))):
        Image.new("L", size).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"b\.JPG is \(4, 5\), .*a\.png \(4, 4\)"):
        list(read_images(tmp_path))


def test_without_the_extra_fid_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match=r"pip install 'harmonica-dit\[fid\]' brings it"):
        fid_inception(tmp_path / "a.npz", tmp_path / "b.npz")


def torchmetrics_of(monkeypatch, name, **classes):
    """Stand in for torchmetrics, which no test needs to have."""
    module = type(sys)(name)
    vars(module).update(classes)
    for i in range(1, name.count(".") + 1):
        above = ".".join(name.split(".")[:i])
        monkeypatch.setitem(sys.modules, above, type(sys)(above))
    monkeypatch.setitem(sys.modules, name, module)


def test_fid_is_given_channels_first_bytes_of_both_sets(monkeypatch, tmp_path):
    seen = {True: [], False: []}

    class Fid(torch.nn.Module):
        def __init__(self, feature):
            super().__init__()
            assert feature == 2048

        def update(self, images, real):
            seen[real].append(images)

        def compute(self):
            return torch.tensor(1.5)

    torchmetrics_of(monkeypatch, "torchmetrics.image.fid", FrechetInceptionDistance=Fid)
    one, _ = written(tmp_path / "one.npz")
    two, _ = written(tmp_path / "two.npz", seed=6, count=3)
    assert fid_inception(tmp_path / "one.npz", tmp_path / "two.npz", batch_size=4) == 1.5
    for real, images in ((False, one), (True, two)):
        assert seen[real][0].dtype == torch.uint8
        assert np.array_equal(torch.cat(seen[real]).permute(0, 2, 3, 1).numpy(), images)


def test_the_inception_score_is_of_channels_first_bytes_and_needs_an_image_a_split(
    monkeypatch, tmp_path
):
    class Score(torch.nn.Module):
        def __init__(self, splits):
            super().__init__()
            self.splits, self.seen = splits, []

        def update(self, images):
            assert images.dtype == torch.uint8
            self.seen.append(images)

        def compute(self):
            return torch.cat(self.seen).shape[1] * torch.tensor(1.0), torch.tensor(0.5)

    torchmetrics_of(monkeypatch, "torchmetrics.image.inception", InceptionScore=Score)
    written(tmp_path / "one.npz")
    assert inception_score(tmp_path / "one.npz", splits=COUNT, batch_size=4) == (3.0, 0.5)
    with pytest.raises(ValueError, match=rf"splits is {COUNT + 1}; .*one.npz has {COUNT} images"):
        inception_score(tmp_path / "one.npz", splits=COUNT + 1)


def test_the_clip_score_pairs_each_image_with_its_prompt(monkeypatch, tmp_path):
    pairs = []

    class Score(torch.nn.Module):
        def __init__(self, model_name_or_path):
            super().__init__()
            assert model_name_or_path.startswith("openai/")

        def update(self, images, texts):
            pairs.extend(zip(images.permute(0, 2, 3, 1).numpy(), texts, strict=True))

        def compute(self):
            return torch.tensor(31.0)

    torchmetrics_of(monkeypatch, "torchmetrics.multimodal.clip_score", CLIPScore=Score)
    images, _ = written(tmp_path / "one.npz")
    prompts = [f"prompt {i}" for i in range(COUNT)]
    assert clip_score(tmp_path / "one.npz", prompts, batch_size=4) == 31.0
    assert [text for _, text in pairs] == prompts
    assert np.array_equal(np.stack([image for image, _ in pairs]), images)
    for wrong in (prompts[:-1], [*prompts, "one more"]):
        with pytest.raises(
            ValueError, match=rf"has {COUNT} images, there are {len(wrong)} prompts"
        ):
            clip_score(tmp_path / "one.npz", wrong, batch_size=4)


# ------------------------------------------------------------ the command


def said(arguments, capsys):
    """Return the exit code, stdout and stderr of the command."""
    try:
        code = image_sets.main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse's way
        code = exit.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command_is_the_library(tmp_path, capsys):
    d = models.load("tiny", steps=3, guidance=2.0)
    schedule = Schedule([[1, 1], [0, 0], [1, 0]], sites=("attn", "mlp"), **d.about)
    schedule.save(tmp_path / "s.json")
    options = [
        "--steps",
        3,
        "--guidance",
        2.0,
        "--schedule",
        tmp_path / "s.json",
        "--count",
        5,
        "--seed",
        9,
    ]
    code, out, _ = said([*options, "--out", tmp_path / "a b.npz"], capsys)
    assert (code, out) == (0, f"5 images of seed 9 are in {tmp_path / 'a b.npz'}\n")
    fitted = schedule.fit(tuple(d.sites))
    write_images(
        d, fitted, lambda x: x, count=5, seed=9, out=tmp_path / "library.npz", progress=False
    )
    assert same(arrays(tmp_path / "a b.npz"), arrays(tmp_path / "library.npz"))


def test_every_option_of_the_model_reaches_load(tmp_path, monkeypatch, capsys):
    asked, tiny = {}, models.load

    def load(name, **options):
        asked.update(options, name=name)
        return tiny("tiny", steps=3)

    monkeypatch.setattr(models, "load", load)
    options = "--model pixart-sigma-1024 --sampler iddpm --steps 3 --guidance 2.5 --weights random --dtype bfloat16"
    code, *_ = said(
        [*options.split(), "--prompts", "p.txt", "--count", 1, "--out", tmp_path / "x"], capsys
    )
    assert code == 0
    assert asked == {
        "name": "pixart-sigma-1024", "sampler": "iddpm", "steps": 3, "guidance": 2.5, "weights": "random",
        "prompts": Path("p.txt"), "dtype": torch.bfloat16, "device": torch.device("cpu"),
        "activation_checkpointing": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "count is 0"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--model", "dalle"], "model is 'dalle'"),
        (["--schedule", "no such.json"], "no such.json: no such file"),
        (["--device", "teapot"], "--device teapot"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--out", "/dev/null/x.npz"], "Not a directory"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(arguments, message, tmp_path, capsys):
    code, out, err = said(
        ["--steps", "2", "--count", "2", "--out", tmp_path / "x.npz", *arguments], capsys
    )
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_schedule_of_other_steps_is_refused_before_anything_is_written(tmp_path, capsys):
    Schedule([[1] * 16] * 3).save(tmp_path / "s.json")
    code, _, err = said(
        ["--steps", 2, "--schedule", tmp_path / "s.json", "--out", tmp_path / "x.npz"], capsys
    )
    assert (code, len(err.splitlines())) == (2, 1)
    assert "this schedule has 3 steps" in err
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_its_own_parser_takes_the_commands_it_documents():
    lines = [
        line.split("harmonica.image_sets")[1]
        for line in image_sets.__doc__.replace("\\\n", "").splitlines()
        if "-m harmonica.image_sets" in line
    ]
    assert len(lines) == 2
    for line in lines:
        assert image_sets.parser().parse_args(line.split()).count in (1000, 50000)
