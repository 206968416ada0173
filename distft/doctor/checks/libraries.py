"""Versions of what a run imports: new enough, and the same on every rank."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Sequence

from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, fail, names, odd_ones, ok

PACKAGES = (
    "distft", "torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "safetensors", "tokenizers",
    "numpy", "flash-attn", "liger-kernel",
)  # fmt: skip


def look(here: Here) -> Facts:
    """Return what is installed; reading it imports none of it."""
    return {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Report versions that differ between ranks, which compute or communicate differently, or are too old."""
    bad = False
    for package in seen[0].facts:
        usual, others = odd_ones(seen, lambda process, package=package: process.facts.get(package))
        if others:
            bad = True
            yield fail(
                f"{package} {others[0].facts.get(package) or 'is not there'} on "
                f"{names(process.who for process in others)}, {usual or 'not there'} on others",
                "the same environment on every host: one on the shared folder, or one container image",
                (process.host for process in others),
            )
    for package, wants in _too_old(seen[0].facts):
        bad = True
        yield fail(f"{package} {seen[0].facts[package]}, wanted {wants}", f'pip install "{package}{wants}"')
    if not bad:
        facts = seen[0].facts
        shown = ("python", "torch", "transformers", "accelerate", "deepspeed", "peft")
        yield ok(", ".join(f"{package} {facts[package]}" for package in shown if facts[package]))


def _too_old(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield what our own package asks for and does not find: (package, specifier)."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("distft") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return
    for requirement in map(Requirement, lines):
        version = facts.get(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            yield requirement.name, str(requirement.specifier)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


CHECK = Check(name="libraries", look=look, judge=judge)
