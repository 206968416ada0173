"""`make gpu-first` on a CPU: killed in the middle, continued, and all that it says afterwards."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import Launch, run, until

pytestmark = pytest.mark.dist

PHASES = ["doctor", "rates", "suite", "parity", "memory", "goals", "paging", "resume", "oom", "ranks"]
KILLED_IN = "memory"


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.first_hour", "--out", str(out), "--minutes", "120", *more]


def records(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(out.glob("[0-9][0-9]-*.json"))]
    return {record["phase"]: record for record in found}


def measured(record: dict[str, Any]) -> dict[str, Any]:
    return {name: step["measured"] for name, step in record["steps"].items()}


def killed_and_continued(
    out: Path, phases: list[str], killed_in: str, *, shown: str, only: bool
) -> dict[str, dict[str, Any]]:
    """Return the records of a run that was killed once; what was done before the kill is not done again."""
    chosen = [word for name in phases for word in ("--only", name)] if only else []
    with Launch(command(out, *chosen)) as first:
        until(lambda: records(out).get(killed_in, {}).get("key" if only else "steps"), 300, first.stderr)
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
        until(lambda: not first.alive(), 30, first.stderr)  # whatever it had started has ended with it
    before = records(out)
    assert list(before) == phases[: phases.index(killed_in) + 1]
    assert before[killed_in]["outcome"] == "begun"
    assert f"{shown}: done" in (out / "page.md").read_text(), "as it goes"

    done = run(command(out, *chosen), timeout_s=900)
    assert done.returncode == 0, done.stderr[-4000:]
    after = records(out)
    assert list(after) == phases
    for name, record in after.items():
        assert (record["outcome"], record["wrong"]) == ("done", []), (name, record)
        assert record["versions"]["torch"]
        assert all(record[key] for key in ("date", "commit", "device", "command", "key", "wall_s")), name
        for step, was in before.get(name, {"steps": {}})["steps"].items():
            assert record["steps"][step] == was, f"{name}, {step}: done before, so not done again"
    return after


@pytest.mark.slow
def test_some_phases(tmp_path: Path) -> None:
    after = killed_and_continued(
        tmp_path, ["rates", "parity", "oom"], "parity", shown="Rates of single kernels", only=True
    )
    check_rates(after)
    check_parity(after)
    check_oom(after)
    again = run(command(tmp_path, "--only", "rates"))
    assert again.returncode == 0, again.stderr
    assert records(tmp_path)["rates"]["steps"] == after["rates"]["steps"], "nothing is left to do"
    assert records(tmp_path)["oom"] == after["oom"], "others are left as they are"


@pytest.mark.slow
def test_every_phase(tmp_path: Path) -> None:
    """Everything that is asserted here is of this one run, whose time is never short."""
    after = killed_and_continued(
        tmp_path, PHASES, KILLED_IN, shown="The device in bf16 against the CPU in fp32", only=False
    )
    check_figures(after)
    check_page(tmp_path)
    refused_for_a_plan(tmp_path)
    one_phase_again_is_nothing_to_do(tmp_path, after)


def check_rates(after: dict[str, dict[str, Any]]) -> None:
    rates = measured(after["rates"])["kernels"]
    assert all(
        rates[name] > 0 for name in ("matmul_flops_per_s", "attention_flops_per_s", "copy_bytes_per_s", "launch_s")
    )


def check_parity(after: dict[str, dict[str, Any]]) -> None:
    apart, bounds = (measured(after["parity"])["compared"][key] for key in ("apart", "bounds"))
    assert all(0 < apart[name] <= bound for name, bound in bounds.items()), "bf16 rounds, and no more than that"


def check_oom(after: dict[str, dict[str, Any]]) -> None:
    oom = measured(after["oom"])["planted"]
    assert (oom["code"], oom["recognised"], oom["advice"]) == (9, True, True)


def check_figures(after: dict[str, dict[str, Any]]) -> None:
    check_rates(after)
    check_parity(after)
    check_oom(after)
    suite = measured(after["suite"])
    assert set(suite["optimizers"]["optimizers"].values()) == {""}
    assert {one["outcome"] for one in suite["tests/gpu"]["tests"].values()} <= {"passed", "skipped"}
    cases = measured(after["memory"])
    assert {case["ran"]["activation_checkpointing"] for case in cases.values()} == {"off", "selective", "full"}
    assert all(abs(case["planned_peak_bytes"] / case["peak_bytes"] - 1) < 0.1 for case in cases.values())
    assert any("compile on" in name for name in cases)
    goals = after["goals"]["steps"]
    assert {step["outcome"] for step in goals.values()} == {"measured", "not here"}
    shares = goals["llama8b-lora: as it is"]["measured"]["profile"]["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert shares["products"] > 0
    paging = measured(after["paging"])["filled"]
    assert not paging["paged"], "there is nothing to page from"
    assert paging["equal"]
    resumed = measured(after["resume"])["killed and continued"]
    assert resumed["losses_equal"]
    assert resumed["weights_equal"]
    assert resumed["saved"] == ["step-00000003"]
    ranks = measured(after["ranks"])
    assert {row["engine"] for row in ranks["engines"]["rows"]} >= {"ddp", "fsdp2"}
    assert all(row["sent_bytes"] > 0 for row in ranks["engines"]["rows"])
    for kind in ("kill", "stop"):
        lost = ranks[f"one rank: {kind}"]
        assert lost["code"] == 6
        assert lost["named"], lost["reason"]
        assert 0 <= lost["seconds"] <= lost["within_s"]


def check_page(out: Path) -> None:
    text, html = (out / "page.md").read_text(), (out / "page.html").read_text()
    assert "no GPU: toy size" in text
    assert "What is wrong" not in text
    for title in ("Memory, planned and measured: done", "Resume bit for bit: done", "Several ranks: done"):
        assert title in text
        assert title in html
    assert "<script" not in html


def refused_for_a_plan(out: Path) -> None:
    """Its form is the one that `distft plan` reads, and a CPU is no GPU of the catalogue."""
    kept = out / "kept.json"
    words = ["--calibrate", str(out / "calibration.json"), "--calibration", str(kept)]
    said = run([sys.executable, "-m", "distft.plan", *words])
    assert said.returncode == 2
    assert said.stderr.count("\n") == 2, said.stderr
    assert '"cpu" is not in the catalogue' in said.stderr
    assert not kept.exists()


def one_phase_again_is_nothing_to_do(out: Path, after: dict[str, dict[str, Any]]) -> None:
    again = run(command(out, "--only", "ranks"))
    assert again.returncode == 0, again.stderr
    assert "5 steps, 5 kept" in again.stderr
    assert records(out)["ranks"]["steps"] == after["ranks"]["steps"]
    assert records(out)["memory"] == after["memory"], "others are left as they are"
