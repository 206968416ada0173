"""Two runs held against each other, and what they started from."""

import json
from pathlib import Path

import pytest
import torch
from run_kit import MANIFEST, Made, made
from safetensors.torch import save_file

from distft.catalog import REGISTRIES
from distft.recipe import load_recipe
from distft.reproduce.command import main
from distft.reproduce.inputs import differences
from distft.reproduce.outcome import compare
from distft.run_record import read_run


def run(folder: Path, name: str, *, slope: float = 0.02, nudge: float = 0.0, steps: int = 20) -> Made:
    one = made(folder, name).recipe(steps=steps).metrics(steps, slope=slope).ended(step=steps)
    (one.folder / "final").mkdir()
    weights = torch.arange(12.0).reshape(3, 4)
    weights[1, 2] += nudge
    save_file({"a": weights, "b": torch.ones(2, dtype=torch.bfloat16)}, one.folder / "final/model.safetensors")
    return one


def outcome(first: Made, second: Made, **how):
    return compare(read_run(first.folder), read_run(second.folder), **how)


def test_equal_is_equal_bit_for_bit(tmp_path: Path) -> None:
    found = outcome(run(tmp_path, "one"), run(tmp_path, "two"))
    assert found.equal
    assert found.within
    assert list(found.lines()) == [
        "loss       equal in all 20 values",
        "grad_norm  equal in all 20 values",
        "lr         equal in all 20 values",
        "eval_loss  equal in all 2 values",
        "final/     equal in all 2 tensors",
    ]


def test_the_step_where_they_part_is_named(tmp_path: Path) -> None:
    first, second = run(tmp_path, "one"), run(tmp_path, "two")
    records = [json.loads(line) for line in (second.folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record.get("loss") and record["step"] >= 7:
            record["loss"] *= 1 + 1e-7 * record["step"]
    second.lines("metrics.jsonl", records)
    found = outcome(first, second)
    loss = found.columns[0]
    assert not found.equal
    assert found.within, "a millionth"
    assert (loss.first_step, loss.worst_step, loss.worst) == (7, 20, pytest.approx(2e-6, rel=1e-3))
    assert not outcome(first, run(tmp_path, "three", slope=0.021)).within


def test_a_loss_that_became_nan_is_no_small_difference(tmp_path: Path) -> None:
    first, second = run(tmp_path, "one"), run(tmp_path, "two")
    text = (second.folder / "metrics.jsonl").read_text().replace('"grad_norm": 1.5', '"grad_norm": "nan"', 1)
    second.write("metrics.jsonl", text)
    found = outcome(first, second)
    assert not found.within
    assert outcome(second, second).equal, "the same text is the same value"


def test_tensors_that_differ_are_named(tmp_path: Path) -> None:
    found = outcome(run(tmp_path, "one"), run(tmp_path, "two", nudge=0.5)).tensors
    assert found is not None
    assert (found.num_equal, found.num_tensors, found.worst, found.worst_name) == (1, 2, 0.5, "a")
    assert found.worst_relative == pytest.approx(0.5 / 11)


def test_a_run_that_broke_off_did_not_reproduce(tmp_path: Path) -> None:
    first, short = run(tmp_path, "one"), run(tmp_path, "two", steps=12)
    assert outcome(first, short).missing_steps == 8
    assert not outcome(first, short).within
    part = outcome(first, short, until=12)
    assert part.equal
    assert part.tensors is None


# -- what it started from --------------------------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path: Path) -> Made:
    """A run whose rows and model are really there, and whose manifest knows their hashes."""
    from distft.assemble import input_hashes
    from distft.core import environment

    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    one = made(tmp_path, "one").recipe(base="demo:tiny-llama", method="full").metrics(5).ended()
    text = (one.folder / "recipe.toml").read_text()
    for split in ("train", "valid"):
        text = text.replace(f'"{split}.jsonl"', f'"{tmp_path}/{split}.jsonl"')
    text = text.replace("[data]", f'[data]\ncache_dir = "{tmp_path}/cache"').replace(
        "[model]", '[model]\ninit = "random"'
    )
    one.write("recipe.toml", text)
    recipe = load_recipe(one.folder / "recipe.toml", registries=REGISTRIES)
    told = {
        "sources": input_hashes.rows(recipe),
        "model": input_hashes.weights(recipe),
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "device": "cpu",
        "environment": {},
        "git": None,
    }
    return one.write("manifest.json", MANIFEST | json.loads(json.dumps(told)))


def found(one: Made) -> list[tuple[str, str]]:
    recipe = load_recipe(one.folder / "recipe.toml", registries=REGISTRIES)
    return [(each.kind, each.what) for each in differences(read_run(one.folder).manifest, recipe, "cpu")]


def test_nothing_that_matters_has_changed(real: Made) -> None:
    assert [kind for kind, _ in found(real) if kind != "told"] == []


def test_other_rows_end_it_before_anything_runs(real: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "2 + 2 =", "completion": " 4"}\n')
    assert found(real)[0] == ("data", f"[[data.train]] {tmp_path}/train.jsonl, train.jsonl")
    assert main([str(real.folder)]) == 3
    told = capsys.readouterr().out
    assert "! [[data.train]]" in told
    assert "nothing to reproduce" in told


def test_versions_that_compute_are_told_from_those_that_do_not(real: Made) -> None:
    manifest = json.loads((real.folder / "manifest.json").read_text())
    manifest["versions"] |= {"torch": "1.0", "pyarrow": "1.0"}
    manifest["hardware"]["cpu"] = "Another Processor"
    real.write("manifest.json", manifest)
    kinds = dict((what, kind) for kind, what in found(real))
    assert (kinds["torch"], kinds["pyarrow"], kinds["processor"]) == ("computes", "told", "computes")


def test_other_weights(real: Made, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((real.folder / "manifest.json").read_text())
    manifest["model"]["files"]["config.json"] = "00" * 32
    real.write("manifest.json", manifest)
    assert main([str(real.folder), "--only-check", "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert told["code"] == 4
    assert told["differences"][0]["kind"] == "model"
    assert told["differences"][0]["then"] == "000000000000…"


def test_a_run_of_many_nodes_is_started_by_hand(real: Made, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((real.folder / "manifest.json").read_text())
    real.write("manifest.json", manifest | {"nodes": 4, "world": 32})
    assert main([str(real.folder)]) == 9
    told = capsys.readouterr().err
    assert "ran on 4 nodes" in told
    assert "--against" in told


def test_against_a_run_that_is_there(real: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = (
        made(tmp_path, "again")
        .metrics(5)
        .ended()
        .write("manifest.json", json.loads((real.folder / "manifest.json").read_text()))
    )
    assert main([str(real.folder), "--against", str(again.folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["reproduced"], told["same_layout"]) == ("equal", True, True)
    again.metrics(5, slope=0.0200001)
    assert main([str(real.folder), "--against", str(again.folder)]) == 1, "the same layout has to give the same bits"
    assert "not reproduced: within 1e-5, but" in capsys.readouterr().out
    again.write("manifest.json", json.loads((real.folder / "manifest.json").read_text()) | {"world": 4})
    assert main([str(real.folder), "--against", str(again.folder)]) == 0
    assert "which is what another layout allows" in capsys.readouterr().out


def test_a_number_of_processes_that_cannot_be(real: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(real.folder), "--nproc", "7"]) == 2
    assert "global_batch_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("engine", "expected"),
    [("ddp", 'engine={ name = "ddp" }'), ("zero3", 'engine={ name = "zero3", offload = "none" }')],
)
def test_what_auto_chose_is_pinned(real: Made, engine: str, expected: str) -> None:
    """With those of its settings that the engine has."""
    from distft.reproduce.command import _pinned

    text = (real.folder / "recipe.toml").read_text()
    real.write("recipe.toml", text + '[engine]\nname = "auto"\noffload = "none"\n')
    manifest = json.loads((real.folder / "manifest.json").read_text())
    real.write("manifest.json", manifest | {"engine": engine})
    settings = _pinned(read_run(real.folder), 2)
    assert settings[0] == expected
    load_recipe(real.folder / "recipe.toml", registries=REGISTRIES, overrides=settings)


@pytest.mark.parametrize(("nproc", "kept"), [(1, True), (2, True), (16, True), (32, False)])
def test_the_micro_batch_stays_where_it_can(real: Made, nproc: int, kept: bool) -> None:
    """64 sequences a step, 4 at a time."""
    from distft.reproduce.command import _pinned

    text = (real.folder / "recipe.toml").read_text()
    real.write("recipe.toml", text.replace("[train]", '[train]\nglobal_batch_size = 64\nmicro_batch_size = "auto"'))
    assert ("train.micro_batch_size=4" in _pinned(read_run(real.folder), nproc)) == kept


def test_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 8
    assert "recipe.toml and manifest.json" in capsys.readouterr().err


def test_answers_are_held_against_each_other_row_by_row(tmp_path: Path) -> None:
    runs = [run(tmp_path, name) for name in ("one", "two")]
    rows = [{"id": f"valid row {at}", "answer": "yes", "scores": {"exact_match": 1.0}} for at in range(4)]
    for one in runs:
        for label in ("before", "step-00000010", "after", "somebody"):
            one.lines(f"eval/{label}/set.jsonl", rows)
    assert outcome(*runs).answers.num_answers == 12, "what somebody asked afterwards is not the run's"
    assert outcome(*runs).equal
    rows[2] = rows[2] | {"answer": "no"}
    runs[1].lines("eval/step-00000010/set.jsonl", rows)
    found = outcome(*runs)
    assert not found.equal
    assert list(found.lines())[-1] == "answers    1 of 12 rows differ, first step-00000010/set, valid row 2"
    assert outcome(*runs, until=9).equal
    (runs[1].folder / "eval/after/set.jsonl").unlink()
    assert list(outcome(*runs).lines())[-1] == "answers    not there: after/set"
