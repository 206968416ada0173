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


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 8
    assert "no run folder" in capsys.readouterr().err
