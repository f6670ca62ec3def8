"""Files of other people, export, resampling and the Hub's folder: what is read, and what is refused."""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import refused, seeded, seeds, tables
from hypothesis import given
from hypothesis import strategies as st

from harmonica import Router, Schedule
from harmonica.storage.foreign import write_smoothcache
from harmonica.storage.hub import ROUTER, fetch, push, write_folder

DATA = os.environ.get("HARMONICA_FOREIGN_DATA")
DIT = tuple(f"blocks.{i}.{kind}" for i in range(28) for kind in ("attn", "mlp"))
ABOUT = {"model": "small", "sampler": "ddim", "timesteps": (9, 5, 0), "guidance": 1.5}
ABOUT |= {"provenance": {"seed": 1}}
L2C = argparse.Namespace(data_path="/images", l1=1e-6, ste_threshold=None, model="DiT-XL/2")
AUTHORS = argparse.Namespace(lambda_c=500, l1=7e-8, ste_threshold=0.1, model="DiT-XL/2")
ROW = torch.ones(2)


def logits(steps, sites, seed=0, trained=slice(None)):
    """Draw (T, N) logits in a file's order: N(0, 1) before training, ±5 where it has been."""
    generator = seeded(seed)
    drawn = torch.randn(steps, sites, generator=generator).clamp(-4, 4)
    drawn[trained] = 10.0 * (torch.rand(drawn[trained].shape, generator=generator) > 0.5) - 5.0
    return drawn


def write_rows(path, rows, args=None):
    """Write (T, N) logits as a router file: with settings around them, or bare."""
    routers = {f"{k}.prob": row.clone() for k, row in enumerate(rows)}
    around = {"routers": routers, "opt": {"state": {}}, "args": args}
    torch.save(routers if args is None else around, path)
    return path


@pytest.mark.parametrize(("steps", "sites"), [(1, 3), (2, 3), (5, 56), (6, 3), (7, 3)])
def test_learning_to_cache_reuses_on_even_rows_and_runs_the_last_row_first(tmp_path, steps, sites):
    rows = logits(steps, sites)
    schedule = Schedule.load(write_rows(tmp_path / "r.pt", rows, L2C))
    wanted = rows.sigmoid() > 0.1
    wanted[1::2] = wanted[-1] = True
    assert torch.equal(schedule.compute, wanted.flip(0))  # for odd numbers of steps too
    assert schedule.sites == (DIT if sites == 56 else ("site0", "site1", "site2"))
    assert (schedule.model, schedule.threshold) == ("DiT-XL/2", 0.1)
    origin = {"format": "Learning-to-Cache router file", "file": "r.pt", "tau": 0.1}
    assert origin.items() <= schedule.provenance.items()
    assert ("first_step" in schedule.provenance) == (steps % 2 == 1)


@given(st.integers(2, 7), st.floats(0.01, 0.99), seeds)
def test_the_authors_routers_may_reuse_in_any_row(tmp_path_factory, steps, tau, seed):
    rows = logits(steps, 4, seed, trained=slice(0, 1))
    schedule = Schedule.load(write_rows(tmp_path_factory.mktemp("r") / "r.pt", rows, AUTHORS), tau)
    wanted = (rows.sigmoid() > tau).flip(0)
    assert torch.equal(schedule.compute[1:], wanted[1:])
    assert ("first_step" in schedule.provenance) != bool(wanted[0].all())
    assert schedule.provenance["format"] == "HarmoniCa router file"


def test_a_bare_file_shows_by_its_rows_and_columns_whose_it_is(tmp_path):
    theirs = logits(6, 56, trained=slice(0, None, 2))
    assert bool((theirs[1::2].sigmoid() <= 0.1).any())  # untrained rows would reuse here and there
    assert bool(Schedule.load(write_rows(tmp_path / "r.pth", theirs)).compute.flip(0)[1::2].all())
    everywhere = Schedule.load(write_rows(tmp_path / "r.pth", logits(6, 56)))
    assert not bool(everywhere.compute.flip(0)[1::2].all())
    sites = Schedule.load(write_rows(tmp_path / "r.pt", logits(3, 58), AUTHORS)).sites
    sides = [[f"{side}_blocks.{i}" for i in range(14)] for side in ("in", "out")]
    blocks = [*sides[0], "mid_block", *sides[1]]
    assert sites == tuple(f"{block}.{kind}" for block in blocks for kind in ("attn", "mlp"))


@pytest.mark.parametrize("steps", [6, 7, 20])
def test_a_u_vit_router_reuses_at_every_other_prediction_from_the_second_step_on(tmp_path, steps):
    rows = logits(steps, 58, trained=slice(1, steps // 2))
    schedule = Schedule.load(write_rows(tmp_path / "dpm.pth", rows), 0.9)
    wanted = torch.ones(steps, 58, dtype=torch.bool)
    for row in range(1, steps // 2):
        wanted[2 * row] = rows[row].sigmoid() > 0.9
    assert torch.equal(schedule.compute, wanted)
    assert schedule.provenance["format"] == "Learning-to-Cache U-ViT router file"


def test_a_router_saved_on_a_gpu_is_read_without_one(tmp_path):
    """The location tag in the pickle is rewritten to cuda:0, as torch writes it for a tensor on a GPU."""
    plain = write_rows(tmp_path / "cpu.pt", logits(4, 3), L2C)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(tmp_path / "gpu.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(name, data)
    assert torch.equal(Schedule.load(tmp_path / "gpu.pt").compute, Schedule.load(plain).compute)


def test_settings_in_a_pickle_are_allowed_for_that_one_call(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    Schedule.load(path := write_rows(tmp_path / "r.pt", logits(4, 3), L2C))
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_a_router_is_frozen_where_it_is_read_at_a_threshold_that_is_checked(tmp_path):
    router = Router(5, ["a", "b"], about={"model": "small", "timesteps": (4, 3, 2, 1, 0)})
    router.save(tmp_path / "ours")  # its first byte is that of a pickle
    for tau in (0.1, 0.5):
        assert Schedule.load(tmp_path / "ours", tau) == router.schedule(tau)
    for path in (tmp_path / "ours", write_rows(tmp_path / "theirs", logits(3, 2), L2C)):
        for tau in (-0.1, 1.0, float("nan")):
            with refused("tau is"):
                Schedule.load(path, tau)


def write(path, data):
    path.write_text(json.dumps(data))
    return path


def test_smoothcache_is_sorted_by_block_or_kind_and_its_first_step_computes(tmp_path):
    data = {"mlp-10": [1, 0], "attn-10": [1, 1], "mlp-9": [True, False], "attn-9": [True, True]}
    schedule = Schedule.load(write(tmp_path / "s.json", data))
    assert schedule.sites == ("blocks.9.attn", "blocks.9.mlp", "blocks.10.attn", "blocks.10.mlp")
    assert schedule.compute.tolist() == [[True] * 4, [True, False, True, False]]
    assert schedule.provenance == {"format": "SmoothCache, per block", "file": "s.json"}
    schedule = Schedule.load(write(tmp_path / "s.json", {"mlp": [1, 0, 1], "attn": [1, 1, 0]}))
    assert schedule.sites == ("attn", "mlp")
    assert schedule.compute.tolist() == [[True, True], [True, False], [False, True]]
    schedule = Schedule.load(write(tmp_path / "s.json", {"attn": [0, 0], "mlp": [1, 0]}))
    assert schedule.compute.tolist() == [[True, True], [False, False]]
    first = "computes, although the file lets 1 of its 2 sites reuse"
    assert schedule.provenance["first_step"] == first


PICKLES = {
    r"not whole: of rows 0 to 2, \[1\] are missing$": [{"0.prob": ROW, "2.prob": ROW}],
    r"of rows 0 to 3, \[0, 1, 2\] are missing": [{"3.prob": ROW}],
    "no router file": [{"routers": {}}, {"routers": 7}, [ROW], ROW],
    "no router file: it has 0.weight where": [{"0.weight": ROW}],
    "row 1 that is not finite": [
        {"0.prob": ROW, "1.prob": row} for row in (torch.ones(3), ROW / 0)
    ],
    "row 0 that is not finite": [{"0.prob": torch.ones(2, 2)}, {"0.prob": "1111"}],
}
OURS = {"format": "harmonica-schedule-1"}
TEXTS = {
    "lists of different lengths.*attn 2, mlp 1": [{"attn": [1, 0], "mlp": [1]}],
    "mixes sites of one block": [{"attn": [1, 0], "mlp-0": [1, 0]}],
    "attn with entries other than 0 and 1": [{"attn": [1, other]} for other in (2, "0", [0])],
    "not a valid schedule": [{"attn": []}, {"attn-0": [1], "attn-00": [1]}],
    "not a valid schedule.*weights": [
        OURS | {"compute": {"a": "101"}, "weights": other}
        for other in (["AAAA"], [""], {}, ["AACAPwAAAAA="] * 2)
    ],
    'no "format"': [{}, {"attn": "10"}],
    "transformer_cache_book is .*expected a plan for each kind": [
        {"step_cache_book": [True], "transformer_cache_book": other} for other in (3, "x", [[True]])
    ],
    "is it newer": [{"format": "harmonica-schedule-2"}],
    "compute is .*; expected a string": [OURS | {"compute": c} for c in (None, {}, ["11"], "11")],
    r"sites have \[2, 3\] digits": [OURS | {"compute": {"a": "110", "b": "11"}}],
    "weights must be a list of 1 texts in base64": [
        OURS | {"compute": {"a": "11"}, "weights": other} for other in ("x", [1], ["!!"], ["é"], [])
    ],
}
REFUSED = [(torch.save, *case) for case in PICKLES.items()]
REFUSED += [(lambda data, path: write(path, data), *case) for case in TEXTS.items()]


@pytest.mark.parametrize(("save", "message", "several"), REFUSED)
def test_a_file_that_lacks_something_or_is_impossible_is_refused(tmp_path, save, message, several):
    for data in several:
        save(data, tmp_path / "r.pt")
        with refused(rf"r\.pt.*{message}"):
            Schedule.load(tmp_path / "r.pt")


THREE = [f"transformer_blocks.{site}" for site in ("3.attn1", "3.attn2", "3.ff", "12.ff")]
KEYS = {"attn-0 mlp-0 attn-1 mlp-1": DIT[:4], "attn-3 attn2-3 mlp-3 mlp-12": THREE}


@pytest.mark.parametrize("keys", KEYS)
@given(tables())
def test_an_exported_table_reads_back_the_same(tmp_path_factory, keys, schedule):
    path, names, keys = tmp_path_factory.mktemp("export") / "s.json", KEYS[keys], keys.split()
    write_smoothcache(path, replace(schedule, sites=names))
    data = json.loads(path.read_text())
    assert (list(data), data[keys[0]]) == (keys, schedule.compute[:, 0].int().tolist())
    assert torch.equal(Schedule.load(path).compute, schedule.compute)


def test_a_site_that_smoothcache_has_no_name_for_is_named(tmp_path):
    for other in ("mid_block.mlp", "transformer_blocks.0.attn1"):
        sites = ("blocks.0.attn", other)
        with refused(rf"1 sites cannot be exported: {other}; "):
            write_smoothcache(tmp_path / "s.json", Schedule([[1, 1]], sites))
        assert not (tmp_path / "s.json").exists()


@pytest.mark.skipif(DATA is None, reason="HARMONICA_FOREIGN_DATA names no folder of theirs")
def test_the_published_files_give_the_published_tables():
    folder = Path(str(DATA))
    router = Schedule.load(folder / "l2c" / "DDIM50_router.pt")
    table = Schedule.load(folder / "smoothcache" / "50-N-2-l2c.json")
    assert router.sites == table.sites == DIT
    assert torch.equal(router.compute, table.compute)
    assert 100 * router.cur == pytest.approx(23.71, abs=0.005)
    short = Schedule.load(folder / "l2c" / "DDIM20_router.pt")
    assert 100 * short.cur == pytest.approx(22.14, abs=0.005)
    for steps in (20, 50):  # of what the solver's second step may reuse, as its sampler counts it
        schedule = Schedule.load(folder / "l2c" / f"dpm{steps}_router.pth", 0.9)
        assert bool(schedule.compute[1::2].all())
        assert schedule.cur > 0.28
    for path in (folder / "smoothcache").glob("*[0-9].json"):
        assert Schedule.load(path).sites == ("attn", "mlp")


@given(tables(steps=6), st.integers(1, 13))
def test_a_resampled_row_comes_from_the_same_relative_place(schedule, steps):
    schedule = replace(schedule, timesteps=(5, 4, 3, 2, 1, 0), provenance={"seed": 1})
    with warnings.catch_warnings(), refused("steps is 0"):
        warnings.simplefilter("error")
        assert schedule.resample(6) == schedule
        schedule.resample(0)
    if steps == 6:
        return
    message = f"for 6 steps was stretched to {steps}, not trained there"
    with pytest.warns(UserWarning, match=message):
        other = schedule.resample(steps)
    assert (other.steps, bool(other.compute[0].all())) == (steps, True)
    assert (other.timesteps, other.sites) == ((), schedule.sites)
    assert other.provenance == {"seed": 1, "resampled_from": 6}
    for k in range(1, steps):
        assert torch.equal(other.compute[k], schedule.compute[round(k * 5 / (steps - 1))])


@pytest.mark.parametrize("blocks", ["blocks", "transformer_blocks"])
@pytest.mark.parametrize(("steps", "kinds"), [(20, ("attn", "mlp")), (100, ("attn", "mlp", "x"))])
def test_a_schedule_file_is_readable_and_small(tmp_path, steps, kinds, blocks):
    sites = [f"{blocks}.{i}.{kind}" for i in range(28) for kind in kinds]
    settings = {"method": "HarmoniCa", "iterations": 20000, "batch_size": 8, "beta": 7e-8}
    about = {**ABOUT, "timesteps": tuple(range(999, 999 - steps, -1)), "provenance": settings}
    Router(steps, sites, about=about).schedule().save(tmp_path / "s.json")
    text = (tmp_path / "s.json").read_text()
    assert len(text) < 4 * steps * len(sites)
    assert text.isascii()
    assert f'  "{blocks}.3.attn": "1' in text


def pair():
    router = Router(3, ["blocks.0.attn", "blocks.0.mlp"], about=ABOUT)
    return router, router.schedule(0.3)


def test_a_folder_holds_the_files_that_save_writes_and_a_page(tmp_path):
    router, schedule = pair()
    for name, files in (("one", []), ("both", [ROUTER])):
        folder = tmp_path / name
        write_folder(folder, schedule, router if files else None)
        files = ["README.md", *files, "schedule.json"]
        assert sorted(p.name for p in folder.iterdir()) == files
        assert Schedule.load(fetch(folder)) == schedule
        page = (folder / "README.md").read_text()
        assert page.startswith("---\nlibrary_name: harmonica\n")
        assert f'Schedule.load(fetch("{folder.name}"))' in page
        assert "# Schedule for small" in page
    assert torch.equal(Router.load(fetch(folder, ROUTER))(), router())
    with pytest.raises(FileNotFoundError, match=r"router\.safetensors: no such file"):
        Router.load(fetch(tmp_path / "one", ROUTER))


def test_what_is_pushed_is_what_is_fetched(tmp_path, monkeypatch):
    asked, options = [], {}

    def create(name, **more):
        asked.append(("create", name, more))
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload(*, repo_id, folder_path, commit_message):
        asked.append(("upload", repo_id, commit_message))
        shutil.copytree(folder_path, tmp_path, dirs_exist_ok=True)

    client = SimpleNamespace(create_repo=create, upload_folder=upload)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: client)
    download = lambda name, **more: options.update(more, name=name) or tmp_path  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    router, schedule = pair()
    push("table", schedule, router, private=True)
    message = "Upload a table made with HarmoniCa"
    created = ("create", "table", {"private": True, "exist_ok": True})
    assert asked == [created, ("upload", "me/table", message)]
    assert 'fetch("me/table")' in (tmp_path / "README.md").read_text()
    assert Schedule.load(fetch("me/table", revision="v1")) == schedule
    assert {"name": "me/table", "revision": "v1"}.items() <= options.items()
    assert torch.equal(Router.load(fetch("me/table", ROUTER))(), router())


def test_a_repository_that_is_not_cached_is_one_clear_sentence_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = r"^me/table is not on this machine and cannot be fetched [^\n]*; connect to the Hub"
    with pytest.raises(FileNotFoundError, match=message):
        fetch("me/table")
    with refused(r"^\./a/b/c is no folder here and no name of a rep"):
        fetch("./a/b/c")
    # The hub's client is not imported until it is needed.
    script = "import sys; from harmonica.storage.hub import *; from harmonica import Schedule\n"
    script += "write_folder('s', Schedule([[1]])); Schedule.load(fetch('s'))\n"
    command = [sys.executable, "-c", script + "print('huggingface_hub' in sys.modules)"]
    assert subprocess.check_output(command, cwd=tmp_path, text=True) == "False\n"
