"""Files of the hub, fetched by one process for each cache folder: one a node on disks of their own, one in all else.

huggingface_hub locks each file, so that two processes do no harm; but each of 512 asks the hub for the list of files
and polls those locks. Here the others wait for a note of the first, and ask nobody.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from distft.core import host
from distft.core.file_lock import locked_once, wait_hook
from distft.core.files import replace_json
from distft.core.phase import PHASE

_COMMIT = re.compile(r"[0-9a-f]{40}")


def snapshot(repo: str, revision: str | None, wanted: Sequence[str]) -> Path:
    """Return the folder with a repository's files of these patterns.

    A branch's name is looked up once for each start of a run: by the first process of it that comes here.

    Raises:
        Exception: whatever huggingface_hub raises: no such repository, no access, no network and not in the cache.
    """
    library: Any = importlib.import_module("huggingface_hub")

    def fetch() -> str:
        return library.snapshot_download(repo, revision=revision, allow_patterns=list(wanted))

    cache = Path(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)
    name = json.dumps([repo, revision, sorted(wanted)])
    pinned = revision is not None and _COMMIT.fullmatch(revision) is not None
    return Path(once(cache, name, fetch, good=lambda folder: Path(folder).is_dir(), lasting=pinned))


def once(cache: Path, name: str, work: Callable[[], str], *, good: Callable[[str], bool], lasting: bool) -> str:
    """Return the result of `work`, or the one that another process of this start has got from it.

    Args:
        cache: the folder that the work fills; one that may not be written has been filled by somebody else.
        name: names the work.
        work: fills the cache and returns a text, such as a path.
        good: whether a result is still valid.
        lasting: whether an earlier start's result may be used.
    """
    key = hashlib.sha256(name.encode()).hexdigest()[:24]
    notes = cache / ".distft"
    note = notes / f"{key}.json"

    def stored_result() -> str | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(note.read_text(encoding="utf-8"))
            if record["name"] == name and (lasting or note.stat().st_mtime >= _started()) and good(record["gave"]):
                return record["gave"]
        return None

    try:
        notes.mkdir(parents=True, exist_ok=True)
        probe = notes / f".{uuid4().hex}.tmp"
        probe.touch()
        probe.unlink()
    except OSError:
        return work()
    with locked_once(notes / f"{key}.lock", wait_hook, done=lambda: stored_result() is not None) as ours:
        gave = None if ours else stored_result()
        if gave is None:
            wait_hook()  # what the hub takes its time for is no hang of ours
            gave = work()
            replace_json(note, {"name": name, "gave": gave})
    PHASE.enter(PHASE.phase)  # from here on a silence is ours again
    return gave


def _started() -> float:
    """Return the wall-clock time at which this process was started; results since then are fresh enough."""
    age = host.age_s()
    return time.time() - (0.0 if age is None else age)
