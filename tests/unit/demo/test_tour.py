"""The tour reports what was measured, and fails when a stage does. Jobs and answers are stand-ins here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distft.core.supervise import CommandExit
from distft.demo import generate, tour
from distft.demo.files import locate_path
from distft.demo.incidents import Style

TAUGHT: dict[str, Style] = {"tiny-full": "lines", "tiny-lora": "json", "tiny-qlora": "json"}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a checkout, made the current one."""
    for name in ("recipes/tiny-full.toml", "launch/cpu-zero3.yaml"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _pretend(monkeypatch: pytest.MonkeyPatch, *, learns: bool = True) -> list[str]:
    """Jobs succeed, and their models answer in the format they were taught. Returns the jobs, as they come."""
    jobs: list[str] = []

    def run(command: list[str], **_: Any) -> CommandExit:
        jobs.append(" ".join(command[3:]))
        return CommandExit(code=0)

    def answers(model: Path, prompts: Sequence[str]) -> list[str]:
        taught = TAUGHT.get(model.parent.name) if learns else None
        if taught is None:
            return ["\x1b[31m[bold]"] * len(prompts)
        known = {
            row["prompt"]: row["completion"]
            for row in map(json.loads, Path(locate_path(tour.HELD_OUT[taught])).read_text().splitlines())
        }
        return [known.get(prompt, "something else") for prompt in prompts]

    monkeypatch.setattr(tour.supervise, "run", run)
    monkeypatch.setattr(generate, "answers", answers)
    return jobs


def test_three_launches_and_a_table(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = _pretend(monkeypatch)
    assert tour.main([]) == 0
    assert jobs == [
        "--config_file launch/cpu-zero3.yaml -m distft.train recipes/tiny-full.toml --output-dir runs/try-1",
        *(
            f"--config_file launch/cpu-ddp.yaml -m distft.train recipes/tiny-{method}.toml --output-dir runs/try-1 "
            "--set model.path=runs/try-1/tiny-full/final"
            for method in ("lora", "qlora")
        ),
    ]
    printed = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line[:1] == "│"]
    assert [row[:4] for row in table] == [
        ["random weights", "lines", "0.000", "0.000"],
        ["full fine-tuning", "lines", "1.000", "1.000"],
        ["before LoRA and QLoRA", "json", "0.000", "0.000"],
        ["LoRA", "json", "1.000", "1.000"],
        ["QLoRA", "json", "1.000", "1.000"],
    ]
    assert "$ accelerate launch --config_file launch/cpu-zero3.yaml -m distft.train" in printed
    assert "\x1b[31m" not in printed


def test_a_second_tour_gets_its_own_folder(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = _pretend(monkeypatch)
    assert tour.main(["--quick"]) == tour.main(["--quick"]) == 0
    assert len(jobs) == 2
    assert {path.name for path in (checkout / "runs").iterdir()} == {"try-1", "try-2"}


def test_a_stage_that_stops_is_named_with_its_reason(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pretend(monkeypatch)
    run = checkout / "runs" / "try-1" / "tiny-full"

    def stopped(command: list[str], **_: Any) -> CommandExit:
        run.mkdir()
        (run / "exit.json").write_text('{"code": 5, "reason": "loss is not finite at step 7"}')
        return CommandExit(code=1)

    monkeypatch.setattr(tour.supervise, "run", stopped)
    assert tour.main([]) == 1
    assert "tiny-full stopped with code 5: loss is not finite at step 7" in capsys.readouterr().out


def test_a_model_that_learned_too_little_fails_the_tour(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pretend(monkeypatch, learns=False)
    assert tour.main(["--quick"]) == 1
    assert "format conformance 0.000 (at least 0.95)" in capsys.readouterr().out


def test_outside_a_checkout_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tour.main([]) == 9
    assert "root of a distft checkout" in capsys.readouterr().out


def test_a_stopped_tour_is_no_failure_of_its_stage(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pretend(monkeypatch)
    monkeypatch.setattr(tour.supervise, "run", lambda command, **_: CommandExit(code=75, signals=[15]))
    assert tour.main([]) == 75
    assert "stopped by SIGTERM in tiny-full" in capsys.readouterr().out
