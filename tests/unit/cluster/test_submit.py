"""`distft submit`: the script it writes, the site file it reads, and what it refuses before Slurm hears of it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distft import submit
from distft.cluster.script import SlurmRequest, render
from distft.cluster.site import Site, read_site
from distft.core.errors import RecipeError

ROOT = Path(__file__).resolve().parents[3]
RECIPE = str(ROOT / "recipes/llama8b-full.toml")
WANTED = SlurmRequest(
    name="r", nodes="2", gpus_per_node=8, time="1-00:00:00", partition=None, output_dir=Path("/runs/r")
)  # fmt: skip


def options(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}


def test_it_asks_for_what_was_wanted_and_what_the_site_needs() -> None:
    site = Site(partition="gpu", account="a", cpus_per_gpu=12, notice_s=600, sbatch=("--exclusive",))
    assert options(render(site, WANTED, [RECIPE])) == {
        *("--job-name=r", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=96", "--gpus-per-node=8"),
        *("--time=1-00:00:00", "--partition=gpu", "--account=a", "--output=/runs/r/job-%j.out"),
        *("--open-mode=append", "--requeue", "--signal=B:USR1@600", "--exclusive"),
    }


def test_a_job_runs_under_the_interpreter_that_submitted_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever python3 is on the PATH of the node, and wherever the environment is: also with a space in its name."""
    (tmp_path / "not this").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "not this" / name).write_text("#!/bin/sh\necho the wrong one\n")
        (tmp_path / "not this" / name).chmod(0o755)
    own = tmp_path / "my environment" / "python"
    own.parent.mkdir()
    own.write_text("#!/bin/sh\necho the right one\n")
    own.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own))
    monkeypatch.setenv("PATH", f"{tmp_path / 'not this'}:/usr/bin:/bin")
    for number, trains in enumerate(([["RECIPE"]], [["A"], ["B"]])):  # alone, and as an array
        script = tmp_path / f"script-{number}"
        script.write_text(render(Site(setup=("true",)), WANTED, *trains))
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
        said = subprocess.run(["bash", script], capture_output=True, text=True, check=True).stdout
        assert said == "the right one\n"
    assert f"exec {sys.executable}" not in render(Site(python="python3.12"), WANTED, ["RECIPE"])
    assert "exec python3.12 -m distft.cluster.batch" in render(Site(python="python3.12"), WANTED, ["RECIPE"])


@pytest.mark.parametrize("launcher", ["train", "torchrun"])
def test_it_is_the_script_that_people_can_submit_by_hand(launcher: str) -> None:
    by_hand = (ROOT / f"cluster/{launcher}.sbatch").read_text()
    written = render(Site(launcher="srun" if launcher == "train" else "torchrun"), WANTED, ["RECIPE"])
    same = {option for option in options(by_hand) if not re.match(r"--(job-name|nodes|output)=", option)}
    assert same <= options(written)
    assert 'trap "" USR1' in by_hand
    assert 'trap "" USR1' in written
    assert ("--launcher torchrun" in by_hand) == ("--launcher torchrun" in written) == (launcher == "torchrun")


def test_a_site_says_what_its_doctor_asks_for() -> None:
    site = Site(link_floor_gb_per_s=40, disk_floor_gb_per_s=0.5, doctor=False)
    written = render(site, WANTED, ["RECIPE"])
    assert written.rstrip().endswith("--no-doctor --link-floor 40 --disk-floor 0.5 RECIPE")


def test_arguments_and_variables_arrive_as_they_were_written(tmp_path: Path) -> None:
    """Run, with a program in place of Python that shows what it was given."""
    show = tmp_path / "python"
    show.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$HF_HOME" "$ODD" "$NCCL_SOCKET_IFNAME"\n')
    show.chmod(0o755)
    odd = 'a "b" `c` $(d) \\ e'
    site = Site(python=str(show), hf_home="/local/$WHO/hf", env={"ODD": odd}, interface="ib0", setup=("WHO=me",))
    script = tmp_path / "script"
    script.write_text(render(site, WANTED, ["my recipe.toml", "--set", 'name="x y"']))
    said = subprocess.run(["bash", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[-3:] == ["/local/me/hf", odd, "ib0"]
    assert said[:-3] == [
        *("-m", "distft.cluster.batch", "--launcher", "srun", "--max-stalled-restarts", "3"),
        *("my recipe.toml", "--set", 'name="x y"'),
    ]


def test_a_folder_of_a_variable_that_nobody_sets_is_not_at_the_root(tmp_path: Path) -> None:
    show = tmp_path / "python"
    show.write_text("#!/bin/sh\necho started\n")
    show.chmod(0o755)
    script = tmp_path / "script"
    site = Site(python=str(show), distft_cache="$NOBODY_SETS_THIS/rows", setup=('echo "$NOR_THIS"',))
    script.write_text(render(site, WANTED, ["RECIPE"]))
    said = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert said.returncode != 0
    assert "NOBODY_SETS_THIS: unbound variable" in said.stderr
    assert "started" not in said.stdout


def test_several_recipes_are_an_array(tmp_path: Path) -> None:
    """Each task runs its own; run here with a program in place of Python."""
    show = tmp_path / "python"
    show.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    show.chmod(0o755)
    trains = [["a.toml", "--set", 'name="x y"'], ["b.toml"], ["c.toml"]]
    script = tmp_path / "script"
    script.write_text(render(Site(python=str(show)), WANTED, *trains))
    assert {"--array=0-2", "--output=/runs/r/job-%A_%a.out", "--requeue"} <= options(script.read_text())
    for number, train in enumerate(trains):
        env = {"SLURM_ARRAY_TASK_ID": str(number), "PATH": "/bin:/usr/bin"}
        said = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=True).stdout.splitlines()
        assert said[-len(train) :] == train
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers its jobs from 100 on and keeps their scripts."""
    sbatch = folder / "sbatch"
    sbatch.write_text(
        f"#!/bin/sh\nn=$(ls {folder}/given.* 2>/dev/null | wc -l)\ncat >{folder}/given.$n\necho $((100+n))\n"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")


def test_a_chain_is_jobs_that_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch)
    shape = [RECIPE, "--output-dir", str(tmp_path / "runs"), "--nodes", "2", "--gpus-per-node", "8", "--chain", "3"]
    assert submit.main(shape) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["job 100", "job 101", "job 102"]
    scripts = [(tmp_path / f"given.{number}").read_text() for number in range(3)]
    assert all("--no-requeue" in options(script) for script in scripts)
    assert all(" --chain " in script.splitlines()[-1] for script in scripts)
    waits = [[o for o in options(script) if o.startswith("--dependency")] for script in scripts]
    assert waits == [[], ["--dependency=afterany:100"], ["--dependency=afterany:101"]]
    assert "--after" not in scripts[0]
    assert "--after 101" in scripts[2]


def test_an_array_is_said_and_two_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch)
    other = str(ROOT / "recipes/llama8b-lora.toml")
    shape = ["--output-dir", str(tmp_path / "runs"), "--nodes", "2", "--gpus-per-node", "8"]
    assert submit.main([RECIPE, other, *shape]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "job 100"
    assert said[1] == f"output: {tmp_path}/runs/job-100_0.out  (llama8b-full)"
    assert said[2] == f"output: {tmp_path}/runs/job-100_1.out  (llama8b-lora)"
    assert (tmp_path / "runs/llama8b-lora").is_dir()
    assert submit.main([RECIPE, RECIPE, *shape]) == 2
    assert f"both write {tmp_path}/runs/llama8b-full  give each its own name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        submit.main([RECIPE, other, *shape, "--chain", "2"])
    assert "--chain goes with one recipe" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "cluster/sites").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_sites_load_and_make_sound_scripts(path: Path, tmp_path: Path) -> None:
    site = read_site(path)
    assert site.setup
    script = tmp_path / "script"
    script.write_text(render(site, WANTED, [RECIPE, "--set", 'name="x"']))
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_sound() -> None:
    scripts = [*ROOT.glob("cluster/*.sbatch"), *ROOT.glob("tests/cluster/slurm/*.sh"), ROOT / ".ci/run"]
    assert len(scripts) >= 6
    subprocess.run(["shellcheck", *scripts], check=True)


def test_a_site_file_is_checked_like_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('partitoin = "gpu"\nnotice_s = "5 min"\n[env]\nA = "1"\n')
    with pytest.raises(RecipeError) as error:
        read_site(path)
    said = str(error.value)
    assert "site.toml: 2 problems" in said
    assert "line 1" in said
    assert 'did you mean "partition"?' in said
    assert "line 2" in said


def test_what_slurm_never_hears_of(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--nodes", "2", "--gpus-per-node", "8", "--dry-run"]
    assert submit.main([RECIPE, *shape, "--set", 'optim.name="admaw"']) == 2
    assert 'did you mean "adamw"' in capsys.readouterr().err
    assert submit.main([RECIPE, "--nodes", "3", "--gpus-per-node", "7", "--dry-run"]) == 2
    assert "numbers of processes that fit" in capsys.readouterr().err
    assert submit.main([RECIPE, *shape, "--site", "absent.toml"]) == 2
    assert "absent.toml" in capsys.readouterr().err


def test_the_job_is_named_on_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\ncat >{tmp_path}/given\necho '4711;cluster'\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    train = [RECIPE, "--output-dir", str(tmp_path / "runs"), "--resume", "never"]
    assert submit.main([*train, "--nodes", "2-8", "--gpus-per-node", "8"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "job 4711"
    folder = Path(said[1].removeprefix("output: ")).parent
    assert folder.is_dir(), "Slurm does not make it"
    assert (tmp_path / "given").read_text().rstrip().endswith(f"{RECIPE} --output-dir {tmp_path}/runs --resume never")
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    assert submit.main([*train, "--gpus-per-node", "8"]) == 9
    assert "invalid partition specified: x" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit.main([*train, "--gpus-per-node", "8"]) == 9
    assert "use --dry-run" in capsys.readouterr().err


def test_as_a_command_it_needs_no_torch() -> None:
    code = (
        "import sys; from distft import submit, status; "
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
