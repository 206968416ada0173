"""What rank 0 makes of what everybody saw: each fault named, with the fix, and nothing where nothing is wrong."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from distft.catalog import REGISTRIES
from distft.core.accelerators import BY_NAME
from distft.doctor.checks import CHECKS, clock, gpus, host, libraries, limits, link, network, shared, world
from distft.doctor.finding import Check, DoctorOptions, Finding, Here, Seen, Severity, run_judge, run_look
from distft.doctor.findings_table import Report
from distft.engine.bandwidth import pairs
from distft.recipe import load_recipe

GIB = 2**30
ROOT = Path(__file__).resolve().parents[3]
HOSTS = ("node1", "node1", "node2", "node2")


def judged(
    check: Check, *facts: dict, asked: DoctorOptions | None = None, hosts: tuple[str, ...] = HOSTS
) -> list[Finding]:
    seen = [Seen(rank=rank, host=hosts[rank], facts=each) for rank, each in enumerate(facts)]
    return run_judge(check, seen, asked or DoctorOptions())


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def here(**more) -> Here:
    known = {
        "rank": 0,
        "world": 1,
        "local_rank": 0,
        "env": {},
        "options": DoctorOptions(),
        "hosts": (socket.gethostname(),),
    }
    return Here(**(known | more))


def test_every_check_looks_alone_and_judges_what_it_saw(tmp_path: Path) -> None:
    asked = DoctorOptions(shared=tmp_path, output=tmp_path, gib=0.001)
    report = Report(("me",))
    for check in CHECKS:
        facts = run_look(check, here(options=asked))
        assert "error" not in facts, (check.name, facts)
        findings = run_judge(check, [Seen(rank=0, host="me", facts=facts)], asked)
        assert findings, check.name
        report.add(check.name, findings)
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert list(tmp_path.iterdir()) == [], "it tidies up"
    assert report.to_json()["findings"][0]["check"] == "processes"


def test_who_could_not_look_is_a_finding() -> None:
    def broken(here: Here) -> dict:
        raise OSError(5, "Input/output error")

    facts = run_look(replace(limits.CHECK, look=broken), here())
    assert facts == {"error": "OSError: [Errno 5] Input/output error"}
    found = only(judged(limits.CHECK, {"error": "OSError: Input/output error"}))
    assert found.verdict is Severity.FAIL
    assert found.message == "rank 0 (node1) could not look: OSError: Input/output error"
    assert found.hosts == ("node1",)


# -- libraries ------------------------------------------------------------------------------------------------------


def installed(**other) -> dict:
    return {"python": "3.12.1", "torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0"} | {
        "deepspeed": None, "peft": "0.21.2"} | other  # fmt: skip


def test_another_version_on_one_rank() -> None:
    found = only(judged(libraries.CHECK, *[installed()] * 3, installed(torch="2.12.0")))
    assert found.verdict is Severity.FAIL
    assert found.message == "torch 2.12.0 on rank 3 (node2), 2.13.0 on others"
    assert found.hosts == ("node2",)
    gone = only(judged(libraries.CHECK, *[installed(deepspeed="0.19.8")] * 3, installed()))
    assert gone.message == "deepspeed is not there on rank 3 (node2), 0.19.8 on others"


def test_too_old_is_said_with_what_is_wanted() -> None:
    found = only(judged(libraries.CHECK, installed(transformers="4.40.0")))
    assert found.message == "transformers 4.40.0, wanted >=5.17"
    assert found.fix == 'pip install "transformers>=5.17"'


def test_versions_that_agree() -> None:
    assert only(judged(libraries.CHECK, *[installed()] * 4)).verdict is Severity.OK


# -- GPUs -----------------------------------------------------------------------------------------------------------

SMI = """<?xml version="1.0" ?>
<nvidia_smi_log>
  <driver_version>570.86.15</driver_version>
  {gpus}
</nvidia_smi_log>"""
GPU = """<gpu id="00000000:0{index}:00.0">
  <product_name>{name}</product_name> <uuid>GPU-{index}</uuid>
  <clocks_{kind}_reasons>
    <clocks_{kind}_reason_gpu_idle>Active</clocks_{kind}_reason_gpu_idle>
    <clocks_{kind}_reason_hw_slowdown>{slow}</clocks_{kind}_reason_hw_slowdown>
  </clocks_{kind}_reasons>
  <fb_memory_usage><total>81559 MiB</total><used>{used} MiB</used></fb_memory_usage>
  <ecc_errors>
    <volatile><sram_uncorrectable>N/A</sram_uncorrectable><dram_correctable>5</dram_correctable>
      <dram_uncorrectable>{bad}</dram_uncorrectable></volatile>
    <aggregate><dram_uncorrectable>7</dram_uncorrectable></aggregate>
  </ecc_errors>
  {remapped}
  <temperature><gpu_temp>41 C</gpu_temp></temperature>
  <processes>{processes}</processes>
</gpu>"""
PROCESS = "<process_info><pid>4711</pid><type>C</type><used_memory>9 MiB</used_memory></process_info>"


def smi(*gpus: dict) -> str:
    healthy = {"name": "NVIDIA H100 80GB HBM3", "kind": "event", "slow": "Not Active", "used": 4, "bad": 0}
    healthy |= {"remapped": "<remapped_rows>N/A</remapped_rows>", "processes": ""}
    return SMI.format(gpus="\n".join(GPU.format(index=i, **(healthy | gpu)) for i, gpu in enumerate(gpus)))


def of_smi(text: str, **more) -> dict:
    driver, found = gpus.read_smi(text)
    return {"expected": 0, "trouble": "", "driver": driver, "gpus": found} | more


def test_healthy_gpus() -> None:
    found = only(judged(gpus.CHECK, *[of_smi(smi({}, {}))] * 4))
    assert found.verdict is Severity.OK
    assert found.message == "2 x NVIDIA H100 80GB HBM3, driver 570.86.15, on each of 2 hosts"


@pytest.mark.parametrize(
    ("sick", "verdict", "said"),
    [
        ({"bad": 3}, "fail", "GPU 1 of node2: 3 uncorrected memory errors (ECC) since the driver was loaded"),
        (
            {"remapped": "<remapped_rows><remapped_row_pending>Yes</remapped_row_pending></remapped_rows>"},
            "fail",
            "GPU 1 of node2: broken memory rows wait to be replaced",
        ),
        (
            {"remapped": "<remapped_rows><remapped_row_failure>Yes</remapped_row_failure></remapped_rows>"},
            "fail",
            "GPU 1 of node2: broken memory rows could not be replaced",
        ),
        ({"slow": "Active"}, "warn", "GPU 1 of node2 is throttled (hw_slowdown) at 41 C"),
        ({"slow": "Active", "kind": "throttle"}, "warn", "GPU 1 of node2 is throttled (hw_slowdown) at 41 C"),
        (
            {"used": 40000, "processes": PROCESS},
            "fail",
            "GPU 1 of node2: 39.1 of 79.6 GiB are taken by processes 4711",
        ),
        ({"used": 500, "processes": PROCESS}, "warn", "GPU 1 of node2: 0.5 of 79.6 GiB are taken by processes 4711"),
    ],
    ids=["ecc", "remap-pending", "remap-failed", "throttled", "throttled-old-driver", "taken", "used-a-little"],
)
def test_a_sick_gpu(sick: dict, verdict: str, said: str) -> None:
    well = of_smi(smi({}, {}))
    found = only(judged(gpus.CHECK, well, well, of_smi(smi({}, sick)), well | {"gpus": []}))
    assert (found.verdict.value, found.message) == (verdict, said)
    assert found.fix
    assert found.hosts == ("node2",)


def test_errors_as_older_drivers_count_them() -> None:
    old = "<double_bit><device_memory>2</device_memory><total>2</total></double_bit>"
    _, (gpu,) = gpus.read_smi(
        smi({}).replace("<volatile>", f"<volatile><single_bit><total>9</total></single_bit>{old}")
    )
    assert gpu["uncorrected"] == 2


def test_gpus_that_are_not_there() -> None:
    one_less = judged(gpus.CHECK, of_smi(smi({}, {}), expected=2), of_smi(smi({}), expected=2), hosts=("a", "b"))
    assert [finding.message for finding in one_less] == [
        "the job has 2 GPUs on b, the driver shows 1",
        "GPUs 1 on b, 2 on others",
    ]
    none = {"expected": 0, "gpus": [], "trouble": "no answer in 60 s"}
    assert only(judged(gpus.CHECK, none)).message == "nvidia-smi on node1: no answer in 60 s"
    assert only(judged(gpus.CHECK, none | {"trouble": "absent"})).verdict is Severity.OK
    assert only(judged(gpus.CHECK, none | {"trouble": "absent", "expected": 8})).verdict is Severity.WARN


def test_only_the_gpus_we_may_use_are_looked_at() -> None:
    _, both = gpus.read_smi(smi({"bad": 1}, {}))
    assert [gpu["index"] for gpu in gpus.visible(both, {"CUDA_VISIBLE_DEVICES": "1"})] == [1]
    assert [gpu["index"] for gpu in gpus.visible(both, {"CUDA_VISIBLE_DEVICES": "GPU-0"})] == [0]
    assert gpus.visible(both, {"CUDA_VISIBLE_DEVICES": ""}) == []
    assert gpus.visible(both, {}) == both


# -- host and limits ------------------------------------------------------------------------------------------------


def room(**other) -> dict:
    return {"cores": 8, "affinity": list(range(8)), "threads": "1", "memory": 64 * GIB, "shm": 8 * GIB} | other


def test_too_little_of_a_host() -> None:
    assert only(judged(host.CHECK, *[room()] * 4)).verdict is Severity.OK
    shm = only(judged(host.CHECK, room(), room(), room(shm=16 * 2**20), room(shm=16 * 2**20)))
    assert (shm.verdict, shm.message, shm.hosts) == (Severity.FAIL, "16 MiB free in /dev/shm of node2", ("node2",))
    memory = only(judged(host.CHECK, room(), room(), room(memory=GIB), room(memory=GIB)))
    assert (memory.verdict.value, memory.message) == ("fail", "0.5 GiB of memory for each of 2 processes on node2")
    cores = only(judged(host.CHECK, *[room(affinity=[3])] * 2))
    assert (cores.verdict.value, cores.message) == ("warn", "1 cores for 2 processes on node1")
    planned = only(judged(host.CHECK, room(memory=16 * GIB), asked=DoctorOptions(per_host=8)))
    assert planned.message == "2.0 GiB of memory for each of 8 processes on node1"


def test_limits() -> None:
    well = {"memlock": -1, "nofile": 65536, "fabric": True}
    assert only(judged(limits.CHECK, well)).verdict is Severity.OK
    assert only(judged(limits.CHECK, well | {"memlock": 65536, "fabric": False})).verdict is Severity.OK
    locked = only(judged(limits.CHECK, well, well | {"memlock": 65536}, hosts=("a", "b")))
    assert (locked.verdict, locked.hosts) == (Severity.FAIL, ("b",))
    assert "at most 64 KiB may be locked on b" in locked.message
    assert only(judged(limits.CHECK, well | {"nofile": 1024})).verdict is Severity.WARN
    assert only(judged(limits.CHECK, well | {"nofile": 256})).verdict is Severity.FAIL


# -- network --------------------------------------------------------------------------------------------------------


def net(**other) -> dict:
    known = {"interfaces": {"lo": "unknown", "eth0": "up", "ib0": "up"}, "wanted": {}, "adapters": {}, "hca": ""}
    known |= {"ib": True, "meets": "node1:29500", "unresolved": "", "foreign": False, "busy": False, "name": "10.0.0.1"}
    return known | other


@pytest.mark.parametrize(
    ("wanted", "exactly", "chosen"),
    [
        ("eth0", False, ["eth0"]),
        ("eth,ib", False, ["eth0", "ib0"]),
        ("=eth", False, []),
        ("^lo,docker", False, ["eth0", "ib0"]),
        ("^=lo", False, ["eth0", "ib0"]),
        ("ib", True, []),
        ("ens32", False, []),
    ],
)
def test_what_an_interface_variable_means(wanted: str, exactly: bool, chosen: list[str]) -> None:
    assert network.chosen_interfaces(wanted, net()["interfaces"], exactly=exactly) == chosen


def test_a_wrong_interface() -> None:
    assert only(judged(network.CHECK, *[net(wanted={"NCCL_SOCKET_IFNAME": "ib0"})] * 4)).verdict is Severity.OK
    wanted = {"wanted": {"GLOO_SOCKET_IFNAME": "ib0"}}
    no_ib = net(**wanted, interfaces={"lo": "unknown", "ens3": "up"})
    found = only(judged(network.CHECK, net(**wanted), net(**wanted), no_ib, no_ib))
    assert (found.verdict, found.hosts) == (Severity.FAIL, ("node2",))
    assert found.message == "GLOO_SOCKET_IFNAME=ib0 names no interface of node2"
    assert "choose of: lo, ens3" in found.fix
    down = net(**wanted, interfaces={"ib0": "down"})
    assert (
        only(judged(network.CHECK, down)).message == "GLOO_SOCKET_IFNAME=ib0 names an interface that is down of node1"
    )


def test_the_meeting_place() -> None:
    lost = only(judged(network.CHECK, net(), net(), net(), net(unresolved="Name or service not known")))
    assert lost.message.startswith("MASTER_ADDR of node1:29500 means nothing to rank 3 (node2): Name or service")
    busy = only(judged(network.CHECK, net(busy=True), net()))
    assert (busy.verdict.value, busy.message) == ("fail", "port 29500 of node1 is taken, and rank 0 is to listen there")
    assert only(judged(network.CHECK, net(foreign=True))).verdict is Severity.WARN
    assert "leads to no address" in only(judged(network.CHECK, net(), net(), net(name=""), net(name=""))).message


def test_ports_in_use_are_seen() -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        assert network.look(here(world=2, env=env))["busy"]
        assert not network.look(here(world=2, rank=1, env=env))["busy"], "only rank 0 listens"
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        assert not network.look(here(world=2, env=env))["busy"], "that is torchrun, which listens for us"
    seen = network.look(here(world=2, env={"MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": port}))
    assert seen["unresolved"]
    assert network.look(here(world=2, env={"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": port}))["foreign"]


def test_adapters() -> None:
    up, down = "4: ACTIVE", "1: DOWN"
    half = net(adapters={"mlx5_0:1": up, "mlx5_1:1": down})
    assert only(judged(network.CHECK, half)).message == "mlx5_1:1 on node1 is not active"
    assert only(judged(network.CHECK, half | {"hca": "mlx5_0"})).verdict is Severity.OK
    assert only(judged(network.CHECK, half | {"hca": "mlx5_1"})).verdict is Severity.FAIL
    assert only(judged(network.CHECK, half | {"hca": "mlx4"})).message == "NCCL_IB_HCA=mlx4 names no adapter of node1"
    assert only(judged(network.CHECK, half | {"hca": "mlx4", "ib": False})).verdict is Severity.OK


# -- clocks, folders, links -----------------------------------------------------------------------------------------


def test_clocks() -> None:
    rest = {"ahead_s": {}, "file_s": None}
    hosts = ("node1", "node2", "node3", "node4")

    def of(ahead: dict, file_s: float = 0.01) -> Finding:
        return only(judged(clock.CHECK, {"ahead_s": ahead, "file_s": file_s}, rest, rest, rest, hosts=hosts))

    assert of({1: 0.01, 2: -0.2, 3: 0.0}).verdict is Severity.OK
    late = of({1: 0.0, 2: -5.0, 3: 0.0})
    assert (late.verdict.value, late.message) == ("warn", "node3 is 5.0 s behind the others")
    first = of({1: -90.0, 2: -90.1, 3: -90.0})
    assert (first.verdict.value, first.message, first.hosts) == (
        "fail",
        "node1 is 90.0 s ahead of the others",
        ("node1",),
    )
    assert "the shared folder's clock is 7.0 s behind node1's" in of({1: 0.0, 2: 0.0, 3: 0.0}, -7.0).message


def folder(**other) -> dict:
    known = {"folder": "/runs", "wrote": "", "missing": [], "replaced": "", "lock": "", "inodes": None}
    return known | {"space": 500 * GIB} | other


def test_folders() -> None:
    assert only(judged(shared.CHECK, *[folder()] * 4)).verdict is Severity.OK
    apart = only(judged(shared.CHECK, folder(missing=[2, 3]), folder(missing=[2, 3]), *[folder(missing=[0, 1])] * 2))
    assert (apart.verdict, apart.hosts) == (Severity.FAIL, ("node2",))
    assert "/runs of node2 is not the others' folder: rank 2 (node2) does not see" in apart.message
    denied = only(judged(shared.CHECK, folder(), folder(), folder(), folder(wrote="Permission denied", missing=[])))
    assert denied.message == "/runs: rank 3 (node2) cannot write: Permission denied"
    assert denied.hosts == ("node2",)
    assert only(judged(shared.CHECK, folder(lock="a lock (flock) is refused: x"))).verdict is Severity.WARN
    assert "no atomic rename" in only(judged(shared.CHECK, folder(replaced="absent"))).fix
    assert only(judged(shared.CHECK, folder(space=GIB // 2))).verdict is Severity.FAIL
    assert only(judged(shared.CHECK, folder(space=5 * GIB))).verdict is Severity.WARN
    assert "room for 3 more files" in only(judged(shared.CHECK, folder(inodes=3))).message


def sent(rate: float, ring: dict[int, float], **other) -> dict:
    known = {"alone": False, "bytes": GIB, "all_reduce": rate, "all_gather": rate * 1.1, "device": "cpu"}
    return known | {"ring": ring} | other


def test_links() -> None:
    ring = [{3: 1e9, 1: 9e9}, {0: 9e9, 2: 9e9}, {1: 9e9, 3: 1e9}, {2: 1e9, 0: 1e9}]
    slow = only(judged(link.CHECK, *[sent(5e9, each) for each in ring]))
    assert slow.verdict is Severity.WARN
    assert slow.hosts == ("node2",)
    assert "slowest rank: 3 on node2, 1.00 GB/s with its better neighbour, the median 9.00" in slow.message
    floor = only(judged(link.CHECK, *[sent(5e9, each) for each in ring], asked=DoctorOptions(link_floor_gb_per_s=20)))
    assert (floor.verdict, floor.hosts) == (Severity.FAIL, ("node2",))
    assert "20 GB/s are asked for" in floor.message
    even = [{3: 9e9, 1: 9e9}] * 4
    assert only(judged(link.CHECK, *[sent(5e9, each) for each in even])).verdict is Severity.OK
    h100 = {"device": "NVIDIA H100 80GB HBM3"}
    paper = only(judged(link.CHECK, *[sent(5e9, each, **h100) for each in even]))
    assert (paper.verdict.value, "the link has 50 GB/s on paper" in paper.message) == ("warn", True)
    assert only(judged(link.CHECK, *[sent(40e9, each, **h100) for each in even])).verdict is Severity.OK


def test_what_a_link_should_give() -> None:
    row = BY_NAME["h100-80gb"]
    assert link.expected_link("NVIDIA H100 80GB HBM3", hosts=1) == row.link_bytes_per_s == 450e9
    assert link.expected_link("NVIDIA H100 80GB HBM3", hosts=2) == row.between_nodes_bytes_per_s
    assert link.expected_link("cpu", hosts=2) is None


@pytest.mark.parametrize("count", range(2, 10))
def test_a_ring_measures_every_neighbour_once(count: int) -> None:
    ranks = list(range(10, 10 + count))
    found = pairs(ranks)
    want = {frozenset((ranks[i], ranks[(i + 1) % count])) for i in range(count)}
    assert {frozenset(pair) for pair in found} == want
    assert len(found) == len(want)
    half = found[: count // 2]
    assert len({rank for pair in half for rank in pair}) == 2 * len(half), "the first half at the same time"
    assert pairs([7]) == []


# -- processes, and the report --------------------------------------------------------------------------------------


def test_worlds() -> None:
    four = {"world": 4, "nodes": 0}
    assert only(judged(world.CHECK, *[four] * 4)).message == "4 processes on 2 hosts (node1, node2)"
    odd = judged(world.CHECK, four, four, four, four | {"world": 8})
    assert odd[0].message == "rank 3 (node2) was started for 8 processes, others 4"
    idle = judged(world.CHECK, *[four | {"nodes": 3}] * 4)
    assert idle[0].message == "the job has 3 nodes, the processes are on 2"
    recipe = load_recipe(
        ROOT / "recipes/tiny-full.toml",
        registries=REGISTRIES,
        overrides=["train.global_batch_size=6", "train.micro_batch_size=1"],
    )
    batch = judged(world.CHECK, *[four] * 4, asked=DoctorOptions(recipe=recipe))
    assert (batch[0].verdict, "global_batch_size" in batch[0].message) == (Severity.FAIL, True)


def test_the_report() -> None:
    report = Report(HOSTS)
    report.add("disk", [Finding(verdict=Severity.OK, message="fast")])
    assert (report.code, report.bad_hosts) == (0, [])
    report.add("clock", [Finding(verdict=Severity.WARN, message="late " * 30, fix="chrony", hosts=("node1",))])
    assert (report.code, report.bad_hosts) == (0, [])
    assert report.text(as_json=False).splitlines()[-1] == "doctor: ready, with 1 to look at"
    report.add("GPUs", [Finding(verdict=Severity.FAIL, message="sick", fix="drain it", hosts=("node2",))])
    assert (report.code, report.bad_hosts) == (9, ["node2"])
    lines = report.text(as_json=False).splitlines()
    assert lines[1] == "disk   ok    fast"
    assert "fix: drain it" in lines[-2]
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "doctor: a run would fail here: 1 to mend"
