"""`distft recipes`: what comes with distft is listed and copied, from a checkout and from a wheel."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from distft import load_recipe, recipes

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("recipes", "launch", "cluster")
FILES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".toml", ".yaml", ".sbatch")
}


def test_everything_is_listed_with_its_first_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {entry["file"] for entry in listed} == set(FILES)
    assert all(entry["summary"] for entry in listed)
    known = {entry["name"]: entry for entry in listed}
    assert known["tiny-lora"] == {
        "name": "tiny-lora",
        "file": "recipes/tiny-lora.toml",
        "summary": "LoRA teaches the model of tiny-full.toml a second answer format (JSON)",
    }
    assert known["cluster/train.sbatch"]["summary"].startswith("A run on a Slurm cluster")
    assert recipes.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {entry['name']} " in text for entry in listed)
    assert max(map(len, text.splitlines())) < 150


@pytest.mark.parametrize("name", ["llama8b-qlora", "launch/1x8-zero3.yaml", "cluster/sites/infiniband.toml"])
def test_a_copy_is_the_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["copy", name, "--to", str(tmp_path / "new")]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    for path in written:
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path / "new")).read_bytes()
    assert written[0].stem == Path(name).stem
    assert {path for path in (tmp_path / "new").rglob("*") if path.is_file()} == set(written)


def test_a_recipe_comes_with_the_launch_file_that_it_names(tmp_path: Path) -> None:
    written = recipes.copy("tiny-full", tmp_path)
    files = ["recipes/tiny-full.toml", "launch/cpu-zero3.yaml", "recipes/schema.json"]
    assert written == [str(tmp_path / file) for file in files]
    assert load_recipe(written[0]).name == "tiny-full"


def test_nothing_is_overwritten_and_equal_files_are_no_obstacle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "launch").mkdir()
    mine = tmp_path / "launch/cpu-zero3.yaml"
    mine.write_text("mine")
    assert recipes.main(["copy", "tiny-full", "--to", str(tmp_path)]) == 8
    assert f"{mine}: exists and differs; nothing was copied" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert not (tmp_path / "recipes").exists()
    mine.unlink()
    assert recipes.main(["copy", "tiny-full", "--to", str(tmp_path)]) == 0
    (tmp_path / "recipes/schema.json").write_text("{}")
    assert recipes.main(["copy", "tiny-full", "--to", str(tmp_path)]) == 0
    assert recipes.main(["copy", "tiny-lora", "--to", str(tmp_path)]) == 0
    assert (tmp_path / "recipes/schema.json").read_text() == "{}", "of another version, or the user's own"
    (tmp_path / "recipes/tiny-lora.toml").unlink()
    (tmp_path / "recipes/tiny-lora.toml").mkdir()
    assert recipes.main(["copy", "tiny-lora", "--to", str(tmp_path)]) == 8
    assert recipes.main(["copy", "tiny-lora", "--to", str(mine)]) == 8
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["copy", "tiny-ful"], "did you mean tiny-full?"),
        (["copy", "launch/1x8-zero4.yaml"], "did you mean launch/1x8-zero"),
        (["copy", "../README.md"], "invalid choice"),
        (["copy"], "copy NAME copies one of the listed files"),
        (["list", "tiny-full"], "list takes no name"),
        (["copyy", "tiny-full"], "did you mean copy?"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        recipes.main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_wheel_has_them_all(tmp_path: Path) -> None:
    pytest.importorskip("wheel")
    source, wheels, installed = tmp_path / "source", tmp_path / "wheels", tmp_path / "installed"
    source.mkdir()
    for folder in ("distft", *FOLDERS):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(wheels), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("distft-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    shipped = installed / "distft/shipped"
    assert {path.relative_to(shipped).as_posix() for path in shipped.rglob("*") if path.is_file()} == {
        path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()
    }

    def run(*words: str) -> str:
        start = "import sys, distft.cli; assert distft.__file__.startswith(sys.argv.pop(1)); distft.cli.main()"
        done = subprocess.run(
            [sys.executable, "-c", start, str(installed), *words],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert {entry["file"] for entry in json.loads(run("recipes", "list", "--json"))} == set(FILES)
    run("recipes", "copy", "tiny-full", "--to", str(tmp_path / "mine"))
    assert load_recipe(tmp_path / "mine/recipes/tiny-full.toml") == load_recipe(ROOT / "recipes/tiny-full.toml")
