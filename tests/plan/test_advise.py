"""What `distft advise` writes is planned: it fits, or what would make it fit is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distft.advise.command import main
from distft.plan.command import main as plan


def advised(capsys: pytest.CaptureFixture[str], model: Path, *flags: str) -> dict:
    assert main(["--model", str(model), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "goal", ["task", pytest.param("domain", marks=pytest.mark.slow)]
)  # the other goals differ from "task" in the approach alone
@pytest.mark.parametrize("rows", ["40", "200000"])
@pytest.mark.parametrize(("gpu", "gpus"), [("24", "1"), ("a100-80gb", "8"), ("0.8", "1")])
def test_the_written_recipe_is_planned(small: Path, tmp_path: Path, capsys, goal, rows, gpu, gpus) -> None:
    machine = ["--gpu", gpu, "--gpus", gpus]
    made = advised(capsys, small, "--goal", goal, "--rows", rows, *machine)
    path = tmp_path / "run.toml"
    path.write_text(made["recipe"])
    assert plan([str(path), *machine, "--json"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    last = made["fits"][-1]
    assert case["method"] == last["method"]
    assert case["fits"] == last["fits"]
    assert case["per_rank"]["peak_bytes"] / 2**30 == pytest.approx(last["peak_gib"])
    assert case["fits"] or last["changes"] or gpu == "0.8"
    assert [one["fits"] for one in made["fits"][:-1]] == [False] * (len(made["fits"]) - 1)


@pytest.mark.slow
def test_a_smaller_card_gets_a_smaller_method(llama8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = ["--goal", "domain", "--rows", "200000"]
    eight = advised(capsys, llama8b, *many, "--gpu", "a100-80gb", "--gpus", "8")
    assert [(one["method"], one["fits"]) for one in eight["fits"]] == [("full", True)]
    one = advised(capsys, llama8b, *many, "--gpu", "16")
    assert [(one["method"], one["fits"]) for one in one["fits"]] == [("full", False), ("lora", False), ("qlora", True)]
    rules = {item["what"]: item["rule"] for item in one["decided"]}
    assert rules["method"] == "four-bits-when-short-of-memory"
    assert rules["optimizer"] == "paged-moments-beside-four-bits"
