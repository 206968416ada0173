"""What a recipe without mistakes becomes, how overrides change it, and that nothing but RecipeError ever comes out."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distft.core.errors import Problem, RecipeError
from distft.recipe import ModelTable, Recipe, Registries, load_recipe, parse_recipe

Parse = Callable[..., Recipe]

FULL = """\
name = "run"
seed = 7
[model]
path = "base"
revision = "main"
[method]
name = "qlora"
r = 8
target_modules = ["q_proj", "v_proj"]
quant = { type = "fp4" }
[data]
max_length = 512
[[data.train]]
path = "train.jsonl"
[[data.train]]
path = "general"
share = 0.1
columns = { "their text" = "text", 'a"b' = "c" }
[[data.eval]]
path = "valid.jsonl"
[optim]
learning_rate = 2e-4
betas = [0.9, 0.95]
[train]
max_steps = 10
max_grad_norm = "off"
[log]
wandb = "a \\"project\\" \\\\ \\n \\u007f ä"
"""


def test_defaults_are_filled_in(parse: Parse) -> None:
    recipe = parse()
    assert (recipe.name, recipe.seed, recipe.run_dir) == ("run", 42, Path("runs/run"))
    parts = [getattr(recipe, table).name for table in ("method", "objective", "optim", "schedule", "engine")]
    assert parts == ["full", "sft", "adamw", "cosine", "auto"]
    assert (recipe.train.epochs, recipe.train.max_steps, recipe.train.global_batch_size) == (1.0, None, 64)
    assert (recipe.data.train[0].weight, recipe.data.train[0].share) == (1.0, None)
    assert recipe.data.loss_on == "assistant"
    assert recipe.optim.params.model_dump()["betas"] == (0.9, 0.999)


def test_max_steps_replaces_the_epoch_and_share_the_weight(parse: Parse) -> None:
    recipe = parse(FULL)
    assert (recipe.train.epochs, recipe.train.max_steps) == (None, 10)
    assert [(source.weight, source.share) for source in recipe.data.train] == [(1.0, None), (None, 0.1)]


def test_plain_text_is_trained_whole(parse: Parse, minimal: str) -> None:
    recipe = parse(minimal + 'format = "text"\n')
    assert recipe.data.loss_on == "all"
    assert parse(recipe.to_toml()) == recipe


def test_integers_are_numbers(parse: Parse, minimal: str) -> None:
    recipe = parse(minimal + "[train]\nepochs = 2\n[optim]\nlearning_rate = 1\n")
    assert isinstance(recipe.train.epochs, float)


def test_lines(parse: Parse, minimal: str) -> None:
    recipe = parse(FULL, "train.max_steps=20")
    assert recipe.line_of("method.quant.type") == 10
    assert recipe.line_of("data.train.1.share") == 17
    assert recipe.line_of("train.max_steps") is None
    assert recipe.line_of("train.compile") is None
    assert recipe.method.line == 7
    assert parse(minimal + "[optim]\nlearning_rate = 1e-4\n").optim.line == 6
    assert parse(minimal).optim.line is None


@pytest.mark.parametrize("overrides", [(), ("data.eval=[]",), ("method={name='full'}", "engine.name=zero3")])
def test_printed_recipe_is_equal_and_prints_the_same(parse: Parse, overrides: tuple[str, ...]) -> None:
    recipe = parse(FULL, *overrides)
    again = parse(recipe.to_toml())
    assert again == recipe
    assert again.to_toml() == recipe.to_toml()
    assert again.digest() == recipe.digest()


def test_equal_means_equal_content(parse: Parse, minimal: str) -> None:
    assert parse(minimal) == parse("# elsewhere\n" + minimal + "[train]\nepochs = 1\n")
    assert parse(minimal).digest() != parse(minimal, "seed=1").digest()
    assert parse(minimal) != parse(minimal, "seed=1")


def test_recipes_are_frozen_and_travel(parse: Parse) -> None:
    recipe = parse(FULL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        recipe.model.path = "other"
    assert dataclasses.replace(recipe, model=ModelTable(path="here")).model.path == "here"
    assert pickle.loads(pickle.dumps(recipe.data)) == recipe.data


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=3", "seed", 3),
        (" seed = 3 ", "seed", 3),
        ("output_dir=some/where", "output_dir", "some/where"),
        ('output_dir="3"', "output_dir", "3"),
        ("output_dir=a=b", "output_dir", "a=b"),
        ("model.dtype=float32", "model.dtype", "float32"),
        ("data.packing=false", "data.packing", False),
        ("data.train.0.path=other.jsonl", "data.train.0.path", "other.jsonl"),
        ("data.train.2.path=third.jsonl", "data.train.2.path", "third.jsonl"),
        ("data.train.0.columns.'a b'=c", "data.train.0.columns", {"a b": "c"}),
        ("optim.betas=[0.8, 0.9]", "optim.params.betas", (0.8, 0.9)),
        ("method.quant.double=false", "method.params.quant.double", False),
        ("method={name = 'full'}", "method.name", "full"),
        ("train={epochs = 3}", "train.epochs", 3.0),
        ("train.max_steps=", "train.epochs", 1.0),
        ("model.revision=", "model.revision", None),
        ("train.max_steps=1\n", "train.max_steps", 1),
    ],
)
def test_overrides(parse: Parse, override: str, key: str, value: object) -> None:
    found: Any = parse(FULL, override)
    for step in key.split("."):
        found = found[int(step)] if step.isdecimal() else getattr(found, step)
    assert found == value


def test_the_later_override_wins_and_held_out_rows_can_be_added(parse: Parse, minimal: str) -> None:
    assert parse(minimal, "seed=1", "seed=2").seed == 2
    assert parse(minimal, "train.epochs=9", "train={max_steps=4}").train.max_steps == 4
    assert parse(minimal, "data.eval.0.path=valid.jsonl").data.eval[0].path == "valid.jsonl"


def test_loading_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(FULL)
    program = """
import sys, time
start = time.perf_counter()
import conftest_registries as fake
from distft.recipe import load_recipe
load_recipe(sys.argv[1], registries=fake.REGISTRIES)
print(time.perf_counter() - start)
heavy = {"torch", "transformers", "numpy", "accelerate", "datasets", "peft", "deepspeed"} & set(sys.modules)
rooms = {name for name in sys.modules if name.startswith("distft.")} - {"distft.core", "distft.recipe"}
assert not heavy, heavy
assert all(name.startswith(("distft.core.", "distft.recipe.")) for name in rooms), rooms
"""
    (tmp_path / "conftest_registries.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    path = [str(tmp_path), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\nimport pytest\n{program}", tmp_path / "r.toml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2  # about 0.2 s on an idle machine; the limit leaves room for a busy one


class TestFiles:
    def fails(self, path: Path | str, registries: Registries) -> str:
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, registries=registries)
        assert str(caught.value).startswith(f"{path}: 1 problem\n")
        return str(caught.value.problems[0])

    def test_missing_file_suggests_a_neighbour(self, tmp_path: Path, registries: Registries) -> None:
        (tmp_path / "tiny-full.toml").write_text(FULL)
        assert f"no such file  did you mean {tmp_path / 'tiny-full.toml'}?" in self.fails(
            tmp_path / "tiny-ful", registries
        )

    def test_missing_folder(self, registries: Registries) -> None:
        assert "no such file" in self.fails("no/such/folder/r.toml", registries)

    def test_folder_lists_its_recipes(self, tmp_path: Path, registries: Registries) -> None:
        (tmp_path / "a.toml").touch()
        assert "is a folder, not a recipe  it holds: a.toml" in self.fails(tmp_path, registries)

    def test_device(self, registries: Registries) -> None:
        assert "is not a regular file" in self.fails("/dev/null", registries)

    def test_not_utf8(self, tmp_path: Path, registries: Registries) -> None:
        path = tmp_path / "latin.toml"
        path.write_bytes(b'name = "a"\n# \xe9\n')
        assert "line 2   byte 0xe9 is not UTF-8  save the file as UTF-8" in self.fails(path, registries)

    def test_byte_order_mark_and_crlf_are_fine(self, tmp_path: Path, registries: Registries) -> None:
        path = tmp_path / "windows.toml"
        path.write_bytes(b"\xef\xbb\xbf" + FULL.replace("\n", "\r\n").encode())
        assert load_recipe(path, registries=registries).line_of("data.train.0.path") == 14

    def test_deep_nesting(self, registries: Registries) -> None:
        with pytest.raises(RecipeError, match="nested too deeply"):
            parse_recipe("a = " + "[" * 5000 + "]" * 5000, source="r.toml", registries=registries)


class TestFuzz:
    """Whatever the input, a Recipe or a RecipeError with one line per problem."""

    def survives(self, registries: Registries, text: str, *overrides: str) -> None:
        problems: tuple[Problem, ...] = ()
        try:
            recipe = parse_recipe(text, source="fuzz", registries=registries, overrides=overrides)
        except RecipeError as error:
            problems = error.problems
        else:
            assert parse_recipe(recipe.to_toml(), source="again", registries=registries) == recipe
        assert all("\n" not in str(problem) for problem in problems)

    @settings(max_examples=150, deadline=None)
    @given(content=st.binary(max_size=60))
    def test_bytes(self, registries: Registries, tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
        path = tmp_path_factory.getbasetemp() / "fuzz.toml"
        path.write_bytes(content)
        with pytest.raises(RecipeError):
            load_recipe(path, registries=registries)

    @settings(max_examples=300, deadline=None)
    @given(
        start=st.integers(0, len(FULL)),
        length=st.integers(0, 30),
        instead=st.text(max_size=6) | st.sampled_from(["[", "]", '"', '"""', "=", "{", "\n", "[[x]]\n", "#", ",", "3"]),
    )
    def test_mutations(self, registries: Registries, start: int, length: int, instead: str) -> None:
        self.survives(registries, FULL[:start] + instead + FULL[start + length :])

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_values(self, registries: Registries, data: st.DataObject) -> None:
        """A valid document with one value replaced by a value of another kind."""
        lines = list[str](FULL.splitlines())
        row = data.draw(st.sampled_from([row for row, line in enumerate(lines) if "=" in line]))
        values = [
            "3",
            "-1",
            "0.5",
            "true",
            '"x"',
            "[]",
            "[1]",
            "[[]]",
            "{}",
            "{ a = 1 }",
            "[{}]",
            "2024-01-01",
            "inf",
            '""',
        ]
        lines[row] = lines[row].split("=")[0] + "= " + data.draw(st.sampled_from(values))
        self.survives(registries, "\n".join(lines))

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(
            st.text(max_size=12)
            | st.tuples(
                st.sampled_from(
                    ["seed", "method", "method.r", "data", "data.train", "data.train.0", "data.train.0.path"]
                )
                | st.sampled_from(
                    ["data.eval.0.path", "train.epochs", "log", "optim.betas.1", "x.y", "data.train.1.columns.a"]
                ),
                st.text(max_size=6)
                | st.sampled_from(["", "3", "[]", "{}", "[3]", "[{}]", "true", "nan", "{name=3}", "[[[["]),
            ).map("=".join),
            max_size=3,
        )
    )
    @example(["optim.betas.1={name=3}"])  # a table where a number belongs
    def test_overrides(self, registries: Registries, overrides: list[str]) -> None:
        self.survives(registries, FULL, *overrides)
