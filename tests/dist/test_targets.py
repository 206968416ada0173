"""Adapters on embeddings, on the head and by regular expression: one loss on every engine, and PEFT reads the result.

The reference is PEFT's own model, loaded from final/ in another folder, one row at a time and without packing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import LENGTH, ROOT, WHOLE_GRIDS, Bench, Run, environment, relative, run
from transformers import AutoModelForCausalLM, LlamaConfig

from distft.data.formats.prompt_completion import PromptCompletion
from distft.data.render import load_renderer

pytestmark = pytest.mark.dist

METHODS = {
    "embeddings": '{name="lora", r=4, target_modules=["embed_tokens", "v_proj"]}',
    "head": '{name="lora", r=4, target_modules=["lm_head", "v_proj"]}',
    "both": '{name="lora", r=4, target_modules=["embed_tokens", "lm_head"], modules_to_save=["norm"]}',
    "whole": '{name="lora", r=4, target_modules=["q_proj"], modules_to_save=["layers.0.mlp", "embed_tokens"]}',
    "expression": '{name="lora", r=4, target_modules="model.layers.1.*(q|up)_proj"}',
}
QLORA = {"qlora": '{name="qlora", r=4, target_modules=["embed_tokens", "lm_head", "q_proj"]}'}
TIED = ("embeddings", "head", "whole")
ENGINES = ("zero3", "fsdp2")
"""Both train all cases in the whole grid; else each trains some."""
QUICK = {"zero3": ("embeddings", "tied-head"), "fsdp2": ("whole", "qlora")}
COMMON = ["checkpoint.every_steps=3", "eval.every_steps=6"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench.make(tmp_path_factory.mktemp("targets"))
    tied = bench.folder / "tied"
    config = LlamaConfig.from_pretrained(bench.folder / "model")
    config.tie_word_embeddings = True
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tied)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tied / name).write_bytes((bench.folder / "model" / name).read_bytes())
    return bench


def cases(bench: Bench, engine: str) -> dict[str, list[str]]:
    said = {name: [f"method={method}"] for name, method in (METHODS | QLORA).items()}
    said |= {f"tied-{name}": [*said[name], f'model.path="{bench.folder}/tied"'] for name in TIED}
    return {f"{name}-{engine}": [*one, f'engine.name="{engine}"', *COMMON] for name, one in said.items()}


def engines_of(name: str) -> tuple[str, ...]:
    return ENGINES if WHOLE_GRIDS else tuple(engine for engine in ENGINES if name in QUICK[engine])


@pytest.fixture(scope="module")
def alone(bench: Bench) -> dict[str, Run]:
    return bench.launch(1, cases(bench, "solo"), tag="one")


@pytest.fixture(scope="module")
def pairs(bench: Bench) -> dict[str, Run]:
    told = {f"{name}-{engine}": cases(bench, engine)[f"{name}-{engine}"] for name in ALL for engine in engines_of(name)}
    return bench.launch(2, told, tag="two", worker="chunks_worker.py")


WHOLE = [*METHODS, *(f"tied-{name}" for name in TIED)]
ALL = [*WHOLE, *QLORA]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_one_loss_on_every_engine(alone: dict[str, Run], pairs: dict[str, Run], name: str) -> None:
    for engine in engines_of(name):
        for column in ("loss", "grad_norm"):
            one, two = alone[f"{name}-solo"].column(column), pairs[f"{name}-{engine}"].column(column)
            assert relative(two, one) < 1e-5, (engine, column, one, two)
    losses = alone[f"{name}-solo"].column("loss")
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_what_peft_loads_from_elsewhere_has_the_losses_that_were_told(
    bench: Bench, alone: dict[str, Run], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (bench.folder / "valid.jsonl").read_text().splitlines()]
    renderer = load_renderer(bench.folder / "model", loss_on="completion")
    rendered = [renderer.render(PromptCompletion(**row)) for row in rows]
    told = [(one.ids_T.tolist(), one.trained_T.tolist()) for one in rendered if len(one.ids_T) <= LENGTH]
    (tmp_path / "rows.json").write_text(json.dumps(told))
    runs = [alone[f"{name}-solo"] for name in WHOLE]
    finals = [str(run.folder / "final") for run in runs if run.folder is not None]
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE, *finals], cwd=tmp_path, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, one, loss in zip(WHOLE, runs, json.loads(done.stdout), strict=True):
        assert loss == pytest.approx(one.evals[-1]["eval_loss"], rel=1e-5), name
    for final in finals:
        assert os.path.isabs(json.loads(Path(final, "adapter_config.json").read_text())["base_model_name_or_path"])


REFERENCE = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
rows, found = json.load(open("rows.json")), []
for final in sys.argv[1:]:
    model = AutoPeftModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for ids, trained in rows:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        total += losses[torch.tensor(trained[1:])].sum().item()
        count += sum(trained[1:])
    found.append(total / count)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_relative_base_leads_there_from_any_folder(bench: Bench, tmp_path: Path) -> None:
    method = METHODS["expression"]
    command = [sys.executable, "-m", "distft.train", str(bench.recipe), "--set", f"method={method}"]
    path = os.path.relpath(bench.folder / "model", ROOT)
    for setting in ('name="relative"', f'model.path="{path}"', 'engine.name="solo"', "train.max_steps=3"):
        command += ["--set", setting]
    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((bench.folder / "runs/relative/final/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(bench.folder / "model")
