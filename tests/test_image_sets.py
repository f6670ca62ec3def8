"""Samples on disk: image i is image i, whoever makes it and however often it was interrupted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal, make, raising, refused, said, seeded, torchrun
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scores import read_images
from small import weigh

from harmonica import Schedule, image_sets, models, sample
from harmonica.image_sets import draw_images, generator_of, to_uint8, write_images
from harmonica.site_names import fit

COUNT = 11
HALF = Schedule([[1] * 4, [0] * 4, [1, 0, 1, 0], [0] * 4])


def decode(x):
    return torch.tanh(x[:, :1])  # grey


def write(out, *, batch=4, count=COUNT, seed=5, schedule=HALF, decode=decode, denoiser=None):
    """Write samples of a small model; return the path."""
    how = {"count": count, "batch_size": batch, "seed": seed, "out": out, "progress": False}
    return write_images(denoiser or make(), schedule, decode, **how)


def written(out, **more):
    """Write samples to an array; return images and labels as they are on disk."""
    path = write(out, **more)
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


def in_folder(path):
    """Return the images of a folder."""
    return torch.cat(list(read_images(path))).numpy()


@pytest.mark.parametrize("batch", [1, 3, 8, 100])
def test_an_image_does_not_depend_on_the_batch_size_or_how_many_there_are(batch, whole, tmp_path):
    assert same(written(tmp_path / "x.npz", batch=batch), whole)
    assert same(written(tmp_path / "y.npz", batch=batch, count=3), [each[:3] for each in whole])


def test_a_process_makes_its_share_and_says_whose_images_it_misses(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(image_sets, "world", lambda: 2)
        patch.setattr(image_sets, "rank", lambda: 1)
        with pytest.raises(FileNotFoundError, match="lacks image 0; all processes must see"):
            written(tmp_path / "x.npz", batch=3)
    assert finished(tmp_path / "x.npz") == [3, 4, 5, 9, 10]
    decoder, sizes = stopping(None)
    assert same(written(tmp_path / "x.npz", batch=3, decode=decoder), whole)
    assert sum(sizes) == 6  # nothing that another has made


def test_torchrun_writes_what_one_process_does(tmp_path):
    options = ["--steps", "3", "--count", "7", "--batch-size", "2", "--seed", "3"]
    done = torchrun("-m", "harmonica.image_sets", *options, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("7 images of seed 3") == 1
    assert image_sets.main([*options, "--out", str(tmp_path / "one.npz")]) == 0
    images, labels = arrays(tmp_path / "one.npz")
    assert np.array_equal(in_folder(tmp_path / "two"), images)
    assert (tmp_path / "two.labels.txt").read_text().split() == [str(label) for label in labels]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.npz", "two", "two.labels.txt"]


def test_other_seeds_are_other_images_and_labels_are_what_they_were_made_of(whole, tmp_path):
    images, labels = written(tmp_path / "x.npz", seed=6)
    assert not np.array_equal(images, whole[0])
    assert not np.array_equal(labels, whole[1])
    assert len(np.unique(whole[0], axis=0)) == COUNT
    d = make()
    x, cond = draw_images(d, range(COUNT), 5)
    assert np.array_equal(whole[1], cond.numpy())
    assert np.array_equal(whole[0], to_uint8(decode(sample(d, x, cond, HALF))).numpy())
    one, label = d.draw(1, generator_of(5, 7))
    assert equal((x[7:8], cond[7:8]), (one, label))


@given(seed=st.integers(-(2**70), 2**70), first=st.integers(0, 2**31))
def test_no_two_images_of_a_seed_share_a_generator(seed, first):
    """The generator on the CPU reads 32 bits of its seed: seeds that differ above them are one."""
    assert equal(*(torch.randn(1, 3, generator=seeded(s)) for s in (5, 5 + 2**32)))
    begun = {generator_of(seed, i).initial_seed() for i in range(first, first + 200)}
    assert len(begun) == 200
    assert max(begun) < 2**32


def stopping(after):
    """Return a decoder that is interrupted at its call number `after`, and the sizes of what it finished."""
    sizes = []

    def interrupted(x):
        if len(sizes) == after:
            raise KeyboardInterrupt
        sizes.append(len(x))
        return decode(x)

    return interrupted, sizes


def finished(out):
    """Return the numbers of the finished images of a run that has stopped."""
    return sorted(int(path.stem) for path in Path(f"{out}.parts").glob("*.png"))


@pytest.mark.parametrize(("after", "first", "then"), [(0, 4, 4), (2, 4, 4), (2, 3, 4), (1, 8, 1)])
@pytest.mark.parametrize("name", ["x.npz", "x"])
def test_an_interrupted_run_goes_on_and_ends_the_same(after, first, then, name, whole, tmp_path):
    out = tmp_path / name
    with pytest.raises(KeyboardInterrupt, match=rf"finished images are in .*{name}\.parts"):
        write(out, batch=first, decode=stopping(after)[0])
    assert not out.exists()
    assert finished(out) == list(range(after * first))
    half = out.with_name(f"{name}.parts") / "000009.png.0123abcd.part"
    half.write_bytes(b"half")  # of a process that was killed
    decoder, sizes = stopping(None)
    write(out, batch=then, decode=decoder)
    assert sum(sizes) == COUNT - after * first  # no finished image again
    assert np.array_equal(arrays(out)[0] if name == "x.npz" else in_folder(out), whole[0])
    left = {"x.npz": ["x.npz"], "x": ["x", "x.labels.txt"]}[name]
    assert sorted(p.name for p in tmp_path.iterdir()) == left


def test_an_interruption_while_all_is_put_together_costs_no_image(whole, tmp_path, monkeypatch):
    drawn = lambda d, numbers, seed: draw_images(d, numbers, seed if len(numbers) > 1 else stop())  # noqa: E731
    stop = raising(KeyboardInterrupt)
    with monkeypatch.context() as patch:
        patch.setattr(image_sets, "draw_images", drawn)  # one by one for their labels
        with pytest.raises(KeyboardInterrupt, match="run the same again"):
            write(tmp_path / "x")
    assert len(finished(tmp_path / "x")) == COUNT
    write(tmp_path / "x", count=5, decode=stopping(0)[0])
    assert np.array_equal(in_folder(tmp_path / "x"), whole[0][:5])  # of fewer, the first


def test_other_settings_and_sizes_do_not_go_on_where_these_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x.npz", decode=stopping(1)[0])
    for change, message in [
        ({"seed": 6}, "seed 5 -> 6"), ({"schedule": None}, "schedule .* -> none"),
        ({"schedule": Schedule([[1] * 4] * 4)}, "schedule "),
        ({"schedule": replace(HALF, order=1)}, "schedule "),
        ({"schedule": weigh(HALF, 1)}, "schedule "),
        ({"denoiser": make(guidance=2.0)}, "guidance 1.5 -> 2.0"),
    ]:  # fmt: skip
        with refused(rf"was begun with other settings \({message}"):
            write(tmp_path / "x.npz", **change)
    with refused(r"images differ in size: \(2, 2, 3\) in .*, \(4, 4, 3\) in "):
        write(tmp_path / "x.npz", decode=lambda x: decode(x)[:, :, :2, :2])
    (tmp_path / "x.npz.parts/000002.png").write_bytes(b"damaged")
    with refused(r"x\.npz\.parts/000002\.png is no image of this set; remove it and run the same"):
        write(tmp_path / "x.npz")


def test_an_npz_is_what_the_adm_evaluator_reads_and_a_folder_holds_the_same_images(whole, tmp_path):
    images, labels = whole
    assert (images.shape, images.dtype) == ((COUNT, 4, 4, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((COUNT,), np.int64)
    assert set(labels.tolist()) <= {0, 1, 2}
    write(out := tmp_path / "deep/er")
    assert sorted(p.name for p in out.iterdir()) == [f"{i:06}.png" for i in range(COUNT)]
    with Image.open(out / "000004.png") as picture:
        assert picture.mode == "RGB"
        assert np.array_equal(np.array(picture), images[4])
    assert (tmp_path / "deep/er.labels.txt").read_text().split() == [*map(str, labels)]


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


def test_what_is_no_picture_no_condition_or_no_request_is_refused_by_name(tmp_path):
    for bad, message in [
        (lambda x: x, r"decode made \(4, 2, 4, 4\); expected \(B, 1 or 3, H, W\)"),
        (lambda x: x[:, 0], r"decode made \(4, 4, 4\)"),
        (lambda x: x[:, :1] * float("nan"), "decode made values that are not finite"),
    ]:
        with refused(message):
            write(tmp_path / "w.npz", decode=bad)
        assert not (tmp_path / "w.npz").exists()
    for cond in (torch.zeros(1), (1, 2), torch.zeros(1, 2, dtype=torch.long)):
        d = make()
        d.draw = lambda batch, g, draw=d.draw: (draw(batch, g)[0], cond)
        with refused("expected one whole number"):
            write(tmp_path / "z.npz", denoiser=d)
    for request, message in (({"count": 0}, "count is 0"), ({"batch": -1}, "batch_size is -1")):
        with refused(message):
            write(tmp_path / "x.npz", **request)
    (tmp_path / "x.npz").write_text("a day of work")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/000000.png").touch()
    for name in ("x.npz", "folder"):
        with pytest.raises(FileExistsError, match=f"{name} exists; choose another name"):
            write(tmp_path / name)
    with refused("this schedule has 1 steps"):
        write(tmp_path / "y.npz", schedule=Schedule([[1] * 4]))


def test_the_command_is_the_library(tmp_path, capsys):
    d = models.load("tiny", steps=3, guidance=2.0)
    schedule = Schedule([[1, 1], [0, 0], [1, 0]], sites=("attn", "mlp"), **d.about)
    schedule.save(tmp_path / "s.json")
    options = ["--steps", 3, "--guidance", 2.0, "--schedule", tmp_path / "s.json", "--count", 5]
    code, out, _ = said(image_sets, [*options, "--seed", 9, "--out", tmp_path / "a b.npz"], capsys)
    assert (code, out) == (0, f"5 images of seed 9 are in {tmp_path / 'a b.npz'}\n")
    fitted, out = fit(schedule, tuple(d.sites)), tmp_path / "library.npz"
    write_images(d, fitted, lambda x: x, count=5, seed=9, out=out, progress=False)
    assert same(arrays(tmp_path / "a b.npz"), arrays(tmp_path / "library.npz"))
    options = ["--steps", 2, "--schedule", tmp_path / "s.json", "--out", tmp_path / "x.npz"]
    code, _, err = said(image_sets, options, capsys)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "this schedule has 3 steps" in err
    assert not (tmp_path / "x.npz").exists(), "it is refused before anything is written"
