"""What the run was asked, what it ran on, what it cost, and the way back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from distft.report import formatting
from distft.report.html import Child, Html, h
from distft.report.tables import facts, fold, missing, table
from distft.run_record import RunRecord


def recipe(run: RunRecord) -> Iterator[Html]:
    """Yield the resolved recipe."""
    if not run.recipe_text:
        yield missing("The run folder has no recipe.toml.")
        return
    digest = str(run.manifest.get("recipe_sha256", ""))
    parts = ["Every default is filled in; "]
    parts += ["sha256 ", h("code", digest[:16]), "." if digest else ""]
    given = (run.manifest.get("recipe") or {}).get("overrides") or []
    yield h("p", parts, class_="soft")
    if given:
        yield h("p", "Changed on the command line: ", [[h("code", override), " "] for override in given])
    yield fold("recipe.toml", h("pre", h("code", run.recipe_text), tabindex=0))


def environment(run: RunRecord) -> Iterator[Html]:
    """Yield hardware, versions and code."""
    manifest = run.manifest
    if not manifest:
        yield missing("The run folder has no manifest.json, so nothing is known of the machine.")
        return
    machine, code, layout = manifest.get("hardware") or {}, manifest.get("git") or {}, manifest.get("layout") or {}
    kinds: dict[str, int] = {}
    for place in manifest.get("devices") or []:
        kinds[place["device"]] = kinds.get(place["device"], 0) + 1
    devices = ", ".join(f"{count} × {name}" for name, count in kinds.items()) or manifest.get("device", "")
    memory = machine.get("memory_gib")
    processor = ", ".join(
        part
        for part in (machine.get("cpu"), f"{manifest.get('cpus')} cores", f"{memory} GiB" if memory else "")
        if part
    )
    commit: Child = None
    if manifest.get("git_commit"):
        dirty = [" with changes, in ", h("code", "uncommitted.diff")] if code.get("dirty") else ", unchanged"
        commit = [h("code", str(manifest["git_commit"])[:12]), dirty]
    yield facts(
        "Machine and processes",
        [
            ("devices", devices),
            ("driver", machine.get("gpu_driver")),
            ("processor", processor),
            ("system", manifest.get("platform")),
            ("processes", f"{manifest.get('world', '')} on {formatting.noun(int(manifest.get('nodes') or 1), 'node')}"),
            ("launcher", " ".join(filter(None, [manifest.get("launcher"), manifest.get("launcher_wants")]))),
            ("engine", run.engine),
            ("micro-batch", _micro(layout)),
            ("checkpointing", layout.get("checkpointing")),
            ("seed", manifest.get("seed")),
            ("code", commit),
            ("folder", h("code", manifest.get("cwd")) if manifest.get("cwd") else None),
            ("Slurm job", manifest.get("slurm_job")),
        ],
    )
    versions = {name: version for name, version in (manifest.get("versions") or {}).items() if version}
    versions |= {str(plugin.get("distribution")): plugin.get("version") for plugin in manifest.get("plugins") or []}
    yield fold("Versions", table("Installed packages", ("package", "version"), list(versions.items())))
    if manifest.get("environment"):
        named = [[name, h("code", value)] for name, value in manifest["environment"].items()]
        yield fold("Environment variables", table("Variables that libraries read", ("name", "value"), named))
    command = manifest.get("command") or []
    if command:
        yield fold("Command of rank 0", h("pre", h("code", " ".join(map(str, command))), tabindex=0))


def _micro(layout: dict[str, Child]) -> str:
    size, count = layout.get("micro_batch_size"), layout.get("micros_per_step")
    return "" if size is None else f"{size} × {count} per step and process"


def cost(run: RunRecord, price: float | None) -> Iterator[Html]:
    """Yield the hours, and money where a price is known."""
    hours = run.gpu_hours
    if hours is None:
        yield missing("Without a start in events.jsonl no time is known, and no cost.")
        return
    unit = "GPU" if run.on_gpu else "process"
    tokens = run.last.get("tokens") or 0
    busy = run.training_s / run.wall_s if run.wall_s else None
    pairs: list[tuple[str, Child]] = [
        (f"{unit} hours", formatting.figure(hours)),
        ("of which in optimizer steps", formatting.percent(None if busy is None else min(1.0, busy))),
        (f"{unit} hours per million tokens", formatting.figure(hours / tokens * 1e6) if tokens else None),
    ]
    if price is not None:
        pairs.append((f"cost at {price:g} per {unit} hour", money(hours * price)))
        pairs.append(("cost per million tokens", money(hours * price / tokens * 1e6) if tokens else None))
    yield facts("Time that was paid for", pairs)
    if price is None:
        yield h("p", "With ", h("code", "--price PER_GPU_HOUR"), " it is told in money.", class_="soft")
    yield h(
        "p",
        "Counted from each start that reached training to its last word, over all processes; imports and waiting in a "
        "queue are not in it.",
        class_="soft",
    )


def money(amount: float) -> str:
    """Return money with two digits, more for less than a cent."""
    return f"{amount:,.2f}" if amount >= 0.01 or not amount else f"{amount:.2g}"


def going_back(run: RunRecord) -> Iterator[Html]:
    """Yield how to return to what was there before."""
    if not run.base:
        yield missing("The recipe is missing, so the base model is not known.")
        return
    model = run.manifest.get("model") or {}
    files = model.get("files") or {}
    revision = model.get("revision")
    yield h(
        "p",
        "This run changed nothing in its base model, ",
        h("code", run.base),
        [" at revision ", h("code", revision)] if revision else None,
        (
            ": an adapter lies beside it, and without the adapter it is the model that it was."
            if run.is_adapter
            else ": the tuned weights are a copy in final/."
        ),
    )
    steps: list[Child] = [h("li", _use_base(run))]
    before = _previous(run)
    if before is not None:
        shown = os.path.relpath(before, run.folder)
        page = before / "report.html"
        link = h("a", "its page", href=Path(os.path.relpath(page, run.folder)).as_posix()) if page.exists() else None
        steps.append(
            h(
                "li",
                "The base is the result of an earlier run, ",
                h("code", shown),
                [" (", link, ")"] if link else None,
                ".",
            )
        )
    kept = sorted(path.name for path in (run.folder / "checkpoints").glob("step-" + 8 * "[0-9]"))
    if kept:
        steps.append(
            h(
                "li",
                "An earlier state of this run: ",
                h(
                    "code",
                    f"distft train {run.folder / 'recipe.toml'} --resume {run.folder / 'checkpoints' / kept[-1]}",
                ),
                f" goes on from it; kept are {', '.join(name.removeprefix('step-').lstrip('0') for name in kept)}.",
            )
        )
    yield h("ul", steps, class_="notes")
    if files:
        rows = [[name, h("code", digest[:16])] for name, digest in files.items()]
        yield fold("Hashes of the base model", table("First 16 digits of sha256", ("file", "sha256"), rows))


def _use_base(run: RunRecord) -> Child:
    if run.is_adapter:
        return ["With PEFT: ", h("code", "model.disable_adapter()"), " for one answer, ", h("code", "model.unload()"),
                " for good; a server stops naming the adapter."]  # fmt: skip
    return ["Load ", h("code", run.base), " instead of ", h("code", str(run.folder / "final")), "."]


def _previous(run: RunRecord) -> Path | None:
    """Return the run whose final/ this one started from."""
    folder = Path(str((run.manifest.get("model") or {}).get("folder") or run.base))
    return folder.parent if folder.name == "final" and (folder.parent / "manifest.json").is_file() else None
