"""The batch script's process: `python -m distft.cluster.batch RECIPE [train options]`, inside a Slurm job.

Starts the run's processes on the job's nodes, passes Slurm's warning (`--signal=B:USR1@SECONDS`) on to them, and when
they have ended asks `distft.cluster.restart_policy` whether the job goes back into the queue. Everything it decides is
said in the job's output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from distft.cluster import batch_args, preflight, restart_policy, slurm, step
from distft.cluster.restart_policy import JobEnd, Phase, RestartDecision, Then
from distft.cluster.starts import End, JobStart, Starts
from distft.core.errors import DistftError, MachineError
from distft.run_folder import RunFolder

LAST_WAIT_S = 60.0
"""After a requeue Slurm ends us; if it has not by then, we end by ourselves."""


class Warned:
    """What Slurm has told this process by signals; nothing else happens inside a handler."""

    def __init__(self) -> None:
        self.to_stop = False
        """SIGUSR1: the time limit or a preemption is near."""
        self.ending = False
        """SIGTERM: Slurm is ending the job, its processes have had the signal too."""

    def install(self) -> None:
        """Take over the signals."""
        signal.signal(signal.SIGUSR1, self._to_stop)
        signal.signal(signal.SIGTERM, self._ending)

    def _to_stop(self, number: int, frame: FrameType | None) -> None:
        self.to_stop = True

    def _ending(self, number: int, frame: FrameType | None) -> None:
        self.ending = True


def supervise(argv: Sequence[str], env: Mapping[str, str], warned: Warned) -> int:
    """Supervise one start of the job from begin to end; return the job's exit code.

    Raises:
        DistftError: it cannot be started; the job ends, and is not requeued.
    """
    want = batch_args.read(argv)
    given = slurm.allocation(env, slurm.host_names(env.get("SLURM_JOB_NODELIST", "")))
    run_dir = RunFolder(want.recipe.run_dir, writes=True).path
    starts = Starts(run_dir)
    num_nodes = batch_args.nodes_that_divide(want.recipe, len(given.nodes), given.per_node)
    _say_where(want, given, num_nodes, starts.checkpoint())
    if want.after is not None and (over := restart_policy.follows_from(starts.records(), want.after)) is not None:
        return _finish(over, given, starts)
    if starts.stalled(given.job) > want.max_stalled:  # lost nodes come back here without a verdict
        return _give_up(given, starts)
    starts.add(
        JobStart(
            job=given.job,
            restart=given.restart,
            nodes=list(given.nodes[:num_nodes]),
            processes=num_nodes * given.per_node,
            checkpoint=starts.checkpoint(),
        )
    )
    if (end := _examine(want, given, num_nodes, env, starts, warned)) is not None:
        return end
    before = restart_policy.read_exit(run_dir)
    train = batch_args.without_resume(want.train) if _got_on(run_dir, given.job, starts) else want.train
    port = slurm.rendezvous_port(given.job, given.restart)
    _say(f"processes meet at {given.nodes[0]}:{port}")
    status = _run(
        step.command(want.launcher, given, num_nodes, train, port), step.environment(env, given, port), warned
    )
    decided = restart_policy.judge(
        JobEnd(
            status=status,
            record=restart_policy.record_of(before, restart_policy.read_exit(run_dir)),
            stop_requested=warned.to_stop,
            stop_file=(run_dir / "STOP").exists(),
            phase=_phase(given.job, warned),
            stalled=starts.stalled(given.job),
            chain=want.chain,
            max_stalled=want.max_stalled,
        )
    )
    return _finish(decided, given, starts)


def _finish(decided: RestartDecision, given: slurm.Allocation, starts: Starts) -> int:
    starts.add(
        End(
            job=given.job,
            restart=given.restart,
            code=decided.code,
            reason=decided.reason,
            checkpoint=starts.checkpoint(),
            then=decided.then.value,
        )
    )
    return _carry_out(decided, given.job)


def _give_up(given: slurm.Allocation, starts: Starts) -> int:
    why, now = restart_policy.stall_text(starts.stalled(given.job)), starts.checkpoint()
    _say(f"job {given.job} {why}")
    starts.add(
        End(
            job=given.job,
            restart=given.restart,
            code=restart_policy.CRASHED,
            reason=why,
            checkpoint=now,
            then=Then.END.value,
        )
    )
    return restart_policy.CRASHED


def _examine(
    want: batch_args.BatchArgs,
    given: slurm.Allocation,
    num_nodes: int,
    env: Mapping[str, str],
    starts: Starts,
    warned: Warned,
) -> int | None:
    """Ask the doctor about the nodes; None when the run may start on them, else the job's exit code."""
    if num_nodes == 1 or not want.doctor or warned.to_stop:
        return None
    port = slurm.rendezvous_port(given.job, given.restart + preflight.PORT_OFFSET)
    examined = preflight.examine(
        preflight.command(given, num_nodes, want.recipe.run_dir, want.floors),
        step.environment(env, given, port),
        given.nodes[:num_nodes],
        lambda: warned.to_stop or warned.ending,
    )
    if examined is None:
        return None  # whoever asked decides, as in the midst of a run
    if examined.ready:
        _say(f"doctor: {num_nodes} nodes are ready")
        return None
    for line in examined.messages:
        _say(f"doctor: {line}")
    then = Then.END
    if _may_go_elsewhere(examined, given, num_nodes):
        then = Then.REQUEUE
    code = MachineError.exit_code
    starts.add(
        End(
            job=given.job,
            restart=given.restart,
            code=code,
            reason=f"doctor: {examined.why}",
            checkpoint=starts.checkpoint(),
            then=then.value,
        )
    )
    if then is Then.REQUEUE:
        _say(f"requeued without {' '.join(examined.sick)}: the same command goes on elsewhere")
        try:
            slurm.requeue_without(given.job, examined.sick)
            time.sleep(LAST_WAIT_S)
        except MachineError as error:
            _say(f"that failed: {error}; sbatch --exclude={','.join(examined.sick)} and the same command start it")
    return code


def _may_go_elsewhere(examined: preflight.Examined, given: slurm.Allocation, num_nodes: int) -> bool:
    sick = " ".join(examined.sick)
    if not preflight.can_be_replaced(examined.sick, given.nodes[:num_nodes]):
        _say("not requeued: " + (f"{sick} are too many to be replaced" if sick else "this is no single node's fault"))
        return False
    try:
        without = [*slurm.excluded(given.job), *examined.sick]
        left = slurm.spare_nodes(given, without)
    except MachineError as error:
        _say(f"not requeued: {error}")
        return False
    if left < len(given.nodes):
        _say(f"not requeued: without {' '.join(without)} partition {given.partition} has {left} nodes")
        return False
    return True


def _got_on(run_dir: Path, job: str, starts: Starts) -> bool:
    """Return whether an earlier start of this job left a checkpoint to go on from.

    --resume speaks of the first start: repeated in a restart, "never" would throw away what the job has done.
    """
    try:
        manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    first = next((record for record in starts.records() if record.get("job") == job), {})
    return manifest.get("slurm_job") == job and starts.checkpoint() not in (0, first.get("checkpoint"))


def _run(command: Sequence[str], env: Mapping[str, str], warned: Warned) -> int:
    """Run the step to its end; its exit status."""
    if warned.to_stop:
        _say("asked to stop before anything was started")
        return restart_policy.CRASHED
    running, passed_on, status = step.Step(command, env), False, None
    while status is None:
        status = running.poll(0.5)
        if warned.to_stop and not passed_on and status is None:
            _say("SIGUSR1: the time limit or a preemption is near; the run finishes its step, saves and ends")
            running.ask_to_stop()
            passed_on = True
    return status


def _phase(job: str, warned: Warned) -> Phase:
    try:
        return slurm.phase(job)
    except MachineError as error:
        _say(f"Slurm does not say what it does with this job: {error}")
        return Phase.ENDING if warned.ending else Phase.RUNNING


def _carry_out(decided: RestartDecision, job: str) -> int:
    ended = f"job {job}: the run ended with code {decided.code}"
    _say(f"{ended}: {decided.reason}" if decided.code else ended)
    _say(decided.why)  # before the requeue: Slurm ends this process then
    if decided.then is Then.REQUEUE:
        try:
            slurm.requeue(job)
        except MachineError as error:
            _say(f"the requeue failed: {error}; the same sbatch command line continues the run")
        else:
            time.sleep(LAST_WAIT_S)
    return decided.exit_code


def _say_where(want: batch_args.BatchArgs, given: slurm.Allocation, num_nodes: int, checkpoint: int) -> None:
    again = f", restart {given.restart}" if given.restart else ""
    gpus = f"{given.gpus_per_node} GPUs" if given.gpus_per_node else "no GPU"
    _say(
        f"job {given.job}{again}: {len(given.nodes)} node{'s' if len(given.nodes) > 1 else ''} "
        f"({' '.join(given.nodes)}) of partition {given.partition}, each {gpus} and {given.cpus_per_node} CPUs"
    )
    if num_nodes < len(given.nodes):
        batch = want.recipe.train.global_batch_size
        _say(
            f"{len(given.nodes) - num_nodes} of them stay idle: global_batch_size = {batch} splits over "
            f"{num_nodes} x {given.per_node} processes, not over {len(given.nodes)} x {given.per_node}"
        )
    begins = f"step {checkpoint} is saved" if checkpoint else "nothing is saved yet"
    _say(f"{num_nodes} x {given.per_node} processes by {want.launcher}, {sys.executable}")
    _say(f"{want.recipe.source} -> {want.recipe.run_dir} ({begins})")


def _say(line: str) -> None:
    print(f"distft: {line}", flush=True)


def main() -> int:
    """Run `python -m distft.cluster.batch`."""
    warned = Warned()
    warned.install()
    try:
        return supervise(sys.argv[1:], os.environ, warned)
    except DistftError as error:
        _say(f"not started, and not requeued: {error.kind}")
        print(error, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
