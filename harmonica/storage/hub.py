"""Hub: folders of the Hugging Face Hub, here and there: what is written, published and fetched.

    a router's folder      router.safetensors and a page, README.md
    a schedule's folder    schedule.json and a page, README.md
    a model's folder       as diffusers writes it; only read (harmonica.models.weights)

The table is the same file that `save` writes. The Hub's client is imported when it is needed; who
may read and write is decided by its login or HF_TOKEN. This file does not know what stands in a
table.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from harmonica.storage.files import StrPath, write_text

FILES = {"Router": "router.safetensors", "Schedule": "schedule.json"}
PAGE = """---
library_name: harmonica
tags:
- harmonica
- feature-caching
- diffusion
---

# {kind} for {model}

Which layer of a diffusion transformer computes at which step, and which one reuses its last output.
Made with HarmoniCa, learned feature caching for diffusion transformers (ICML 2025,
arXiv 2410.01723).

```python
from harmonica import {kind}

schedule = {kind}.from_pretrained("{name}"){freeze}
```

```
{drawing}
```
"""


class Drawn(Protocol):
    """What a page shows: a schedule, which is for a model and which `str` draws."""

    @property
    def model(self) -> str: ...  # noqa: D102


def write_folder(
    folder: StrPath, save: Callable[[Path], None], kind: str, schedule: Drawn, name: str = ""
) -> None:
    """Write the folder of a router or a schedule: its table, then the page.

    Each file is whole or not there; files of the same names are replaced, others stay.

    Args:
        folder: made if it is new, in a folder that exists.
        save: writes the table to a path.
        kind: "Router" or "Schedule".
        schedule: what the page shows.
        name: of the repository; the folder's own name if empty.
    """
    folder = Path(folder).absolute()
    folder.mkdir(exist_ok=True)
    freeze = ".schedule(tau=0.1)" if kind == "Router" else ""
    facts = {"kind": kind, "model": schedule.model or "an unnamed model", "freeze": freeze}
    page = PAGE.format(**facts, drawing=schedule, name=name or folder.name)
    try:
        save(folder / FILES[kind])
        write_text(folder / "README.md", page)
    finally:
        with suppress(OSError):  # a folder with something in it stays
            folder.rmdir()


def push(
    repo_id: str, save: Callable[[Path], None], kind: str, schedule: Drawn, private: bool
) -> str:
    """Upload the folder that `write_folder` writes as one commit; return the repository's address.

    `repo_id` is owner/name, or a name among one's own. The repository is made if it is new, private
    on request. Errors of the Hub's client (no login, no right to write, no network) are passed on.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    name = repo_id if "/" in repo_id else address.repo_id
    message = f"Upload a {kind.lower()} made with HarmoniCa"
    with tempfile.TemporaryDirectory() as folder:
        write_folder(folder, save, kind, schedule, name)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return str(address)


def table_file(source: StrPath, kind: str, revision: str | None) -> Path:
    """Return the file of a table, from a folder here or a repository on the Hub.

    Raises what `download` raises, and ValueError if the folder holds a table of the other kind.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = download(os.fspath(source), list(FILES.values()), revision=revision)
    for other, file in FILES.items():
        if other != kind and (folder / file).is_file() and not (folder / FILES[kind]).is_file():
            raise ValueError(f"{source} holds a {other.lower()}; use {other}.from_pretrained(...)")
    return folder / FILES[kind]


def download(
    repo_id: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    otherwise: str = "pass a folder",
) -> Path:
    """Return the local copy of a repository's files, downloaded if need be.

    Args:
        repo_id: such as facebook/DiT-XL-2-256.
        patterns: files wanted, such as transformer/*.
        revision: branch, tag or commit; the main branch if None.
        otherwise: what else the user can do, for the error.

    Raises:
        FileNotFoundError: if there is no such repository or revision, or it is neither on this
            machine nor in reach.
        ValueError: if repo_id cannot be the name of a repository.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns))
    except errors.HFValidationError:
        problem = "is no folder here and no name of a repository on the Hub, which is owner/name"
        raise ValueError(f"{repo_id} {problem}") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        problem = f"the Hub shows no {repo_id} at {revision or 'main'}, and there is no such folder"
        raise FileNotFoundError(f"{problem}; if it is private, log in to the Hub") from None
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        problem = f"is not on this machine and cannot be fetched ({type(error).__name__})"
        todo = f"connect to the Hub once, or {otherwise}"
        raise FileNotFoundError(f"{repo_id} {problem}; {todo}") from None
    return Path(folder)
