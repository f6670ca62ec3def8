"""Whatever bytes a file holds, reading it gives a valid object or an error that names it, and runs nothing.

What is drawn and what counts as a finding: benchmarks/fuzzing.py. `python benchmarks/fuzz.py` does the same for minutes.
"""

import io
import itertools
import json
import os
import pickle
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import refused
from fuzzing import TARGETS, any_json, outcome, put, ways, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from scores import read_images

from harmonica import Router, Schedule
from harmonica.models.prompts import read_prompts
from harmonica.models.weights import read_state
from harmonica.storage.files import read_json, write_tensors

kinds = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


@kinds
def test_a_valid_file_is_read(target, tmp_path):
    assert outcome(target, put(target, tmp_path)) == "object"


@kinds
@settings(max_examples=30)
@given(draw=st.randoms(use_true_random=False))
def test_a_spoilt_file_is_read_or_refused_by_name_and_runs_nothing(target, draw, tmp_path):
    data = draw.choice(ways(target))(whole(target)[target.file], draw)
    assert outcome(target, put(target, tmp_path, data)) in ("object", "refused")


@settings(max_examples=30)
@given(draw=st.randoms(use_true_random=False))
def test_any_json_in_place_of_a_table_is_refused_or_read(draw, tmp_path):
    for target in TARGETS:
        if target.file.endswith(".json"):
            path = put(target, tmp_path, json.dumps(any_json(draw)).encode())
            assert outcome(target, path) in ("object", "refused"), target.name


pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
GADGETS = {
    "a command": (os.system, "touch {trace}"),
    "a process": (subprocess.check_output, ["touch", "{trace}"]),
    "eval": (eval, "open({trace!r}, 'w')"), "exec": (exec, "open({trace!r}, 'w')"),
    "a file": (open, "{trace}", "w"), "an import": (__import__, "antigravity"),
    "a method": (Path.touch, Path("{trace}")), "torch.load": (torch.load, "{trace}"),
    "torch.hub": (torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x"),
}  # fmt: skip
WRAPPED = {
    "alone": lambda thing: thing,
    "as a row": lambda thing: {"0.prob": torch.ones(2), "1.prob": thing},
    "as a key": lambda thing: {"routers": {"0.prob": torch.ones(2)}, "opt": [{"state": thing}]},
    "as an average": lambda thing: {"ema": {"w": torch.ones(2), "x": thing}},
}


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("gadget", GADGETS)
def test_no_call_in_a_pickle_is_made_wherever_it_stands(gadget, tmp_path):
    """Learning-to-Cache's, the authors' and the original weights' files are pickles: torch's zip, or bare."""
    (function, *arguments), trace = GADGETS[gadget], tmp_path / "trace"
    named = lambda part: type(part)(str(part).format(trace=str(trace)))  # noqa: E731
    filled = tuple([*map(named, a)] if isinstance(a, list) else named(a) for a in arguments)
    for (name, wrap), protocol in itertools.product(WRAPPED.items(), (0, 2, 4)):
        path, hostile = tmp_path / f"{name} {protocol}.pt", wrap(Calls(function, filled))
        for data in (pickle.dumps(hostile, protocol), zipped(hostile, protocol)):
            path.write_bytes(data)
            for read in (Schedule.load, read_state):
                with refused(rf"{name} {protocol}\.pt "):
                    read(path)
            assert not trace.exists()


def zipped(data, protocol):
    """Return what torch.save would write, by another protocol."""
    file = io.BytesIO()
    torch.save(data, file, pickle_protocol=max(protocol, 2))
    return file.getvalue()


def test_a_few_bytes_that_claim_to_be_a_huge_tensor_are_refused(tmp_path):
    """Every entry the same memory: torch would need four terabytes to look at it."""
    huge = torch.ones(1).expand(10**12)
    torch.save({"0.prob": huge, "1.prob": huge}, path := tmp_path / "r.pt")
    assert path.stat().st_size < 5000
    with refused(r"r\.pt is not a valid schedule: it has a row 0 that is not"):
        Schedule.load(path)
    with refused(r"r\.pt does not hold tensors by parameter name"):
        read_state(path)


def test_an_archive_that_would_unpack_to_more_than_it_is_is_refused(tmp_path):
    torch.save({"0.prob": torch.zeros(10**6)}, tmp_path / "plain.pt")
    bomb, packed = tmp_path / "bomb.pt", zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(bomb, "w", packed) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert bomb.stat().st_size < 10_000
    with refused(r"bomb\.pt would unpack to 3 MB, more than its own size"):
        Schedule.load(bomb)


def test_an_npz_that_claims_more_images_than_there_is_memory_for_is_refused(tmp_path):
    claim = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**15}, 4, 4, 3), }}".encode()
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(claim) + 1)
        archive.writestr("arr_0.npy", head + claim + b"\n123")
    with refused(r"x\.npz is a damaged \.npz"):
        list(read_images(tmp_path / "x.npz"))


@pytest.mark.parametrize("read", [read_json, read_prompts, Schedule.load])
def test_an_oversized_text_is_refused_unread(read, tmp_path):
    """Sparse: it takes no room on the disk, and would take all of the memory."""
    with (tmp_path / "big.json").open("wb") as file:
        file.write(b"{")
        file.truncate(2**36)
    with refused(r"big\.json is 65536 MB; a text has at most 64 MB"):
        read(tmp_path / "big.json")


def test_a_header_with_a_number_of_sites_for_their_names_is_refused_at_once(tmp_path):
    """A number would be as many names, drawn up in memory."""
    path, facts = tmp_path / "r.safetensors", {"sites": 10**12, "about": {}}
    write_tensors(path, {"logits": torch.zeros(1, 2)}, facts)
    with refused(r"r\.safetensors is not a valid router: sites must be"):
        Router.load(path)


def test_the_mark_that_windows_begins_a_text_with_is_no_error(tmp_path):
    table, path = Schedule([[1, 1], [0, 1]]), tmp_path / "s.json"
    table.save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Schedule.load(path) == table
