"""The command line: help, exit codes, what is started; every verb also as a module. A mistake is not a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from distft.cli import app
from distft.launch import launch_command

ROOT = Path(__file__).resolve().parents[2]
VERBS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert "Traceback" not in done.stderr or "import distft.train" in arguments
    return done


def test_help_names_every_verb() -> None:
    done = run("-m", "distft.cli", "--help")
    assert done.returncode == 0
    assert {"train", "check"} <= set(VERBS)
    for verb in VERBS:
        assert f" {verb} " in done.stdout
    bare = run("-m", "distft.cli")
    assert "Usage:" in bare.stdout + bare.stderr, "no verb: the help, not an error to decipher"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_and_is_a_module(verb: str) -> None:
    done = run("-m", "distft.cli", verb, "--help")
    own = {
        "status": ("RUN_OR_FOLDER", "--json"),
        "doctor": ("a recipe", "--set"),
        "advise": ("--goal", "--json"),
        "report": ("RUN", "--price"),
        "compare": ("RUN", "--json"),
        "reproduce": ("RUN", "--nproc"),
    }
    expected = own.get(verb, ("TOML recipe", "--set"))
    assert done.returncode == 0
    assert all(word in done.stdout for word in expected)
    as_module = run("-m", f"distft.{verb}", "--help")
    assert as_module.returncode == 0
    assert expected[1] in as_module.stdout


def test_the_installed_command_is_the_same() -> None:
    from importlib.metadata import entry_points

    found = [entry for entry in entry_points(group="console_scripts") if entry.name == "distft"]
    assert not found or found[0].value == "distft.cli:main"


# -- check: exit codes 2 and 3 ---------------------------------------------------------------------------------------


def recipe(folder: Path, **changed: str) -> str:
    rows = folder / "train.jsonl"
    rows.write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n{"prompt": "no completion"}\n')
    text = f"""name = "run"
[model]
path = "demo:tiny-llama"
init = "random"
[data]
loss_on = "completion"
cache_dir = "{folder}/cache"
[[data.train]]
path = "{rows}"
format = "prompt_completion"
[train]
global_batch_size = 1
"""
    for old, new in changed.items():
        text = text.replace(old, new)
    (folder / "recipe.toml").write_text(text)
    return str(folder / "recipe.toml")


def test_check_lists_every_mistake_of_a_recipe(tmp_path: Path) -> None:
    done = run("-m", "distft.cli", "check", recipe(tmp_path, loss_on="los_on"), "--set", 'optim.name="admaw"')
    assert done.returncode == 2
    assert "2 problems" in done.stderr
    assert 'did you mean "loss_on"' in done.stderr
    assert 'did you mean "adamw"' in done.stderr
    assert "line 6" in done.stderr
    assert done.stdout == ""


def test_check_names_file_and_row(tmp_path: Path) -> None:
    done = run("-m", "distft.cli", "check", recipe(tmp_path))
    assert done.returncode == 3
    assert "train.jsonl:2" in done.stderr
    assert '"completion"' in done.stderr


def test_a_recipe_that_is_not_there() -> None:
    done = run("-m", "distft.cli", "check", "recipes/tiny-ful.toml")
    assert done.returncode == 2
    assert "no such file  did you mean recipes/tiny-full.toml?" in done.stderr


# -- train -----------------------------------------------------------------------------------------------------------


def test_one_process_needs_no_launcher() -> None:
    assert launch_command(1, ["r.toml", "--set", "a=1"]) == [
        sys.executable, "-m", "distft.train", "r.toml", "--set", "a=1",
    ]  # fmt: skip


def test_several_processes_are_accelerates() -> None:
    command = launch_command(8, ["r.toml"])
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[command.index("--num_processes") + 1] == "8"
    assert command[command.index("--num_machines") + 1] == "1"
    assert command[command.index("--mixed_precision") + 1] == "no", "the recipe's dtype decides"
    assert command[-3:] == ["-m", "distft.train", "r.toml"]


def test_train_passes_its_arguments_and_exit_code_on(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    done = run("-m", "distft.cli", "train", path, "--nproc", "1", "--set", "seeed=1", "--output-dir", str(tmp_path))
    assert done.returncode == 2
    assert 'did you mean "seed"' in done.stderr


def test_the_module_without_a_recipe_says_how_it_is_used() -> None:
    done = run("-m", "distft.train")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: distft.train [-h] [--set TABLE.KEY=VALUE]")
    assert "the following arguments are required: recipe" in done.stderr


def test_importing_the_command_says_what_to_import_instead() -> None:
    """`import distft.train` would put a module where `distft.train` is a function."""
    done = run("-c", "import distft.train")
    assert done.returncode == 1
    assert "ImportError: this module is a command; in Python: from distft import train" in done.stderr
    assert run("-c", "from distft import train; assert callable(train)").returncode == 0
