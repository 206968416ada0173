"""`python -m distft.check RECIPE`: the resolved recipe and what its data becomes, before any GPU is asked for.

Reads the rows (into the cache that training uses), never the weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from distft import compatibility
from distft.catalog import REGISTRIES
from distft.check_options import parser
from distft.core.errors import DONE, DistftError, FileSystemError
from distft.core.virtual_tokens import VIRTUAL_ID
from distft.data.loader import EvalSteps, Steps
from distft.data.preparation_report import SourceReport
from distft.data.prepare import prepare
from distft.data.prepared_folder import cache_folder
from distft.data.render import load_renderer, settings_of
from distft.data.store import Prepared
from distft.data.tokenizer import load_decoder
from distft.data_quality import DataQualityReport, card, examine, refuse_overlap, summary
from distft.data_quality.judged_rows import JudgedRows, document_tokens, judged_rows
from distft.evaluation.build import build_eval_sets
from distft.recipe import Recipe, check_steps, load_recipe
from distft.trained_counts import trained_counts

MARKS = ("⟦", "⟧")
"""Around trained tokens where there is no colour."""
_BAR = 40
_PROGRESS_EVERY = 10_000


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """One document of a row as the model will see it."""

    id: str
    num_tokens: int
    num_supervised: int
    pieces: tuple[tuple[str, bool], ...]
    """(text, whether it is trained), in order."""


@dataclass(frozen=True, kw_only=True)
class SplitView:
    """The rows of [[data.train]] or [[data.eval]]."""

    split: str
    sources: tuple[SourceReport, ...]
    num_rows: int
    num_tokens: int
    num_supervised: int
    num_sequences: int
    """Per epoch."""
    fill: float
    """Real tokens ÷ (sequences x max_length)."""
    lengths: tuple[tuple[int, int, int], ...]
    """Histogram of rows: (shortest, longest, rows)."""
    fingerprint: str
    samples: tuple[SampleView, ...]
    """Each document of the rows that are shown."""
    judged: JudgedRows | None
    """Figures of rows that judge answers."""


@dataclass(frozen=True, kw_only=True)
class SetView:
    """What the model will be asked."""

    name: str
    num_rows: int
    longest_prompt: int
    """Tokens."""
    figures: tuple[str, ...]
    prompt: str
    """The first question, as the model will read it."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Everything `check` says."""

    name: str
    recipe: dict[str, Any]
    """Resolved, every default filled in."""
    recipe_toml: str
    splits: tuple[SplitView, ...]
    answers: tuple[SetView, ...]
    model: str | None
    """What is proven of the model's arithmetic, then a line for each path that was tried before and not taken; None for
    a folder that holds a tokenizer alone."""
    unplanned: str
    """Why `parameters` are those before training alone; empty where they stay."""
    parameters: tuple[int, int] | None
    """(trained, all); None where `model` is."""
    care: DataQualityReport
    """What the rows hold that should be known: repeats, overlap, personal data, balance."""
    tokens_per_epoch: int
    supervised_per_epoch: int
    num_steps: int
    num_samples: int
    """Sequences of the whole run."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        content = asdict(self)
        del content["recipe_toml"]
        return content


def run_check(recipe: Recipe, *, samples: int = 2, cache_dir: Path | None = None) -> CheckReport:
    """Prepare the recipe's rows and describe them.

    Args:
        recipe: with real paths (see `distft.demo.locate`).
        samples: rows to show of each split.
        cache_dir: of prepared rows; the recipe's, when None.

    Raises:
        DataError: rows that cannot be trained on, or that the recipe's `[data] overlap` refuses.
        RecipeError: the recipe does not fit its model or these rows.
    """
    has_config = compatibility.has_config(recipe)  # a tokenizer's folder is enough to look at rows
    if has_config:
        compatibility.refuse_misfits(recipe)
    folder = cache_dir or cache_folder(recipe.data)
    tokenizer, revision = compatibility.tokenizer_of(recipe)
    decode = load_decoder(tokenizer, revision) if samples else str
    virtual_tokens = recipe.method.spec.virtual_tokens(recipe.method.params)

    def prepared(split: Any, sources: Sequence[Any]) -> Prepared:
        return prepare(
            recipe.data,
            sources,
            tokenizer=tokenizer,
            revision=revision,
            split=split,
            cache_dir=folder,
            virtual_tokens=virtual_tokens,
            progress=_tell,
        )

    train = prepared("train", recipe.data.train)
    steps = Steps(
        train,
        recipe.data,
        seed=recipe.seed,
        epochs=recipe.train.epochs,
        max_steps=recipe.train.max_steps,
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=1,
    )
    check_steps(recipe, steps.num_steps)
    compatibility.refuse_other_rows(recipe, train.report, "train")
    if has_config:
        compatibility.refuse_long_rows(recipe, train.longest_document, "train")
    first_rows = steps.order.epoch(0).rows_N[:samples]
    splits = [_split("train", train, steps.order.per_epoch, steps.fill, first_rows, decode)]
    if recipe.data.eval:
        held_out = prepared("eval", recipe.data.eval)
        compatibility.refuse_other_rows(recipe, held_out.report, "eval")
        if has_config:
            compatibility.refuse_long_rows(recipe, held_out.longest_document, "eval")
        sequences = EvalSteps(held_out, recipe.data, micro_batch_size=1).num_samples
        fill = held_out.report.num_tokens / (sequences * recipe.data.max_length)
        splits.append(_split("eval", held_out, sequences, fill, np.arange(min(samples, held_out.num_rows)), decode))
    care = examine(recipe.data, answers=recipe.eval.answers, cache_dir=folder, progress=_tell)
    refuse_overlap(care, recipe.data)
    return CheckReport(
        name=recipe.name,
        recipe=recipe.resolved(),
        recipe_toml=recipe.to_toml(),
        splits=tuple(splits),
        answers=tuple(_sets(recipe, tokenizer, revision)),
        model=_verdict(recipe) if has_config else None,
        parameters=trained_counts(recipe) if has_config else None,
        unplanned=recipe.method.spec.unplanned(recipe.method.params),
        care=care,
        tokens_per_epoch=steps.tokens_per_epoch,
        supervised_per_epoch=steps.supervised_per_epoch,
        num_steps=steps.num_steps,
        num_samples=steps.num_samples,
    )


def _verdict(recipe: Recipe) -> str:
    """Return the proven path on a CPU, in seconds or from the cache; a run proves its accelerator's kernels.

    Raises:
        RecipeError: it would not be trained on its own loss.
    """
    from distft.model import skeleton
    from distft.model.proving import path_of, verdict_on

    table = recipe.model
    if table.attention == "flash":  # where the run is, not here
        table = table.model_copy(update={"attention": "auto"})
    with compatibility.with_model_line(recipe):
        verdict = verdict_on(
            table,
            skeleton.find_config(recipe.model),
            max_length=recipe.data.max_length,
            head=recipe.objective.spec.head_of(recipe.objective.params),
        )
    line = recipe.line_of("model.path")
    path_of(verdict, source=recipe.source, line=line, attention=table.attention)
    return "\n".join([verdict.describe(), *(f"  {line}" for line in verdict.tried())])


def _tell(rows: int) -> None:
    if rows % _PROGRESS_EVERY < 512 and rows >= _PROGRESS_EVERY and sys.stderr.isatty():
        print(f"\rpreparing: {rows:,} rows", end="", file=sys.stderr, flush=True)


def _sets(recipe: Recipe, tokenizer: str, revision: str | None) -> Iterator[SetView]:
    if not recipe.eval.answers:
        return
    table = recipe.data
    virtual_tokens = recipe.method.spec.virtual_tokens(recipe.method.params)
    renderer = load_renderer(tokenizer, revision=revision, virtual_tokens=virtual_tokens, **settings_of(table))
    for exam in build_eval_sets(recipe.eval.answers, table, renderer, seed=recipe.seed, progress=_tell):
        yield SetView(
            name=exam.name,
            num_rows=exam.rows,
            longest_prompt=exam.longest_prompt,
            figures=tuple(exam.figures()),
            prompt=exam.first_prompt,
        )


def _split(split: str, rows: Prepared, sequences: int, fill: float, shown: np.ndarray, decode: Any) -> SplitView:
    return SplitView(
        split=split,
        sources=rows.report.sources,
        num_rows=rows.num_rows,
        num_tokens=rows.report.num_tokens,
        num_supervised=int(rows.supervised.sum(dtype=np.int64)),
        num_sequences=sequences,
        fill=fill,
        lengths=tuple(_histogram(rows.lengths)),
        fingerprint=rows.fingerprint,
        samples=tuple(sample for row in shown for sample in _samples(rows, int(row), decode)),
        judged=judged_rows(rows),
    )


def _histogram(lengths: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield rows by length, each bin twice as wide as the one before; empty bins at both ends are left out."""
    edges = [0, *(1 << power for power in range(3, int(lengths.max()).bit_length() + 1))]
    counts, _ = np.histogram(lengths, bins=edges)
    first = next(index for index, count in enumerate(counts) if count)
    for low, high, count in zip(edges[first:-1], edges[first + 1 :], counts[first:], strict=True):
        yield low, high - 1, int(count)


def _samples(rows: Prepared, row: int, decode: Any) -> Iterator[SampleView]:
    """Yield each document of a row, split where training starts and stops.

    Prefixes are decoded, not pieces: bytes of one character may be spread over tokens, and some tokenizers drop a space
    at the start of a text.
    """
    for side, ids_T, trained_T in document_tokens(rows, row):
        ends = [*(np.flatnonzero(np.diff(trained_T)) + 1).tolist(), len(ids_T)]
        pieces, begin, before = [], 0, ""
        for end in ends:
            text = decode([token for token in ids_T[:end].tolist() if token < VIRTUAL_ID])
            pieces.append((text[len(before) :], bool(trained_T[begin])))
            begin, before = end, text
        yield SampleView(
            id=rows.sample_id(row) + (f", {side}" if side else ""),
            num_tokens=len(ids_T),
            num_supervised=int(trained_T[1:].sum()),
            pieces=tuple(pieces),
        )


def show(report: CheckReport, console: Console) -> None:
    """Print the report."""
    _line(console, report.recipe_toml.rstrip())
    if report.model is not None:
        _line(console, f"\n[model]  {report.model}")
    if report.parameters is not None:
        trained, total = report.parameters
        later = f"; {report.unplanned}" if report.unplanned else ""
        _line(console, f"[method] {trained:,} of {total:,} parameters are trained ({trained / total:.2%}){later}")
    for split in report.splits:
        _show_split(split, console)
    _line(console, "\n[care]")
    for line in summary(report.care):
        _line(console, f"  {line}")
    for answers in report.answers:
        figures = ", ".join(answers.figures)
        about = f"{answers.num_rows:,} rows, prompts of up to {answers.longest_prompt:,} tokens, {figures}"
        _line(console, f"\n[answers] {answers.name}: {about}\n  first: {answers.prompt!r}")
    train = report.splits[0]
    _line(console, "\n[run]")
    for name, value in (
        ("tokens per epoch", f"{report.tokens_per_epoch:,}  ({report.supervised_per_epoch:,} trained)"),
        ("sequences per epoch", f"{train.num_sequences:,}"),
        ("steps", f"{report.num_steps:,}  ({report.num_samples:,} sequences)"),
    ):
        _line(console, f"  {name:<20} {value}")


def _show_split(split: SplitView, console: Console) -> None:
    _line(
        console,
        f"\n[{split.split}]  {split.num_rows:,} rows, {split.num_tokens:,} tokens, "
        f"{split.num_supervised:,} trained, {split.num_sequences:,} sequences, fill {split.fill:.1%}",
    )
    _line(
        console, f"  {'source':<32} {'format':<24} {'read':>10} {'kept':>10} {'dropped':>8} {'cut':>8} {'tokens':>14}"
    )
    for source in split.sources:
        name = source.path if len(source.path) <= 32 else "…" + source.path[-31:]
        form = source.format + (" (auto)" if source.decided else "")
        _line(
            console,
            f"  {name:<32} {form:<24} {source.num_read:>10,} {source.num_kept:>10,} "
            f"{source.num_dropped:>8,} {source.num_truncated:>8,} {source.num_tokens:>14,}",
        )
        for line in source.messages():
            _line(console, f"    {line}")
        for fault in source.faults:
            _line(console, f"    {fault}")
    most = max(count for *_, count in split.lengths)
    _line(console, f"  {'tokens':>15} {'rows':>10}")
    for low, high, count in split.lengths:
        _line(console, f"  {f'{low:,}-{high:,}':>15} {count:>10,} {'█' * -(-count * _BAR // most)}")
    for line in () if split.judged is None else split.judged.lines():
        _line(console, f"  {line}")
    for sample in split.samples:
        _line(console, f"\n  {sample.id}: {sample.num_tokens:,} tokens, {sample.num_supervised:,} trained")
        console.print(highlighted(sample, colour=console.color_system is not None), soft_wrap=True)


def highlighted(sample: SampleView, *, colour: bool) -> Text:
    """Return the sample with its trained text on green, or between marks where there is no colour."""
    text = Text()
    for piece, trained in sample.pieces:
        if colour:
            text.append(piece, style="black on green" if trained else "dim")
        else:
            text.append(MARKS[0] + piece + MARKS[1] if trained else piece)
    return text


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _write_card(path: Path, care: DataQualityReport, recipe: Recipe) -> None:
    sources = [
        (split, recipe.written(source.path)) for split in ("train", "eval") for source in getattr(recipe.data, split)
    ]
    try:
        path.write_text(card(care, name=recipe.name, sources=sources), encoding="utf-8")
    except OSError as error:
        raise FileSystemError(f"{path}: the data card cannot be written: {error.strerror}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    options = parser().parse_args(argv)
    try:
        recipe = load_recipe(options.recipe, registries=REGISTRIES, overrides=options.overrides)
        report = run_check(recipe, samples=options.samples)
        if not compatibility.has_config(recipe):
            print(
                f"check: {recipe.written(recipe.model.path)} holds no config.json: its tokenizer was used",
                file=sys.stderr,
            )
        if options.card:
            _write_card(Path(options.card), report.care, recipe)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        show(report, Console())
    return DONE


if __name__ == "__main__":
    sys.exit(main())
