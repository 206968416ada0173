"""A run that is killed or asked to stop, started again by the same command line, ends as if nothing had happened."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
from harness import STEPS, Bench, Run, run

ENGINES = ["zero3", "fsdp2"]


def start(bench: Bench, name: str, engine: str, *more: str, fault: str = "", timeout_s: float = 120.0):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "distft.train", str(bench.recipe)]
    settings = [f'name="{name}"', f'engine.name="{engine}"', "train.micro_batch_size=2", "checkpoint.every_steps=2"]
    for setting in [*settings, *more]:
        command += ["--set", setting]
    return run(command, timeout_s=timeout_s, DISTFT_FAULT=fault)


def end(bench: Bench, name: str) -> tuple[list[float], str]:
    """(loss of every step, sha256 of the final tensors)."""
    folder = bench.folder / "runs" / name
    done = Run.read({"folder": str(folder)})
    tensors = hashlib.sha256((folder / "final/model.safetensors").read_bytes()).hexdigest()
    return done.column("loss"), tensors


def exit_of(bench: Bench, name: str) -> dict:
    return json.loads((bench.folder / "runs" / name / "exit.json").read_text())


@pytest.fixture(scope="module")
def oracle(bench: Bench) -> dict[str, tuple[list[float], str]]:
    """Uninterrupted runs."""
    out = {}
    for engine in ENGINES:
        name = f"oracle-{engine}"
        done = start(bench, name, engine)
        assert done.returncode == 0, done.stderr[-3000:]
        out[engine] = end(bench, name)
        assert len(out[engine][0]) == STEPS
    return out


FAULTS = [
    ("zero3", "kill:rank=1,point=step,step=5", "checkpoint.asynchronous=true"),
    ("fsdp2", "kill:rank=0,point=P3,step=4", "checkpoint.asynchronous=false"),
    ("zero3", "kill:rank=0,point=P6,step=4", "checkpoint.asynchronous=false"),
    ("fsdp2", "kill:rank=1,point=P2,step=4", "checkpoint.asynchronous=true"),
    ("zero3", "enospc:rank=1,point=P2,step=2", "checkpoint.asynchronous=false"),
]


@pytest.mark.parametrize(("engine", "fault", "mode"), FAULTS, ids=[f"{e}-{f}" for e, f, _ in FAULTS])
def test_killed_runs_end_as_the_oracle(bench: Bench, oracle: dict, engine: str, fault: str, mode: str) -> None:
    name = "".join(c if c.isalnum() else "-" for c in f"{engine}-{fault}")
    first = start(bench, name, engine, mode, fault=fault)
    saved = sorted(p.name for p in (bench.folder / "runs" / name / "checkpoints").glob("step-*"))
    if fault.startswith("kill"):
        assert first.returncode != 0
        assert saved, "an older or a newer checkpoint is there, never none"
        assert not (bench.folder / "runs" / name / "final").exists()
    else:  # one save that fails is survived
        assert first.returncode == 0, first.stderr[-3000:]
        assert "training goes on" in first.stderr
        assert saved == ["step-00000004", "step-00000006"]
    again = start(bench, name, engine, mode)
    assert again.returncode == 0, again.stderr[-3000:]
    assert end(bench, name) == oracle[engine]
    assert not list((bench.folder / "runs" / name / "checkpoints").glob(".tmp-*"))


def test_a_stop_file_stops_and_the_same_command_continues(bench: Bench, oracle: dict) -> None:
    folder = bench.folder / "runs/stopped"
    folder.mkdir(parents=True)
    (folder / "STOP").touch()
    assert start(bench, "stopped", "zero3").returncode != 0
    ended = exit_of(bench, "stopped")
    assert (ended["code"], ended["step"]) == (75, None)
    assert "stopped by the file" in ended["reason"]
    assert "before training began" in ended["reason"]
    (folder / "STOP").unlink()
    assert start(bench, "stopped", "zero3", fault="term:rank=1,point=step,step=3").returncode != 0
    ended = exit_of(bench, "stopped")
    assert (ended["code"], ended["step"]) == (75, 3)
    assert "stopped by SIGTERM after step 3; the state is saved" in ended["reason"]
    assert start(bench, "stopped", "zero3").returncode == 0
    assert end(bench, "stopped") == oracle["zero3"]
    assert exit_of(bench, "stopped")["step"] == STEPS


def test_a_flipped_byte_is_quarantined_and_the_one_before_is_used(bench: Bench, oracle: dict) -> None:
    first = start(bench, "flipped", "fsdp2", "checkpoint.asynchronous=false", fault="kill:rank=1,point=step,step=5")
    assert first.returncode != 0
    root = bench.folder / "runs/flipped/checkpoints"
    newest = sorted(root.glob("step-*"))[-1]
    victim = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    again = start(bench, "flipped", "fsdp2")
    assert again.returncode == 0, again.stderr[-3000:]
    assert victim.name in again.stderr, "the bad file is named"
    assert list(root.glob(f"{newest.name}.corrupt-*")), "set aside, not deleted"
    assert end(bench, "flipped") == oracle["fsdp2"]


def test_a_folder_in_use_is_refused(bench: Bench) -> None:
    from distft.checkpoint.lock import RunLock

    folder = bench.folder / "runs/busy"
    folder.mkdir(parents=True)
    with RunLock(folder):
        done = run([sys.executable, "-m", "distft.train", str(bench.recipe), "--set", 'name="busy"'])
    assert done.returncode == 7
    assert "Traceback" not in done.stderr
    assert Path(folder / "exit.json").exists() is False, "the other run's folder is left alone"
