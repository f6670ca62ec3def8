"""Hub: folders of the Hugging Face Hub, here and there: what is written, published and fetched.

    a table's folder    schedule.json, a page README.md, and the router if one was trained
    a model's folder    as diffusers writes it; only read (harmonica.models.weights)

    push("me/table", schedule)                       publish
    Schedule.load(fetch("me/table"))                 read it again; a folder will do as well
    Router.load(fetch("me/table", ROUTER))           the scores, to go on from

The Hub's client is imported when it is needed; who may read and write is decided by its login or
HF_TOKEN. This file does not know what stands in a table: a schedule is what has `model` and `save`
and is drawn by `str`, a router what has `save`.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harmonica.storage.files import write_text
from harmonica.values import StrPath

SCHEDULE, ROUTER = "schedule.json", "router.safetensors"
PAGE = """---
library_name: harmonica
tags:
- harmonica
- feature-caching
- diffusion
---

# Schedule for {model}

Which layer of a diffusion transformer computes at which step, and which one reuses its last output.
Made with HarmoniCa, learned feature caching for diffusion transformers (ICML 2025,
arXiv 2410.01723).

```python
from harmonica import Schedule
from harmonica.storage.hub import fetch

schedule = Schedule.load(fetch("{name}"))
```

```
{schedule}
```
"""


def write_folder(folder: StrPath, schedule: Any, router: Any = None, name: str = "") -> None:
    """Write a table's folder, which is made if it is new; the page calls it `name`, or by its own
    name. Files of the same names are replaced, others stay.
    """
    folder = Path(folder).absolute()
    folder.mkdir(exist_ok=True)
    schedule.save(folder / SCHEDULE)
    if router is not None:
        router.save(folder / ROUTER)
    model = schedule.model or "an unnamed model"
    page = PAGE.format(model=model, schedule=schedule, name=name or folder.name)
    write_text(folder / "README.md", page)


def push(repo_id: str, schedule: Any, router: Any = None, *, private: bool = False) -> str:
    """Upload the folder that `write_folder` writes as one commit; return the repository's address.

    `repo_id` is owner/name, or a name among one's own. The repository is made if it is new, private
    on request. Errors of the Hub's client (no login, no right to write, no network) are passed on.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    name = repo_id if "/" in repo_id else address.repo_id
    with tempfile.TemporaryDirectory() as folder:
        write_folder(folder, schedule, router, name)
        message = "Upload a table made with HarmoniCa"
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return str(address)


def fetch(source: StrPath, file: str = SCHEDULE, revision: str | None = None) -> Path:
    """Return the path of a file in a folder here, or in a repository on the Hub as `download`."""
    here = Path(source).is_dir()
    return (Path(source) if here else download(os.fspath(source), [file], revision=revision)) / file


def download(
    repo_id: str, patterns: Sequence[str], *, revision: str | None = None,
    otherwise: str = "pass a folder",
) -> Path:  # fmt: skip
    """Return the local copy of the files of a repository, such as facebook/DiT-XL-2-256, that match
    patterns, such as transformer/*; they are downloaded if need be. `revision` is a branch, tag or
    commit, None the main branch; `otherwise` is what else the user can do, for an error.

    Raises FileNotFoundError if there is no such repository or revision, or it is neither on this
    machine nor in reach, ValueError if repo_id is no repository's name.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
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
