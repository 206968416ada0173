"""Records as pictures: memory by component planned against measured, tokens/s by method, memory against length."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distft.bench.planned import peak_bytes, planned_peak
from distft.bench.table import MIB, name_of

HOW = 'plots need matplotlib: pip install "distft[bench]"'
COMPONENTS = {
    "weights": "#4477AA",
    "quant_constants": "#66CCEE",
    "gradients": "#CCBB44",
    "master": "#AA3377",
    "optimizer": "#228833",
    "activations and rest": "#BBBBBB",
}
"""Colours that people without some of them can tell apart. Source: Paul Tol, https://personal.sron.nl/~pault/"""
MARKS = ("o", "s", "^", "D", "v")
COLOURS = ("#4477AA", "#228833", "#EE6677", "#AA3377", "#CCBB44", "#66CCEE")


def available() -> bool:
    """Return whether there is anything to draw with."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write the pictures that `records` have figures for; SVG, text as text."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "distft",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    measured = [record for record in records if record["outcome"] == "measured"]
    drawn = [_memory_by_component(measured), _speed_by_method(measured), _memory_by_length(measured)]
    names = ("memory-by-component", "tokens-per-s", "memory-by-length")
    written = []
    for name, figure in zip(names, drawn, strict=True):
        if figure is not None:
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
            written.append(path)
    return written


def components(record: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (planned, measured) bytes of each component on rank 0; the last is the peak less the others.

    The peak need not be at a moment when gradients are there, so the rest is what exceeds the whole state, if anything.
    """
    plan, held = record["planned"]["state_by_rank"][0], record["ranks"][0]["held"]
    parts = {name: (plan[f"{name}_bytes"], held[f"{name}_bytes"]) for name in COMPONENTS if f"{name}_bytes" in plan}
    tops = (planned_peak(record) or 0, peak_bytes(record) or 0)
    rest = tuple(max(0, top - sum(part[side] for part in parts.values())) for side, top in enumerate(tops))
    return parts | {"activations and rest": (rest[0], rest[1])}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _label(record: dict[str, Any]) -> str:
    case = record["case"]
    return f"{name_of(record)}\nm {record['ran']['micro_batch_size']}, {case['max_length']:,}"


def _memory_by_component(records: Sequence[dict[str, Any]]) -> Any:
    shown = [record for record in records if record.get("planned")]
    if not shown:
        return None
    figure, axes = _figure(7.5, 0.6 + 0.42 * len(shown))
    for place, record in enumerate(shown):
        y_of = {"planned": place - 0.19, "measured": place + 0.19}
        ends = [0.0, 0.0]
        for name, pair in components(record).items():
            for side, (y, opacity) in enumerate(((y_of["planned"], 0.5), (y_of["measured"], 1.0))):
                size = pair[side] / MIB
                axes.barh(y, size, 0.34, left=ends[side], color=COMPONENTS[name], alpha=opacity, linewidth=0)
                ends[side] += size
    for name, colour in COMPONENTS.items():
        axes.barh(0, 0, color=colour, label=name.replace("_", " "))
    axes.set_yticks(range(len(shown)), [_label(record).replace("\n", ", ") for record in shown])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("MiB on rank 0; of each pair the upper, pale bar is planned, the lower one measured")
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(COMPONENTS), columnspacing=1, handlelength=1)
    return figure


def _speed_by_method(records: Sequence[dict[str, Any]]) -> Any:
    shown = [record for record in records if record.get("loss_check", {}).get("equal", True)]
    if not shown:
        return None
    figure, axes = _figure(7.5, 0.6 + 0.27 * len(shown))
    methods = list(dict.fromkeys(record["case"]["method"] for record in shown))
    colours = dict(zip(methods, COLOURS * len(methods), strict=False))
    rates = [record["speed"]["tokens_per_s"] for record in shown]
    axes.barh(range(len(shown)), rates, 0.7, color=[colours[record["case"]["method"]] for record in shown])
    for place, rate in enumerate(rates):
        axes.text(rate, place, f" {rate:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [_label(record).replace("\n", ", ") for record in shown])
    axes.invert_yaxis()
    axes.set_xlabel("real tokens/s of all processes")
    return figure


def _memory_by_length(records: Sequence[dict[str, Any]]) -> Any:
    """Draw a panel for each method; a colour for each engine, a mark for each micro-batch."""
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for record in records:
        method = record["case"]["method"]
        engine = name_of(record).removeprefix(f"{method} ")
        lines.setdefault((method, engine, record["ran"]["micro_batch_size"]), []).append(record)
    lines = {key: group for key, group in lines.items() if len({record["case"]["max_length"] for record in group}) > 1}
    if not lines:
        return None
    methods, engines, micros = (list(dict.fromkeys(key[part] for key in lines)) for part in range(3))
    figure = Figure(figsize=(max(7.5, 3.0 * len(methods)), 3.8), layout="constrained")
    panels = dict(zip(methods, figure.subplots(1, len(methods), sharey=True, squeeze=False)[0], strict=True))
    for (method, engine, micro), group in lines.items():
        group = sorted(group, key=lambda record: record["case"]["max_length"])
        x = [record["case"]["max_length"] for record in group]
        colour, mark = COLOURS[engines.index(engine) % len(COLOURS)], MARKS[micros.index(micro) % len(MARKS)]
        axes = panels[method]
        measured = [peak_bytes(record) / MIB for record in group]
        axes.plot(x, measured, mark, color=colour, markersize=5, label=f"{engine}, micro-batch {micro}")
        planned = [
            (length, plan / MIB) for length, record in zip(x, group, strict=True) if (plan := planned_peak(record))
        ]
        if planned:
            axes.plot(*zip(*planned, strict=True), "-", color=colour, linewidth=0.8)
        axes.set_xticks(x)
        axes.set_title(method)
        axes.set_xlabel("tokens in a sequence")
    first = panels[methods[0]]
    first.set_ylim(bottom=0)
    first.set_ylabel("peak, MiB on the rank that has most\nmarks measured, lines planned")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure
