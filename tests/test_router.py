"""Router and Schedule: the table, its files, and what they refuse."""

import json
import math
import os
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make, refused, seeded, seeds, tables, with_noise
from hypothesis import given
from hypothesis import strategies as st

from harmonica import Macs, Router, Schedule, sample
from harmonica.storage.files import read_tensors, write_tensors


def test_row_zero_is_the_constant_one_and_not_a_parameter():
    router = Router(5, 3)
    assert router()[0].tolist() == [1.0, 1.0, 1.0]
    assert sum(p.numel() for p in router.parameters()) == 4 * 3
    router().sum().backward()
    assert all(row.grad is not None for row in router.rows)


@given(st.integers(1, 6), st.integers(1, 6), seeds)
def test_a_saved_router_is_the_same_table(tmp_path_factory, steps, sites, seed):
    path = tmp_path_factory.mktemp("router") / "a router.safetensors"
    router = Router(steps, sites, generator=seeded(seed), about={"model": "small"})
    router.save(path)
    again = Router.load(path)
    assert torch.equal(router(), again())
    assert (again.sites, again.about) == (router.sites, router.about)


@given(tables(), st.text(max_size=8))
def test_a_saved_schedule_is_the_same_table(tmp_path_factory, schedule, model):
    path = tmp_path_factory.mktemp("schedule") / "s.json"
    number = np.float32(0.5)  # whatever a schedule takes, its file gives back
    facts = {"timesteps": torch.tensor([999, 666, 333, 0]), "guidance": torch.tensor(1.5)}
    facts |= {"threshold": number, "provenance": {"seed": 1, 2: number, "all": torch.ones(2)}}
    schedule = replace(schedule, model=model, **facts)
    schedule.save(path)
    assert Schedule.load(path) == schedule


def test_a_schedule_is_frozen_shares_no_memory_and_equals_only_itself():
    facts = {"model": "small", "sampler": "ddim", "guidance": 1.5}
    table = torch.tensor([[True, True], [False, True]])
    one = Schedule(table, **facts)
    table[1] = True
    assert one.cur == 0.25
    assert one == Schedule([[1, 1], [0, 1]], **facts)
    assert one not in (replace(one, model="other"), Schedule([[1, 1], [1, 1]], **facts), "another")
    with pytest.raises(FrozenInstanceError):
        one.compute = table


def test_cur_and_speedup_by_hand():
    schedule = Schedule([[1, 1], [0, 1], [0, 0], [1, 0]])
    assert schedule.cur == 0.5
    macs = Macs(torch.tensor([3.0, 6.0], dtype=torch.float64), rest=1.0)
    assert schedule.speedup(macs) == 4 * 10 / (10 + 7 + 1 + 4)
    assert Schedule([[1, 1]]).speedup(macs) == 1.0
    with refused("macs counts 2 sites and the schedule has 3"):
        Schedule([[1, 1, 1]]).speedup(macs)


IMPOSSIBLE = [
    ([[1, 0], [1, 1]], {"sites": ("a", "b")}, "step 0 reuses b, but nothing is cached yet"),
    ([[1, 1], [0.5, 1]], {}, "entries other than 0 and 1"),
    ([[1.0, float("nan")]], {}, "entries other than 0 and 1"),
    (torch.ones(0, 3), {}, r"shape \(0, 3\)"),
    ([1, 1], {}, r"shape \(2,\)"),
    ([[1, 1]], {"sites": ("a",)}, "1 distinct site names"),
    ([[1, 1]], {"sites": ("a", "a")}, "1 distinct site names"),
    ([[1, 1]], {"timesteps": (1, 2)}, "2 timesteps"),
    *(([[1, 1]], {"timesteps": (t,)}, "a timestep is") for t in (math.nan, "1", None, True, 1j)),
    *(([[1, 1]], {"guidance": g}, "guidance is") for g in (math.inf, "2", [2], True)),
    *(([[1, 1]], {"threshold": t}, "threshold is") for t in (math.nan, "0", -0.1, 1.0)),
    (torch.quantize_per_tensor(torch.ones(1, 1), 1, 0, torch.qint8), {}, "quantized or nested"),
    *(([[1, 1]], {"model": m}, "model is") for m in (3, b"dit", Path("dit"))),
    *(([[1, 1]], {"provenance": {"a": v}}, "provenance is") for v in (math.nan, Path(), object())),
    ([[1, 1]], {"sites": (1, 2)}, "site 0 is 1"),
    ([[1, 1], [1]], {}, "compute is a list that no tensor can be made of"),
    (torch.ones(1, 1, device="meta"), {}, "compute is a Tensor that no tensor"),
]


@pytest.mark.parametrize(("table", "facts", "message"), IMPOSSIBLE)
def test_an_impossible_schedule_is_refused(table, facts, message):
    with refused(message):
        Schedule(table, **facts)


def test_a_router_without_steps_sites_or_numbers_is_refused():
    nothing, two = Router(3, 2), torch.zeros(2, 2)
    for name, values in {
        "tau": (-0.1, 1.0, 2, math.nan, math.inf, True, "0.1", None, [0.1], torch.ones(2)),
        "k": (-1, 3, 1.5, "1", None), "steps": (0, -1, True, 2.0, math.nan, "3", None, 10**9),
        "sites": (0, True, 2.0, None, "ab", 10**9), "generator": (0, True, "cpu"),
        "logits": (torch.zeros(3, 2), two * math.nan, two.int(), two.bool(), [[0.0, 0.0]] * 2),
    }.items():  # fmt: skip
        for value in values:
            with pytest.raises((ValueError, TypeError), match=f"^{name} (is|are) "):
                given = {"steps": 3, "sites": 2, name: value}
                call = {"tau": nothing.schedule, "k": nothing.row}.get(name)
                call(value) if call else Router(**given)
    router = Router(3, 2)
    router.rows[0].data.fill_(float("nan"))
    with refused("not numbers; its training diverged"):
        router.schedule()


def test_a_schedule_refuses_another_run():
    d, x, y = with_noise(make())
    router = Router(4, d.sites, about=d.about)
    fits, four = router.schedule(), "the model has 4 sites, blocks.0.attn"
    for schedule in (fits, Schedule(fits.compute), Router(4, 4).schedule()):
        sample(d, x, y, schedule)  # without names and timesteps it fits by its shape
    other = replace(fits, sites=("a", "b", "c", "d"))
    for wrong, message in (
        (Router(5, d.sites).schedule(), "5 steps .*the run has 4; run 5 or train a schedule for 4"),
        (Router(4, 6).schedule(), f"6 sites, site0 … site5, {four}"),
        (other, f"4 sites, a … d, {four}"),
        (replace(fits, timesteps=(9, 8, 7, 0)), "made at timesteps 9 … 0"),
    ):
        with refused(message):
            sample(d, x, y, wrong)


def test_a_missing_file_or_folder_and_a_device_are_named(tmp_path):
    for load, table in ((Schedule.load, Router(2, 2).schedule()), (Router.load, Router(2, 2))):
        with pytest.raises(FileNotFoundError, match=r"nothing here: no such file"):
            load(tmp_path / "nothing here")
        with pytest.raises(FileNotFoundError, match="no such folder; make it"):
            table.save(tmp_path / "not" / "there")
        for path in (tmp_path, "/dev/zero"):
            with pytest.raises(FileNotFoundError, match="is a folder or a device, not a file"):
                load(path)


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "s.json"
    Schedule([[1, 1]] * 9, model="old").save(path)
    with path.open() as reader:
        half = reader.read(20)
        Schedule([[1, 1]], model="new").save(path)
        assert json.loads(half + reader.read())["model"] == "old"
    assert Schedule.load(path).model == "new"
    assert os.listdir(tmp_path) == ["s.json"]  # noqa: PTH208


def test_a_link_stays_a_link_and_a_read_only_file_stays_as_it_is(tmp_path, monkeypatch):
    old, new = Schedule([[1]], model="old"), Schedule([[1]], model="new")
    path, link = tmp_path / "s.json", tmp_path / "link.json"
    old.save(path)
    link.symlink_to(path.name)
    new.save(link)
    assert (link.is_symlink(), Schedule.load(path)) == (True, new)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    for target in (path, link):
        with pytest.raises(PermissionError, match="it is read-only; it was not written"):
            old.save(target)
    assert {each.name for each in tmp_path.iterdir()} == {"s.json", "link.json"}
    assert Schedule.load(path) == new


def test_what_was_read_does_not_change_with_its_file(tmp_path):
    path, ones = tmp_path / "r", torch.ones(2, 2)
    write_tensors(path, {"images": ones}, {})
    read = read_tensors(path)[0]["images"]
    path.write_bytes(bytes(path.stat().st_size))  # in place, as cp does
    assert torch.equal(read, ones)
