"""Files: JSON, text, tensors and torch's pickles, written whole and read without running them.

A file is written under another name beside its own and then renamed. So a reader sees the old file
or the new one, and a full disk or a killed process leaves the old one in place. Whatever bytes a
file holds, reading it gives a value or an error that names it (docs/faults.md). This file does not
know what the JSON and the tensors mean.
"""

import argparse
import errno
import json
import os
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.values import StrPath, require

FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64  # of weights and logits
LARGEST_TEXT = 2**26  # bytes; a table of 1000 steps and 10 000 sites takes a sixth of it


def existing(path: StrPath) -> Path:
    """Return path as a Path; raise FileNotFoundError if there is no such file."""
    path = Path(path)
    if not path.is_file():
        problem = "is a folder or a device, not a file" if path.exists() else "no such file"
        raise FileNotFoundError(f"{path}: {problem}")
    return path


def folder_of(path: StrPath) -> Path:
    """Return the folder of a file that need not be there; raise FileNotFoundError if it is not."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; make it for {Path(path).name}")
    return folder


def refuse_existing(path: StrPath, todo: str) -> None:
    """Raise FileExistsError if a file is there, an OSError if none can be written."""
    folder = folder_of(path)
    if Path(path).exists():
        what = "is a folder; name a file in it" if Path(path).is_dir() else f"exists; {todo}"
        raise FileExistsError(f"{path} {what}")
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"x")


@contextmanager
def decoding(path: StrPath, verdict: str) -> Iterator[None]:
    """Turn whatever bad bytes raise, in any code, into a ValueError that names the file.

    >>> with decoding("s.json", "is not a schedule"):
    ...     {}["compute"]
    Traceback (most recent call last):
    ValueError: s.json is not a schedule: it has no 'compute'
    """
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        what = " ".join(what.split())[:300] or type(error).__name__
        raise ValueError(f"{path} {verdict}: {what}") from None


def require_same(what: str, before: Mapping[str, Any], now: Mapping[str, Any], todo: str) -> None:
    """Raise ValueError, saying how they differ, unless settings are those of a file.

    >>> require_same("x.pt has other settings", {"seed": 0, "T": 9}, {"seed": 1, "T": 9}, "…")
    Traceback (most recent call last):
    ValueError: x.pt has other settings (seed 0 -> 1); …
    """
    pairs = [(name, before.get(name), now.get(name)) for name in sorted({*before, *now})]
    other = "; ".join(f"{name} {a!s:.80} -> {b!s:.80}" for name, a, b in pairs if a != b)
    require(not other, f"{what} ({other:.400}); {todo}")


def write_whole(path: StrPath, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, under a new name each time, then rename it to `path`;
    where that is a link, the file that it leads to is written.

    Raises FileNotFoundError if there is no such folder, or an OSError that names `path`.
    """
    place = Path(os.path.realpath(path))
    beside = folder_of(place) / f"{place.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, "it is read-only")
        write(beside)
        beside.replace(place)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"{error.strerror}; it was not written", str(path)) from None
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(path: StrPath) -> Iterator[None]:
    """Hold a folder, or a file that need not be there, for one run; raise BlockingIOError if
    another run holds it.

    The lock is the system's and ends with the process; a file is held by an empty one beside it,
    which may be left over. Where there are no such locks (Windows, some network disks) nobody is
    refused.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    beside = None if Path(path).is_dir() else folder_of(path) / f"{Path(path).name}.lock"
    with ExitStack() as at_end:
        handle = os.open(beside or path, os.O_RDONLY if beside is None else os.O_CREAT)
        at_end.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink == 0:  # the run that held it has just removed it
                raise BlockingIOError
        except BlockingIOError:
            todo = "wait for it, or choose another"
            raise BlockingIOError(f"{path} is being written to by another run; {todo}") from None
        except OSError:  # a disk that knows no locks
            pass
        if beside is not None:
            at_end.callback(beside.unlink, missing_ok=True)
        yield


def write_text(path: StrPath, text: str) -> None:
    """Write a text in UTF-8."""
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: StrPath, data: Mapping[str, Any]) -> None:
    """Write JSON a person can read: one line for each key, and for each key of inner mappings."""

    def lines(value: Any, indent: str) -> str:
        if not isinstance(value, Mapping) or not value or len(indent) > 2:
            return json.dumps(value)
        inner = (f"{indent}{json.dumps(key)}: {lines(v, indent + ' ')}" for key, v in value.items())
        return "{\n" + ",\n".join(inner) + f"\n{indent[1:]}}}"

    write_text(path, lines(data, " ") + "\n")


def write_tensors(path: StrPath, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, and facts (anything JSON can say) in its metadata."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    dense = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    try:
        write_whole(path, lambda beside: save_file(dense, beside, metadata))
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{path} could not be written: {error}") from None


def read_text(path: StrPath) -> str:
    """Read a text file in UTF-8, with or without the mark that Windows begins one with.

    Raises FileNotFoundError, or ValueError if it is not UTF-8 or larger than LARGEST_TEXT.
    """
    size, most = existing(path).stat().st_size, LARGEST_TEXT
    require(size <= most, f"{path} is {size >> 20} MB; a text has at most {most >> 20} MB")
    with decoding(path, "is not text in UTF-8"):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: StrPath) -> dict[str, Any]:
    """Read a JSON object; raise FileNotFoundError, or ValueError if the file is not one."""
    text = read_text(path)
    with decoding(path, "is not whole JSON; write or fetch it again"):
        data = json.loads(text)
    kind = type(data).__name__
    require(kind == "dict", f"{path} holds a JSON {kind}; an object was expected")
    return data  # type: ignore[no-any-return]


def read_tensors(path: StrPath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote; raise FileNotFoundError, or ValueError for another file."""
    from safetensors import safe_open

    verdict = "is not a whole safetensors file of ours; write or fetch it again"
    with decoding(path, verdict), safe_open(existing(path), framework="pt") as file:
        # copies, since a tensor of the file would change, or kill Python, when the file does
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        facts = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    return tensors, facts


def read_pickle(path: StrPath) -> Any:
    """Unpickle tensors, containers and argparse.Namespace, a plain bag of values.

    Raises FileNotFoundError, or ValueError if the file is damaged or holds more, which is not run.
    """
    if is_archive(existing(path)):
        with decoding(path, "is a damaged archive"), zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        stored = unpacked <= Path(path).stat().st_size  # torch does not compress
        require(stored, f"{path} would unpack to {unpacked >> 20} MB, more than its own size")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # for this call alone
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception:  # bad bytes can raise anything here
        problem = "is damaged, or holds more than tensors and settings; nothing in it was run"
        raise ValueError(f"{path} {problem}") from None


def is_archive(path: StrPath) -> bool:
    """Say whether a file is a zip, be it a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # on some damages it raises, against its own documentation
        return True


def is_plain(tensor: Any) -> bool:
    """Say whether this is a dense tensor of ordinary numbers, all of which its file held.

    A few bytes may claim to be a tensor of any size, each row of it the same memory.
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        return False
    size = tensor.numel() * tensor.element_size()
    return not (tensor.is_quantized or tensor.is_meta or tensor.untyped_storage().nbytes() < size)
