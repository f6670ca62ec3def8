"""Files: safetensors and JSON, whole or not at all.

A file is written beside its name and then renamed, so a reader sees the old one or the new one and
a full disk or a killed process leaves the old one in place. Nothing is pickled: reading a file
executes nothing. Whatever bytes a file holds, reading it gives an object or an error that names the
file (docs/faults.md lists what was tried).

This file does not know what the tensors and the JSON mean.
"""

from __future__ import annotations

import argparse
import json
import os
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

StrPath = str | os.PathLike[str]
LARGEST_TEXT = 2**26
"""Bytes of JSON or prompts; a table of 1000 steps and 10 000 sites takes a sixth of it."""


def existing(path: StrPath) -> Path:
    """Return path as a Path.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not Path(path).is_file():
        found = (
            "is a folder or a device; a file was expected"
            if Path(path).exists()
            else "no such file"
        )
        raise FileNotFoundError(f"{path}: {found}")
    return Path(path)


def refused(path: StrPath, verdict: str, error: BaseException | str) -> ValueError:
    """Return the error that a file is refused with: its name, the verdict, and in short what was
    found.

    >>> refused("s.json", "is not a schedule", KeyError("compute"))
    ValueError("s.json is not a schedule: 'compute'")
    """
    found = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path} {verdict}: {found if len(found) <= 300 else found[:299] + '…'}")


@contextmanager
def decoding(path: StrPath, verdict: str) -> Iterator[None]:
    """Turn whatever another library raises on made-up bytes into one ValueError that names the
    file.

    Only for calls of decoders that are not ours: what they raise is not to be foreseen, and ours
    is.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise refused(path, verdict, error) from None


def write_whole(path: StrPath, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`.

    The name beside is nobody else's: two runs that write one file, on two machines too, do not
    tread on each other's half, and the last one stays.

    Raises:
        FileNotFoundError: if the folder does not exist.
        OSError: if the disk is full, say; it names `path`.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent}: no such folder; make it before writing {path.name}"
        )
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        write(beside)
        beside.replace(path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"{error.strerror}; it was not written", str(path)) from None
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def alone(folder: StrPath) -> Iterator[None]:
    """Hold a folder for one run: another that asks for it is refused until this one has ended,
    however it ends.

    The lock is the system's and dies with the process, so none is ever stale, and nothing is left
    in the folder. Where there are no such locks (Windows, some network disks) nobody is refused;
    files are whole even so.

    Raises:
        BlockingIOError: if another run holds it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(fcntl, handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(fcntl: Any, handle: int, folder: StrPath) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            f"{folder} is being written to by another run; wait for it, or choose another"
        ) from None
    except OSError:  # a disk that knows no locks
        return


def write_json(path: StrPath, data: Mapping[str, Any]) -> None:
    """Write JSON a person can read: a line for each key, and for each key of the mappings
    inside.
    """

    def one_line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=True)

    entries = []
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            inner = ",\n".join(f"  {one_line(k)}: {one_line(v)}" for k, v in value.items())
            entries.append(f" {one_line(key)}: {{\n{inner}\n }}")
        else:
            entries.append(f" {one_line(key)}: {one_line(value)}")
    text = "{\n" + ",\n".join(entries) + "\n}\n"
    write_whole(path, lambda beside: beside.write_text(text, encoding="ascii"))


def read_text(path: StrPath) -> str:
    """Read a text file in UTF-8, with or without the mark that Windows begins one with.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such text, or larger than any that is meant to be read.
    """
    size = existing(path).stat().st_size
    if size > LARGEST_TEXT:
        raise ValueError(
            f"{path} is {size >> 20} MB; text of at most {LARGEST_TEXT >> 20} MB was expected"
        )
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8: {error.reason} at byte {error.start}"
        ) from None


def read_json(path: StrPath) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a JSON object.
    """
    text = read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(path, "is not JSON", error) from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}; an object was expected")
    return data


def read_pickle(path: StrPath) -> Any:
    """Unpickle tensors, containers and argparse.Namespace, a plain bag of values; anything else is
    refused unread.

    Raises:
        ValueError: if there is anything else in it, or it is damaged. torch's own message would
            advise to run the file.
    """
    _refuse_a_bomb(existing(path))
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # for this call; nobody else's loads change
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception:  # bytes that someone made up can raise anything here
        found = "is damaged, or holds more than tensors and settings"
        raise ValueError(f"{path} {found}; nothing in it was run") from None


def _refuse_a_bomb(path: Path) -> None:
    """Raise ValueError if an archive says it unpacks to more than it is: torch stores its tensors
    as they are.
    """
    if not is_archive(path):
        return
    with decoding(path, "is a damaged archive"), zipfile.ZipFile(path) as archive:
        inside = sum(member.file_size for member in archive.infolist())
    if inside > path.stat().st_size:
        raise ValueError(
            f"{path} would unpack to {inside >> 20} MB, more than it is; files of torch are not packed"
        )


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
    if (
        not isinstance(tensor, Tensor)
        or tensor.layout != torch.strided
        or tensor.is_quantized
        or tensor.is_meta
    ):
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def write_tensors(path: StrPath, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, facts (anything JSON can say) in its metadata."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in facts.items()}

    def write(beside: Path) -> None:
        try:
            save_file(whole, beside, metadata)
        except SafetensorError as error:  # a full disk, which is no fault of the tensors
            raise OSError(f"{path} could not be written: {error}") from None

    write_whole(path, write)


def read_tensors(path: StrPath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not safetensors, or its facts are not JSON.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(existing(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a handle, not a dict)
            return tensors, {
                key: json.loads(value) for key, value in (file.metadata() or {}).items()
            }
    except (SafetensorError, ValueError, RecursionError) as error:
        raise refused(path, "is not a safetensors file of ours", error) from None
