"""The pieces of what start-up, checkpoints and collectives cost at hundreds of ranks, each measured on a small machine.

    python benchmarks/at_scale.py [--only imports join collectives records commit weights plan] [--configs DIR]
                                  --out FILE

`docs/scaling.md` puts them together for 512 GPUs. What is measured here is what grows with the number of ranks and runs
on a host's CPU: files, stores, gloo, Python objects. Processes are forked from one that has imported torch, so that 64
of them fit; with more of them than cores their times are upper bounds. Parts that are asked for are replaced in FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import kit

RANKS, NODES = 512, 64
JOINED = (2, 4, 8, 16, 32, 64)
TALKING = (2, 4, 8, 16, 32)
MODELS = {"8b": ("llama8b-full.toml", "Llama-3.1-8B.json"), "70b": ("llama70b-full.toml", "Llama-3.1-70B.json")}
OPENED = """
import importlib._bootstrap_external as files, json, os, sys
counts = {"stats": 0}
opened = set()
inner = files._path_stat
def stat(path):
    counts["stats"] += 1
    return inner(path)
files._path_stat = stat
sys.addaudithook(lambda event, given: opened.add(str(given[0])) if event == "open" else None)
sys.argv = json.loads(sys.argv[1])
from distft.core.hard_exit import hard_exit
from distft.job import main
code = main(sys.argv[1:])
roots = tuple(sys.path[1:]) + (sys.prefix, sys.base_prefix)
mapped = {line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if "/" in line}
kept = [path for path in opened if path.startswith(roots) and os.path.isfile(path)]
libraries = [path for path in mapped if ".so" in path and os.path.isfile(path)]
size = lambda paths: sum(os.path.getsize(path) for path in paths)
json.dump({"files": len(kept), "bytes": size(kept), "libraries": len(libraries), "library_bytes": size(libraries),
           "stats": counts["stats"], "code": code}, open("opened.json", "w"))
hard_exit(code)
"""


def main() -> None:
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {
        "imports": imports,
        "join": join,
        "collectives": collectives,
        "records": records,
        "commit": commit,
        "weights": weights,
        "plan": plan,
    }
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    options.add_argument("--configs", type=Path, help="folder with the models' config files, for `commit` and `plan`")
    options.add_argument("--out")
    asked = options.parse_args()
    known = Path(asked.out) if asked.out else None
    result = json.loads(known.read_text(encoding="utf-8"))["parts"] if known and known.exists() else {}
    for name in asked.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        result[name] = parts[name](asked)
    kit.finish({"benchmark": "at_scale", "parts": result}, asked.out)


def imports(asked: argparse.Namespace) -> dict[str, Any]:
    """Files that one process opens and looks for until a run of one step has ended, by engine."""
    found = {}
    for engine in ("fsdp2", "zero3"):
        with tempfile.TemporaryDirectory() as text:
            given = ["distft.train", str(kit.ROOT / "recipes/tiny-full.toml"), "--output-dir", text]
            for setting in (
                "train.epochs=",
                "train.max_steps=1",
                f'engine.name="{engine}"',
                f'data.cache_dir="{text}/c"',
            ):
                given += ["--set", setting]
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(kit.ROOT)}
            subprocess.run(
                [sys.executable, "-c", OPENED, json.dumps(given)],
                cwd=text,
                env=env,
                check=True,
                stderr=subprocess.DEVNULL,
            )
            found[engine] = json.loads((Path(text) / "opened.json").read_text(encoding="utf-8"))
    return found


def forked(world: int, work: Callable[[int, int, int], Any]) -> list[Any]:
    """What `work(rank, world, port)` gives in each of so many processes of their own; none ends before all are done."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    pipes, pids = [], []
    gate, open_gate = os.pipe()
    for rank in range(world):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(open_gate)
            try:
                os.write(writer, pickle.dumps(work(rank, world, port)))
                os.close(writer)
                os.read(gate, 1)  # ends when the parent closes its end
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(writer)
        pipes.append(reader)
        pids.append(pid)
    said = []
    for pipe in pipes:
        with os.fdopen(pipe, "rb") as file:
            said.append(file.read())
    os.close(gate)
    os.close(open_gate)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        raise SystemExit(f"processes ended with {codes}")
    return [pickle.loads(one) for one in said]


def join(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds until N processes have met in a store, and until they have a gloo group (all pairs of them connected)."""
    import torch.distributed as dist

    def work(rank: int, world: int, port: int) -> tuple[float, float]:
        began = time.perf_counter()
        store = dist.TCPStore("localhost", port, world, rank == 0, timedelta(seconds=120), wait_for_workers=False)
        store.set(f"here/{rank}", "x")
        store.wait([f"here/{other}" for other in range(world)])
        met = time.perf_counter()
        group = dist.PrefixStore("group", store)
        dist.init_process_group("gloo", store=group, rank=rank, world_size=world, timeout=timedelta(seconds=120))
        dist.barrier()
        done = time.perf_counter()
        dist.barrier()
        return met - began, done - met

    rows = []
    for world in JOINED:
        took = forked(world, work)
        rows.append({"world": world, "met_s": max(met for met, _ in took), "group_s": max(group for _, group in took)})
    return rows


def collectives(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of what a run does on the host: three doubles a step, objects at looks and saves."""
    import torch
    import torch.distributed as dist

    from distft.engine.recursive_doubling import summed

    def timed(repeat: int, work: Callable[[], object]) -> dict[str, float]:
        took = []
        for _ in range(repeat):
            began = time.perf_counter()
            work()
            took.append(1000 * (time.perf_counter() - began))
        return kit.quantiles(took[repeat // 10 :])

    def work(rank: int, world: int, port: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
        total = torch.zeros(3, dtype=torch.float64)
        everyone: list[Any] = [None] * world
        large = os.urandom(256 * 1024)
        said = {
            "all_reduce_ms": timed(60, lambda: dist.all_reduce(total)),
            "doubling_ms": timed(60, lambda: summed(total, rank, world)),
            "gather_object_ms": timed(20, lambda: dist.all_gather_object(everyone, ("host", 0.1, 0.2))),
            "gather_256k_ms": timed(10, lambda: dist.all_gather_object(everyone, large)),
            "to_rank_0_256k_ms": timed(10, lambda: dist.gather_object(large, everyone if rank == 0 else None)),
        }
        dist.barrier()
        return said

    rows = [{"world": world} | forked(world, work)[0] for world in TALKING]
    return [*rows, {"slopes_ms_per_rank": {key: _slope(rows, key) for key in rows[0] if key != "world"}}]


def _slope(rows: list[dict[str, Any]], key: str) -> float:
    """Of the medians against the number of ranks, least squares."""
    return statistics.linear_regression([row["world"] for row in rows], [row[key]["median"] for row in rows]).slope


def records(asked: argparse.Namespace) -> dict[str, Any]:
    """The watch's files: what is written each beat, and what looking at all of them costs when nobody gets on."""
    from distft.core import host
    from distft.health.heartbeat import PLACE, SIZE, Heartbeat, HeartbeatFile
    from distft.health.watchdog import MAX_BEAT_S

    with tempfile.TemporaryDirectory() as text:
        boards = [HeartbeatFile(Path(text), rank) for rank in range(RANKS)]
        for rank, board in enumerate(boards):
            board.open()
            board.write(Heartbeat(rank=rank, process=host.identity(), phase="forward", step=5))
        began = time.perf_counter()
        for rank, board in enumerate(boards):
            board.write(Heartbeat(rank=rank, process=host.identity(), phase="forward", step=6))
            board.flush()
        wrote = time.perf_counter() - began
        began = time.perf_counter()
        seen = boards[0].read(range(RANKS))
        read = time.perf_counter() - began
        assert len(seen) == RANKS
        began = time.perf_counter()
        for count in range(10_000):
            boards[0].mark("forward", 6, count)
        marked = (time.perf_counter() - began) / 10_000
        for board in boards:
            board.close()
    return {
        "ranks": RANKS,
        "beat_s": MAX_BEAT_S,
        "bytes_a_beat": SIZE + PLACE,
        "write_ms": 1000 * wrote / RANKS,
        "read_all_ms": 1000 * read,
        "mark_us": 1e6 * marked,
    }


def commit(asked: argparse.Namespace) -> dict[str, Any]:
    """The commit of a checkpoint under zero3, where each rank has a piece of every tensor; without the tensors."""
    return {f"{size}-{ranks}": _commit(size, asked, ranks) for size in MODELS for ranks in (64, RANKS)}


def _commit(size: str, asked: argparse.Namespace, ranks: int) -> dict[str, Any]:
    from distft.checkpoint.intervals import Chunk, index_bytes, parse_index
    from distft.checkpoint.manifest import FileEntry, Manifest, parse_manifest
    from distft.checkpoint.saving import WrittenFiles, merge
    from distft.checkpoint.shards import DCP_METADATA, write_dcp_metadata

    planner = _planner(size, asked, "zero3")
    params = [(param.name, param.numel) for param in planner.inventory(planner.recipe()).params]
    names = [(f"{kind}.{name}", numel) for kind in ("param", "exp_avg", "exp_avg_sq") for name, numel in params]

    def written(rank: int) -> WrittenFiles:
        file, offset, parts = f"__{rank}_0.distcp", 0, []
        for name, numel in names:
            share = -(-numel // ranks)
            start, stop = min(numel, rank * share), min(numel, (rank + 1) * share)
            chunk = Chunk(start, stop - start, file, offset, 4 * (stop - start) + 1200) if stop > start else None
            parts.append((name, numel, "float32", chunk))
            offset += 4 * (stop - start) + 1200
        return WrittenFiles(
            [FileEntry(file, offset, "0" * 64), FileEntry(f"rank-{rank:05d}.json", 900, "0" * 64)], parts
        )

    took: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = work()
        took[f"{name}_s"] = round(time.perf_counter() - began, 3)
        return found

    everyone = [written(rank) for rank in range(ranks)]
    sent = [pickle.dumps((None, one)) for one in everyone]
    del everyone
    before = _rss()
    heard = timed("unpickle_all", lambda: [pickle.loads(one)[1] for one in sent])
    heard_bytes = _rss() - before
    entries = timed("merge", lambda: merge(heard))
    index = timed("index", lambda: index_bytes(entries))
    with tempfile.TemporaryDirectory() as text:
        timed("dcp_metadata", lambda: write_dcp_metadata(Path(text), entries))
        metadata = (Path(text) / DCP_METADATA).stat().st_size
    files = tuple(file for one in heard for file in one.files)
    made = Manifest(step=1, world=ranks, engine="zero3", hashes={"recipe": "0" * 64}, files=files)
    manifest = timed("manifest", made.to_bytes)
    timed("parse_manifest", lambda: parse_manifest(manifest))
    lengths = made.file_bytes
    heard.clear()
    entries.clear()
    parsed = timed("parse_index", lambda: parse_index(index, lengths))
    return {
        "ranks": ranks,
        "tensors": len(names),
        "chunks": sum(len(entry.chunks) for entry in parsed.values()),
        "gathered_bytes_per_rank": len(sent[0]),
        "gathered_bytes": sum(map(len, sent)),
        "objects_bytes": max(0, heard_bytes),  # growth of the process: 0 where it used memory that it had
        "index_bytes": len(index),
        "dcp_metadata_bytes": metadata,
        "manifest_bytes": len(manifest),
        "files": len(files) + 3,
    } | took


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def weights(asked: argparse.Namespace) -> dict[str, Any]:
    """What 1 and 4 processes of a host read from its disk to load one model's file, and where its bytes are then."""
    import torch
    from safetensors.torch import save_file

    from distft.model.tensor_files import TensorFiles

    with tempfile.TemporaryDirectory(dir=kit.ROOT) as text:  # on a disk: /tmp may be memory
        folder = Path(text)
        tensors = {f"block{number}.weight": torch.randn(2048, 2048) for number in range(16)}
        save_file(tensors, folder / "model.safetensors")
        os.sync()
        size = (folder / "model.safetensors").stat().st_size

        def work(rank: int, world: int, port: int) -> dict[str, int]:
            before = _io() | _status()
            source, total = TensorFiles(folder), 0.0
            for name in sorted(source.names):
                total += float(source.read(name).sum())  # touches every page; nothing is kept
            after = _io() | _status()
            return {key: after[key] - before[key] for key in after}

        rows = []
        for cached in (False, True):
            for world in (1, 4):
                if not cached:
                    _drop(folder / "model.safetensors")
                said = forked(world, work)
                rows.append({"cached": cached, "processes": world} | {k: sum(one[k] for one in said) for k in said[0]})
    return {"file_bytes": size, "rows": rows, "meaning": "sums over the processes"}


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    said = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    return {"asked_bytes": said["rchar"], "disk_bytes": said["read_bytes"]}


def _status() -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {
        name: 1024 * int(lines[key].split()[0])
        for name, key in (("anonymous_bytes", "RssAnon"), ("file_bytes", "RssFile"))
    }


def _drop(path: Path) -> None:
    """Out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plan(asked: argparse.Namespace) -> dict[str, Any]:
    """Predicted, not measured: what a rank holds, sends and saves on 64 nodes of 8 H100."""
    rows = {}
    for size in MODELS:
        for label, engine, within in (
            ("zero3", "zero3", None),
            ("fsdp2", "fsdp2", None),
            ("fsdp2-node", "fsdp2", "node"),
        ):
            case = _planner(size, asked, engine, within).case()
            sends = case.speed.sent
            rows[f"{size}-{label}"] = {
                "fits": case.fits,
                "peak_gib": round(case.memory.peak / 2**30, 2),
                "micros_per_step": case.setup.micros_per_step,
                "sent_micro_bytes": round(sends.micro),
                "sent_micro_inside_bytes": round(sends.micro_inside),
                "sent_step_bytes": round(sends.step),
                "sent_step_inside_bytes": round(sends.step_inside),
                "sent_bytes_a_step": round(sends.of_step(case.setup.micros_per_step)),
                "step_s": round(case.speed.step_s, 3),
                "checkpoint_bytes": case.memory.checkpoint,
                "checkpoint_bytes_per_rank": round(case.memory.checkpoint / RANKS),
            }
    return rows


def _planner(size: str, asked: argparse.Namespace, engine: str, within: str | None = None) -> Any:
    from distft.plan.machine import read_machine
    from distft.plan.planner import Planner

    if asked.configs is None:
        raise SystemExit("--configs: a folder with the models' config files")
    recipe, config = MODELS[size]
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_bytes((asked.configs / config).read_bytes())
    overrides = [f'engine.name="{engine}"', f"train.global_batch_size={RANKS}", "train.micro_batch_size=1"]
    overrides += [f'engine.shard_within="{within}"'] if within else []
    machine = read_machine("h100-80gb", RANKS // NODES, NODES)
    return Planner(path=str(kit.ROOT / "recipes" / recipe), overrides=overrides, folder=folder, machine=machine)


if __name__ == "__main__":
    main()
