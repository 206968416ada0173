"""Preference objectives and reward models: one loss under every engine, split and packing; a kept reference."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from harness import BATCH, SETTINGS, WHOLE_GRIDS, Bench, Launch, Run, label, relative, torchrun
from harness import run as run_command
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-5
OBJECTIVES = {
    "dpo": 'objective={name="dpo", beta=0.3}',
    "orpo": 'objective={name="orpo", beta=0.5}',
    "reward": 'objective={name="reward", center=0.1}',
    "kto": 'objective={name="kto", beta=0.3, undesirable_weight=0.1}',
    "bco": 'objective={name="bco", beta=0.3}',
}
SINGLE = ("kto", "bco")
"""Objectives on single answers."""
FILES = (("train", "train"), ("eval", "valid"))
METHODS = {
    "full": ['method.name="full"', "optim.learning_rate=1e-3"],
    "lora": ['method={name="lora", r=4}', "optim.learning_rate=2e-3"],
    "qlora": ['method={name="qlora", r=4}', "optim.learning_rate=3e-3"],
}
COVERED = ("dpo-full", "reward-lora", "kto-full")
LAYOUTS = (
    [("solo", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2), ("fsdp2", 4)] if WHOLE_GRIDS else [("fsdp2", 2)]
)
REFERENCES = {
    "twin-full-true-1": ("full", "model", "twin"),
    "twin-qlora-true-1": ("qlora", "model", "twin"),
    "there-full-true-1": ("full", "model", "other"),
    "back-full-true-1": ("full", "other", "model"),
}
"""Case -> method, trained model and the reference that is named: a copy of the trained one, or another."""
if not WHOLE_GRIDS:
    del REFERENCES["twin-qlora-true-1"]
LIMIT_S = 3600.0 if WHOLE_GRIDS else 600.0
FIGURES = ("loss", "grad_norm", "reward_chosen", "reward_rejected", "reward_accuracy", "tokens")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The usual tiny model; the answers of other rows are the rejected ones."""
    bench = Bench.make(tmp_path_factory.mktemp("pairs"))
    shutil.copytree(bench.folder / "model", bench.folder / "twin")
    shutil.copytree(bench.folder / "model", bench.folder / "other")
    weights = load_file(bench.folder / "other/model.safetensors")
    generator = torch.Generator().manual_seed(5)
    moved = {name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    save_file(moved, bench.folder / "other/model.safetensors", metadata={"format": "pt"})
    for split in ("train", "valid"):
        path = bench.folder / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        answers = [row["completion"] for row in rows]
        made = [
            {"prompt": row["prompt"], "chosen": " disk" + good, "rejected": " cache" + bad, "margin": 0.1 * (index % 3)}
            for index, (row, good, bad) in enumerate(zip(rows, answers, answers[1:] + answers[:1], strict=True))
        ]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in made))
        single = [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for index, pair in enumerate(made)
            for side in (("chosen", "rejected") if index % 3 else ("rejected",))
        ]
        (bench.folder / f"{split}-single.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    return bench


def cases(engine: str, world: int, folder: Path, *settings: str) -> dict[str, list[str]]:
    """Three objectives and methods; packed or not; the smallest and the largest micro-batch of the first objective."""
    out = {}
    for objective, chosen in OBJECTIVES.items():
        for method, how in METHODS.items():
            if not WHOLE_GRIDS and f"{objective}-{method}" not in COVERED:
                continue
            whole = WHOLE_GRIDS and (objective, method) in (("dpo", "full"), ("kto", "full"))
            form, rows = "preference", []
            if objective in SINGLE:
                form = "unpaired"
                rows = [f'data.{split}.0.path="{folder}/{file}-single.jsonl"' for split, file in FILES]
            for packing in ("true", "false") if whole else ("true",):
                for micro in sorted({1, BATCH // world}) if whole else (1,):
                    out[f"{objective}-{method}-{packing}-{micro}"] = [
                        f'engine.name="{engine}"', chosen, *how, f"data.packing={packing}", "data.max_length=224",
                        f"train.micro_batch_size={micro}", "train.rehearse=true", *rows,
                        f'data.train.0.format="{form}"',
                        f'data.eval.0.format="{form}"', f'data.cache_dir="{folder}/cache-{engine}"',
                        *(SETTINGS[name] for name in settings),
                    ]  # fmt: skip
    for name, (method, model, reference) in REFERENCES.items():
        out[name] = [
            *out[f"dpo-{method}-true-1"],
            f'objective={{name="dpo", beta=0.3, reference="{folder}/{reference}"}}',
            f'model.path="{folder}/{model}"',
        ]
    return out


@pytest.fixture(scope="module")
def solo(pairs: Bench) -> dict[str, Run]:
    return pairs.launch(1, cases("solo", 1, pairs.folder), tag="solo", timeout_s=LIMIT_S)


@pytest.fixture(scope="module", params=LAYOUTS, ids=label)
def layout(request: pytest.FixtureRequest, pairs: Bench, solo: dict[str, Run]) -> dict[str, Run]:
    engine, world = request.param
    return (
        solo
        if world == 1
        else pairs.launch(world, cases(engine, world, pairs.folder), tag=f"{engine}x{world}", timeout_s=LIMIT_S)
    )


def test_loss_norm_and_figures_equal_solo(layout: dict[str, Run], solo: dict[str, Run]) -> None:
    worst: dict[str, float] = {}
    for name, run in layout.items():
        reference = solo[name.rsplit("-", 1)[0] + "-1"]
        margin = [] if name.startswith(SINGLE) else ["reward_margin"]
        for figure in (*FIGURES, *margin):
            mine, theirs = run.column(figure), reference.column(figure)
            if figure.startswith("reward"):
                worst[f"{name} {figure}"] = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
            else:
                worst[f"{name} {figure}"] = relative(mine, theirs)
        evaluated = ("eval_loss", "eval_reward_chosen", "eval_reward_rejected", "eval_reward_accuracy")
        for figure in (*evaluated, *(f"eval_{figure}" for figure in margin)):
            assert run.evals[-1][figure] == pytest.approx(reference.evals[-1][figure], rel=1e-4, abs=1e-5), (
                name,
                figure,
            )
    assert {name: gap for name, gap in worst.items() if gap > TOLERANCE} == {}


def test_identical_policies_give_ln_2_and_it_learns(solo: dict[str, Run]) -> None:
    for name, run in solo.items():
        if name.startswith(("dpo", "twin")):
            assert run.column("loss")[0] == pytest.approx(0.6931472, abs=1e-6), name
            assert run.column("reward_margin")[0] == pytest.approx(0, abs=1e-5)
        if name.startswith("kto"):
            assert run.column("kl")[0] == pytest.approx(0, abs=1e-5)
            assert max(run.column("kl")) > 0.001, (name, "the policy moves away from its reference")
        assert run.evals[-1]["eval_loss"] < run.evals[0]["eval_loss"], name


def test_another_model_is_the_reference(layout: dict[str, Run]) -> None:
    for method in ("full", "qlora") if WHOLE_GRIDS else ("full",):
        named, unnamed = layout[f"twin-{method}-true-1"], layout[f"dpo-{method}-true-1"]
        for figure in (*FIGURES, "reward_margin"):
            assert named.column(figure) == pytest.approx(unnamed.column(figure), rel=1e-5, abs=1e-6), (method, figure)
    there, back = layout["there-full-true-1"], layout["back-full-true-1"]
    for figure in ("reward_chosen", "reward_rejected", "reward_margin"):
        first = there.column(figure)[0]
        assert abs(first) > 0.001, "the policy is not its reference"
        assert back.column(figure)[0] == pytest.approx(-first, rel=1e-3, abs=1e-5), "each is the other's reference"


@pytest.mark.slow
def test_a_run_killed_in_the_reference_pass_goes_on_there(pairs: Bench, tmp_path: Path) -> None:
    overrides = [*cases("solo", 1, tmp_path)["dpo-full-true-1"], f'output_dir="{tmp_path}/runs"']

    def command(name: str, cache: str) -> list[str]:
        given = [*overrides, f'name="{name}"', f'data.cache_dir="{tmp_path}/{cache}"']
        words = [word for override in given for word in ("--set", override)]
        return [sys.executable, "-m", "distft.train", str(pairs.recipe), *words]

    with Launch(command("oracle", "one")) as oracle:
        assert oracle.end().code == 0, oracle.stderr()
    with Launch(command("killed", "two"), DISTFT_FAULT="kill:point=reference,skip=1") as killed:
        assert killed.end().code != 0
    parts = list((tmp_path / "two/logprobs").glob(".part-*/done.bin"))
    assert len(parts) == 1
    done = parts[0].read_bytes()
    assert 0 < sum(done) < len(done), "some rows were computed before the end"
    with Launch(command("killed", "two")) as again:
        assert again.end().code == 0, again.stderr()
        assert f"{len(done) - sum(done)} of {len(done)} rows" in again.stderr()
    runs = [Run.read({"folder": str(tmp_path / "runs" / name)}) for name in ("oracle", "killed")]
    assert runs[0].column("loss") == runs[1].column("loss"), "bit for bit"
    [values] = [path for path in (tmp_path / "two/logprobs").glob("*/logprobs.bin") if path.stat().st_size > 4000]
    damaged = bytearray(values.read_bytes())
    damaged[100] ^= 255
    values.write_bytes(damaged)
    with Launch(command("third", "two")) as third:
        assert third.end().code == 0
        told = [line for line in third.stderr().splitlines() if "are computed before training" in line]
        assert len(told) == 1, "damage is found by its checksum; the rows of the other split are found done"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dpo-full", "kto-full", "kto-lora"])
def test_killed_in_training_and_continued_here_and_on_another_layout(pairs: Bench, tmp_path: Path, case: str) -> None:
    """A batch-wide column (KTO's KL) and a reference are the same after a restart: bit for bit, or to 1e-5."""

    def command(name: str, engine: str, world: int) -> list[str]:
        given = cases(engine, world, pairs.folder)[f"{case}-true-1"]
        given += [f'output_dir="{tmp_path}/runs"', f'name="{name}"', "checkpoint.every_steps=2"]
        words = [word for override in given for word in ("--set", override)]
        return [*(torchrun(world) if world > 1 else [sys.executable]), "-m", "distft.train", str(pairs.recipe), *words]

    with Launch(command("oracle", "solo", 1)) as oracle:
        assert oracle.end().code == 0, oracle.stderr()
    with Launch(command("killed", "solo", 1), DISTFT_FAULT="kill:point=backward,step=4") as killed:
        assert killed.end().code != 0
    shutil.copytree(tmp_path / "runs/killed", tmp_path / "runs/moved")
    for name, engine, world in (("killed", "solo", 1), ("moved", "fsdp2", 2)):
        with Launch(command(name, engine, world)) as again:
            assert again.end().code == 0, again.stderr()
    expected, here, there = (
        Run.read({"folder": str(tmp_path / "runs" / name)}) for name in ("oracle", "killed", "moved")
    )
    names = ("loss", "grad_norm", "reward_chosen", "reward_rejected", *(("kl",) if case.startswith("kto") else ()))
    for figure in names:
        assert here.column(figure) == expected.column(figure), (figure, "bit for bit")
        assert there.column(figure) == pytest.approx(expected.column(figure), rel=TOLERANCE, abs=TOLERANCE), figure
    assert len(here.column("loss")) == len(there.column("loss")) > 4, "no step appears twice"


FRESH = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig
import bitsandbytes

bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # its repacked products are not those of the 4-bit weights
for final, base, dtype, four_bits, rows, out in json.loads(sys.argv[1]):
    dtype = getattr(torch, dtype)
    how = {"dtype": dtype}
    if four_bits:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    if base:
        from peft import AutoPeftModelForSequenceClassification
        model = AutoPeftModelForSequenceClassification.from_pretrained(final, num_labels=1, **how)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(final, **how)
    tokenizer = AutoTokenizer.from_pretrained(final)
    rewards = []
    for row in map(json.loads, open(rows)):
        for side in ("chosen", "rejected"):
            ids = [*tokenizer(row["prompt"] + row[side])["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                rewards.append(model(input_ids=torch.tensor([ids])).logits.item())
    json.dump(rewards, open(out, "w"))
"""


@pytest.mark.slow
def test_a_reward_model_gives_its_rewards_in_plain_transformers(pairs: Bench, tmp_path: Path) -> None:
    """In a process of its own: full, LoRA and QLoRA, in fp32 and in bf16, whose rewards agree within its rounding."""
    folder, made = pairs.folder, {}
    for method in METHODS:
        for dtype in ("float32", "bfloat16"):
            base = [given for given in cases("solo", 1, folder)["reward-lora-true-1"] if given not in METHODS["lora"]]
            made[f"{method}-{dtype}"] = [*base, *METHODS[method], f'model.dtype="{dtype}"', "train.max_steps=6"]
    runs = pairs.launch(1, made, tag="fresh")
    work = []
    for name, trained_run in runs.items():
        assert trained_run.folder is not None, trained_run.error
        method, dtype = name.split("-")
        out = str(tmp_path / f"{name}.json")
        rows = str(folder / "valid.jsonl")
        work.append([str(trained_run.folder / "final"), method != "full", dtype, method == "qlora", rows, out])
    (tmp_path / "fresh.py").write_text(FRESH)
    done = run_command([sys.executable, str(tmp_path / "fresh.py"), json.dumps(work)])
    assert done.returncode == 0, done.stderr
    for name, trained_run in runs.items():
        assert trained_run.folder is not None
        held_out = trained_run.folder / "eval/after/held_out.jsonl"
        kept = [json.loads(line) for line in held_out.read_text().splitlines()]
        trained = [row[f"reward_{side}"] for row in kept for side in ("chosen", "rejected")]
        loaded = json.loads((tmp_path / f"{name}.json").read_text())
        gap = max(abs(a - b) for a, b in zip(trained, loaded, strict=True))
        spread = max(trained) - min(trained)
        assert spread > 0.05, (name, "the rewards differ between answers")
        assert gap <= (1e-5 if name.endswith("float32") else 0.02 * max(1.0, max(map(abs, trained)))), (name, gap)
