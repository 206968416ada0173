"""What the driver says of each host's GPUs: errors in their memory, throttling, and other people's processes."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence

from distft.doctor.finding import (
    Check,
    DoctorOptions,
    Facts,
    Finding,
    Here,
    Seen,
    by_host,
    fail,
    names,
    odd_ones,
    ok,
    warn,
)

ASK_S = 60.0
"""A driver with a GPU that has fallen off the bus answers late or never."""
THROTTLED = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
TAKEN = 0.1
"""Share of a GPU's memory used by others from which a run that was planned for the whole has no room."""


def look(here: Here) -> Facts:
    """Run `nvidia-smi -q -x`, once on each host."""
    facts: Facts = {"expected": int(here.env.get("SLURM_GPUS_ON_NODE", "0")), "gpus": [], "trouble": ""}
    if not here.leads:
        return facts
    try:
        done = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, timeout=ASK_S, check=False)
    except FileNotFoundError:
        return facts | {"trouble": "absent"}
    except subprocess.TimeoutExpired:
        return facts | {"trouble": f"no answer in {ASK_S:.0f} s"}
    if done.returncode:
        return facts | {"trouble": (done.stdout + done.stderr).strip().splitlines()[0]}
    driver, gpus = read_smi(done.stdout, own_pids={os.getpid()})
    return facts | {"driver": driver, "gpus": visible(gpus, here.env)}


def read_smi(text: str, own_pids: set[int] = frozenset()) -> tuple[str, list[Facts]]:  # pyright: ignore[reportArgumentType]
    """Read (driver's version, facts by GPU) from the XML, whose elements have moved between driver versions.

    Raises:
        ValueError: it is no XML.
    """
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise ValueError(f"nvidia-smi -q -x: {error}") from None
    return root.findtext("driver_version", ""), [
        {
            "index": index,
            "name": gpu.findtext("product_name", ""),
            "uuid": gpu.findtext("uuid", ""),
            "uncorrected": _number(gpu.findtext("ecc_errors/volatile/double_bit/total"))  # older GPUs
            + sum(_number(node.text) for node in gpu.iterfind("ecc_errors/volatile/*") if "uncorrectable" in node.tag),
            "remap_pending": "Yes" in (gpu.findtext("remapped_rows/remapped_row_pending") or ""),
            "remap_failed": "Yes" in (gpu.findtext("remapped_rows/remapped_row_failure") or ""),
            "retired_pending": "Yes" in (gpu.findtext("retired_pages/pending_retirement") or ""),
            "throttled": [
                reason
                for reason in THROTTLED
                for kind in ("event", "throttle")
                if gpu.findtext(f"clocks_{kind}_reasons/clocks_{kind}_reason_{reason}") == "Active"
            ],
            "celsius": _number(gpu.findtext("temperature/gpu_temp")),
            "total_mib": _number(gpu.findtext("fb_memory_usage/total")),
            "used_mib": _number(gpu.findtext("fb_memory_usage/used")),
            "pids": [
                pid
                for process in gpu.iterfind("processes/process_info")
                if (pid := _number(process.findtext("pid"))) not in own_pids and "C" in process.findtext("type", "C")
            ],
        }
        for index, gpu in enumerate(root.iterfind("gpu"))
    ]


def visible(gpus: list[Facts], env: Mapping[str, str]) -> list[Facts]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves, by number or by UUID."""
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    words = [word.strip() for word in chosen.split(",") if word.strip()]
    return [gpu for gpu in gpus if any(w == str(gpu["index"]) or gpu["uuid"].startswith(w) for w in words)]


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Judge whether GPUs are healthy, free, and the same number and kind on every host."""
    leaders = by_host(seen)
    findings = [finding for process in leaders for finding in _of_host(process)]
    findings += _between(leaders)
    yield from findings
    if not findings:
        gpus = leaders[0].facts["gpus"]
        each = f"{len(gpus)} x {gpus[0]['name']}, driver {leaders[0].facts['driver']}" if gpus else "none"
        yield ok(each + (f", on each of {len(leaders)} hosts" if len(leaders) > 1 and gpus else ""))


def _of_host(process: Seen) -> Iterator[Finding]:
    gpus, host, trouble = process.facts["gpus"], process.host, process.facts["trouble"]
    if trouble and trouble != "absent":
        yield fail(
            f"nvidia-smi on {host}: {trouble}", "the driver or a GPU is broken: drain the node, reboot it", [host]
        )
    elif process.facts["expected"] and trouble == "absent":
        yield warn(
            f"the job has {process.facts['expected']} GPUs on {host}, and there is no nvidia-smi to ask about them",
            "put the driver's programs on PATH, or run in a container with --gpus (Docker) or --nv (Apptainer)",
        )
    elif process.facts["expected"] > len(gpus):
        yield fail(
            f"the job has {process.facts['expected']} GPUs on {host}, the driver shows {len(gpus)}",
            "a GPU has fallen off the bus (dmesg: Xid 79): drain the node",
            [host],
        )
    for gpu in gpus:
        which = f"GPU {gpu['index']} of {host}"
        if gpu["uncorrected"]:
            errors = f"{gpu['uncorrected']} uncorrected memory error{'s' if gpu['uncorrected'] > 1 else ''}"
            yield fail(
                f"{which}: {errors} (ECC) since the driver was loaded", "drain the node; nvidia-smi --gpu-reset", [host]
            )
        if gpu["remap_pending"] or gpu["retired_pending"]:
            yield fail(
                f"{which}: broken memory rows wait to be replaced", "drain the node; nvidia-smi --gpu-reset", [host]
            )
        if gpu["remap_failed"]:
            yield fail(f"{which}: broken memory rows could not be replaced", "the GPU must be exchanged", [host])
        if gpu["throttled"]:
            yield warn(
                f"{which} is throttled ({', '.join(gpu['throttled'])}) at {gpu['celsius']} C",
                "cooling or power: tell the site",
                [host],
            )
        taken = gpu["used_mib"] / max(1, gpu["total_mib"])
        if gpu["pids"] or taken > TAKEN:
            whose = f"processes {names(gpu['pids'])}" if gpu["pids"] else "processes that are not shown here"
            message = f"{which}: {gpu['used_mib'] / 1024:.1f} of {gpu['total_mib'] / 1024:.1f} GiB are taken by {whose}"
            fix = "end them (ps -p PID), or ask for the node alone (--exclusive)"
            yield fail(message, fix, [host]) if taken > TAKEN else warn(message, fix, [host])


def _between(leaders: Sequence[Seen]) -> Iterator[Finding]:
    for what, key in (
        ("GPUs", lambda process: len(process.facts["gpus"])),
        ("GPUs called", lambda process: ", ".join(sorted({gpu["name"] for gpu in process.facts["gpus"]}))),
        ("driver", lambda process: process.facts.get("driver")),
    ):
        usual, others = odd_ones(leaders, key)
        if others:
            message = f"{what} {key(others[0])} on {names(process.host for process in others)}, {usual} on others"
            fix = "ask for nodes of one kind (--constraint, or a partition)"
            hosts = [process.host for process in others]
            yield fail(message, fix, hosts) if what == "GPUs" else warn(message, fix, hosts)


def _number(text: str | None) -> int:
    """Return the number in "80999 MiB", "27 C" or "0"; 0 for "N/A"."""
    word = (text or "").split(" ")[0]
    return int(word) if word.isdecimal() else 0


CHECK = Check(name="GPUs", look=look, judge=judge)
