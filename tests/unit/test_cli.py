"""The command line: help, exit codes, what is started; every verb also as a module. A mistake is not a traceback."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from distft.cli import VERBS as TABLE
from distft.cli import parser_of
from distft.launch import launch_command

ROOT = Path(__file__).resolve().parents[2]
VERBS = list(TABLE)
MODULES = [verb for verb in VERBS if verb != "completion"]
"""Those that are also `python -m distft.VERB`."""


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
    assert bare.returncode == 2
    assert bare.stderr == done.stdout, "no verb: the help, not an error to decipher"


@pytest.mark.parametrize(
    "verb", [verb if verb in ("train", "serve") else pytest.param(verb, marks=pytest.mark.slow) for verb in VERBS]
)
def test_help_of_a_verb_is_that_of_its_module(verb: str) -> None:
    done = run("-m", "distft.cli", verb, "--help")
    assert done.returncode == 0
    flags = parser_of(TABLE[verb]).flags()
    assert all(flag in done.stdout for flag in flags)
    if verb in MODULES:
        assert run("-m", f"distft.{verb}", "--help").stdout == done.stdout


def test_help_imports_nothing_heavy_and_takes_no_time() -> None:
    """One process makes the help of every verb; imports of the largest libraries alone would take seconds."""
    code = """
import sys
from distft.cli import VERBS, parser_of, usage
for text in [usage(), *(parser_of(verb).format_help() for verb in VERBS.values())]:
    assert text
heavy = {"torch", "transformers", "numpy", "rich", "pydantic", "typer", "accelerate", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
    assert run("-c", code).returncode == 0
    assert min(_cpu_seconds("-m", "distft.cli", "--help") for _ in range(3)) <= 0.2


def _cpu_seconds(*arguments: str) -> float:
    """Of the processor, which other work on this machine does not change much."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainx"], "unknown verb trainx  did you mean train?"),
        (["evaluate"], "unknown verb evaluate  did you mean eval?"),
        (["--versoin"], "unknown flag --versoin  did you mean --version?"),
        (["zzz"], "unknown verb zzz  allowed: train, check"),
        (["train", "r.toml", "--resum", "never"], "unknown flag --resum  did you mean --resume?"),
        (["train", "r.toml", "--allow"], "unknown flag --allow"),  # no abbreviations
        (["train", "r.toml", "--nproc", "0"], "argument --nproc: must be a whole number of at least 1, not '0'"),
        (["plan", "r.toml", "--max", "sqe"], "invalid choice: 'sqe'  did you mean seq?  allowed: seq, micro"),
        (["bench", "r.toml", "--rows=rael"], "did you mean real?"),
        (["check", "r.toml", "more.toml"], "unexpected arguments: more.toml"),
        (["compare"], "the following arguments are required: RUN"),
        (["completion", "fihs"], "did you mean fish?"),
        (["submit", "recipes/llama8b-full.toml", "--gpus-per-node", "8", "--resum", "never"], "did you mean --resume?"),
    ],
)  # fmt: skip
def test_a_mistyped_command_line_names_the_nearest_and_ends_with_2(words: list[str], said: str) -> None:
    done = run("-m", "distft.cli", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "verb", ["train", *(pytest.param(verb, marks=pytest.mark.slow) for verb in MODULES if verb != "train")]
)
def test_a_mistake_is_the_same_by_both_ways_in(verb: str) -> None:
    ways = [run("-m", "distft.cli", verb, "--no-such-flag"), run("-m", f"distft.{verb}", "--no-such-flag")]
    assert [way.returncode for way in ways] == [2, 2]
    assert ways[0].stderr == ways[1].stderr


def test_processes_are_not_started_from_inside_one_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    for verb in ("train", "eval"):
        done = run("-m", f"distft.{verb}", str(ROOT / "recipes/tiny-full.toml"), "--nproc", "2")
        assert done.returncode == 2
        assert "one of a launcher's already" in done.stderr


def test_the_version_is_the_packages() -> None:
    import distft

    assert run("-m", "distft.cli", "--version").stdout == f"distft {distft.__version__}\n"


# -- completion ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "distft.bash"
    path.write_text(run("-m", "distft.cli", "completion", "bash").stdout)
    return path


def complete(script: Path, *words: str) -> set[str]:
    """What a real bash offers for the last of the words, called as it calls completion functions."""
    code = (
        'source "$1"; shift; COMP_WORDS=(distft "$@"); COMP_CWORD=$#; _distft; ((${#COMPREPLY[@]})) && '
        'printf "%s\\n" "${COMPREPLY[@]}"; complete -p distft >&2'
    )
    done = subprocess.run(
        ["bash", "-uc", code, "bash", str(script), *words], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == "complete -o default -F _distft distft\n"
    return set(done.stdout.split())


def test_bash_completes_verbs_flags_and_values(bash_script: Path) -> None:
    assert complete(bash_script, "") == {*VERBS, "--help", "--version"}
    assert complete(bash_script, "re") == {verb for verb in VERBS if verb.startswith("re")}
    assert complete(bash_script, "--v") == {"--version"}
    for verb in VERBS:
        assert complete(bash_script, verb, "-") == set(parser_of(TABLE[verb]).flags())
    assert complete(bash_script, "train", "recipe.toml", "--res") == {"--resume"}
    assert complete(bash_script, "bench", "recipe.toml", "--oom", "") == {"micro", "length"}
    assert complete(bash_script, "plan", "recipe.toml", "--max", "m") == {"micro", "model"}
    assert complete(bash_script, "plan", "--max", "=", "s") == {"seq"}, "bash hands over --max=s as three words"
    assert complete(bash_script, "plan", "--max", "=") == {"seq", "micro", "model"}
    assert complete(bash_script, "completion", "") == {"bash", "zsh", "fish"}
    assert complete(bash_script, "check", "") == set(), "a recipe: file names, which are bash's default"
    assert complete(bash_script, "check", "r.toml", "--card", "--") == set(), "the value of a flag is a file name"


def test_zsh_runs_the_function_of_bash_and_fish_has_its_own(bash_script: Path) -> None:
    zsh = run("-m", "distft.cli", "completion", "zsh").stdout
    assert zsh == "autoload -U +X bashcompinit && bashcompinit\n" + bash_script.read_text()
    fish = run("-m", "distft.cli", "completion", "fish").stdout.splitlines()
    assert any(line.startswith("complete -c distft -f -n __fish_use_subcommand -a train -d '") for line in fish)
    of_bench = "complete -c distft -n '__fish_seen_subcommand_from bench' -l oom -x -a 'micro length' -d "
    assert any(line.startswith(of_bench) for line in fish)
    flags = sum(len(parser_of(verb).flags()) for verb in TABLE.values())
    assert sum(" -l " in line or " -s " in line for line in fish) == flags


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
    assert done.stderr.startswith("usage: distft train [-h] [--set TABLE.KEY=VALUE]")
    assert "the following arguments are required: RECIPE" in done.stderr


def test_importing_the_command_says_what_to_import_instead() -> None:
    """`import distft.train` would put a module where `distft.train` is a function."""
    done = run("-c", "import distft.train")
    assert done.returncode == 1
    assert "ImportError: this module is a command; in Python: from distft import train" in done.stderr
    assert run("-c", "from distft import train; assert callable(train)").returncode == 0
