"""What cannot fit is not submitted."""

from pathlib import Path

import pytest
from plan_kit import recipe_text

from distft import submit


@pytest.fixture
def recipe(llama8b: Path, tmp_path: Path) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(llama8b, method='name = "lora"'))
    return str(path)


def asked(recipe: str, gpu: str, *more: str) -> list[str]:
    return [recipe, "--nodes", "1-4", "--gpus-per-node", "1", "--gpu", gpu, "--dry-run", *more]


def test_what_cannot_fit_is_refused_with_what_would(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(asked(recipe, "16")) == 2
    out, err = capsys.readouterr()
    assert not out, "no script"
    assert "does not fit: " in err
    assert "of 16.0 on each of 1 16gib (predicted)" in err
    assert "--set" in err
    assert submit.main(asked(recipe, "16", "--no-plan")) == 0
    assert "#SBATCH" in capsys.readouterr().out


def test_what_fits_says_so_and_is_written(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(asked(recipe, "h100-80gb")) == 0
    out, err = capsys.readouterr()
    assert err.startswith("plan: fits: ")
    assert "#SBATCH --nodes=1-4" in out
    assert submit.main(asked(recipe, "h100-80gbb")) == 2
    assert 'did you mean "h100-80gb"?' in capsys.readouterr().err


def test_a_model_that_is_not_here_is_submitted_unplanned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(Path("some/hub-model")))
    assert submit.main(asked(str(path), "80")) == 0
    assert "not planned: the model's config.json is not on this machine" in capsys.readouterr().err
