"""What a proof of a model found, and where it is kept; read without torch.

See `distft.model.proof` for how it is found.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distft.core.cache import cache_root
from distft.core.errors import FileSystemError
from distft.core.file_lock import locked_once
from distft.core.files import replace_json
from distft.model.paths import ForwardPath


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A path that was held against the reference, or a part of it."""

    path: str
    difference: str
    """What differed and by how much, or why it cannot run."""


@dataclass(frozen=True, kw_only=True)
class ProofVerdict:
    """What a proof found; kept in the cache."""

    architecture: str
    path: ForwardPath | None
    """None: no path gives transformers' numbers."""
    attempts: tuple[Attempt, ...]
    """Those that failed, in order."""
    reason: str = ""
    """Why there is no path."""

    def describe(self) -> str:
        """Return the verdict as a line."""
        if self.path is None:
            return f"{self.architecture}: refused: {self.reason}"
        rest = self.path.describe()
        equal = "loss, gradients and answers equal transformers' own"
        return f"{self.architecture}: {equal}{f', by {rest}' if rest else ''}"

    def tried(self) -> list[str]:
        """Return a line for each faster path that was tried, and why it was not taken."""
        return [f"not {attempt.path}: {attempt.difference}" for attempt in self.attempts]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> ProofVerdict:
        """Read what `to_json` gave."""
        path = content["path"]
        attempts = tuple(Attempt(**attempt) for attempt in content["attempts"])
        return ProofVerdict(**{**content, "path": None if path is None else ForwardPath(**path), "attempts": attempts})


def kept(key: str, find: Callable[[], ProofVerdict], *, waiting: Callable[[], None] = lambda: None) -> ProofVerdict:
    """Return the verdict named `key` from the cache, or find it and keep it there.

    Of several processes that ask together one works and the others wait.

    Args:
        key: see `cache_key`.
        find: the proof.
        waiting: called now and then while another process works.

    Raises:
        FileSystemError: the cache cannot be written.
    """
    folder = cache_root() / "proofs"
    file = folder / f"{key}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked_once(folder / f"{key}.lock", waiting, done=file.is_file) as mine:
            if mine:
                replace_json(file, find().to_json(), indent=1)
        return ProofVerdict.from_json(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise FileSystemError(
            f"{folder}: the proof of the model cannot be kept: {error.strerror or error}  "
            "set DISTFT_CACHE to a folder that can be written"
        ) from None


def cache_key(
    config_json: str,
    *,
    attentions: Sequence[str],
    device: str,
    dtype: str,
    max_length: int,
    compiled: bool = False,
    head: str = "lm",
) -> str:
    """Return a name for a proof: everything that its verdict depends on, the code of this room included.

    Args:
        config_json: text of the model's config.json.
        attentions: what is tried, in order.
        device: "cpu", or the accelerator's product name.
        dtype: of the run.
        max_length: tokens in the run's longest document.
        compiled: whether compiled blocks are tried.
        head: what stands on the hidden states.
    """
    versions = {name: _version(name) for name in _LIBRARIES}
    facts = [config_json, list(attentions), device, dtype, max_length, compiled, head, versions, _code()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


_LIBRARIES = (
    "torch",
    "transformers",
    "flash-attn",
    "liger-kernel",
    "mamba-ssm",
    "causal-conv1d",
    "flash-linear-attention",
    "kernels",
)
"""Distributions of what may compute a part of the model."""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _code() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
