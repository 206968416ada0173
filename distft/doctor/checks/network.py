"""Where the processes are to meet, and through which interface: looked at before they try."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from distft.doctor.finding import Check, DoctorOptions, Facts, Finding, Here, Seen, by_host, fail, names, ok, warn

NET = Path("/sys/class/net")
INFINIBAND = Path("/sys/class/infiniband")


def look(here: Here) -> Facts:
    """Return the names, addresses, interfaces and adapters of this host."""
    address, port = here.env.get("MASTER_ADDR"), here.env.get("MASTER_PORT")
    listens = here.rank == 0 and here.world > 1 and here.env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return {
        "interfaces": {name: _state(NET / name / "operstate") for _, name in socket.if_nameindex()},
        "wanted": {name: here.env[name] for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if here.env.get(name)},
        "adapters": {
            f"{path.parent.parent.name}:{path.name}": _state(path / "state")
            for path in sorted(INFINIBAND.glob("*/ports/*"))
        },
        "hca": here.env.get("NCCL_IB_HCA", ""),
        "ib": here.env.get("NCCL_IB_DISABLE", "0") != "1",
        "meets": f"{address}:{port}" if address and here.world > 1 else "",
        "unresolved": _unresolved(address) if address and here.world > 1 else "",
        "name": _leads_to(socket.gethostname()),
        "foreign": bool(address and listens and _is_foreign(address)),
        "busy": bool(port and listens and port != "0" and _is_busy(int(port))),
    }


def judge(seen: Sequence[Seen], options: DoctorOptions) -> Iterator[Finding]:
    """Judge whether every process resolves MASTER_ADDR, and every named interface exists and is up."""
    bad = False
    for finding in [*_meeting(seen), *_names(seen), *_interfaces(seen), *_adapters(seen)]:
        bad = True
        yield finding
    if not bad:
        facts = seen[0].facts
        up = [name for name, state in facts["interfaces"].items() if state in ("up", "unknown") and name != "lo"]
        where = f"meets at {facts['meets']}; " if facts["meets"] else ""
        yield ok(f"{where}interfaces up: {names(up) or 'lo'}")


def _meeting(seen: Sequence[Seen]) -> Iterator[Finding]:
    lost = [process for process in seen if process.facts["unresolved"]]
    if lost:
        yield fail(
            f"MASTER_ADDR of {lost[0].facts['meets']} means nothing to {names(process.who for process in lost)}: "
            f"{lost[0].facts['unresolved']}",
            "use a name that every host resolves (getent hosts NAME), or rank 0's IP address",
            (process.host for process in lost),
        )
    elif seen[0].facts["foreign"]:
        yield warn(
            f"MASTER_ADDR of {seen[0].facts['meets']} is no address of {seen[0].host}, where rank 0 is",
            "name the host of rank 0: in Slurm the first of scontrol show hostnames",
        )
    if seen[0].facts["busy"]:
        port = seen[0].facts["meets"].rpartition(":")[2]
        yield fail(
            f"port {port} of {seen[0].host} is taken, and rank 0 is to listen there",
            f"set MASTER_PORT to another one, or end what listens (ss -ltnp 'sport = :{port}')",
        )


def _names(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Report host names that others cannot reach: without an interface gloo listens at its host name's address."""
    leaders = by_host(seen)
    lost = [
        process
        for process in leaders
        if not process.facts["name"] and "GLOO_SOCKET_IFNAME" not in process.facts["wanted"]
    ]
    if lost and len(leaders) > 1:
        yield warn(
            f"the name of {names(process.host for process in lost)} leads to no address that others can reach",
            "GLOO_SOCKET_IFNAME=INTERFACE (site file: interface), or mend /etc/hosts",
        )


def _interfaces(seen: Sequence[Seen]) -> Iterator[Finding]:
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        without, down = list[Seen](), list[Seen]()
        for process in seen:
            wanted = process.facts["wanted"].get(variable, "")
            if not wanted:
                continue
            chosen = chosen_interfaces(wanted, process.facts["interfaces"], exactly=variable.startswith("GLOO"))
            if not chosen:
                without.append(process)
            elif all(process.facts["interfaces"][name] == "down" for name in chosen):
                down.append(process)
        for which, what in ((without, "names no interface"), (down, "names an interface that is down")):
            if which:
                facts = which[0].facts
                yield fail(
                    f"{variable}={facts['wanted'][variable]} {what} of {names({process.host: 0 for process in which})}",
                    f"choose of: {', '.join(facts['interfaces'])}; or unset it (site file: interface)",
                    (process.host for process in which),
                )


def chosen_interfaces(wanted: str, there: Mapping[str, str], *, exactly: bool) -> list[str]:
    """Return the interfaces that a variable means.

    NCCL reads a list of beginnings, of exact names after "=", and of those to be left out after "^"; gloo exact names.
    Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-socket-ifname
    """
    without = wanted.startswith("^")
    exactly = exactly or wanted.lstrip("^").startswith("=")
    listed = [word for word in wanted.lstrip("^=").split(",") if word]
    hit = [name for name in there if any(name == word if exactly else name.startswith(word) for word in listed)]
    return [name for name in there if name not in hit] if without else hit


def _adapters(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Report InfiniBand and RoCE ports that are there and do not work."""
    for process in by_host(seen):
        ports = process.facts["adapters"]
        named = [word.lstrip("^=").partition(":")[0] for word in process.facts["hca"].split(",") if word]
        ours = {port: state for port, state in ports.items() if not named or any(port.startswith(n) for n in named)}
        dead = [port for port, state in ours.items() if "ACTIVE" not in state]
        if not process.facts["ib"] or not (named or dead):
            continue
        if named and not process.facts["hca"].startswith("^") and not ours:
            yield fail(
                f"NCCL_IB_HCA={process.facts['hca']} names no adapter of {process.host}",
                f"choose of: {', '.join(ports) or 'none, there is no InfiniBand here'}",
                [process.host],
            )
        elif dead and len(dead) == len(ours):
            yield fail(
                f"no port of {names(dead)} on {process.host} is active",
                "see ibstat: cable, subnet manager",
                [process.host],
            )
        elif dead:
            yield warn(
                f"{names(dead)} on {process.host} is not active", "see ibstat: cable, subnet manager", [process.host]
            )


def _state(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"


def _unresolved(address: str) -> str:
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _is_foreign(address: str) -> bool:
    """Return whether no interface of this host has the address."""
    for family, kind, protocol, _, where in _addresses(address):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((where[0], 0))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    continue
            return False
    return True


def _leads_to(host: str) -> str:
    """Return the first address of a name that is not this host's own loop; empty: none."""
    return next((where[0] for *_, where in _addresses(host) if not str(where[0]).startswith(("127.", "::1"))), "")


def _addresses(address: str) -> list:
    try:
        return socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError:
        return []


def _is_busy(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


CHECK = Check(name="network", look=look, judge=judge, gate=True)
