"""Demo names become files: complete, the same for everybody, cheap the second time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distft.catalog import REGISTRIES
from distft.core.errors import FileSystemError, RecipeError
from distft.demo import tokenizer
from distft.demo.files import MODEL_CONFIG, locate_path
from distft.demo.incidents import SIZES
from distft.recipe import Recipe, parse_recipe

ROOT = Path(__file__).parents[3]
NAMES = ("demo:tiny-llama", *(f"demo:{name}" for name in SIZES))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one; other tests share the one of conftest.py."""
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_other_paths_are_left_alone(cache: Path) -> None:
    assert locate_path("data/train.jsonl") == "data/train.jsonl"
    assert not cache.exists()


def test_every_name_is_a_file_with_its_rows(cache: Path) -> None:
    for name, (_, size) in SIZES.items():
        path = Path(locate_path(f"demo:{name}"))
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert path.is_relative_to(cache)
        assert len(rows) == size
        assert {tuple(row) for row in rows} == {("prompt", "completion")}
    model = Path(locate_path("demo:tiny-llama"))
    assert {file.name for file in model.iterdir()} == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_the_model_knows_its_tokenizer() -> None:
    assert MODEL_CONFIG["vocab_size"] == tokenizer.VOCAB_SIZE
    assert (MODEL_CONFIG["pad_token_id"], MODEL_CONFIG["eos_token_id"]) == (tokenizer.PAD_ID, tokenizer.EOS_ID)


def test_the_model_can_be_evaluated_in_4_bits_on_a_cpu() -> None:
    assert MODEL_CONFIG["hidden_size"] % 64 == MODEL_CONFIG["intermediate_size"] % 64 == 0


def test_the_cache_follows_the_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Path(locate_path("demo:tiny-llama")).is_relative_to(tmp_path / "xdg" / "distft")


def _recipe(text: str) -> Recipe:
    return parse_recipe(text, source="mine.toml", registries=REGISTRIES)


def test_a_recipe_has_real_paths_and_writes_the_names() -> None:
    text = (
        'name = "x"\n[model]\npath = "demo:tiny-llama"\ninit = "random"\n'
        '[[data.train]]\npath = "demo:incidents/train"\n[[data.train]]\npath = "own.jsonl"\n'
        '[[data.eval]]\npath = "demo:incidents/valid"\n'
    )
    recipe = _recipe(text)
    assert recipe.model.path == locate_path("demo:tiny-llama")
    assert recipe.model.tokenizer is None
    assert [source.path for source in recipe.data.train] == [locate_path("demo:incidents/train"), "own.jsonl"]
    assert [source.path for source in recipe.data.eval] == [locate_path("demo:incidents/valid")]
    assert recipe.model.init == "random"
    assert recipe.written(recipe.model.path) == "demo:tiny-llama"
    written = recipe.resolved()
    assert written["model"]["path"] == "demo:tiny-llama"
    assert [source["path"] for source in written["data"]["train"]] == ["demo:incidents/train", "own.jsonl"]
    assert _recipe(recipe.to_toml()) == recipe
    elsewhere = recipe.with_value(("data", "date"), "2024-01-31")
    assert elsewhere.data.date == "2024-01-31"
    assert elsewhere.digest() == recipe.digest(), "the day of a run is not a setting"
    other = replace(recipe, model=recipe.model.model_copy(update={"path": "mine"}))
    assert other.resolved()["model"]["path"] == "mine", "a value that was changed since is written as it is"


def test_a_recipe_is_told_all_its_unknown_names_with_their_lines() -> None:
    with pytest.raises(RecipeError, match=r"mine.toml: 2 problems") as caught:
        _recipe('name = "x"\n[model]\npath = "demo:huge"\n[[data.train]]\npath = "demo:accidents"\n')
    assert [problem.line for problem in caught.value.problems] == [3, 5]


def test_an_unknown_name_is_a_mistake_in_the_recipe() -> None:
    with pytest.raises(RecipeError) as caught:
        locate_path("demo:incident/train")
    assert 'did you mean "demo:incidents/train"?' in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(FileSystemError, match="DISTFT_CACHE"):
        locate_path("demo:tiny-llama")


@pytest.mark.slow
def test_processes_that_start_together_agree(cache: Path) -> None:
    code = "import sys; from distft.demo.files import locate_path; print(locate_path('demo:tiny-llama'))"
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    told = {process.communicate(timeout=60)[0].strip() for process in started}
    assert all(process.returncode == 0 for process in started)
    assert told == {locate_path("demo:tiny-llama")}
    assert len(list(cache.iterdir())) == 1, "nothing half-written is left"


def test_nothing_heavy_is_imported_once_the_files_exist() -> None:
    locate_path("demo:tiny-llama")
    code = (
        "import sys; from distft.demo.files import locate_path; locate_path('demo:tiny-llama');"
        "print(*sorted({'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
