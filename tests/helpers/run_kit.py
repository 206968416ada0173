"""Run folders as the main job and the evaluation leave them, made by hand: what tests of readers share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from distft.evaluation.judged import judged_figures
from distft.scores.paired import compare
from distft.scores.spec import MetricInfo, ScoreResult

BEGAN = datetime(2026, 11, 25, 8, 0, 0, tzinfo=UTC)
RECIPE = """name = "{name}"
seed = 42
output_dir = "runs"

[model]
path = "{base}"
dtype = "float32"

[method]
name = "{method}"

[objective]
name = "sft"

[data]
max_length = 128
packing = true
loss_on = "completion"
train = [{{ path = "train.jsonl", format = "prompt_completion" }}]
eval = [{{ path = "valid.jsonl", format = "prompt_completion" }}]

[optim]
name = "adamw"
learning_rate = {rate}

[schedule]
name = "cosine"

[train]
max_steps = {steps}
"""
MANIFEST: dict[str, Any] = {
    "engine": "ddp",
    "world": 2,
    "nodes": 1,
    "devices": [{"host": "n1", "device": "NVIDIA H100 80GB HBM3"}] * 2,
    "device": "NVIDIA H100 80GB HBM3",
    "launcher": "accelerate",
    "layout": {"micro_batch_size": 4, "micros_per_step": 1, "checkpointing": None, "why": ""},
    "seed": 42,
    "parameters": {"total": 1000, "trainable": 100},
    "recipe_sha256": "ab" * 32,
    "recipe": {"source": "r.toml", "overrides": ["train.max_steps=40"]},
    "sources": {"train": [{"path": "train.jsonl", "files": {"train.jsonl": "cd" * 32}}]},
    "model": {"path": "owner/base", "folder": "/cache/base", "files": {"model.safetensors": "ef" * 32}},
    "versions": {"distft": "0.1.0", "torch": "2.13.0", "deepspeed": None},
    "hardware": {"cpu": "A Processor", "memory_gib": 64.0, "gpu_driver": "580.1"},
    "git_commit": "0123456789abcdef",
    "git": {"commit": "0123456789abcdef", "dirty": True, "diff_sha256": "00"},
    "environment": {"OMP_NUM_THREADS": "1"},
    "command": ["python", "-m", "distft.train", "r.toml"],
    "cpus": 8,
    "cwd": "/home/me/project",
}


def at(seconds: float) -> str:
    return (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Made:
    """A run folder that grows file by file."""

    folder: Path

    def write(self, name: str, content: Any) -> Made:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return self

    def lines(self, name: str, records: list[dict[str, Any]]) -> Made:
        return self.write(name, "".join(json.dumps(record) + "\n" for record in records))

    def recipe(self, *, method: str = "lora", base: str = "owner/base", rate: str = "1e-4", steps: int = 40) -> Made:
        text = RECIPE.format(name=self.folder.name, method=method, base=base, rate=rate, steps=steps)
        return self.write("recipe.toml", text).write("manifest.json", MANIFEST | {"num_steps": steps})

    def metrics(self, steps: int = 40, *, slope: float = 0.02) -> Made:
        records: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "eval_loss": 2.5, "eval_tokens": 100.0}]
        for step in range(1, steps + 1):
            records.append(
                {"step": step, "epoch": step / steps, "samples": 8 * step,
                 "tokens": 1000 * step, "tokens_loss": 400 * step,
                 "loss": 2.4 - slope * step, "lr": 1e-4, "grad_norm": 1.5, "step_s": 0.5, "tokens_per_s": 2000.0 + step,
                 "mfu": 0.41, "memory_gib": 20.5}
            )  # fmt: skip
            if step % 20 == 0:
                records.append({"step": step, "eval_loss": 2.45 - slope * step, "eval_tokens": 100.0})
        return self.lines("metrics.jsonl", records)

    def ended(self, code: int = 0, reason: str = "done", step: int = 40, seconds: float = 60.0) -> Made:
        told = {"code": code, "reason": reason, "step": step, "host": "n1", "rank": 0, "time": at(seconds)}
        return self.write("exit.json", told)

    def events(self, records: list[dict[str, Any]] | None = None) -> Made:
        usual = [
            {"time": at(0), "event": "started", "engine": "ddp", "world": 2, "step": 0},
            {"time": at(20), "event": "saved", "step": 20, "bytes": 10, "blocked_s": 0.25, "total_s": 1.0},
            {"time": at(60), "event": "ended", "step": 40, "code": 0, "reason": "done"},
        ]
        return self.lines("events.jsonl", usual if records is None else records)

    def evaluated(
        self,
        before: list[float],
        after: list[float],
        *,
        name: str = "valid",
        hostile: str = "",
        score: str = "exact_match",
    ) -> Made:
        """Right and wrong answers, as the contract between evaluation and report has them."""
        figure = MetricInfo(name=score, binary=True)
        scored = {
            label: ScoreResult(
                figures=(figure,), rows={score: tuple(values)}, totals={score: sum(values) / len(values)}
            )
            for label, values in (("before", before), ("after", after))
        }
        (change,) = compare(scored["before"], scored["after"], resamples=200)
        ids = [f"{name}.jsonl row {row + 1}" for row in range(len(before))]
        for label, values in (("before", before), ("after", after)):
            rows = [
                {"id": row, "prompt": f"question {row}{hostile}", "reference": f"right{hostile}",
                 "answer": f"{label} answer to {row}{hostile}", "scores": {score: value}, "row": {}}
                for row, value in zip(ids, values, strict=True)
            ]  # fmt: skip
            self.lines(f"eval/{label}/{name}.jsonl", rows)
        one = {"name": name, "score": score, "figure": score, "higher_is_better": True, "binary": True,
               "before": change.before.to_json() | {"step": 0}, "after": change.after.to_json() | {"step": 40},
               "best": None, "change": change.to_json(),
               "regressions": [ids[found.index] for found in change.regressions]}  # fmt: skip
        return self.write("eval/summary.json", {"sets": [one], "held_out": {}})

    def judged(
        self,
        before: list[dict[str, Any]],
        after: list[dict[str, Any]],
        *,
        objective: str = "dpo",
        rows_sha256: str = "aa",
        answer_tokens: tuple[int, int] | None = None,
    ) -> Made:
        """Held-out rows that judge answers, of a run with such an objective; measured figures in metrics.jsonl."""
        text = (self.folder / "recipe.toml").read_text()
        self.write("recipe.toml", text.replace('name = "sft"', f'name = "{objective}"'))
        for label, rows in (("before", before), ("after", after)):
            about = {
                "loss": 0.7 if label == "before" else 0.5,
                "rows_sha256": rows_sha256,
                "judged": judged_figures(rows),
            }
            self.write(f"eval/{label}/held_out.json", about)
        for label, tokens in zip(("before", "after"), answer_tokens or (), strict=False):
            self.write(f"eval/{label}/valid.json", {"answer_tokens": tokens, "rows": 6, "rows_sha256": "vv"})
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            share = record["step"] / 40
            figures = {"reward_chosen": share, "reward_rejected": -share, "reward_margin": 2 * share}
            figures |= {"reward_accuracy": 0.5 + share / 2, "logprob_chosen": -3.0, "logprob_rejected": -9.0}
            prefix = "" if "loss" in record else "eval_"
            record |= {f"{prefix}{name}": value for name, value in figures.items()}
        return self.lines("metrics.jsonl", records)

    def care(self, *notes: str) -> Made:
        lengths = {"p10": 10, "p50": 50, "p90": 90, "max": 120}
        split = {
            "num_rows": 80,
            "num_unread": 0,
            "prompt_chars": lengths,
            "answer_chars": lengths,
            "labels": {"yes": 50, "no": 30},
        }
        told = {"splits": {"train": split, "eval": split | {"labels": {}}}, "num_same": 2,
                "num_near": 1, "num_conflicting": 0,
                "near_searched": 80, "repeats": [], "num_shared": {"row": 1, "prompt": 0, "near": 0}, "shared": [],
                "num_found": {"email": 1},
                "found": [{"row": "train.jsonl row 3", "kind": "email", "secret": False, "masked": "a…@b"}],
                "notes": list(notes)}  # fmt: skip
        return self.write("data-card.json", told)

    def rolled_out(self, *, hostile: str = "") -> Made:
        """Two steps' own answers, the later ones better and longer; a fifth of the first without a reward."""
        text = (self.folder / "recipe.toml").read_text()
        self.write("recipe.toml", text.replace('name = "sft"', 'name = "grpo"'))
        for step in (0, 20):
            lines = []
            for number in range(20):
                reward = None if step == 0 and number % 5 == 4 else number / 20 + step / 40
                line = {"id": f"train.jsonl row {number // 4 + 1}", "number": number % 4, "prompt": f"asked {hostile}"}
                line |= {"answer": f"answer {step} {number} {hostile}", "ended": number != 3, "reward": reward}
                line |= {"rewards": {"exact_match": reward, "length": -1.0}, "advantage": 0.0}
                line |= {"unscored": "took longer than 1 s" if reward is None else None}
                lines.append(line | {"ids": [1] * (number + step + 1), "logprobs": [-1.0] * (number + step + 1)})
            self.lines(f"rollouts/step-{step:08d}.jsonl", lines)
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            share = record["step"] / 40
            record |= {"reward_total": share, "reward_exact_match": share + 1, "reward_length": -1.0}
            record |= {"truncated_answers": 0.05, "unscored_answers": 0.2 - share / 5, "equal_answers": share}
            record |= {"writing_s": 0.5, "judging_s": 0.1, "sampler_gap": 1e-6, "sampler_gap_max": 2e-5}
        return self.lines("metrics.jsonl", records)

    def whole(self) -> Made:
        """Nothing is missing."""
        made = self.recipe().metrics().events().ended().care("80 training rows: few")
        return made.write("plan.json", {"per_rank": {"peak_bytes": 22 * 2**30}}).evaluated(
            [1, 1, 0, 0, 0, 1], [1, 0, 1, 1, 1, 1]
        )


def made(folder: Path, name: str = "run") -> Made:
    (folder / name).mkdir(parents=True)
    return Made(folder / name)


class Page(HTMLParser):
    """A page taken apart: elements in order with their attributes, and the text of each."""

    VOID = ("meta", "link", "br", "hr", "img", "line", "path", "circle", "rect")

    INLINE = ("span", "code", "strong", "a", "small", "b")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.unclosed: list[str] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._between(tag)
        text: list[str] = []
        self.elements.append((tag, dict(attrs), text))
        if tag not in self.VOID:
            self._open.append((tag, text))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._open.pop()
        self._between(tag)
        if opened != tag:
            self.unclosed.append(f"{opened} closed by {tag}")

    def _between(self, tag: str) -> None:
        """Cells and paragraphs are apart on the screen, though no space is between them in the file."""
        if tag not in self.INLINE:
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        for _, text in self._open:
            text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def texts(self, tag: str) -> list[str]:
        return [" ".join("".join(text).split()) for name, _, text in self.elements if name == tag]

    @property
    def words(self) -> str:
        return self.texts("body")[0]
