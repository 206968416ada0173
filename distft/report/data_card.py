"""What the rows are, from the look that `distft.data_quality` takes at them: kept in the run folder, else taken now."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distft.report import formatting
from distft.report.charts import meter
from distft.report.html import Child, Html, h
from distft.report.tables import missing, table
from distft.run_record import CARE, RunRecord

_LABELS = 12


def with_care(run: RunRecord) -> tuple[RunRecord, str]:
    """Return the record with a data card, which is kept beside it as data-card.json and data-card.md.

    Where there is none yet, the recipe's rows are examined now (or were, by `distft check`: then it takes no time).

    Returns:
        The record, and why it has no card; "" when it has one.
    """
    if run.care is not None:
        return run, ""
    if not run.recipe_text:
        return run, "the run folder has no recipe.toml"
    from distft.catalog import REGISTRIES
    from distft.core.errors import DistftError
    from distft.data.prepared_folder import cache_folder
    from distft.data_quality import card, examine
    from distft.recipe import load_recipe
    from distft.recipe.eval_rules import has_own_rows

    try:
        recipe = load_recipe(run.folder / "recipe.toml", registries=REGISTRIES)
        quality_report = examine(recipe.data, answers=recipe.eval.answers, cache_dir=cache_folder(recipe.data))
    except DistftError as error:
        return run, " ".join(str(error).split())
    care = json.loads(json.dumps(quality_report.to_json()))
    sources = [
        (split, recipe.written(source.path)) for split in ("train", "eval") for source in getattr(recipe.data, split)
    ]
    sources += [
        ("eval", recipe.written(answers.path))
        for answers in recipe.eval.answers
        if has_own_rows(answers) and answers.path
    ]
    _keep(run.folder / CARE, json.dumps(care, ensure_ascii=False, indent=1) + "\n")
    _keep(run.folder / "data-card.md", card(quality_report, name=run.name, sources=sources))
    return replace(run, care=care), ""


def _keep(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # somebody else's run: reading it is enough
        path.write_text(text, encoding="utf-8")


def data_card(run: RunRecord, why_not: str) -> Iterator[Html]:
    """Yield the section's content."""
    yield _sources(run)
    if run.care is None:
        yield missing(f"No data card: {why_not or 'nobody has looked at the rows'}.")
        return
    care = run.care
    if care.get("notes"):
        yield h("h3", "Look at this first")
        yield h("ul", [h("li", note) for note in care["notes"]], class_="notes")
    yield _lengths(care["splits"])
    yield _counts(care)
    yield from _labels(care["splits"])
    yield from _finds(care)


def _sources(run: RunRecord) -> Html:
    recipe = run.table("data")
    hashed = run.manifest.get("sources") or {}
    rows: list[list[Child]] = []
    for split in ("train", "eval"):
        for index, source in enumerate(recipe.get(split) or []):
            hashes = hashed.get(split) or []
            files = hashes[index].get("files", {}) if index < len(hashes) else {}
            digests = [h("div", h("code", digest[:16]), f" {label}") for label, digest in list(files.items())[:5]]
            shown = digests or [h("span", formatting.NOTHING)]
            rows.append([source.get("path", ""), split, source.get("format", "auto"), shown])
    if not rows:
        return missing("The recipe in the run folder names no rows.")
    return table("Sources", ("path", "split", "format", "sha256 of its files, first 16 digits"), rows)


def _lengths(splits: Mapping[str, Any]) -> Html:
    rows = [
        [
            split,
            formatting.count(figures["num_rows"]),
            formatting.count(figures["num_unread"]),
            *(
                formatting.count(figures[part].get(quantile))
                for part in ("prompt_chars", "answer_chars")
                for quantile in ("p50", "p90", "max")
            ),
        ]
        for split, figures in splits.items()
    ]
    heads = ("split", "rows", "of no format", "prompt, median", "90 %", "longest", "answer, median", "90 %", "longest")
    return table("Rows, and their lengths in characters", heads, rows, numbers=range(1, 9))


def _counts(care: Mapping[str, Any]) -> Html:
    rows = [
        ["training rows equal to an earlier one", formatting.count(care["num_same"])],
        ["training rows nearly equal to an earlier one", formatting.count(care["num_near"])],
        ["training rows that answer an earlier row's question otherwise", formatting.count(care["num_conflicting"])],
    ]
    if "eval" in care["splits"]:
        shared = sum(care["num_shared"].values())
        kinds = ", ".join(f"{count:,} by {kind}" for kind, count in care["num_shared"].items() if count)
        rows.append(
            ["evaluation rows that are also trained on", formatting.count(shared) + (f" ({kinds})" if kinds else "")]
        )
    return table("Repeats and overlap", ("what", "rows"), rows, numbers=(1,))


def _labels(splits: Mapping[str, Any]) -> Iterator[Html]:
    train = splits.get("train") or {}
    labels = train.get("labels") or {}
    if not labels:
        return
    most = max(labels.values())
    rows: list[list[Child]] = [
        [
            label or "(empty)",
            h("div", meter(count / most), class_="bar"),
            formatting.count(count),
            formatting.percent(count / train["num_rows"]),
        ]
        for label, count in list(labels.items())[:_LABELS]
    ]
    if len(labels) > _LABELS:
        rows.append([f"{len(labels) - _LABELS} more", "", "", ""])
    yield table("Training answers", ("answer", "(picture)", "rows", "share"), rows, numbers=(2, 3))


def _finds(care: Mapping[str, Any]) -> Iterator[Html]:
    counts = care.get("num_found") or {}
    if not counts:
        yield h("p", "No personal data or secrets by shape; names and addresses of people have none.", class_="soft")
        return
    first = {finding["kind"]: finding for finding in reversed(care.get("found") or [])}
    rows = [
        [kind, formatting.count(count), f"{first[kind]['row']}: {first[kind]['masked']}" if kind in first else ""]
        for kind, count in counts.items()
    ]
    yield table("Personal data and secrets by shape, masked", ("kind", "rows", "for example"), rows, numbers=(1,))
