"""Several processes: the same router as one with the joint batch, whoever is killed on the way.

Each launch below is a real torchrun of two processes (gloo, CPU). The script says what they do; what each finds out
comes back as a file of tensors.
"""

import pytest
import torch
from conftest import ROOT, make, refused, seeded, torchrun

from harmonica import Router, train_sdt
from harmonica import processes as distributed
from harmonica.processes import batch_per_rank, from_rank_0, local_part, mean_over_ranks
from harmonica.storage.files import read_tensors

QUICK = {"batch_size": 4, "beta": 1e-4, "lr": 0.05, "refresh_every": 2, "progress": False}
UPDATES = 60
PROXIES = {"sdt": None, "iepo": "leave-one-out"}

LAWS = """
import torch.distributed.nn.functional  # as loading a model does; it must not keep the group alive
from harmonica.processes import batch_per_rank, from_rank_0, local_part, mean_over_ranks, rank, world

import harmonica.training.checkpoint
if rank() == 1:  # whoever is not rank 0 cannot even touch the file
    harmonica.training.checkpoint.write_router = harmonica.training.checkpoint.read_router = None

def said(work):
    try:
        return str(work())
    except (ValueError, FloatingPointError, FileExistsError) as error:
        return f"{type(error).__name__}: {error}"

def broken():
    d = small()
    if rank() == 1:
        d.model.final_layer.linear.weight.data.fill_(float("nan"))
    return train_sdt(d, iterations=3, **{**QUICK, "proxy": None})

trees = {"y": torch.arange(4), "pair": (torch.arange(8).view(4, 2), None)}
facts["broken"] = said(broken)
facts["uneven"] = said(lambda: train_sdt(small(), iterations=3, **{**QUICK, "batch_size": 3}))
facts["joint"] = said(lambda: local_part((torch.zeros(4), torch.zeros(1, 4)), 4))
facts["told"] = said(lambda: from_rank_0(lambda: 1 / rank() if rank() else int("no number")))
facts["heard"] = said(lambda: from_rank_0(lambda: f"from {rank()}"))
tensors["mean"] = mean_over_ranks(torch.tensor([1.0, 2.0]) + rank())
tensors["share"] = torch.tensor(batch_per_rank(4))
tensors["labels"], tensors["pairs"] = local_part(trees, 4)["y"], local_part(trees, 4)["pair"][0]
for name, proxy in PROXIES.items():
    router = train_sdt(small(), iterations=UPDATES, checkpoint=folder / name, **{**QUICK, "proxy": proxy})
    tensors[name] = router.logits
# generators seeded by rank are a common mistake: rank 0's is taken by all
seeded = torch.Generator().manual_seed(rank())
tensors["seeded"] = train_sdt(small(), iterations=6, generator=seeded, **QUICK).logits
"""

KILLED = """
import os, signal
from harmonica.training.checkpoint import TrainingState
count = TrainingState.count

def counting(self, update):
    count(self, update)
    if (self.updates, rank()) == (40, {victim}):
        os.kill(os.getpid(), signal.SIGKILL)

TrainingState.count = counting
train_sdt(small(), iterations=UPDATES, checkpoint=folder / "{name}", checkpoint_every=15, **QUICK)
"""

RESUMED = """
for name in ("killed0", "killed1"):
    tensors[name] = train_sdt(small(), iterations=UPDATES, checkpoint=folder / name, resume=True, **QUICK).logits
"""

FRAME = """
import sys
import weakref
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from conftest import make
from harmonica import train_sdt
from harmonica.processes import processes, rank
from harmonica.storage.files import write_tensors

small = lambda: make(dtype=torch.float32)
folder, tensors, facts = Path({folder!r}), {{}}, {{}}
PROXIES, QUICK, UPDATES = {settings}
with processes("cpu"):
    group = weakref.ref(torch.distributed.group.WORLD)
{work}
    write_tensors(folder / f"{name}.{{rank()}}", tensors, facts)
assert group() is None, "the group outlived its with"
"""


def together(folder, name, work):
    """Run `work` in two processes; return torchrun's end."""
    indented = "\n".join(f"    {line}" for line in work.splitlines())
    places = {"tests": f"{ROOT}/tests", "folder": str(folder), "name": name, "work": indented}
    frame = FRAME.format(**places, settings=(PROXIES, QUICK, UPDATES))
    (folder / f"{name}.py").write_text(frame, encoding="utf-8")
    return torchrun(folder / f"{name}.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two processes")


@pytest.fixture(scope="module")
def killed(folder):
    """How runs ended in which rank 0, or rank 1, was killed, and a copy of what the second left."""
    names = {"killed0": 0, "killed1": 1}
    ends = [together(folder, n, KILLED.format(victim=v, name=n)) for n, v in names.items()]
    (folder / "left").write_bytes((folder / "killed1").read_bytes())
    return ends


@pytest.fixture(scope="module")
def both(folder, killed):
    """What each of the two ranks found out: [(tensors, facts), (tensors, facts)]."""
    done = together(folder, "laws", LAWS + RESUMED)
    assert done.returncode == 0, done.stderr[-3000:]
    return [read_tensors(folder / f"laws.{number}") for number in (0, 1)]


@pytest.mark.parametrize("name", PROXIES)
def test_two_processes_train_the_router_of_one_with_the_joint_batch(both, name):
    settings = {**QUICK, "proxy": PROXIES[name]}
    alone = train_sdt(make(dtype=torch.float32), iterations=UPDATES, **settings).logits
    for tensors, _ in both:
        r = tensors[name].sigmoid()
        torch.testing.assert_close(tensors[name], alone, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(r, alone.sigmoid(), rtol=1e-4, atol=0)
    # Every score went somewhere, so the comparison says something.
    assert (alone - Router(4, 4, generator=seeded(0)).logits).abs().min() > 0.1


def test_ranks_take_their_own_samples_and_hold_one_router_that_rank_0_writes(both, folder):
    (zero, _), (one, _) = both
    for name in (*PROXIES, "seeded"):
        assert torch.equal(zero[name], one[name])
    for name in PROXIES:
        assert torch.equal(Router.load(folder / name).logits, zero[name])
    assert not list(folder.glob("*.part"))
    for number, (tensors, _) in enumerate(both):
        assert tensors["labels"].tolist() == [number, number + 2]
        assert tensors["pairs"].tolist() == [[2 * n, 2 * n + 1] for n in (number, number + 2)]
        assert (tensors["share"], tensors["mean"].tolist()) == (2, [1.5, 2.5])


def test_a_condition_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert local_part((torch.arange(4), None, 0.5), 4)[1:] == (None, 0.5)
    with refused("processes share holds a list; expected tensors of 4 rows"):
        local_part((torch.arange(4), ["a", "b", "c", "d"]), 4)


def test_what_one_rank_finds_or_fails_at_stops_all(both):
    """A loss that is not finite, a batch that cannot be shared evenly, what rank 0 alone reads."""
    for _, facts in both:
        uneven = "ValueError: batch_size is 3 for 2 processes in all; make it a multiple of 2"
        assert (facts["uneven"], facts["heard"]) == (uneven, "from 0")
        assert "holds a tensor of shape (1, 4); expected tensors of 4 rows" in facts["joint"]
        assert facts["broken"].startswith("FloatingPointError: the loss of step 1 is nan")
        assert facts["told"].startswith("ValueError: invalid literal for int")


def test_a_killed_rank_ends_the_run_and_leaves_a_whole_checkpoint(killed, folder):
    for end in killed:
        assert end.returncode != 0
        assert "exitcode  : -9" in end.stderr
    assert 0 < read_tensors(folder / "left")[1]["updates"] < 40


def test_a_run_whose_rank_was_killed_is_resumed_to_the_same_router_bit_for_bit(both, folder):
    for tensors, _ in both:
        assert torch.equal(tensors["killed0"], tensors["iepo"])
        assert torch.equal(tensors["killed1"], tensors["iepo"])
    # and with another number of processes, to rounding
    d = make(dtype=torch.float32)
    alone = train_sdt(d, iterations=UPDATES, checkpoint=folder / "left", resume=True, **QUICK)
    torch.testing.assert_close(alone.logits, both[0][0]["iepo"], rtol=1e-3, atol=1e-4)


def test_alone_nothing_is_asked_of_anyone(monkeypatch):
    value, batch = torch.ones(2), (torch.ones(3), None)
    for available in (True, False):  # and where torch was built without it
        monkeypatch.setattr(torch.distributed, "is_available", lambda: available)
        assert (distributed.rank(), distributed.world(), batch_per_rank(3)) == (0, 1, 3)
        assert mean_over_ranks(value) is value
        assert local_part(batch, 3) is batch
        assert from_rank_0(lambda: value) is value
    with distributed.processes("cpu") as device:
        assert device.type == "cpu"
        assert not torch.distributed.is_initialized()


DEVICES = {"cuda:1": "device is 'cuda:1' for several", "cuda": "no GPU", "mps": "is 'mps'"}


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_cannot_be_shared_out_is_refused_before_joining(device, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "200", "LOCAL_RANK": "199"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.started_as() == (0, 200)
    with refused(DEVICES[device]), distributed.processes(device):
        pass
