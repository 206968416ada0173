"""A case's key is its measurement's name: what would change the figures changes it, and nothing else does."""

from dataclasses import replace
from pathlib import Path

import pytest
from bench_kit import cases, wanted

from distft.bench import provenance
from distft.bench.cases import BenchCase, grid
from distft.bench.meter import MOST_WARMUP
from distft.core.errors import RecipeError


def only(folder: Path, *overrides: str, **asked: object) -> BenchCase:
    (case,) = cases(folder, **{"overrides": overrides} | asked)
    return case


def test_the_grid_is_every_combination_and_solo_is_one_process(tmp_path: Path) -> None:
    found = cases(
        tmp_path, methods=("full", "lora"), engines=("solo", "fsdp2"), micros=(1, 2), lengths=(64, 128), nproc=2
    )
    assert len(found) == len({case.key for case in found}) == 16
    assert [case.max_length for case in found] == [64] * 8 + [128] * 8, "those of one length lie together"
    assert {(case.engine, case.world) for case in found} == {("solo", 1), ("fsdp2", 2)}
    for case in found:
        recipe = case.recipe
        assert (recipe.method.name, recipe.engine.name) == (case.method, case.engine)
        assert (recipe.train.micro_batch_size, recipe.data.max_length) == (case.micro_batch_size, case.max_length)
        assert recipe.train.max_steps == 10 + MOST_WARMUP + 30 + 1, "blocks may be compiled meanwhile"
        assert recipe.train.global_batch_size == 8, "the same rows a step, so the same losses"


CHANGES = {
    "recipe": {"overrides": ("optim.learning_rate=1e-3",)},
    "seed": {"overrides": ("seed=7",)},
    "steps": {"steps": 31},
    "warmup": {"warmup": 11},
    "rows": {"rows": "full"},
    "limit": {"limit_gib": 2.0},
    "processes": {"nproc": 2},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_figures_changes_the_key(tmp_path: Path, change: str) -> None:
    assert only(tmp_path).key == only(tmp_path).key
    assert only(tmp_path, **CHANGES[change]).key != only(tmp_path).key  # type: ignore[arg-type]


def test_a_warm_up_for_the_whole_run_fits_the_few_steps_that_are_measured(tmp_path: Path) -> None:
    case = only(tmp_path, "schedule.warmup_steps=300", "train.max_steps=1000", "train.compile=false")
    assert case.refused == ""
    assert case.recipe.schedule.params.warmup_steps == 20
    assert only(tmp_path, "schedule.warmup_steps=3", "train.max_steps=1000").recipe.schedule.params.warmup_steps == 3


def test_where_results_go_changes_no_key(tmp_path: Path) -> None:
    beside = ('name="other"', 'output_dir="elsewhere"', "checkpoint.keep=7", "log.every_steps=3")
    assert only(tmp_path, *beside).key == only(tmp_path).key


def test_other_versions_code_or_hardware_are_other_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = only(tmp_path)
    keys = {case.key}
    with monkeypatch.context() as patched:
        patched.setattr("distft.bench.cases.versions", lambda: {"torch": "99"})
        keys.add(case.key)
    for name, said in (("code", {"source_sha256": "0"}), ("hardware", {"cpu": "another"})):
        with monkeypatch.context() as patched:
            patched.setattr(provenance, name, lambda said=said: said)
            keys.add(case.key)
    assert len(keys) == 4
    assert case.key in keys


def test_a_refused_combination_is_a_case_that_says_why(tmp_path: Path) -> None:
    fine, refused = cases(tmp_path, micros=(2, 3))
    assert not fine.refused
    assert "does not divide" in refused.refused
    assert not refused.content
    (uneven,) = grid(replace(wanted(tmp_path), nproc=3, engines=("ddp",)))
    assert "do not split evenly over 3 processes" in uneven.refused


def test_a_recipe_that_is_wrong_itself_is_no_case(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown"):
        cases(tmp_path, overrides=("train.micro=1",))


def test_only_gpus_that_processes_see_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_output", lambda command: "NVIDIA H100\nNVIDIA H200\n")
    for visible, seen in (
        (None, ["NVIDIA H100", "NVIDIA H200"]),
        ("1", ["NVIDIA H200"]),
        ("", []),
        ("GPU-4f", ["GPU-4f"]),
    ):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert provenance.gpus() == seen
    monkeypatch.setattr(provenance, "_output", lambda command: "")
    assert provenance.gpus() == []
