"""Several runs on one page, and as JSON."""

import json
from pathlib import Path

import pytest
from run_kit import Page, made

from distft.compare import main


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    one = made(tmp_path / "a", "small").whole()
    two = made(tmp_path / "b", "large").recipe(method="full", rate="3e-5").metrics(40, slope=0.03).events().ended()
    two.evaluated([1, 1, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1])
    three = made(tmp_path / "c", "new").recipe(method="qlora")  # not begun
    return [one.folder, two.folder, three.folder]


def test_the_page(runs: list[Path], tmp_path: Path) -> None:
    assert main([*map(str, runs), "--out", str(tmp_path / "c.html"), "--price", "3"]) == 0
    told = Page((tmp_path / "c.html").read_text())
    assert not told.unclosed
    assert told.texts("h1") == ["small · large · new"]
    assert "lowest held-out loss: large" in told.words.lower() or "best exact_match on valid" in told.words.lower()
    assert "100.0 % [61.0, 100.0]" in told.words
    assert "83.3 %" in told.words
    table = dict(zip(told.texts("th"), told.texts("th"), strict=True))
    assert "optim.learning_rate" in table
    assert "method.name" in table
    assert "data.max_length" not in table, "the same everywhere"
    assert len(told.all("caption")) == len(told.all("table"))
    assert all(one.get("aria-label") for one in told.all("div") if one.get("role") == "img")


def test_a_folder_of_runs_is_its_runs(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs[0].parent), str(runs[1]), "--json", "--price", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["run"] for one in told["runs"]] == ["small", "large"]
    small, large = told["runs"]
    assert small["quality"] == {"valid, exact_match": pytest.approx(5 / 6)}
    assert small["cost"] == pytest.approx(2 * 60 / 3600 * 3)
    assert (small["peak_memory_gib"], large["held_out_loss"]) == (20.5, pytest.approx(2.45 - 1.2))
    assert told["settings_that_differ"]["optim.learning_rate"] == {str(runs[0]): "0.0001", str(runs[1]): "3e-05"}
    assert "name" not in told["settings_that_differ"]


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [made(tmp_path / parent, "run").whole().folder for parent in ("monday", "tuesday")]
    assert main([*map(str, folders), "--out", str(tmp_path / "c.html")]) == 0
    assert Page((tmp_path / "c.html").read_text()).texts("h1") == ["monday/run · tuesday/run"]


def test_rows_of_one_name_that_are_others_do_not_compare(runs: list[Path], tmp_path: Path) -> None:
    def told(*hashes: str) -> Page:
        for run, digest in zip(runs, hashes, strict=False):
            (run / "eval/after/valid.json").write_text(json.dumps({"rows_sha256": digest}))
        assert main([*map(str, runs[:2]), "--out", str(tmp_path / "c.html")]) == 0
        return Page((tmp_path / "c.html").read_text())

    same, other = told("aa", "aa").words, told("aa", "bb").words
    assert "Best exact_match on valid: large" in same
    assert "does not compare" not in same
    assert "valid are not the same rows in all of these runs" in other
    assert "Lowest held-out loss: large" in other, "what does compare"


def test_losses_on_other_rows_do_not_compare(runs: list[Path], tmp_path: Path) -> None:
    for run, digest in zip(runs, ("aa", "bb"), strict=False):
        (run / "eval/summary.json").unlink()
        manifest = json.loads((run / "manifest.json").read_text())
        (run / "manifest.json").write_text(json.dumps(manifest | {"data": {"eval": digest}}))
    assert main([*map(str, runs[:2]), "--out", str(tmp_path / "c.html")]) == 0
    told = Page((tmp_path / "c.html").read_text()).words
    assert "evaluated on different rows: their held-out losses do not compare" in told
    assert "owest held-out loss" not in told
    assert "nothing to draw" in told


def answers(right: int) -> list[dict[str, float]]:
    return [
        {"ahead": 1.0 if n < right else -1.0, "desirable": float(n % 2), "reward": 0.5, "logprob": -2.0, "tokens": 4.0}
        for n in range(20)
    ]


def pairs(right: int, logprob: float = -4.0) -> list[dict[str, float]]:
    return [
        {"reward_chosen": 1.0 if n < right else -1.0, "reward_rejected": 0.0, "tokens_chosen": 4.0,
         "tokens_rejected": 4.0, "logprob_chosen": logprob, "logprob_rejected": -9.0}
        for n in range(20)
    ]  # fmt: skip


def test_runs_of_different_objectives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracies compare where the pairs do; losses and scales of different objectives never."""
    made(tmp_path, "dpo").recipe().metrics().judged(pairs(10), pairs(17, -6.0))
    made(tmp_path, "simpo").recipe().metrics().judged(pairs(12), pairs(14), objective="simpo")
    made(tmp_path, "kto").recipe().metrics().judged(answers(10), answers(19), objective="kto", rows_sha256="bb")
    made(tmp_path, "sft").recipe().metrics()

    def told(*runs: str) -> Page:
        assert main([*(str(tmp_path / run) for run in runs), "--out", str(tmp_path / "c.html")]) == 0
        return Page((tmp_path / "c.html").read_text())

    two = told("dpo", "simpo")
    assert "Best held-out accuracy: dpo" in two.words
    assert "have different objectives: their held-out losses do not compare" in two.words
    assert "lowest held-out loss" not in two.words.lower()
    assert "dpo dpo pairs 50.0 % [29.9, 70.1] 85.0 % [64.0, 94.8]" in two.words
    charts = [str(one["aria-label"]) for one in two.all("div") if one.get("role") == "img"]
    assert {"Training loss of dpo", "Training loss of simpo", "Held-out loss of dpo"} <= {
        label.partition(":")[0] for label in charts
    }
    assert any(label.startswith("Memory: dpo: 20.50, 0.850; simpo: 20.50, 0.700") for label in charts)
    assert "not measured on the same pairs" not in two.words

    text = (tmp_path / "dpo/recipe.toml").read_text()
    for beta in ("0.1", "0.5"):
        made(tmp_path, f"dpo-{beta}").recipe().metrics().judged(pairs(10), pairs(15))
        table = f'name = "dpo"\nbeta = {beta}\nloss = "sigmoid"'
        (tmp_path / f"dpo-{beta}/recipe.toml").write_text(text.replace('name = "dpo"\n\n[data]', f"{table}\n\n[data]"))
    betas = told("dpo-0.1", "dpo-0.5")
    assert "Training loss of dpo (beta 0.1) by step" in betas.texts("h3")
    assert "their held-out losses do not compare" in betas.words, "a loss is on the scale of its beta"

    every = told("dpo", "simpo", "kto", "sft")
    assert "not measured on the same pairs or labelled answers: these do not compare" in every.words
    assert "best held-out accuracy" not in every.words.lower()
    assert "sft sft – – – – – – –" in every.words
    assert "kto kto labelled answers" in every.words
    assert not every.unclosed

    assert main([str(tmp_path / "dpo"), str(tmp_path / "kto"), str(tmp_path / "sft"), "--json"]) == 0
    dpo, kto, sft = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert [one["objective"] for one in (dpo, kto, sft)] == ["dpo", "kto", "sft"]
    assert dpo["judged"] == {
        "accuracy": 0.85, "margin": pytest.approx(0.7), "calibration_error": pytest.approx(0.119, abs=1e-3),
        "logprob_per_token": -1.5,
    }  # fmt: skip
    assert (kto["judged"]["accuracy"], kto["judged"]["logprob_per_token"]) == (0.95, -0.5)
    assert sft["judged"] == {}


def test_lengths_of_answers_stand_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = made(tmp_path, "dpo").whole().judged(pairs(10), pairs(17), answer_tokens=(60, 90))
    assert main([str(one.folder), str(made(tmp_path, "sft").whole().folder), "--out", str(tmp_path / "c.html")]) == 0
    told = Page((tmp_path / "c.html").read_text())
    assert "Length of generated answers, mean tokens before and after run valid ● dpo 10.00 → 15.00" in told.words
    assert main([str(one.folder), "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert line["answer_tokens"] == {"valid": 15.0}


def test_supervised_runs_have_no_preferences(runs: list[Path], tmp_path: Path) -> None:
    assert main([*map(str, runs), "--out", str(tmp_path / "c.html")]) == 0
    told = Page((tmp_path / "c.html").read_text())
    assert "Preferences" not in told.words
    assert "objective" not in told.texts("th")


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 8
    assert "no run folder" in capsys.readouterr().err
