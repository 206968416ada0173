"""Runs on a real Slurm of two nodes: they start, are warned, preempted, cut off and cancelled, and end as they should.

A `stop` fault (SIGSTOP) holds a run at a chosen place, so that what happens to it there does not depend on who is
faster; `thaw` lets it go on. Each test has a run folder of its own. Every wait has an end (`slurm.PATIENCE_S`).
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from harness import STEPS, Bench, Run, relative
from slurm import SAVE, Cluster, Job, Refused

TRAIN = "cluster/train.sbatch"
SYNC = "checkpoint.asynchronous=false"


class Story:
    """One run and the job that makes it."""

    def __init__(self, cluster: Cluster, bench: Bench, name: str) -> None:
        self.cluster, self.bench, self.name = cluster, bench, name
        self.folder = bench.folder / "runs" / name
        self.metrics = self.folder / "metrics.jsonl"

    def submit(
        self, *options: str, engine: str = "fsdp2", script: str = TRAIN, settings: tuple[str, ...] = (),
        before: tuple[str, ...] = (), fault: str = "", doctor: bool = False,
    ) -> Job:  # fmt: skip
        """`before`: options of the script that come before the recipe. `doctor`: examine the nodes first."""
        before = before if doctor else ("--no-doctor", *before)
        changes = [f'name="{self.name}"', f'engine.name="{engine}"', SAVE, *settings]
        command = [*before, str(self.bench.recipe), *(word for change in changes for word in ("--set", change))]
        return self.cluster.submit(script, *options, run=command, **({"DISTFT_FAULT": fault} if fault else {}))

    def result(self) -> Run:
        """What it left behind; no step is missing, none is there twice."""
        run = Run.read({"folder": str(self.folder)})
        assert run.column("step") == list(range(1, STEPS + 1))
        return run

    def steps_done(self) -> int:
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return sum('"loss"' in line for line in lines)

    def records(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "starts.jsonl").read_text().splitlines()]

    def ends(self) -> list[tuple[int, str]]:
        """(code, what the job did then) of each start that came to say so."""
        return [(record["code"], record["then"]) for record in self.records() if "ended" in record]

    def nodes(self) -> list[list[str]]:
        """Of each start."""
        return [record["nodes"] for record in self.records() if "began" in record]


def tensors(run: Run) -> str:
    assert run.folder is not None
    return hashlib.sha256((run.folder / "final/model.safetensors").read_bytes()).hexdigest()


def assert_same(run: Run, oracle: Run) -> None:
    """Bit for bit."""
    assert run.column("loss") == oracle.column("loss")
    assert tensors(run) == tensors(oracle)


@pytest.mark.parametrize(
    ("engine", "script"),
    [
        pytest.param("zero3", TRAIN, id="zero3-srun"),
        pytest.param("fsdp2", "cluster/torchrun.sbatch", id="fsdp2-torchrun", marks=pytest.mark.slow),
    ],
)
def test_two_nodes_train_as_one_process(cluster: Cluster, bench: Bench, solo: Run, engine: str, script: str) -> None:
    story = Story(cluster, bench, f"two-by-two-{engine}")
    job = story.submit("--nodes=2", "--ntasks-per-node=2", engine=engine, script=script)
    assert job.end()["JobState"] == "COMPLETED", job.output
    run = story.result()
    assert relative(run.column("loss"), solo.column("loss")) < 1e-5
    assert relative(run.column("grad_norm"), solo.column("grad_norm")) < 1e-5
    assert json.loads((story.folder / "manifest.json").read_text())["world"] == 4
    for said in (
        f"distft: job {job.id}: 2 nodes (node1 node2) of partition debug, each no GPU and ",
        "2 x 2 processes by ",
        f"{bench.recipe} -> {story.folder} (nothing is saved yet)",
        "processes meet at node1:",
        "the run ended with code 0",
    ):
        assert said in job.output
    assert story.ends() == [(0, "end")]


@pytest.mark.slow  # a minute is Slurm's shortest limit; a preempted job is warned in the same way
@pytest.mark.row(44)
def test_warned_before_its_time_limit_it_saves_and_goes_on(cluster: Cluster, bench: Bench, pair: Run) -> None:
    story = Story(cluster, bench, "time-limit")
    # Due after 90 s, but Slurm looks at the clock every 30 s and may be a minute early.
    job = story.submit("--nodes=2", "--time=2", "--signal=B:USR1@30", fault="stop:rank=1,point=step,step=3")
    job.wait_for("SIGUSR1: the time limit or a preemption is near")
    assert job.end(thaw=True)["JobState"] == "COMPLETED", job.output
    assert_same(story.result(), pair)
    assert set(story.ends()[:-1]) == {(75, "requeue")}
    assert story.ends()[-1] == (0, "end")
    assert "stopped by SIGUSR1" in job.output
    assert f"job {job.id}, restart 1:" in job.output, "the same output file goes on"
    assert job.output.count("processes meet at") == len(story.nodes()) >= 2


@pytest.mark.row(44)
def test_preempted_in_the_middle_of_a_save(cluster: Cluster, bench: Bench, pair: Run) -> None:
    """By a real job of a more important partition, which then runs first."""
    story = Story(cluster, bench, "preempted")
    job = story.submit("--nodes=2", "--cpus-per-task=4", settings=(SYNC,), fault="stop:rank=1,point=P3,step=2")
    checkpoints = story.folder / "checkpoints"
    job.wait_until((checkpoints / ".tmp-step-00000002").exists, "a save")
    assert not (checkpoints / "step-00000002").exists()
    urgent = cluster.submit("--wrap=true", "--partition=urgent", "--nodes=2", "--cpus-per-task=4")
    job.wait_until(lambda: job.fields().get("PreemptTime") != "None", "its preemption")  # only then may the save go on
    assert job.end(thaw=True)["JobState"] == "COMPLETED", job.output
    assert urgent.end()["JobState"] == "COMPLETED"
    assert int(job.fields()["Restarts"]) == 1
    assert_same(story.result(), pair)
    assert not list(checkpoints.glob(".tmp-*"))


def test_a_node_that_loses_power(cluster: Cluster, bench: Bench, pair: Run) -> None:
    story = Story(cluster, bench, "power-cut")
    job = story.submit("--nodes=2", settings=(SYNC,), fault="stop:rank=0,point=step,step=3")
    job.wait_until(lambda: story.steps_done() == 3, "three steps")
    cluster.power_off("node2")
    job.wait_until(lambda: job.fields()["Restarts"] == "1", "Slurm to notice")
    cluster.power_on("node2")
    assert job.end(thaw=True)["JobState"] == "COMPLETED", job.output
    assert_same(story.result(), pair)
    assert [record["checkpoint"] for record in story.records() if "began" in record] == [0, 2]
    assert story.ends()[-1] == (0, "end")
    assert "(step 2 is saved)" in job.output


@pytest.mark.slow
def test_the_node_of_the_batch_script_loses_power(cluster: Cluster, bench: Bench, pair: Run) -> None:
    """With it goes the process that holds the run's lock; the next start of the same job need not wait for it."""
    story = Story(cluster, bench, "batch-host")
    job = story.submit("--nodes=2", fault="stop:rank=0,point=step,step=3")
    job.wait_until(lambda: story.steps_done() == 3, "three steps")
    cluster.power_off("node1")
    job.wait_until(lambda: job.fields()["Restarts"] == "1", "Slurm to notice")
    cluster.power_on("node1")
    assert job.end(thaw=True)["JobState"] == "COMPLETED", job.output
    assert_same(story.result(), pair)
    assert story.ends() == [(0, "end")], "the first start had no time for a last word"


@pytest.mark.slow
def test_a_node_that_fails_the_doctor_is_replaced(cluster3: Cluster, bench: Bench, pair: Run) -> None:
    """On node2 the run folder is a folder of its own, as where a mount is missing; the job goes on without it."""
    story = Story(cluster3, bench, "sick-node")
    story.folder.mkdir(parents=True)
    cluster3.inside("node2", "mount", "-t", "tmpfs", "tmpfs", str(story.folder))
    job = story.submit("--nodes=2", doctor=True)
    assert job.end()["JobState"] == "COMPLETED", job.output
    assert f"doctor: shared folder: {story.folder} of node2 is not the others' folder" in job.output
    assert "requeued without node2: the same command goes on elsewhere" in job.output
    assert "doctor: 2 nodes are ready" in job.output
    assert job.fields()["ExcNodeList"] == "node2"
    assert story.nodes() == [["node1", "node2"], ["node1", "node3"]]
    assert story.ends() == [(9, "requeue"), (0, "end")]
    assert_same(story.result(), pair)
    alone = Story(cluster3, bench, "no-other-node")
    alone.folder.mkdir(parents=True)
    cluster3.inside("node3", "mount", "-t", "tmpfs", "tmpfs", str(alone.folder))
    ended = alone.submit("--nodes=2", "--exclude=node1", doctor=True)
    assert ended.end()["ExitCode"] == "9:0", ended.output
    assert "not requeued: without node1 node3 partition debug has 1 nodes" in ended.output
    assert alone.ends() == [(9, "end")]


@pytest.mark.slow
def test_two_nodes_then_one_then_two(cluster: Cluster, bench: Bench, solo: Run) -> None:
    story = Story(cluster, bench, "elastic")
    job = story.submit("--nodes=1-2", fault="stop:rank=0,point=step,step=2;stop:rank=0,point=step,step=4")

    def warn_at(step: int, warnings: int) -> None:
        job.wait_until(lambda: story.steps_done() == step, f"step {step}")
        job.warn()
        job.wait_for("SIGUSR1: ", times=warnings)
        restarts = int(job.fields()["Restarts"])
        job.wait_until(lambda: int(job.fields()["Restarts"]) > restarts, "the requeue", thaw=True)

    try:
        job.wait_until(lambda: story.steps_done() == 2, "two steps")
        cluster.set_node("node2", "DRAIN")
        warn_at(2, warnings=1)
        job.wait_until(lambda: story.steps_done() == 4, "two more")
    finally:
        cluster.set_node("node2", "RESUME")
    warn_at(4, warnings=2)
    assert job.end(thaw=True)["JobState"] == "COMPLETED", job.output
    assert story.nodes() == [["node1", "node2"], ["node1"], ["node1", "node2"]]
    run = story.result()
    assert relative(run.column("loss"), solo.column("loss")) < 1e-5


@pytest.mark.row(44)
def test_its_own_faults_are_not_requeued(cluster: Cluster, bench: Bench) -> None:
    """The reason is among the last lines of the job's output, and in the job's exit code."""
    broken = Story(cluster, bench, "broken").submit(settings=('optim.name="admaw"', "train.max_stps=3"))
    assert broken.end()["ExitCode"] == "2:0"
    assert broken.fields()["Restarts"] == "0"
    assert "not started, and not requeued: recipe" in broken.output
    assert "2 problems" in broken.output
    assert 'did you mean "adamw"?' in broken.output
    assert 'did you mean "max_steps"?' in broken.output
    story = Story(cluster, bench, "poisoned")
    nan = story.submit(engine="solo", settings=tuple(bench.poisoned(12)))
    assert nan.end()["ExitCode"] == "5:0", nan.output
    assert nan.fields()["Restarts"] == "0"
    last = nan.output[nan.output.rindex(f"distft: job {nan.id}: the run ended with code 5: numeric: ") :]
    assert "poisoned.jsonl row 12" in last
    assert "not requeued: the run ended by its own fault" in last
    assert story.ends() == [(5, "end")]


@pytest.mark.slow
@pytest.mark.row(44)
def test_a_job_that_does_not_get_on_stops(cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    """Warned during data preparation each time, as with a time limit that is too short; enough time then mends it."""
    rows = tmp_path / "many.jsonl"
    rows.write_text((bench.folder / "train.jsonl").read_text() * 250)
    settings = (f'data.train.0.path="{rows}"', f'data.cache_dir="{tmp_path}/cache"')
    story = Story(cluster, bench, "stalled")
    job = story.submit(engine="solo", settings=settings, before=("--max-stalled-restarts", "1"))
    for start in (1, 2):
        job.wait_for("distft: preparing rows", times=start)
        job.warn()
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "1"), job.output
    assert job.output.count("stopped by SIGUSR1 before training began (rows)") >= 2
    assert "not requeued: 2 starts in a row began at the same checkpoint and none wrote a newer one" in job.output
    assert story.ends() == [(75, "requeue"), (75, "end")]
    again = story.submit(engine="solo", settings=settings, before=("--max-stalled-restarts", "1"))
    assert again.end()["JobState"] == "COMPLETED", again.output
    assert len(story.result().steps) == STEPS


@pytest.mark.slow  # tests/faults freezes ranks on one host
def test_a_frozen_rank_is_named_with_its_host(cluster: Cluster, bench: Bench) -> None:
    """SIGSTOP of one task on the second node: the others wait in a collective, and the job's output says for whom."""
    story = Story(cluster, bench, "frozen")
    freeze = "stop:rank=3,point=forward,step=3"
    options = ("--nodes=2", "--ntasks-per-node=2")
    job = story.submit(*options, fault=freeze, settings=("guard.hang_timeout_s=30",))
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "6:0"), job.output
    named = next((line for line in job.output.splitlines() if "shows no sign of life" in line), job.output)
    assert "rank 3 (node2" in named, named
    assert "shows no sign of life, last seen in forward of step 3" in named, named
    assert story.ends() == [(6, "end")]


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, bench: Bench) -> None:
    """SIGTERM lets the run save and say 75; `scontrol requeue` would now bring back what a person has ended."""
    story = Story(cluster, bench, "cancelled")
    job = story.submit(engine="solo", fault="stop:rank=0,point=step,step=3")
    job.wait_until(lambda: story.steps_done() == 3, "three steps")
    cluster.ask("scancel", job.id)
    ended = job.end(thaw=True)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert "requeued: the same command continues" not in job.output
    job.wait_until(lambda: not cluster.ask("squeue", "--noheader").strip(), "an empty queue")
    assert job.fields()["JobState"] == "CANCELLED"


@pytest.mark.slow  # of the harness, not of the product
def test_taken_down_it_leaves_no_process(cluster: Cluster, tmp_path: Path) -> None:
    other = Cluster.up(tmp_path / "slurm", nodes=4)
    try:
        job = other.submit("--wrap=srun sleep 600", "--nodes=4")
        job.wait_until(lambda: sum("bin/sleep 600" in line for line in other.processes()) == 4, "a task on each node")
    finally:
        other.down()
    assert other.processes() == []


SUBMIT = [sys.executable, "-m", "distft.submit"]


def test_scripts_of_distft_submit_are_what_slurm_accepts(cluster: Cluster, bench: Bench, tmp_path: Path) -> None:
    """`sbatch --test-only` says whether a job of this shape could ever start; shellcheck, where it is installed."""
    (tmp_path / "site.toml").write_text(
        'partition = "urgent"\ncpus_per_gpu = 2\nsetup = ["umask 027"]\nhf_home = "/tmp/$USER/hf"\n'
    )
    for nodes in ("1", "2", "1-2"):
        script = tmp_path / f"{nodes}.sh"
        shape = ["--nodes", nodes, "--gpus-per-node", "2", "--time", "1-00:00:00", "--site", f"{tmp_path}/site.toml"]
        script.write_text(cluster.ask(*SUBMIT, str(bench.recipe), *shape, "--dry-run", "--set", "seed=1"))
        cluster.ask("sbatch", "--test-only", str(script))
        if shutil.which("shellcheck"):
            cluster.ask("shellcheck", str(script))
    too_many = ["--nodes", "64", "--gpus-per-node", "2", "--dry-run", "--set", "train.global_batch_size=128"]
    script.write_text(cluster.ask(*SUBMIT, str(bench.recipe), *too_many))
    with pytest.raises(Refused, match=r"node configuration is not available|node count"):
        cluster.ask("sbatch", "--test-only", str(script))
    with pytest.raises(Refused, match="numbers of processes that fit"):
        cluster.ask(*SUBMIT, str(bench.recipe), "--nodes", "3", "--gpus-per-node", "1", "--dry-run")


def test_scripts_for_one_eight_and_64_nodes(cluster64: Cluster, bench: Bench, tmp_path: Path) -> None:
    recipes = [str(bench.recipe)]
    for name in ("b", "c"):
        recipes.append(str(tmp_path / f"{name}.toml"))
        Path(recipes[-1]).write_text(bench.recipe.read_text().replace('name = "bench"', f'name = "{name}"'))
    for nodes, count in ((1, 1), (8, 1), (64, 1), (8, 3)):
        script = tmp_path / f"{nodes}-{count}.sh"
        shape = ["--nodes", str(nodes), "--gpus-per-node", "2", "--set", "train.global_batch_size=128", "--dry-run"]
        script.write_text(cluster64.ask(*SUBMIT, *recipes[:count], *shape, "--time", "1-00:00:00"))
        cluster64.ask("sbatch", "--test-only", str(script))
        if shutil.which("shellcheck"):
            cluster64.ask("shellcheck", str(script))


def test_submitted_and_watched(cluster: Cluster, bench: Bench) -> None:
    story = Story(cluster, bench, "submitted")
    shape = ["--nodes", "1", "--gpus-per-node", "2", "--set", 'name="submitted"', "--set", 'engine.name="fsdp2"']
    said = cluster.ask(*SUBMIT, str(bench.recipe), *shape, DISTFT_FAULT="stop:rank=0,point=step,step=3").splitlines()
    job = Job(cluster, said[0].removeprefix("job "), story.folder / f"{said[0].replace(' ', '-')}.out")
    assert said[1] == f"output: {job.log}"
    job.wait_until(lambda: story.steps_done() == 3, "three steps")
    watch = [sys.executable, "-m", "distft.status", str(story.folder), "--json"]
    (running,) = json.loads(cluster.ask(*watch))["runs"]
    assert (running["state"], running["step"], running["num_steps"]) == ("running", 3, STEPS)
    assert (running["job"], running["nodes"]) == (job.id, ["node1"])
    assert job.end(thaw=True)["JobState"] == "COMPLETED", job.output
    assert "each 2 GPUs" in job.output
    (complete,) = json.loads(cluster.ask(*watch))["runs"]
    assert (complete["state"], complete["step"], complete["restarts"]) == ("complete", STEPS, [])


@pytest.mark.slow
def test_an_array_of_three_recipes(cluster: Cluster, bench: Bench, solo: Run) -> None:
    """One of them is warned and requeued: alone, for its job has a number of its own."""
    names, recipes = ("array-a", "array-b", "array-c"), []
    for name in names:
        recipes.append(bench.folder / f"{name}.toml")
        recipes[-1].write_text(bench.recipe.read_text().replace('name = "bench"', f'name = "{name}"'))
    stories = [Story(cluster, bench, name) for name in names]
    shape = ["--nodes", "1", "--gpus-per-node", "0", "--set", 'engine.name="solo"', "--set", SAVE]
    said = cluster.ask(*SUBMIT, *map(str, recipes), *shape, DISTFT_FAULT="stop:rank=0,point=step,step=3").splitlines()
    array = said[0].removeprefix("job ")
    jobs = [Job(cluster, f"{array}_{n}", bench.folder / f"runs/job-{array}_{n}.out") for n in range(3)]
    assert [f"output: {job.log}  ({name})" for job, name in zip(jobs, names, strict=True)] == said[1:4]
    for job, story in zip(jobs, stories, strict=True):
        job.wait_until(lambda story=story: story.steps_done() == 3, "three steps", thaw=False)
        if story is stories[0]:
            job.warn()
            job.wait_for("SIGUSR1: ")
        assert job.end(thaw=True)["JobState"] == "COMPLETED", job.output
    for job, story in zip(jobs, stories, strict=True):
        assert relative(story.result().column("loss"), solo.column("loss")) < 1e-5
        assert f"job {job.id}" in job.output
    assert [story.ends() for story in stories] == [[(75, "requeue"), (0, "end")], [(0, "end")], [(0, "end")]]


@pytest.mark.slow
def test_a_chain_of_jobs_where_none_is_requeued(cluster: Cluster, bench: Bench, solo: Run) -> None:
    story = Story(cluster, bench, "chain")
    shape = ["--nodes", "1", "--gpus-per-node", "0", "--set", 'name="chain"', "--set", 'engine.name="solo"']
    shape += ["--set", SAVE, "--chain", "3"]
    said = cluster.ask(*SUBMIT, str(bench.recipe), *shape, DISTFT_FAULT="stop:rank=0,point=step,step=3").splitlines()
    jobs = [
        Job(cluster, line.removeprefix("job "), story.folder / f"{line.replace(' ', '-')}.out") for line in said[:3]
    ]
    first, second, third = jobs
    first.wait_until(lambda: story.steps_done() == 3, "three steps")
    assert second.fields()["Reason"] == "Dependency"
    first.warn()
    first.wait_for("SIGUSR1: ")
    assert (first.end(thaw=True)["ExitCode"], first.fields()["Restarts"]) == ("75:0", "0"), first.output
    assert "the next job of the chain goes on" in first.output
    assert second.end(thaw=True)["JobState"] == "COMPLETED", second.output
    assert third.end()["JobState"] == "COMPLETED", third.output
    assert "the run is complete" in third.output
    assert "processes meet at" not in third.output, "it ended at once"
    assert relative(story.result().column("loss"), solo.column("loss")) < 1e-5
    assert [(record["job"], record["then"]) for record in story.records() if "ended" in record] == [
        (job.id, "end") for job in jobs
    ]
