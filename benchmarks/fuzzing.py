"""Fuzzing: every file that the library reads, ways to spoil one, and what a reader may do with it.

    Target     a kind of file: how a valid one is written, and how it is read
    spoil      a mutation of a file's bytes: blind, or of the JSON, safetensors header or archive that they are
    outcome    "object" (a valid one, used once), "refused" (an error that names the file), else a finding

tests/test_fuzz.py draws a few of each; benchmarks/fuzz.py goes on for minutes.
"""

import argparse
import io
import json
import math
import os
import random
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from conftest import SMALL, make, seeded
from PIL import Image
from scores import read_images

from harmonica import Router, Schedule, train_sdt
from harmonica.image_sets import read_png, write_png
from harmonica.models.dit import DiT
from harmonica.models.prompts import read_prompts
from harmonica.models.weights import component, fill, read_state
from harmonica.storage.files import read_json, write_tensors
from harmonica.storage.foreign import write_smoothcache
from harmonica.storage.hub import fetch, write_folder
from harmonica.training.checkpoint import Checkpoint, start

SITES = tuple(f"blocks.{i}.{kind}" for i in range(2) for kind in ("attn", "mlp"))
ABOUT = {"model": "small", "sampler": "ddim", "timesteps": (9, 5, 0), "guidance": 1.5}
LONGEST = 600
"""Characters of an error; a file that is wrong everywhere must not fill the screen."""


class Target(NamedTuple):
    """A kind of file."""

    name: str
    file: str  # its name in a folder of its own, which `write` fills with what else is read
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


def _router() -> Router:
    return Router(3, SITES, about=ABOUT, generator=seeded(0))


def _use(table: Schedule | Router) -> None:
    """Do with a table what a run does."""
    if isinstance(table, Router):
        assert table().dtype.is_floating_point
        table = table.schedule(0.5)
    assert table.compute.dtype == torch.bool
    assert bool(table.compute[0].all())
    assert str(table)
    assert 0.0 <= table.cur < 1.0
    table.check(table.steps, table.sites, table.timesteps)
    assert all(isinstance(site, str) for site in table.sites)


def _load(path: Path) -> None:
    _use(Schedule.load(path))


def _rows(path: Path) -> None:
    rows = {f"{k}.prob": torch.linspace(-5, 5, 4) * (-1) ** k for k in range(3)}
    args = argparse.Namespace(lambda_c=500, model="DiT-XL/2")
    torch.save({"routers": rows, "opt": {}, "args": args}, path)


@lru_cache(1)
def _dit() -> dict[str, torch.Tensor]:
    return make(dtype=torch.float32).model.state_dict()


def _weights(path: Path) -> None:
    if path.suffix == ".pt":
        torch.save({"ema": _dit(), "opt": {}, "args": argparse.Namespace(lr=1e-4)}, path)
    else:
        write_tensors(path, _dit(), {})


def _fill(path: Path) -> None:
    with torch.device("meta"):
        model = DiT(**SMALL, depth=2)
    fill(model, read_state(path), path)
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in model.parameters())
    label = torch.zeros(1, dtype=torch.long)
    model.to(torch.float32)(torch.zeros(1, 2, 4, 4), torch.zeros(1), label)


@lru_cache(1)
def _checkpoint_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path, d = Path(folder) / "c", make(dtype=torch.float32)
        train_sdt(d, batch_size=1, iterations=3, checkpoint=path, progress=False)
        return path.read_bytes()


def _resume(path: Path) -> None:
    d = make(dtype=torch.float32)
    how = {"tau": 0.1, "beta": 7e-8, "refresh_every": 25, "proxy": "leave-one-out"}
    state = start(d, {"batch_size": 1, "lr": 0.01, **how})
    Checkpoint(path, 100, d, state, 6, resume=True)
    assert 0 <= state.updates <= 6
    assert bool(state.router().isfinite().all())
    state.router.rows[0].grad = torch.ones(4)
    state.optimizer.step()


def _picture(path: Path) -> None:
    image = read_png(path)
    assert (image.dtype, image.ndim, image.shape[-1]) == (np.uint8, 3, 3)


PIXELS = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)


def _npz(path: Path) -> None:
    np.savez_compressed(path, arr_0=PIXELS, arr_1=np.arange(2))


def _images(path: Path) -> None:
    for batch in read_images(path):
        assert batch.dtype == torch.uint8
        assert batch.dim() == 4


def _component(path: Path) -> None:
    component(path.parent, "transformer", "DiTTransformer2DModel")


def _text(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text, encoding="utf-8")


CONFIG = '{"_class_name": "DiTTransformer2DModel", "sample_size": 4}'
PROMPTS = "a red house\n# not this\nein grüner Hügel\n"
TARGETS = (
    Target("schedule", "s.json", lambda p: _router().schedule(0.5).save(p), _load),
    Target("SmoothCache", "s.json", lambda p: write_smoothcache(p, _router().schedule(0.5)), _load),
    Target("router", "r.safetensors", lambda p: _router().save(p), lambda p: _use(Router.load(p))),
    Target("router as schedule", "r.safetensors", lambda p: _router().save(p), _load),
    Target("router file .pt", "r.pt", _rows, _load),
    Target("folder", "schedule.json", lambda p: write_folder(p.parent, _router().schedule(0.5)),
           lambda p: _load(fetch(p.parent))),
    Target("weights .safetensors", "w.safetensors", _weights, _fill),
    Target("weights .pt", "w.pt", _weights, _fill),
    Target("checkpoint", "c.safetensors", lambda p: p.write_bytes(_checkpoint_bytes()), _resume),
    Target("set's image", "000000.png", lambda p: write_png(p, torch.from_numpy(PIXELS[0])), _picture),
    Target("set's settings", "settings.json", _text('{"seed": 1, "guidance": 1.5}'), read_json),
    Target("images .npz", "x.npz", _npz, _images),
    Target("image", "0.png", lambda p: Image.fromarray(PIXELS[0]).save(p), lambda p: _images(p.parent)),
    Target("prompts", "p.txt", _text(PROMPTS), read_prompts),
    Target("component", "config.json", _text(CONFIG), _component),
)  # fmt: skip
"""Every kind of file that is read from a name a user gives."""


def any_bytes(data: bytes, draw: random.Random) -> bytes:
    """Replace everything, but now and then keep what the kind of file is told by."""
    keep = data[: draw.choice((0, 0, 2, 4, 9, 16))]
    return keep + draw.randbytes(draw.choice((0, 1, 8, 60, 400)))


def one_byte(data: bytes, draw: random.Random) -> bytes:
    """Change one byte."""
    at = draw.randrange(len(data))
    return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]


def cut(data: bytes, draw: random.Random) -> bytes:
    """End early."""
    return data[: draw.randrange(len(data))]


def longer(data: bytes, draw: random.Random) -> bytes:
    """Put something in, at the end or elsewhere: bytes, or the file again."""
    at = draw.choice((len(data), draw.randrange(len(data))))
    return data[:at] + draw.choice((draw.randbytes(9), bytes(4096), data)) + data[at:]


def lost(data: bytes, draw: random.Random) -> bytes:
    """Lose a stretch, as a bad copy does: gone, or zeros."""
    at, length = draw.randrange(len(data)), draw.choice((1, 4, 64, 512))
    return data[:at] + draw.choice((b"", bytes(len(data[at : at + length])))) + data[at + length :]


BLIND = (any_bytes, one_byte, cut, longer, lost)
NUMBERS = (0, 1, -1, 2, 3, 4, 2**31, 2**63, -(2**63), 10**18, 10**400)
NUMBERS += (1.5, -0.0, math.nan, math.inf, 1e308)
WORDS = "x 0101 harmonica-schedule-1 F32 I64 BOOL F8_E4M3 __class__"
TEXTS = ("", "é\ud800\x00", "x" * 999, *WORDS.split())
NAMES = "format steps sites compute timesteps shape dtype logits self __class__ a.b"
KEYS = ("", *NAMES.split())


def any_json(draw: random.Random, depth: int = 3) -> Any:
    """Return any JSON value, with a liking for those that hurt."""
    kind = draw.randrange(7 if depth else 5)
    if kind < 5:
        number = draw.choice(NUMBERS)
        return draw.choice((None, True, False, number, number, draw.choice(TEXTS)))
    items = [any_json(draw, depth - 1) for _ in range(draw.choice((0, 1, 2, 3, 4)))]
    return items if kind == 5 else {draw.choice(KEYS + TEXTS): item for item in items}


def one_field(data: Any, draw: random.Random) -> Any:
    """Replace, remove, rename, add or double one field, anywhere in JSON."""
    if not isinstance(data, dict | list) or not data or draw.random() < 0.15:
        return any_json(draw)
    if isinstance(data, list):
        items = list(data)
        at = draw.randrange(len(items))
        items[at : at + 1] = draw.choice(([], [items[at]] * 2, [one_field(items[at], draw)]))
        return items
    key, other, what = draw.choice(list(data)), draw.choice(KEYS + TEXTS), draw.randrange(5)
    if what == 0:
        return {k: v for k, v in data.items() if k != key}
    if what == 1:
        return {other if k == key else k: v for k, v in data.items()}
    new = (other, any_json(draw)) if what == 2 else (key, one_field(data[key], draw))
    return {**data, new[0]: new[1]}


def field_of_json(data: bytes, draw: random.Random) -> bytes:
    """Replace a field of a JSON file."""
    return json.dumps(one_field(json.loads(data), draw)).encode()


def header(data: bytes, draw: random.Random) -> bytes:
    """Lie in a safetensors header: a field of it, a fact inside its metadata, or its length."""
    (length,) = struct.unpack("<Q", data[:8])
    told, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    what = draw.randrange(4)
    if what == 0:
        wrong = draw.choice((0, 1, length - 1, length + 1, 2**31, 2**63))
        return struct.pack("<Q", wrong) + data[8:]
    if what == 1 and told.get("__metadata__"):
        key = draw.choice(list(facts := told["__metadata__"]))
        facts[key] = json.dumps(one_field(json.loads(facts[key]), draw))
    elif what == 2:
        key = draw.choice([k for k in told if k != "__metadata__"])
        told[key] = draw.choice((_retyped, _reshaped))(told[key], draw)
    else:
        told = one_field(told, draw)
    lying = json.dumps(told).encode()
    return struct.pack("<Q", len(lying)) + lying + body


def _retyped(tensor: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Say another type of as many bytes, so that the size is right."""
    start, end = tensor["data_offsets"]
    per = (end - start) // max(1, int(np.prod(tensor["shape"])))
    same = {1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 2: ("F16", "BF16", "I16", "U16")}
    same |= {4: ("F32", "I32", "U32"), 8: ("F64", "I64", "U64", "C64")}
    return {**tensor, "dtype": draw.choice(same[per])}


def _reshaped(tensor: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Say another shape of as many entries."""
    n = int(np.prod(tensor["shape"]))
    shapes = ([n], [1, n], [n, 1], [1, *tensor["shape"]], [])
    return {**tensor, "shape": draw.choice(shapes)}


def inside(data: bytes, draw: random.Random) -> bytes:
    """Spoil one member of a zip and pack it again: the archive is sound, what is in it is not."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w") as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        victim = draw.choice(names + pickles * 4)
        for name in names:
            body, way = old.read(name), draw.choice((one_byte, one_byte, cut, lost))
            new.writestr(name, way(body, draw) if name == victim and body else body)
    return packed.getvalue()


def ways(target: Target) -> tuple[Callable[[bytes, random.Random], bytes], ...]:
    """Return what can be done to a file of this kind."""
    knowing = {".json": field_of_json, ".safetensors": header, ".pt": inside, ".npz": inside}
    way = knowing.get(Path(target.file).suffix)
    return (*BLIND, *[way] * 5) if way else BLIND


_OS = "system exec fork posix_spawn spawn mkdir remove rename rmdir chmod symlink"
_FORBIDDEN = ("subprocess.Popen", "socket.", "shutil.", "ctypes.dlopen", "pty.")
_FORBIDDEN += tuple(f"os.{name}" for name in _OS.split())
_seen: list[str] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open":
        writes = len(args) > 2 and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes and args[0] != os.devnull:
            _seen.append(f"open {args[0]!r:.80} for writing")
    elif event in ("exec", "compile"):  # of a file's text; a lazy import's is Python's own
        name = getattr(args[0], "co_filename", args[-1]) if event == "exec" else args[1]
        if not str(name).endswith((".py", ">")) or str(name) in ("<string>", "<stdin>"):
            _seen.append(f"{event} {name!r:.80}")
    elif event.startswith(_FORBIDDEN):
        _seen.append(f"{event} {args!r:.80}")


_hooked = False


@contextmanager
def watched() -> Iterator[list[str]]:
    """Note whatever reaches for the world outside: a process, a socket, a file to write, code to run."""
    global _seen, _hooked
    if not _hooked:  # an audit hook stays for the life of the process
        sys.addaudithook(_hook)
        _hooked = True
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


@lru_cache(None)
def _warm(target: Target) -> None:
    """Read a valid one unwatched: what is imported for it comes in now."""
    Image.init()
    import_module("torch.utils.serialization.config")  # which torch.load does at its first file
    repr(torch.zeros(1))  # torch imports much, named tuples too, when it first prints a tensor
    with tempfile.TemporaryDirectory() as folder:
        target.read(put(target, Path(folder)))


def outcome(target: Target, path: Path) -> str:
    """Read a file; return "object", "refused", or what is wrong with how it was read."""
    _warm(target)
    with watched() as reached, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.read(path)
            ended = "object"
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            ended = _judged(error, path)
    return f"reached for {reached[0]}" if reached else ended


def _judged(error: BaseException, path: Path) -> str:
    """Return "refused" if an error names the file in a few words."""
    said = str(error)
    if type(error) not in (ValueError, FileNotFoundError):
        return f"a bare {type(error).__name__}: {said:.200}"
    if path.name not in said and path.parent.name not in said:
        return f"does not name the file: {said:.200}"
    return "refused" if len(said) < LONGEST else f"{len(said)} characters: {said:.200}"


@lru_cache(None)
def whole(target: Target) -> dict[str, bytes]:
    """Return the files of a valid one, by name."""
    with tempfile.TemporaryDirectory() as folder:
        target.write(Path(folder) / target.file)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def put(target: Target, folder: Path, data: bytes | None = None) -> Path:
    """Write a valid one of this kind to a folder, its file replaced by `data`; return the file."""
    for name, body in whole(target).items():
        (folder / name).write_bytes(body)
    if data is not None:
        (folder / target.file).write_bytes(data)
    return folder / target.file
