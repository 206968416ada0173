"""The command line of the batch script."""

from pathlib import Path

import pytest

from distft.cluster import batch_args
from distft.core.errors import RecipeError

ROOT = Path(__file__).resolve().parents[3]
RECIPE = str(ROOT / "recipes/tiny-full.toml")


def test_the_run_folder_is_the_one_that_training_uses() -> None:
    found = batch_args.read(
        [RECIPE, "--set", 'name="x"', "--resume", "never", "--output-dir", '/o/"p"', "--set", "seed=3"]
    )
    assert found.recipe.run_dir == Path('/o/"p"/x')
    assert found.train == (
        RECIPE,
        "--set",
        'name="x"',
        "--resume",
        "never",
        "--output-dir",
        '/o/"p"',
        "--set",
        "seed=3",
    )
    assert (found.launcher, found.max_stalled) == ("srun", 3)


def test_own_options_come_first() -> None:
    found = batch_args.read(["--launcher", "torchrun", "--max-stalled-restarts", "5", RECIPE, "--allow-changes"])
    assert (found.launcher, found.max_stalled) == ("torchrun", 5)
    assert found.train == (RECIPE, "--allow-changes")


@pytest.mark.parametrize("argv", [[], ["--set", "seed=1", RECIPE]])
def test_a_command_line_without_a_recipe_in_front(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        batch_args.read(argv)
    assert error.value.code == 2
    assert "usage: sbatch [options] cluster/train.sbatch" in capsys.readouterr().err


def test_a_faulty_recipe_is_refused_before_anything_starts() -> None:
    with pytest.raises(RecipeError, match='did you mean "adamw"'):
        batch_args.read([RECIPE, "--set", 'optim.name="admaw"'])


def test_a_restart_forgets_where_the_first_start_began() -> None:
    assert batch_args.without_resume(["r", "--resume", "never", "--set", "a=1"]) == ("r", "--set", "a=1")
    assert batch_args.without_resume(["r", "--resume=/ckpt", "--allow-changes"]) == ("r", "--allow-changes")
    assert batch_args.without_resume(["r"]) == ("r",)


def test_as_many_nodes_as_the_global_batch_allows() -> None:
    recipe = batch_args.read(
        [RECIPE, "--set", "train.global_batch_size=64", "--set", "train.micro_batch_size=1"]
    ).recipe
    assert [batch_args.nodes_that_divide(recipe, nodes, 8) for nodes in (1, 2, 3, 4, 5, 8)] == [1, 2, 2, 4, 4, 8]
    with pytest.raises(RecipeError, match="numbers of processes that fit"):
        batch_args.nodes_that_divide(recipe, 2, 7)
