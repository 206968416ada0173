"""An outsider agrees: TRL's preference and reward trainers on the same pairs, model and settings, at every step.

Optional: needs DISTFT_ASSETS (tinystories and the pretrained stories260k) and TRL in the environment; installs nothing.
Where TRL means another loss by a name, the settings here make both the same, and say so.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, run
from peer_recipe import LENGTH, write_peer_recipe

ROWS, BATCH, STEPS, RATE = 64, 8, 20, 2e-4
LOSSES = {
    "sigmoid": {}, "hinge": {}, "ipo": {}, "robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 0.01},
    "nca_pair": {}, "bco_pair": {}, "sppo_hard": {}, "apo_zero": {}, "apo_down": {}, "discopop": {}, "sigmoid_norm": {},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    **{f"dpo-{loss}": {"name": "dpo", "loss": loss, "beta": 0.1, **more} for loss, more in LOSSES.items()},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
    "reward": {"name": "reward", "center": 0.01},
    "kto": {"name": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 0.8},
    "kto-apo_zero": {"name": "kto", "beta": 0.1, "loss": "apo_zero"},
}
THEIRS = """
import json, sys
import torch
from datasets import Dataset
plan, model, rows, single, out, folder = sys.argv[1:]
data = Dataset.from_list([json.loads(line) for line in open(rows)])
answers = Dataset.from_list([json.loads(line) for line in open(single)])
common = dict(
    output_dir=folder, per_device_train_batch_size=%(BATCH)d, gradient_accumulation_steps=1, max_steps=%(STEPS)d,
    learning_rate=%(RATE)r, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
    optim="adamw_torch", adam_beta2=0.999, max_length=%(LENGTH)d, train_sampling_strategy="sequential", logging_steps=1,
    bf16=False, fp16=False, report_to=[], save_strategy="no", use_cpu=True, seed=42, gradient_checkpointing=False,
    disable_tqdm=True,
)
found = {}
for name, case in json.loads(open(plan).read()).items():
    torch.manual_seed(0)
    given = dict(case)
    kind = given.pop("name")
    if kind == "dpo":
        from trl import DPOConfig, DPOTrainer
        args = DPOConfig(loss_type=[given.pop("loss")], model_init_kwargs={"dtype": "float32"}, **given, **common)
        trainer = DPOTrainer(model=model, args=args, train_dataset=data)
    elif kind == "kto":
        from trl import KTOConfig, KTOTrainer
        if given.get("loss") == "apo_zero":
            given["loss"] = "apo_zero_unpaired"
        given = {"loss_type" if key == "loss" else key: value for key, value in given.items()}
        args = KTOConfig(model_init_kwargs={"dtype": "float32"}, **given, **common)
        trainer = KTOTrainer(model=model, args=args, train_dataset=answers)
    elif kind == "simpo":
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        args = CPOConfig(
            loss_type="simpo", simpo_gamma=given["gamma"], beta=given["beta"], cpo_alpha=0.0, **common
        )
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        trainer = CPOTrainer(model=lm, args=args, train_dataset=data, processing_class=tokenizer)
    else:
        from transformers import AutoModelForSequenceClassification
        from trl import RewardConfig, RewardTrainer
        args = RewardConfig(center_rewards_coefficient=given["center"], **common)
        lm = AutoModelForSequenceClassification.from_pretrained(sys.argv[2] + "-scalar", dtype=torch.float32)
        trainer = RewardTrainer(model=lm, args=args, train_dataset=data)
    trainer.train()
    found[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
json.dump(found, open(out, "w"))
"""
OURS = """
import json, sys
import distft
plan, recipe = sys.argv[1:3]
for name, case in json.loads(open(plan).read()).items():
    table = "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in case.items()) + "}"
    model = ["model.path=" + json.dumps(sys.argv[3] + "-scalar")] if case["name"] == "reward" else []
    if case["name"] == "kto":
        model = ["data.train.0.path=" + json.dumps(sys.argv[4])]
    distft.train(distft.load_recipe(recipe, overrides=[f'name="{name}"', f"objective={table}", *model]))
"""
NAMES = {
    "loss": ("loss",), "reward_chosen": ("rewards/chosen",), "reward_rejected": ("rewards/rejected",),
    "reward_margin": ("rewards/margins", "margin"), "reward_accuracy": ("rewards/accuracies", "accuracy"),
    "kl": ("kl",),
}  # fmt: skip


@pytest.mark.slow
def test_trl_has_the_same_figures_at_every_step(assets: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    import shutil

    model, rows, plan, out = (tmp_path / name for name in ("model", "rows.jsonl", "plan.json", "theirs.json"))
    shutil.copytree(assets / "stories260k-hf", model)
    with (assets / "tinystories/preference.jsonl").open() as source:
        read = [json.loads(next(source)) for _ in range(ROWS)]
    short = [
        {"prompt": row["prompt"][:120], "chosen": " " + row["chosen"][:160], "rejected": " " + row["rejected"][:200]}
        for row in read
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in short))
    single = tmp_path / "single.jsonl"
    sides = ("chosen", "rejected", "chosen")  # of every two pairs three answers, in turn
    answers = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for first, second in zip(short[::2], short[1::2], strict=True)
        for row, side in zip((first, second, second), sides, strict=True)
    ]
    assert len({answer["prompt"] for answer in answers}) > ROWS / 2
    single.write_text("".join(json.dumps(row) + "\n" for row in answers))
    plan.write_text(json.dumps(CASES))
    scalar = tmp_path / "scalar.py"
    scalar.write_text(
        "import sys, torch\nfrom transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        "torch.manual_seed(0)\n"
        "m = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=1, dtype=torch.float32)\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\nm.config.pad_token_id = t.unk_token_id\n"
        "m.save_pretrained(sys.argv[1] + '-scalar')\nt.save_pretrained(sys.argv[1] + '-scalar')\n"
    )
    done = run([sys.executable, str(scalar), str(model)])
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = tmp_path / "theirs.py"
    theirs.write_text(THEIRS % {"BATCH": BATCH, "STEPS": STEPS, "RATE": RATE, "LENGTH": LENGTH})
    arguments = [str(plan), str(model), str(rows), str(single), str(out), str(tmp_path / "t")]
    path = ":".join([str(ROOT), *sys.path])
    done = run([sys.executable, str(theirs), *arguments], PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    recipe = tmp_path / "ours.toml"
    write_peer_recipe(recipe, model=model, rows=rows, steps=STEPS, batch=BATCH, rate=RATE, micro=2)
    ours = tmp_path / "ours.py"
    ours.write_text(OURS)
    done = run([sys.executable, str(ours), str(plan), str(recipe), str(model), str(single)], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    gaps: dict[str, float] = {}
    for case, lines in found.items():
        mine = [json.loads(line) for line in (tmp_path / case / "metrics.jsonl").read_text().splitlines()]
        mine = [line for line in mine if "loss" in line]
        assert len(mine) == len(lines) == STEPS
        for name, others in NAMES.items():
            other = next((other for other in others if other in lines[0]), None)
            if name in mine[0] and other is not None:
                scale = max(1.0, max(abs(line[other]) for line in lines))
                gaps[f"{case} {name}"] = max(abs(a[name] - b[other]) for a, b in zip(mine, lines, strict=True)) / scale
    print(json.dumps(gaps, indent=1))
    assert len(gaps) >= 5 * len(LOSSES)
    assert {name: gap for name, gap in gaps.items() if gap > 1e-4} == {}
