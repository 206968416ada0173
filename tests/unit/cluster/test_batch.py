"""One start of a job from begin to end, with programs in place of srun and scontrol that do as they are told."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from distft.cluster import batch, slurm
from distft.core.errors import FileSystemError, RecipeError

ROOT = Path(__file__).resolve().parents[3]
RECIPE = str(ROOT / "recipes/tiny-full.toml")
SCONTROL = """#!/bin/sh
case "$1 $2" in
  "show hostnames") echo n1; echo n2 ;;
  "show job") cat "$0.job" ;;
  "update "*) test -z "$SIGNALLED" || kill -TERM $$; echo "$@" >>"$0.updated" ;;
  requeue*) echo "$2" >>"$0.requeued"; test -z "$SIGNALLED" || kill -TERM $PPID $$ ;;
esac
"""


@dataclass
class Site:
    """A folder of programs, and a run in it."""

    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs/r"

    def srun(self, script: str) -> None:
        """What srun does; it runs in the run folder."""
        path = self.folder / "srun"
        path.write_text(f'#!/bin/sh\necho "$@" >>"{self.folder}/srun.calls"\ncd "{self.run_dir}"\n{script}\n')
        path.chmod(0o755)

    def ends(self, code: int, reason: str = "why", status: int = 1) -> None:
        said = json.dumps({"code": code, "reason": reason, "nonce": os.urandom(4).hex()})
        self.srun(f"echo '{said}' >exit.json; exit {status}")

    def start(
        self,
        *more: str,
        before: tuple[str, ...] = (),
        warned: batch.Warned | None = None,
        restart: int = 0,
        job: str = "7",
        doctor: bool = False,
    ) -> int:
        """`sbatch train.sbatch BEFORE RECIPE ... MORE` has come to its turn."""
        env = dict(os.environ) | {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS_PER_NODE": "2"}
        env |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        argv = [
            *([] if doctor else ["--no-doctor"]),
            *before,
            RECIPE,
            "--output-dir",
            str(self.folder / "runs"),
            "--set",
            'name="r"',
            "--set",
            "train.micro_batch_size=1",
            *more,
        ]
        return batch.supervise(argv, env, warned or batch.Warned())

    def doctor(self, *reports: dict, status: int = 9) -> None:
        """What the doctor prints; the run itself, if it comes to that, is complete at once."""
        (self.folder / "reports").write_text("noise\n" + "".join(json.dumps(report) + "\n" for report in reports))
        self.srun(f'case "$*" in *distft.doctor*) cat "{self.folder}/reports"; exit {status};; esac')

    def updates(self) -> list[str]:
        told = self.folder / "scontrol.updated"
        return told.read_text().splitlines() if told.exists() else []

    def calls(self) -> list[str]:
        calls = self.folder / "srun.calls"
        return calls.read_text().splitlines() if calls.exists() else []

    def requeues(self) -> int:
        told = self.folder / "scontrol.requeued"
        return len(told.read_text().splitlines()) if told.exists() else 0

    def save(self, step: int) -> None:
        (self.run_dir / f"checkpoints/step-{step:08d}").mkdir(parents=True)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "scontrol.job").write_text("JobId=7 JobState=RUNNING Reason=None")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(batch, "LAST_WAIT_S", 0.0)
    return Site(tmp_path)


def test_a_run_that_is_preempted_then_complete(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.ends(75, "preempted: stopped by SIGUSR1 after step 3; the state is saved")
    assert site.start() == 75
    assert site.requeues() == 1
    said = capsys.readouterr().out
    assert "distft: job 7: 2 nodes (n1 n2)" in said
    assert "2 x 2 processes by srun" in said
    assert "(nothing is saved yet)" in said
    assert "the run ended with code 75: preempted: stopped by SIGUSR1 after step 3" in said
    assert said.rstrip().endswith("requeued: the same command continues")
    site.save(3)
    site.srun("exit 0")
    assert site.start(restart=1) == 0
    assert site.requeues() == 1
    said = capsys.readouterr().out
    assert "job 7, restart 1:" in said
    assert "(step 3 is saved)" in said
    assert [record.get("then") for record in map(json.loads, (site.run_dir / "starts.jsonl").open())] == [
        *(None, "requeue", None, "end")
    ]


def test_a_fault_of_its_own_ends_the_job_with_its_code(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.ends(5, "numeric: step 3: loss nan", status=1)
    assert site.start() == 5
    assert site.requeues() == 0
    assert "the run ended with code 5: numeric: step 3: loss nan" in capsys.readouterr().out


def test_the_verdict_of_an_earlier_start_is_not_taken_for_this_ones(site: Site) -> None:
    site.ends(75)
    site.start()
    site.srun("kill -9 $$")
    assert site.start(restart=1) == 1
    assert site.requeues() == 1


def test_a_warning_reaches_the_processes(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    program = f"exec {sys.executable} -c " + repr(
        "import signal,sys,time,json\n"
        "def stop(*_): open('exit.json','w').write(json.dumps({'code': 75, 'reason': 'asked'})); sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, stop)\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])\n"
        "time.sleep(60)"
    ).replace("\\n", "\n")
    site.srun(program)

    class Soon(batch.Warned):
        """Warned just after the processes were started."""

        seen = 0

        @property
        def to_stop(self) -> bool:
            self.seen += 1
            return self.seen > 1

        @to_stop.setter
        def to_stop(self, value: bool) -> None:
            pass

    assert site.start(warned=Soon()) == 75
    assert site.requeues() == 1
    assert "SIGUSR1: the time limit or a preemption is near" in capsys.readouterr().out


def test_warned_before_anything_started_nothing_is_started(site: Site) -> None:
    site.srun("exit 0")
    warned = batch.Warned()
    warned.to_stop = True
    assert site.start(warned=warned) == 75
    assert site.calls() == []
    assert site.requeues() == 1


def test_a_cancelled_job_is_left_alone(site: Site) -> None:
    site.ends(75)
    (site.folder / "scontrol.job").write_text("JobId=7 JobState=COMPLETING Reason=None")
    assert site.start() == 75
    assert site.requeues() == 0


def test_restarts_without_progress_end(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.ends(75)
    for restart in range(2):
        site.start(before=("--max-stalled-restarts", "2"), restart=restart)
        site.ends(75)
    assert site.start(before=("--max-stalled-restarts", "2"), restart=2) == 1
    assert site.requeues() == 2
    assert "3 starts in a row began at the same checkpoint" in capsys.readouterr().out
    assert len(site.calls()) == 3


def test_lost_nodes_come_back_without_a_verdict_and_are_limited_too(site: Site) -> None:
    for restart in range(4):
        site.srun("exit 1")
        site.start(restart=restart)
        (site.folder / "srun.calls").unlink()
        lines = (site.run_dir / "starts.jsonl").read_text().splitlines()
        (site.run_dir / "starts.jsonl").write_text(
            "".join(f"{line}\n" for line in lines if "began" in line)
        )  # no last word
    site.srun("exit 0")
    assert site.start(restart=4) == 1
    assert site.calls() == [], "not started a fifth time"
    said = [json.loads(line) for line in (site.run_dir / "starts.jsonl").open()]
    assert ["began" in record for record in said] == [True] * 4 + [False]
    assert "4 starts in a row" in said[-1]["reason"]


def test_resume_never_is_meant_for_the_first_start(site: Site) -> None:
    """Repeated, it would throw away what this job has done; in a new job it is meant."""
    site.run_dir.mkdir(parents=True)
    site.save(100)  # of an older run
    site.ends(75)
    site.start("--resume", "never")
    assert site.calls()[-1].endswith("--resume never")
    site.start("--resume", "never")
    assert site.calls()[-1].endswith("--resume never"), "the first start never came to set the old run aside"
    (site.run_dir / "checkpoints").rename(site.run_dir / "checkpoints.old-1")
    site.save(2)
    (site.run_dir / "manifest.json").write_text('{"slurm_job": "7"}')
    site.ends(75)
    site.start("--resume", "never")
    assert not site.calls()[-1].endswith("--resume never")
    site.start("--resume", "never", job="8")
    assert site.calls()[-1].endswith("--resume never")


def test_nodes_that_the_batch_does_not_reach_stay_idle(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.srun("exit 0")
    assert site.start("--set", "train.global_batch_size=2") == 0
    assert "--nodes=1 --ntasks=2" in site.calls()[0]
    assert "1 of them stay idle: global_batch_size = 2 splits over 1 x 2 processes" in capsys.readouterr().out


def test_a_faulty_recipe_and_an_unwritable_folder_end_it_before_srun(site: Site) -> None:
    site.srun("exit 0")
    (site.folder / "runs").write_text("in the way")
    with pytest.raises(FileSystemError):
        site.start()
    env = {"SLURM_JOB_ID": "7"}
    with pytest.raises(RecipeError):
        batch.supervise([RECIPE, "--set", "train.max_stps=3"], env, batch.Warned())
    assert site.calls() == []


def test_a_chain_goes_on_until_the_run_is_complete(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.ends(75)
    assert site.start(before=("--chain",), job="20") == 75
    assert site.requeues() == 0, "this queue does not requeue"
    assert "the next job of the chain goes on" in capsys.readouterr().out
    site.srun("exit 0")
    assert site.start(before=("--chain", "--after", "20"), job="21") == 0
    calls = len(site.calls())
    for job, before in (("22", "21"), ("23", "22")):
        assert site.start(before=("--chain", "--after", before), job=job) == 0
    assert len(site.calls()) == calls, "nothing was started"
    assert "the run is complete" in capsys.readouterr().out


def test_a_chain_ends_with_its_runs_own_fault_and_not_with_a_lost_node(site: Site) -> None:
    site.ends(75)
    site.start(before=("--chain",), job="20")
    lines = (site.run_dir / "starts.jsonl").read_text().splitlines()
    (site.run_dir / "starts.jsonl").write_text(lines[0] + "\n")  # it said no last word
    site.ends(5, "numeric: loss nan")
    assert site.start(before=("--chain", "--after", "20"), job="21") == 5
    calls = len(site.calls())
    for job, before in (("22", "21"), ("23", "22")):
        assert site.start(before=("--chain", "--after", before), job=job) == 5
    assert len(site.calls()) == calls


def test_a_job_of_an_array_is_called_by_both_its_numbers() -> None:
    env = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm.allocation(env, ("n1",)).job == "70_2", "job 70 may be all of them"
    assert slurm.allocation({"SLURM_JOB_ID": "70"}, ("n1",)).job == "70"


def report(*bad: str, found: str = "sick", world: int = 2, hosts: tuple[str, ...] = ("n1", "n2.site")) -> dict:
    """As `distft doctor --json` prints it."""
    row = {"check": "GPUs", "verdict": "fail", "found": found, "fix": "drain it", "hosts": list(bad)}
    well = {"check": "disk", "verdict": "ok", "found": "fast", "fix": "", "hosts": []}
    wrong = [row] if bad or found != "sick" else []
    return {"world": world, "hosts": list(hosts), "bad_hosts": list(bad), "findings": [well, *wrong]}


def test_ready_nodes_are_said_and_the_run_starts(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.doctor(report(), status=0)
    assert site.start(doctor=True, before=("--link-floor", "40")) == 0
    first, second = site.calls()
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in first
    assert first.endswith(
        f"distft.doctor --short --json --output-dir {site.run_dir} --per-host 2 --join-s 120 --link-floor 40"
    )
    assert "distft.train" in second
    assert "distft: doctor: 2 nodes are ready" in capsys.readouterr().out


def test_one_node_is_not_examined(site: Site) -> None:
    site.doctor(report("n1"))
    assert site.start("--set", "train.global_batch_size=2", doctor=True) == 0
    assert len(site.calls()) == 1


def test_a_sick_node_is_excluded_and_replaced(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own name may carry a domain; nodes that were excluded before stay so."""
    (site.folder / "sinfo").write_text("#!/bin/sh\nprintf '%s\\n' 'n1 mix' 'n2 alloc' 'n3 idle' 'n4 drain'\n")
    (site.folder / "sinfo").chmod(0o755)
    site.doctor(report("n2.site", found="GPU 0 of n2.site: 3 uncorrected memory errors"))
    assert site.start(doctor=True) == 9
    assert (site.requeues(), site.updates()) == (1, ["update JobId=7 ExcNodeList=n2"])
    assert len(site.calls()) == 1, "the run was not started"
    said = capsys.readouterr().out
    assert "doctor: GPUs: GPU 0 of n2.site: 3 uncorrected memory errors; fix: drain it" in said
    assert said.rstrip().endswith("requeued without n2: the same command goes on elsewhere")
    ends = [json.loads(line) for line in (site.run_dir / "starts.jsonl").open()]
    assert (ends[-1]["code"], ends[-1]["then"]) == (9, "requeue")


def test_slurms_own_signal_does_not_stop_the_exclusion(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the requeue on it ends whatever runs in the job."""
    (site.folder / "sinfo").write_text("#!/bin/sh\nprintf '%s\\n' 'n1 mix' 'n2 alloc' 'n3 idle'\n")
    (site.folder / "sinfo").chmod(0o755)
    monkeypatch.setenv("SIGNALLED", "1")
    warned = batch.Warned()
    before = signal.getsignal(signal.SIGTERM)
    try:
        warned.install()
        site.doctor(report("n2"))
        assert site.start(doctor=True, warned=warned) == 9
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert site.updates() == ["update JobId=7 ExcNodeList=n2"]
    assert warned.ending, "the signal was not lost, only late"


@pytest.mark.parametrize(
    ("reports", "why"),
    [
        ([report("n1", "n2")], "n1 n2 are too many to be replaced"),
        ([report(found="transformers is too old")], "this is no single node's fault"),
        ([], "n1 n2 are too many to be replaced"),
        ([report("n2")], "not requeued: without n2 partition  has 1 nodes"),
        ([report("n2", world=1, hosts=("n2",)), report(found="1 of 2 came", hosts=("n1",))], "partition  has 1 nodes"),
    ],
    ids=["both", "neither", "no word", "no other node", "one cannot come"],
)
def test_else_the_job_ends_with_the_reason(
    site: Site, capsys: pytest.CaptureFixture[str], reports: list[dict], why: str
) -> None:
    (site.folder / "sinfo").write_text("#!/bin/sh\nprintf '%s\\n' 'n1 mix' 'n2 alloc' 'n3 down*'\n")
    (site.folder / "sinfo").chmod(0o755)
    site.doctor(*reports)
    assert site.start(doctor=True) == 9
    assert (site.requeues(), site.updates()) == (0, [])
    assert why in capsys.readouterr().out
    assert json.loads((site.run_dir / "starts.jsonl").read_text().splitlines()[-1])["then"] == "end"


def test_a_node_that_is_not_heard_of(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (site.folder / "sinfo").write_text(
        "#!/bin/sh\nprintf '%s\\n' n1 n2 n3\n".replace("n1 n2 n3", "'n1 idle' 'n2 idle' 'n3 idle'")
    )
    (site.folder / "sinfo").chmod(0o755)
    site.doctor(report(found="1 of 2 processes came", hosts=("n1",), world=1), status=143)
    assert site.start(doctor=True) == 9
    assert site.updates() == ["update JobId=7 ExcNodeList=n2"]
    assert "the doctor was not heard of on n2: srun ended with status 143" in capsys.readouterr().out


def test_the_command_starts_without_torch_and_says_what_is_wrong(tmp_path: Path) -> None:
    code = (
        "import sys; from distft.cluster import batch; "
        "sys.argv = ['batch', 'absent.toml']; status = batch.main(); "
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "distft: not started, and not requeued: recipe" in done.stdout
    assert "absent.toml: 1 problem" in done.stdout
