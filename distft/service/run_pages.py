"""The report of a run, and the comparison of several, as HTML that a browser shows without scripts or requests.

They are made by the commands that people call, each in a process of its own: the server imports no torch.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from distft.service.errors import ApiError
from distft.service.job_folder import JobFolder

MAKING_S = 180.0
SANDBOX = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""Content-security-policy of these pages: they hold what people and models wrote."""


class RunPages:
    """Makes pages of runs, and keeps them until a run has gone on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turn = threading.Lock()

    def report(self, folder: JobFolder) -> str:
        """Return the report of a job's run.

        Raises:
            ApiError: there is no run yet, or no page can be made of it.
        """
        return self._made("distft.report", [folder])

    def comparison(self, folders: Sequence[JobFolder]) -> str:
        """Return several jobs' runs side by side.

        Raises:
            ApiError: one has no run yet, or no page can be made of them.
        """
        return self._made("distft.compare", folders)

    def _made(self, command: str, folders: Sequence[JobFolder]) -> str:
        stamp = hashlib.sha256(command.encode())
        for folder in folders:
            if not (folder.run / "metrics.jsonl").exists():
                raise ApiError(404, f"The job {folder.job_id} has not trained a step yet.", code="no_run_yet")
            for name in ("metrics.jsonl", "exit.json", "events.jsonl", "exports.jsonl"):
                path = folder.run / name
                state = (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None
                stamp.update(f"{path} {state}".encode())
        self._folder.mkdir(parents=True, exist_ok=True)
        page = self._folder / f"{stamp.hexdigest()[:32]}.html"
        with self._turn:
            if not page.exists():
                self._make(command, folders, page)
        text = page.read_text(encoding="utf-8")
        for folder in folders:
            text = text.replace(f"{folder.path}/runs/", "").replace(f"{folder.path}/", "")
        return text.replace(f"{self._folder.parent}/", "")  # artifacts that were made of them, and the cache

    def _make(self, command: str, folders: Sequence[JobFolder], page: Path) -> None:
        for older in sorted(self._folder.glob("*.html"), key=lambda path: path.stat().st_mtime)[:-64]:
            older.unlink(missing_ok=True)
        aside = page.with_suffix(".new")
        asked = [sys.executable, "-m", command, *(str(folder.run) for folder in folders), "--out", str(aside)]
        try:
            done = subprocess.run(
                asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=MAKING_S
            )
        except subprocess.TimeoutExpired:
            raise ApiError(503, "The page took too long to make; try again.", code="page_unavailable") from None
        if done.returncode != 0 or not aside.exists():
            raise ApiError(503, "No page can be made of this run at the moment; try again.", code="page_unavailable")
        aside.replace(page)
