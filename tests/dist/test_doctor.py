"""`distft doctor` on hosts of its own, where something is really wrong: found, named with the host and the fix, 9."""

import os
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
from hosts import Rank, Wire, can_isolate, can_wire, examine, other_version

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not can_isolate(), reason="this kernel does not let us make namespaces (unshare)"),
]
LITTLE = ("--gib", "0.02")
FOUR = ("node1", "node1", "node2", "node2")


def test_healthy_hosts(tmp_path: Path) -> None:
    told = examine([Rank(host) for host in FOUR], "--output-dir", str(tmp_path), *LITTLE)
    assert told.codes == [0] * 4, told.err
    assert [out for out in told.out if out] == [told.out[0]], "said once"
    report = told.report
    assert report["verdict"] in ("ok", "warn"), report
    assert (report["code"], report["world"]) == (0, 4)
    assert report["hosts"] == ["node1", "node2"]
    rows = {row["check"]: row["found"] for row in report["findings"]}
    assert set(rows) == {
        *(
            "processes",
            "network",
            "libraries",
            "plugins",
            "GPUs",
            "host",
            "limits",
            "torch",
            "clock",
            "shared folder",
            "disk",
            "generator",
        ),
        *("arithmetic", "link"),
    }
    assert rows["processes"] == "4 processes on 2 hosts (node1, node2)"
    assert "4 processes see each other's files" in rows["shared folder"]
    assert "ms between 2 hosts" in rows["clock"]
    assert "all-reduce" in rows["link"]
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.slow
def test_four_faults_at_once(tmp_path: Path) -> None:
    """A library of another version, a clock, a folder that one host does not share, a slow link."""
    runs = tmp_path / "runs"
    runs.mkdir()
    ranks = [Rank(host) for host in FOUR]
    ranks[3].env["PYTHONPATH"] = other_version(tmp_path / "other", "transformers", "5.17.0")
    for rank in ranks[2:]:
        rank.before = f"mount -t tmpfs tmpfs {runs}"
    faults = "skew:rank=2,point=clock,seconds=90;slow:rank=3,point=link,seconds=0.1,times=1000"
    told = examine(ranks, "--output-dir", str(runs), *LITTLE, "--link-floor", "90", DISTFT_FAULT=faults)
    assert told.codes == [9] * 4, told.err
    found = told.findings("fail")
    assert set(found) == {"libraries", "clock", "shared folder", "link"}
    assert found["libraries"]["found"].startswith("transformers 5.17.0 on rank 3 (node2), ")
    assert found["libraries"]["fix"].startswith("the same environment on every host")
    assert found["clock"]["found"] == "node2 is 90.0 s ahead of the others"
    assert "chronyc" in found["clock"]["fix"]
    assert f"{runs} of node2 is not the others' folder" in found["shared folder"]["found"]
    assert "every host mounts" in found["shared folder"]["fix"]
    assert "90 GB/s are asked for; slowest rank: 3 on node2" in found["link"]["found"]
    assert "NCCL_DEBUG=INFO" in found["link"]["fix"]
    assert told.report["bad_hosts"] == ["node2"]
    assert list(runs.iterdir()) == []


def test_a_wrong_interface_stops_before_anybody_waits(tmp_path: Path) -> None:
    ranks = [Rank("node1"), Rank("node2", env={"GLOO_SOCKET_IFNAME": "ib7"})]
    began = time.monotonic()
    told = examine(ranks, "--output-dir", str(tmp_path))
    assert told.codes == [9, 9], told.err
    assert time.monotonic() - began < 60
    found = told.findings("fail")["network"]
    assert found["found"] == "GLOO_SOCKET_IFNAME=ib7 names no interface of node2"
    assert found["hosts"] == ["node2"]
    assert "choose of: " in found["fix"]
    assert "link" not in {row["check"] for row in told.report["findings"]}, "nothing was measured"


@pytest.mark.slow
def test_who_did_come_is_said_when_somebody_does_not(tmp_path: Path) -> None:
    ranks = [Rank("node1"), Rank("node2"), Rank("node3", absent=True)]
    told = examine(ranks, "--output-dir", str(tmp_path), "--join-s", "6")
    assert told.codes == [9, 9, None], told.err
    found = told.findings("fail")["processes"]
    assert found["found"] == "2 of 3 processes came: node1 (0), node2 (1); not heard of: rank 2"
    assert "--machine_rank" in found["fix"]


@pytest.mark.slow
def test_two_processes_of_one_rank(tmp_path: Path) -> None:
    """As when two machines are given the same --machine_rank."""
    ranks = [Rank("node1"), Rank("node2"), Rank("node3", env={"RANK": "1"})]
    told = examine(ranks, "--output-dir", str(tmp_path), "--join-s", "6")
    assert told.codes == [9, 9, 9]
    said = "".join(told.out)
    assert re.search(r"two processes say that they are rank 1: on node([23]) and node(?!\1)[23]", said), said
    assert told.findings("fail")["processes"]["found"].endswith("not heard of: rank 2")


def test_rank_0_out_of_reach(tmp_path: Path) -> None:
    """Whoever cannot come says so itself, and what it sees of its own host."""
    with socket.create_server(("localhost", 0)) as free:
        nobody = str(free.getsockname()[1])
    ranks = [Rank("node1"), Rank("node2", env={"MASTER_PORT": nobody})]
    told = examine(ranks, "--output-dir", str(tmp_path), "--join-s", "6", json_=False)
    assert told.codes == [9, 9]
    assert "rank 1 (node2):" in told.err[1]
    assert "waited in vain for an answer from" in " ".join(told.err[1].split())
    assert f"localhost:{nobody}" in told.err[1]
    assert "1 of 2 processes came: node1 (0); not heard of: rank 1" in " ".join(told.out[0].split())


def test_a_full_disk_and_a_sick_gpu_on_one_machine(tmp_path: Path) -> None:
    """One process, no launcher: a run folder of 8 MiB, a GPU whose driver counts memory errors."""
    runs, programs = tmp_path / "runs", tmp_path / "bin"
    runs.mkdir()
    programs.mkdir()
    (programs / "nvidia-smi").write_text(f"#!/bin/sh\ncat {tmp_path}/smi.xml\n")
    (programs / "nvidia-smi").chmod(0o755)
    (tmp_path / "smi.xml").write_text(
        "<nvidia_smi_log><driver_version>570.1</driver_version><gpu id='0'><product_name>NVIDIA A100</product_name>"
        "<ecc_errors><volatile><dram_uncorrectable>2</dram_uncorrectable></volatile></ecc_errors>"
        "</gpu></nvidia_smi_log>"
    )
    rank = Rank("node1", before=f"mount -t tmpfs -o size=8m tmpfs {runs}")
    told = examine([rank], "--output-dir", str(runs), PATH=f"{programs}:{os.environ['PATH']}")
    assert told.codes == [9], told.err
    found = told.findings("fail")
    gpu = found["GPUs"]
    assert gpu["found"] == "GPU 0 of node1: 2 uncorrected memory errors (ECC) since the driver was loaded"
    assert "drain the node" in gpu["fix"]
    assert "No space left on device" in found["disk"]["found"]
    assert f"{runs}: 0.01 GiB free" in found["shared folder"]["found"]
    assert "torch uses no GPU on node1" in found["torch"]["found"] or shutil.which("nvidia-smi")


@pytest.mark.slow
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    """Read-only for one host: the mount, for root may write anything else."""
    ranks = [
        Rank("node1"),
        Rank("node2", before=f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path}"),
    ]
    told = examine(ranks, "--output-dir", str(tmp_path), "--short")
    assert told.codes == [9, 9], told.err
    found = told.findings("fail")["shared folder"]
    assert found["found"] == f"{tmp_path}: rank 1 (node2) cannot write: Read-only file system"
    assert found["hosts"] == ["node2"]


@pytest.mark.slow
def test_a_process_that_dies_on_the_way_does_not_keep_the_others(tmp_path: Path) -> None:
    told = examine(
        [Rank("node1"), Rank("node2")],
        "--output-dir",
        str(tmp_path),
        "--short",
        DISTFT_FAULT="kill:rank=1,point=shared",
    )
    assert told.codes[0] == 9
    assert told.codes[1] not in (0, 9)
    assert "shared folder" in told.findings("fail")


@pytest.mark.slow  # a minute of waiting for a network that is gone
@pytest.mark.skipif(not can_wire(), reason="needs root, ip and tc to make two networks")
def test_a_cable_that_is_slow_and_then_cut(tmp_path: Path) -> None:
    """Two hosts with networks of their own: a real link of 200 Mbit/s, then one on which nothing passes."""
    asked = ("--output-dir", str(tmp_path), "--gib", "0.004", "--link-floor", "0.06", "--short")
    with Wire() as wire:
        good = examine(wire.ranks(), *asked)
        assert good.codes == [0, 0], good.out + good.err
        wire.slow("200mbit")
        slow = examine(wire.ranks(), *asked)
        assert slow.codes == [9, 9], slow.out + slow.err
        found = slow.findings("fail")
        assert set(found) == {"link"}
        rate = float(re.search(r"all-gather ([0-9.]+) GB/s", found["link"]["found"])[1])
        assert 0.005 < rate < 0.03, "200 Mbit/s are 0.025 GB/s"
        wire.cut()
        cut = examine(wire.ranks(), *asked, "--join-s", "8")
        assert cut.codes == [9, 9], cut.out + cut.err
        assert cut.findings("fail")["processes"]["found"].startswith(
            "1 of 2 processes came: node1 (0); not heard of: rank 1"
        )
        assert f"rank 1 waited in vain for an answer from {Wire.FIRST}" in cut.out[1]
