"""Tries every type of adapter that the installed PEFT has, and writes the page that says what came out.

usage: python tests/helpers/peft_page.py FOLDER > docs/peft-types.md   (`make peft-types`; a quarter of an hour)
"""

import contextlib
import json
import shutil
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from harness import Bench, Run, relative
from peft import PeftModel
from tiny import CPU, batch, documents
from transformers import AutoModelForCausalLM

from distft.engine import ENGINES as ENGINE_SPECS
from distft.model import load, quantize
from distft.model.adapters import METHODS
from distft.model.adapters.peft_types import ON_4BIT, OWN_METHODS, REFUSED, REFUSED_CUT_BY_BLOCK, registered_types
from distft.model.heads import HEADS
from distft.recipe import ModelTable

TOLERANCE = 1e-5
SETTINGS: dict[str, dict[str, Any]] = {
    "VBLORA": {"num_vectors": 16, "vector_length": 16, "topk": 2},
    "C3A": {"block_size": 16},
    "BOFT": {"boft_block_size": 4},
    "WAVEFT": {"n_frequency": 64},
    "SHIRA": {"r": 2},
    "ROAD": {"group_size": 8},
    "FOURIERFT": {"n_frequency": 64},
    "GRALORA": {"r": 4, "gralora_k": 2},
    **{name: {"r": 4} for name in ("RANDLORA", "MISS", "PVERA", "LILY", "DEFT", "HIRA", "HRA", "GLORA")},
}
"""What the tiny model needs besides PEFT's defaults."""
ENGINES = {"ddp": 2, "zero3": 2, "fsdp2": 2}


def types_tried() -> list[str]:
    return sorted(set(registered_types()) - {*REFUSED, *OWN_METHODS})


def method_of(name: str, **more: Any) -> str:
    pairs = {"type": name, **SETTINGS.get(name, {}), **more}
    written = ", ".join(f"{key} = {value if value == {} else json.dumps(value)}" for key, value in pairs.items())
    return f'method={{name="peft", {written}}}'


def runs_of(bench: Bench, engine: str, world: int, names: list[str], tag: str, **more: Any) -> dict[str, Run]:
    cases = {
        name: [method_of(name, **more), f'engine.name="{engine}"', "optim.learning_rate=3e-3", "data.eval=[]"]
        for name in names
    }
    runs = {}
    for name, overrides in cases.items():  # one launch for each: a type that fails must not take others with it
        try:
            runs |= bench.launch(world, {name: overrides}, tag=f"{tag}-{name}", timeout_s=200)
        except AssertionError as error:
            runs[name] = Run(None, str(error), [], [])
    return runs


def built(folder: Path, name: str, **more: Any) -> Any:
    spec, raw = METHODS["peft"], {"type": name, **SETTINGS.get(name, {}), **more}
    params = spec.params.for_table(raw).model_validate_json(json.dumps(raw))
    table = ModelTable(path=str(folder), dtype="float32")
    made = load.build(table, folder, spec, params, seed=1, device=CPU, head=HEADS["lm"])
    made.fill(made.module, CPU)
    torch.manual_seed(0)
    for _, param in sorted(made.module.named_parameters()):
        if param.requires_grad:
            param.data.add_(0.02 * torch.randn(param.shape))
    return made.module.eval()


def beside_4bit(base: Path, rounded: Path, name: str) -> str:
    """Whether logits beside a base in 4 bits are those beside the same base dequantised."""
    if name not in ON_4BIT:
        return "refused"
    example = batch(documents([30, 12])).inputs()
    with torch.no_grad():
        gap = (built(base, name, quant={})(**example) - built(rounded, name)(**example)).abs().max().item()
    return "equal" if gap < 1e-4 else f"differs by {gap:.1e}"


def rounded_base(base: Path, folder: Path) -> Path:
    """The base with every matrix that QLoRA stores in 4 bits as it comes back from them."""
    lm = AutoModelForCausalLM.from_pretrained(base)
    spec = METHODS["qlora"]
    table = ModelTable(path=str(base), dtype="float32")
    marked = load.build(table, base, spec, spec.params(), seed=1, device=CPU, head=HEADS["lm"], weights=False)
    names = quantize.names_in_4bit(marked.module.transformer)
    weights = dict(lm.named_parameters())
    for name, (module, short) in names.items():
        plain = weights[name.replace(".base_layer.", ".")]
        plain.data = quantize.round_trip(module, short, plain.data)
    lm.save_pretrained(folder)
    return folder


def beside_others(base: Path, final: Path) -> str:
    with contextlib.suppress(Exception):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(final))
        model.load_adapter(str(final), "second")
        model.set_adapter("second")
        return "yes"
    return "no"


def merged(base: Path, final: Path) -> str:
    ids = torch.tensor(documents([20]))
    with torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(final)).eval()
        apart = model(input_ids=ids).logits
        try:
            gap = (model.merge_and_unload()(input_ids=ids).logits - apart).abs().max().item()
        except Exception:  # any: PEFT says in many ways that it cannot
            return "no"
    return "yes" if gap < 1e-3 else f"differs by {gap:.1e}"


def verdict(run: Run | None, reference: Run) -> str:
    if run is None or run.error or reference.error:
        return "fails"
    gap = max(relative(run.column(name), reference.column(name)) for name in ("loss", "grad_norm"))
    return "equal" if gap < TOLERANCE else f"differs by {gap:.0e}"


def rows(folder: Path) -> list[list[str]]:
    bench, names = Bench.make(folder), types_tried()
    base = folder / "model"
    solo = runs_of(bench, "solo", 1, names, "solo")
    tried = [name for name in names if not solo[name].error]
    together = {engine: runs_of(bench, engine, world, tried, engine) for engine, world in ENGINES.items()}
    rounded = rounded_base(base, folder / "rounded")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, rounded)
    made = []
    for name in names:
        final = (solo[name].folder or folder) / "final"
        fell = "trains" if not solo[name].error and all(step["grad_norm"] > 0 for step in solo[name].steps) else "no"
        engines = [
            "refused" if is_refused(name, engine) else verdict(together[engine].get(name), solo[name])
            for engine in ENGINES
        ]
        made.append(
            [name, fell, *engines, beside_4bit(base, rounded, name), beside_others(base, final), merged(base, final)]
        )
        if error := next(
            (run.error for run in (solo[name], *(r[name] for r in together.values() if name in r)) if run.error), ""
        ):
            print(name, error[-1500:], file=sys.stderr)
    return made


def is_refused(name: str, engine: str) -> bool:
    return name in REFUSED_CUT_BY_BLOCK and ENGINE_SPECS[engine].parameters == "cut by block"


def page(made: list[list[str]]) -> str:
    lines = [
        "# PEFT's types",
        "",
        f"Written by `make peft-types` with PEFT {version('peft')}, on a CPU: six fp32 steps, a Llama of two blocks.",
        '`name = "peft"`, `type = "..."`; the other keys are the fields of the type\'s config. Beside two processes:',
        f"whether losses and norms of gradients are those of one process to {TOLERANCE:g}. 4 bits: whether losses",
        "beside a base in 4 bits are those beside the same base dequantised. Last two: what PEFT does with `final/`.",
        "",
        "| type | solo | ddp × 2 | zero3 × 2 | fsdp2 × 2 | 4 bits | several adapters | merge |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in made),
        "",
        "PVERA draws noise in training, another one in each process. RANDLORA's first step is equal; what rounding",
        "makes of it grows over the six.",
        "",
        *(f"- {name} under fsdp2: {reason}" for name, reason in REFUSED_CUT_BY_BLOCK.items()),
        "",
        "## Types with a method of their own",
        "",
        *(f'- {name}: `name = "{method}"`' for name, method in OWN_METHODS.items()),
        "",
        "## Refused",
        "",
        *(f"- {name}: {reason}" for name, reason in sorted(REFUSED.items())),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        text = page(rows(Path(sys.argv[1])))
    sys.stdout.write(text)
