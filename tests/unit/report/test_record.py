"""Reading a run folder: whatever is there, in any state of repair."""

import json
from pathlib import Path

import pytest
from run_kit import BEGAN, at, made

from distft.run_record import number, read_run


def test_a_whole_run(tmp_path: Path) -> None:
    run = read_run(made(tmp_path).whole().folder)
    assert (run.name, run.method, run.engine, run.world, run.base) == ("run", "lora", "ddp", 2, "owner/base")
    assert run.exit["code"] == 0
    assert run.is_adapter
    assert len(run.steps) == 40
    assert run.held_out_losses == (2.5, pytest.approx(1.65))
    assert run.losses == (pytest.approx(2.35), pytest.approx(1.63)), "means of the first and last four steps"
    assert run.peak_gib == 20.5
    assert run.planned_gib == 22.0
    assert run.wall_s == 60.0
    assert run.gpu_hours == pytest.approx(2 * 60 / 3600)
    assert run.training_s == 20.0
    (one,) = run.results
    assert (one.name, one.title, one.verdict) == ("valid", "exact_match", "no clear change")
    assert run.answers("after", "valid")["valid.jsonl row 2"]["scores"] == {"exact_match": 0}


def test_an_empty_folder_is_a_run_of_which_nothing_is_known(tmp_path: Path) -> None:
    run = read_run(made(tmp_path).folder)
    assert run.name == "run"
    assert (run.steps, run.results, run.spans, run.care) == ((), (), (), None)
    assert (run.losses, run.held_out_losses, run.wall_s, run.gpu_hours, run.peak_gib) == (
        None,
        (None, None),
        None,
        None,
        None,
    )


def test_torn_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    folder = made(tmp_path).recipe().metrics(3)
    with (folder.folder / "metrics.jsonl").open("a") as file:
        file.write('[1, 2]\n{"step": "x", "loss": 1}\n{"step": 4, "lo')
    folder.write("manifest.json", "{torn").write("eval/summary.json", "[]")
    run = read_run(folder.folder)
    assert [record["step"] for record in run.steps] == [1, 2, 3]
    assert (run.manifest, run.results) == ({}, ())


def test_numbers_that_are_none(tmp_path: Path) -> None:
    folder = made(tmp_path).lines("metrics.jsonl", [{"step": 1, "loss": "nan"}, {"step": 2, "loss": 1.5, "mfu": None}])
    run = read_run(folder.folder)
    assert run.column("loss") == [(2, 1.5)]
    assert run.column("mfu") == []
    assert [number(value) for value in (1, 2.5, True, None, "inf", float("inf"))] == [1.0, 2.5, None, None, None, None]


def test_starts_ends_and_what_died_in_between(tmp_path: Path) -> None:
    events = [
        {"time": at(0), "event": "started", "engine": "zero3", "world": 8, "step": 0},
        {"time": at(50), "event": "saved", "step": 5},  # and then the node was lost
        {"time": at(900), "event": "continued", "checkpoint": "step-5"},
        {"time": at(910), "event": "started", "engine": "fsdp2", "world": 4, "step": 5},
    ]
    folder = made(tmp_path).events(events).ended(code=6, reason="hang: rank 2 is silent", seconds=1000)
    first, second = read_run(folder.folder).spans
    assert (first.began, first.code, first.world) == (BEGAN.timestamp(), None, 8)
    assert second.step == 5
    assert (second.code, second.reason, second.ended) == (6, "hang: rank 2 is silent", BEGAN.timestamp() + 1000)
    assert read_run(folder.folder).gpu_hours == pytest.approx((900 * 8 + 90 * 4) / 3600)


def test_the_recipes_own_rows_come_first(tmp_path: Path) -> None:
    """Summaries are in the order of names, and spot checks are called anything."""
    folder = made(tmp_path).recipe().evaluated([1, 0], [1, 1], name="tickets")
    (one,) = json.loads((folder.folder / "eval/summary.json").read_text())["sets"]
    many = [one | {"name": name} for name in ("general", "mail", "refusals", "tickets")]
    folder.write("eval/summary.json", {"sets": many})
    text = (folder.folder / "recipe.toml").read_text()
    folder.write("recipe.toml", text + '[[eval.answers]]\nname = "tickets"\n[[eval.answers]]\nname = "mail"\n')
    names = [result.name for result in read_run(folder.folder).results]
    assert names == ["tickets", "mail", "general", "refusals"]


def test_a_run_that_goes_on_is_as_old_as_its_steps(tmp_path: Path) -> None:
    events = [{"time": at(0), "event": "started", "engine": "ddp", "world": 2, "step": 0}]
    assert read_run(made(tmp_path).metrics(30).events(events).folder).wall_s == 15.0


def test_the_manifest_of_a_real_run_reads_back(tmp_path: Path) -> None:
    """Written by the folder itself, with a secret in the environment and a login in a proxy's address."""
    from distft.run_folder import RunFolder

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_secret")
        patch.setenv("NCCL_DEBUG", "WARN")
        patch.setenv("HF_ENDPOINT", "https://me:hunter2@hub.local")
        patch.setenv("ACCELERATE_API_KEY", "k")
        patch.setenv("HOME_ADDRESS", "not ours")
        folder = RunFolder(tmp_path / "run", writes=True)
        folder.start('name = "run"\n', {"engine": "solo", "world": 1})
        folder.learn({"model": {"files": {"a": "b"}}})
    text = (tmp_path / "run/manifest.json").read_text()
    assert "hf_secret" not in text
    assert "hunter2" not in text
    said = json.loads(text)
    told = said["environment"]
    assert told["NCCL_DEBUG"] == "WARN"
    assert told["HF_ENDPOINT"] == "https://…@hub.local"
    assert not {"HF_TOKEN", "ACCELERATE_API_KEY", "HOME_ADDRESS"} & set(told)
    assert said["model"] == {"files": {"a": "b"}}
    assert said["hardware"]["cpu"]
    assert said["engine"] == "solo"
