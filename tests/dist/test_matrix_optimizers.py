"""Optimizers that have a rule of their own for weight matrices: two processes as one, cut and continued bit for bit."""

import hashlib

import pytest
from harness import STEPS, WHOLE_GRIDS, Bench, Run, relative

pytestmark = pytest.mark.slow
CUT = 3
METHODS = {
    "full": ['model.dtype="float32"'],
    "bf16": ['model.dtype="bfloat16"'],
    "lora": ['method={name="lora", r=8}'],
}
OPTIMIZERS = {
    "muon": 'optim={name="muon", learning_rate=3e-3}',
    "galore": 'optim={name="galore", learning_rate=1e-2, rank=8, update_gap=4}',
    "apollo": 'optim={name="apollo", learning_rate=1e-2, rank=8, update_gap=4}',
    "apollo-mini": 'optim={name="apollo", learning_rate=1e-2, rank=1, scale=128.0, scale_by="tensor", update_gap=4}',
}
"""Projections change after the cut as well."""
PAIRS = [("muon", "full"), ("galore", "full")]
if WHOLE_GRIDS:
    PAIRS += [("apollo", "full"), ("apollo-mini", "full"), ("muon", "bf16"), ("galore", "lora")]


def cases(engine: str) -> dict[str, list[str]]:
    fixed = [f'engine.name="{engine}"', "train.micro_batch_size=1", 'checkpoint.every_steps="off"']
    out = {}
    for optim, method in PAIRS:
        out[f"{optim}-{method}"] = out[f"cut-{optim}-{method}"] = [*fixed, *METHODS[method], OPTIMIZERS[optim]]
    return out


@pytest.fixture(scope="module")
def runs(bench: Bench) -> dict[str, dict[str, Run]]:
    """Engine -> case -> run; those that were cut went on, the one under ddp from solo's checkpoint."""
    found = {}
    for engine, world in (("solo", 1), ("ddp", 2)):
        chosen = cases(engine)
        extra = {
            name: {"fault": f"term:rank={world - 1},point=step,step={CUT};raise:point={name}"}
            for name in chosen
            if name.startswith("cut-")
        }
        tag = f"matrix-{engine}"
        found[engine] = bench.launch(world, chosen, tag=tag, extra=extra)
        again = {name: chosen[name] for name in extra}
        for name in again:
            assert f"after step {CUT}; the state is saved" in found[engine][name].error, found[engine][name].error
        found[engine] |= bench.launch(world, again, tag=tag)
    crossed = {f"crossed-{optim}-{method}": cases("ddp")[f"{optim}-{method}"] for optim, method in PAIRS}
    saved = {
        name: {"resume": str(bench.folder / f"runs/matrix-solo-cut-{name[8:]}/checkpoints/step-{CUT:08d}")}
        for name in crossed
    }
    found["crossed"] = bench.launch(2, crossed, tag="matrix-crossed", extra=saved)
    return found


def weights(run: Run) -> str:
    assert run.folder is not None
    files = sorted((run.folder / "final").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_processes_are_one_and_a_cut_changes_nothing(
    runs: dict[str, dict[str, Run]], pair: tuple[str, str]
) -> None:
    name = "-".join(pair)
    alone, two = runs["solo"][name], runs["ddp"][name]
    bound = 2e-2 if "bf16" in pair else 1e-4 if pair[0] == "muon" else 1e-5  # Muon computes in bf16
    assert relative(two.column("loss"), alone.column("loss")) < bound
    assert alone.column("loss")[-1] < alone.column("loss")[0] - 1e-2, "it learns"
    for engine in ("solo", "ddp"):
        whole, cut = runs[engine][name], runs[engine][f"cut-{name}"]
        assert cut.column("loss") == whole.column("loss"), engine
        assert weights(cut) == weights(whole), engine
    crossed = runs["crossed"][f"crossed-{name}"]
    assert len(crossed.steps) == STEPS - CUT
    assert crossed.column("loss") == pytest.approx(alone.column("loss")[CUT:], rel=bound)
