"""Every file in launch/ is what its name says, is understood by this accelerate, and starts the processes it should."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from harness import ROOT, Bench, relative, run

pytestmark = pytest.mark.dist
FILES = sorted((ROOT / "launch").glob("*.yaml"))
NAMES = [path.stem for path in FILES]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2")
PLAIN = {"gpu": (1, 8, "ddp"), "1x1": (1, 1, ""), "cpu": (1, 1, ""), "cpu-Nx1-ddp": (2, 2, "ddp")}


def meant(name: str) -> tuple[int, int, str]:
    """(machines, processes, engine) that a file's name stands for."""
    if name in PLAIN:
        return PLAIN[name]
    shape, _, engine = name.partition("-")
    machines, processes = {"1x1": (1, 1), "1x8": (1, 8), "Nx8": (2, 16), "cpu": (1, 2)}[shape]
    return machines, processes, engine


def test_every_engine_has_one_for_every_shape() -> None:
    wanted = {f"{shape}-{engine}" for shape in ("1x8", "Nx8") for engine in ENGINES}
    wanted |= {f"1x1-{engine}" for engine in ENGINES if engine != "ddp"} | {"1x1", "cpu", "cpu-ddp", "cpu-fsdp2"}
    assert wanted <= set(NAMES)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_is_what_its_name_says(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    machines, processes, engine = meant(path.stem)
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert (config.num_machines, config.num_processes) == (machines, processes)
    options = {action.dest for action in launch_command_parser()._actions}
    nested = {**config.deepspeed_config, **config.fsdp_config}
    assert set(nested) <= options, "a key that nothing reads"
    if path.stem.startswith("cpu") or engine in ("", "ddp"):
        assert config.distributed_type == (
            "NO" if processes == 1 else "DEEPSPEED" if engine == "zero3" else "MULTI_GPU"
        )
    elif engine == "fsdp2":
        assert (config.distributed_type, config.fsdp_config["fsdp_version"]) == ("FSDP", 2)
    else:
        assert (config.distributed_type, config.deepspeed_config["zero_stage"]) == ("DEEPSPEED", int(engine[4]))
        offload = config.deepspeed_config.get("offload_optimizer_device", "none")
        assert (offload == "cpu") == engine.endswith("offload")
    if machines > 1:
        assert config.main_process_ip
        assert config.same_network
        assert not config.deepspeed_config or config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
    assert config.mixed_precision == "no", "the recipe's dtype decides"
    assert config.use_cpu == (path.stem.startswith("cpu") and engine != "zero3")
    assert yaml.safe_load(path.read_text())["compute_environment"] == "LOCAL_MACHINE"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """All of them, on two processes of this machine's CPU; the two machines of those for several are this one twice."""
    folder = tmp_path_factory.mktemp("launched")
    helper = str(ROOT / "tests/helpers/launched.py")
    done = run([sys.executable, helper, "all", str(folder), *map(str, FILES)], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_launches(launched: tuple[Path, dict[str, list[int]]], name: str) -> None:
    folder, codes = launched
    machines, processes, engine = meant(name)
    assert codes[name] == [0] * machines
    said = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.*.json"))]
    assert [one["world"] for one in said] == ([2, 2] if processes > 1 else [1])
    assert [one["local_rank"] for one in said] == [0] * len(said) if machines > 1 else list(range(len(said)))
    cpu = name.startswith("cpu") and engine != "zero3"
    wants = "" if cpu or engine in ("", "ddp") else "fsdp" if engine == "fsdp2" else engine[:5]
    assert {(one["wants"], one["offloads"]) for one in said} == {(wants, engine.endswith("offload"))}


@pytest.mark.slow
def test_offload_and_stages_train_as_their_files_say(bench: Bench) -> None:
    """The recipe's engine is auto: the file decides. CPU and DDP files train in test_variants.py."""
    losses = {}
    for name, more in (("1x8-zero3-offload", ["engine.name='zero3'", "engine.offload='optimizer'"]), ("1x8-zero1", [])):
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
        command = [*launch, "--config_file", f"launch/{name}.yaml", "-m", "distft.train", str(bench.recipe)]
        for setting in (f'name="file-{name}"', *more):
            command += ["--set", setting]
        done = run(command)
        assert done.returncode == 0, done.stderr[-4000:]
        folder = bench.folder / f"runs/file-{name}"
        facts = json.loads((folder / "manifest.json").read_text())
        assert (facts["world"], facts["engine"]) == (2, name.removeprefix("1x8-").partition("-")[0])
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses[name] = [record["loss"] for record in records if "loss" in record]
    assert relative(*losses.values()) < 1e-5
