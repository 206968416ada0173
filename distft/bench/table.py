"""Records as Markdown: what they were measured on, one row for each case, the boundary of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from distft.bench.loss_agreement import EARLY
from distft.bench.planned import peak_bytes, planned_peak, state_bytes
from distft.bench.runner import OUTCOMES
from distft.core.accelerators import GIB

MIB = 2**20
STEADY = 0.9
"""Share of the rate by the median step that the whole block reaches, if nothing interrupts it."""
COLUMNS = ("method", "engine", "micro", "length", "tokens/s", "ratio", "step ms, median [p10, p90]", "peak",
           "planned", "difference", "state planned", "state measured", "note")  # fmt: skip


TIMES = ("tokens/s", "step ms, median [p10, p90]")
"""Columns that say something of this machine and nothing of another."""


def markdown(
    name: str, records: Sequence[dict[str, Any]], boundary: dict[str, Any] | None = None, *, times: bool = True
) -> str:
    """Return the whole page; without `times`, ratios and bytes alone, which hold on other machines too."""
    shown = [index for index, column in enumerate(COLUMNS) if times or column not in TIMES]

    def row(cells: Sequence[str]) -> str:
        return _row(cells[index] for index in shown)

    lines = [f"# {name}", "", *_head(records), "", row(COLUMNS), row(["---"] * len(COLUMNS))]
    lines += [row(_cells(record, baseline(record, records))) for record in records]
    lines += ["", *_legend(records)]
    if boundary is not None:
        lines += ["", *_boundary(boundary)]
    return "\n".join(lines) + "\n"


def baseline(record: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what a record's ratio is to: full fine-tuning otherwise alike, else the first of the same length."""
    measured = [candidate for candidate in records if candidate["outcome"] == "measured"]

    def alike(candidate: dict[str, Any], *keys: str) -> bool:
        return all(candidate["case"][key] == record["case"][key] for key in keys)

    full = (
        candidate
        for candidate in measured
        if candidate["ran"]["trained_parameters"] == candidate["ran"]["parameters"]
        and alike(candidate, "engine", "world", "micro_batch_size", "max_length", "rows")
    )
    return next(full, next((candidate for candidate in measured if alike(candidate, "max_length", "rows")), None))


def compact(num_bytes: float | None) -> str:
    """Format bytes as GiB from one on, as MiB below."""
    if num_bytes is None:
        return "–"
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"


def name_of(record: dict[str, Any]) -> str:
    """Return a case in a few words, for rows and axes."""
    case = record["case"]
    ranks = f" x {case['world']}" if case["world"] > 1 else ""
    return f"{case['method']} {case['engine']}{ranks}"


def _cells(record: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    case, ran = record["case"], record.get("ran", {})
    engine = ran.get("engine", case["engine"])
    world = case["world"]
    micro = ran.get("micro_batch_size", case["micro_batch_size"])
    shown = [case["method"], f"{engine} x {world}" if world > 1 else engine, str(micro), str(case["max_length"])]
    planned = planned_peak(record)
    if record["outcome"] != "measured":
        state = record["planned"]["state_by_rank"][0] if record.get("planned") else None
        rest = ["–", "–", "–", "–", compact(planned), "–", "–" if state is None else f"{state_bytes(state):,}", "–"]
        return [*shown, *rest, f"{OUTCOMES[record['outcome']]}: {record['reason']}"]
    speed, peak = record["speed"], peak_bytes(record)
    step = speed["step_s"]
    held = record["ranks"][0]["held"]
    state = record["planned"]["state_by_rank"][0] if record.get("planned") else None
    difference = "–" if planned is None else f"{100 * (planned - peak) / peak:+.1f} %"
    ratio = f"{speed['tokens_per_s'] / base['speed']['tokens_per_s']:.2f}" if base and _valid(record) else "–"
    return [
        *shown,
        f"{speed['tokens_per_s']:,.0f}" if _valid(record) else "void",
        ratio,
        f"{step['median'] * 1e3:,.1f} [{step['p10'] * 1e3:,.1f}, {step['p90'] * 1e3:,.1f}]",
        compact(peak),
        compact(planned),
        difference,
        "–" if state is None else f"{state_bytes(state):,}",
        f"{state_bytes(held):,}",
        "; ".join(notes(record)),
    ]


def _valid(record: dict[str, Any]) -> bool:
    return record.get("loss_check", {}).get("equal", True)


def notes(record: dict[str, Any]) -> Iterator[str]:
    """Yield what a reader must know of a measured row."""
    check = record.get("loss_check")
    if check and not check["equal"]:
        left = f", {record['left_out']} updates left out" if record["left_out"] else ""
        apart = f"by {check['early']:.1e} early, {check['all']:.1e} in all{left}"
        yield f"VOID: its losses differ from {check['reference']} {apart}"
    retries = sum(rank["device"]["alloc_retries"] or 0 for rank in record["ranks"])
    if retries:
        yield f"{retries} allocation retries: too full to be fast"
    speed = record["speed"]
    if speed["block_tokens_per_s"] < STEADY * speed["tokens_per_s"]:
        share = speed["block_tokens_per_s"] / speed["tokens_per_s"]
        yield f"unsteady: interruptions left the whole block {share:.0%} of this rate"
    if not speed["settled"]:
        yield "graphs were still being compiled"
    if record.get("planned"):
        wrong = [
            rank
            for rank, (held, plan) in enumerate(zip(record["ranks"], record["planned"]["state_by_rank"], strict=True))
            if held["held"] != plan
        ]
        if wrong:
            yield f"state differs from the plan on rank {', '.join(map(str, wrong))}"
    elif "not_planned" in record:
        yield f"not planned: {record['not_planned']}"
    if speed["mfu"]:
        rate = speed["of_matmul_rate"]
        yield f"MFU {speed['mfu']:.1%}" + (f", {rate:.1%} of the matmul rate measured beside it" if rate else "")
    if record["case"]["limit_gib"]:
        yield f"under {record['case']['limit_gib']:g} GiB"


def _head(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    first = records[0]
    machine, case = first["hardware"], first["case"]
    threads = sorted({record["ran"]["threads"] for record in records if "ran" in record})
    on = f"{len(machine['gpus'])} x {machine['gpus'][0]}" if machine["gpus"] else "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version)
    codes = (record["code"] for record in records)
    commits = dict.fromkeys((code["commit"] or "unknown")[:12] + " and changes" * bool(code["dirty"]) for code in codes)
    dates = sorted({record["date"][:10] for record in records})
    yield (
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(commits)}; "
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {on}; {', '.join(map(str, threads))} thread(s) a process."
    )
    yield f"{versions}."
    sizes = {record["case"]["global_batch_size"] for record in records} - {None}
    batches = ", ".join(map(str, sorted(sizes)))
    kind = {"real": "the recipe's rows", "full": "full-length mock rows"}[case["rows"]]
    yield (
        f"{kind[0].upper()}{kind[1:]}; {case['steps']} steps measured after at least {case['warmup']}; "
        f"{batches} sequences a step; {case['model'] and case['model']['path']}, "
        f"{case['model'] and case['model']['dtype']}; {case['optim'] and case['optim']['name']}."
    )


def _legend(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    measured = [record for record in records if record["outcome"] == "measured"]
    yield "Rates: real tokens/s of all processes, by the median step. ratio: to full fine-tuning otherwise alike, else"
    yield "to the first row of its length. state: bytes of weights, constants, gradients, masters, optimizer; rank 0."
    on_gpu = measured and measured[0]["ranks"][0]["device"]["allocated_bytes"] is not None
    if on_gpu:
        yield "peak: the allocator's, of all phases; planned: without context, NCCL and fragmentation."
    else:
        yield "peak: tensors on the CPU in one more step, counted by torch's allocator; planned: the same, of a later"
        yield "step, so without what a GPU adds (context, fragmentation)."
    if records[0]["case"]["rows"] == "real":
        yield "The plan is that of full sequences with every token trained: above what real rows need, never below."
    checks = [
        check for record in measured if (check := record.get("loss_check")) and check["reference"] != record["key"]
    ]
    if checks:
        early, whole = (max(check[key] for check in checks) for key in ("early", "all"))
        yield (
            f"Losses: {len(checks)} compared with another case of their method, length and global batch, apart by at "
            f"most {early:.1e} in the first {EARLY} steps and {whole:.1e} in all (allowed: {_allowed(checks)})."
        )
    elif measured:
        yield "Losses: no two cases here have the same method, length and global batch; none was compared."


def _allowed(checks: Sequence[dict[str, Any]]) -> str:
    numbers_by_reason = {
        check["why"]: f"{check['tolerance_early']:g} and {check['tolerance_all']:g}" for check in checks
    }
    return "; ".join(f"{numbers} for {why}" for why, numbers in numbers_by_reason.items())


def _boundary(boundary: dict[str, Any]) -> Iterator[str]:
    yield f"## Boundary of memory: {boundary['axis']}"
    yield ""
    yield f"{boundary['case']}. Limit: {boundary['limit']}."
    yield f"Every try a fresh process, {boundary['steps']} steps or more, full-length rows, two micro-batches a step."
    yield ""
    yield _row((boundary["axis"], "outcome", "tensors planned", "tensors measured", "process itself", "planned in all"))
    yield _row("---" for _ in range(6))
    before = max((attempt["own_bytes"] or 0 for attempt in boundary["tries"]), default=0) or None
    for attempt in boundary["tries"]:
        planned, own_bytes = (
            attempt["planned_bytes"],
            attempt["own_bytes"] or before,
        )  # those that failed began like the others
        total = None if planned is None or own_bytes is None else planned + own_bytes
        sizes = (planned, attempt["peak_bytes"], own_bytes, total)
        yield _row([str(attempt["value"]), attempt["outcome"], *map(compact, sizes)])
    yield ""
    yield f"**{boundary['found']}**"


def _row(cells: Any) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
