"""What a run started from against what is here now: rows, weights, versions, hardware, code."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.core import environment
from distft.recipe import Recipe

DATA, MODEL, COMPUTES, TOLD = "data", "model", "computes", "told"
"""Kinds of difference: other rows; other weights; may change digits; changes none that is known."""
_IGNORED = (
    "DISTFT_CACHE",
    "VIRTUAL_ENV",
    "CONDA",
    "SLURM",
    "LD_LIBRARY",
    "HF_HOME",
    "ACCELERATE",
    "TOKENIZERS",
    "TORCH_FR",
    "TORCH_NCCL",
    "PYTORCH_NVML",
    "DS_ACCELERATOR",
    "TRANSFORMERS_NO_ADVISORY",
)
"""Variables that say where things are, and those that launchers and we ourselves set for the processes of a run."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that is not as it was."""

    kind: str
    what: str
    then: str
    now: str

    def __str__(self) -> str:
        return f"{self.what}: {self.then} then, {self.now} now"

    @property
    def is_fatal(self) -> bool:
        """Nothing can be reproduced from other rows or weights."""
        return self.kind in (DATA, MODEL)


def differences(manifest: Mapping[str, Any], recipe: Recipe, device: str) -> list[Difference]:
    """Return the differences, gravest first, of what the manifest knows. `device`: this machine's, or "cpu".

    Raises:
        DataError: rows are not there any more.
        RecipeError: the model is not.
    """
    changes = [
        *_rows(manifest.get("sources") or {}, recipe),
        *_weights(manifest.get("model") or {}, recipe),
        *_versions(manifest.get("versions") or {}),
        *_plugins(manifest.get("plugins") or []),
        *_machine(manifest, device),
        *_code(manifest.get("git") or {}),
        *_variables(manifest.get("environment") or {}),
    ]
    order = (DATA, MODEL, COMPUTES, TOLD)
    return sorted(changes, key=lambda change: order.index(change.kind))


def _rows(then: Mapping[str, Any], recipe: Recipe) -> Iterator[Difference]:
    from distft.assemble import input_hashes

    if not then:
        yield Difference(kind=TOLD, what="[data]", then="no hash was written", now="not compared")
        return
    now = input_hashes.rows(recipe)
    for split, sources in then.items():
        for index, source in enumerate(sources):
            here = now.get(split, [])
            files = here[index]["files"] if index < len(here) else {}
            yield from _hashes(DATA, f"[[data.{split}]] {source['path']}", source["files"], files)


def _weights(then: Mapping[str, Any], recipe: Recipe) -> Iterator[Difference]:
    from distft.assemble import input_hashes

    if not then.get("files"):
        yield Difference(kind=TOLD, what="[model]", then="no hash was written", now="not compared")
        return
    now = input_hashes.weights(recipe)
    yield from _hashes(MODEL, f"[model] {then['path']}", then["files"], now["files"])
    yield from _hashes(MODEL, f"tokenizer of {then['path']}", then.get("tokenizer") or {}, now["tokenizer"])


def _hashes(kind: str, what: str, then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Difference]:
    for name in sorted({*then, *now}):
        before, after = then.get(name, ""), now.get(name, "")
        if before != after:
            short = [f"{digest[:12]}…" if digest else "not there" for digest in (before, after)]
            yield Difference(kind=kind, what=f"{what}, {name}", then=short[0], now=short[1])


def _versions(then: Mapping[str, str | None]) -> Iterator[Difference]:
    now = environment.versions() | environment.built_with()
    for name, before in then.items():
        after = now.get(name)
        if before != after and name in now:
            kind = COMPUTES if name in environment.COMPUTES else TOLD
            yield Difference(kind=kind, what=name, then=before or "not installed", now=after or "not installed")


def _plugins(then: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    from distft.catalog import PLUGINS

    before = {str(plugin.get("distribution")): str(plugin.get("version")) for plugin in then}
    now = {plugin.distribution: plugin.version for plugin in PLUGINS.load()}
    for name in sorted({*before, *now}):
        pair = [versions.get(name, "not installed") for versions in (before, now)]
        if pair[0] != pair[1]:
            yield Difference(kind=COMPUTES, what=f"plugin {name}", then=pair[0], now=pair[1])


def _machine(then: Mapping[str, Any], device: str) -> Iterator[Difference]:
    before = then.get("device")
    if before and before != device:
        yield Difference(kind=COMPUTES, what="device", then=before, now=device)
    cpu = (then.get("hardware") or {}).get("cpu")
    here = environment.hardware()
    if cpu and cpu != here["cpu"]:
        kind = COMPUTES if before == "cpu" else TOLD
        yield Difference(kind=kind, what="processor", then=cpu, now=here["cpu"])
    driver = (then.get("hardware") or {}).get("gpu_driver")
    if driver and driver != here["gpu_driver"]:
        yield Difference(kind=COMPUTES, what="GPU driver", then=driver, now=here["gpu_driver"] or "none")


def _code(then: Mapping[str, Any]) -> Iterator[Difference]:
    here = environment.git_state(Path.cwd())
    now = {} if here is None else here.to_json()
    if then and (then.get("commit"), then.get("diff_sha256")) != (now.get("commit"), now.get("diff_sha256")):
        commits = [
            f"{str(state.get('commit'))[:12]}{' with changes' if state.get('dirty') else ''}"
            if state
            else "no repository"
            for state in (then, now)
        ]
        yield Difference(kind=TOLD, what="code around the run", then=commits[0], now=commits[1])


def _variables(then: Mapping[str, str]) -> Iterator[Difference]:
    now = environment.library_variables(os.environ)
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name) and not name.startswith(_IGNORED):
            pair = [variables.get(name, "not set") for variables in (then, now)]
            yield Difference(kind=TOLD, what=f"${name}", then=pair[0], now=pair[1])
