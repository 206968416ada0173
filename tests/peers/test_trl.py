"""An outsider agrees: TRL's SFTTrainer on the same rows, model and settings has the same loss at every step.

Optional: needs DISTFT_ASSETS (GSM8K and the pretrained stories260k) and TRL in the environment; installs nothing.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from harness import ROOT, Run, run
from peer_recipe import LENGTH, write_peer_recipe

ROWS, BATCH, STEPS, RATE = 64, 8, 20, 1e-3

TRL = """
import json, sys
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
model, rows, out, folder = sys.argv[1:]
data = Dataset.from_list([json.loads(line) for line in open(rows)])
args = SFTConfig(
    output_dir=folder, per_device_train_batch_size=%(BATCH)d, gradient_accumulation_steps=1, max_steps=%(STEPS)d,
    learning_rate=%(RATE)r, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
    optim="adamw_torch", adam_beta2=0.999, completion_only_loss=True, max_length=%(LENGTH)d, packing=False,
    train_sampling_strategy="sequential", logging_steps=1, bf16=False, fp16=False, report_to=[], save_strategy="no",
    use_cpu=True, seed=42, model_init_kwargs={"dtype": "float32"}, gradient_checkpointing=False, disable_tqdm=True,
    shuffle_dataset=False,
)
trainer = SFTTrainer(model=model, args=args, train_dataset=data)
trainer.train()
history = [entry for entry in trainer.state.log_history if "loss" in entry]
json.dump({"loss": [e["loss"] for e in history], "grad_norm": [e["grad_norm"] for e in history]}, open(out, "w"))
"""


@pytest.mark.slow
def test_sft_trainer_has_the_same_loss_at_every_step(assets: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    model, rows = assets / "stories260k-hf", tmp_path / "rows.jsonl"
    with (assets / "gsm8k/train.jsonl").open() as source:
        read = [json.loads(next(source)) for _ in range(ROWS)]
    rows.write_text("".join(json.dumps({"prompt": r["question"], "completion": r["answer"]}) + "\n" for r in read))

    script = tmp_path / "theirs.py"
    script.write_text(TRL % {"BATCH": BATCH, "STEPS": STEPS, "RATE": RATE, "LENGTH": LENGTH})
    out = tmp_path / "theirs.json"
    done = run([sys.executable, str(script), str(model), str(rows), str(out), str(tmp_path / "t")], PYTHONPATH=_path())
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(out.read_text())

    recipe = tmp_path / "ours.toml"
    data = 'loss_on = "completion"\nlong_rows = "truncate"'
    write_peer_recipe(recipe, model=model, rows=rows, steps=STEPS, batch=BATCH, rate=RATE, data=data)
    done = run([sys.executable, "-m", "distft.train", str(recipe)])
    assert done.returncode == 0, done.stderr[-3000:]
    ours = Run.read({"folder": str(tmp_path / "ours")})
    gap = [abs(a - b) for a, b in zip(ours.column("loss"), theirs["loss"], strict=True)]
    print("ours  ", [f"{x:.5f}" for x in ours.column("loss")])
    print("theirs", [f"{x:.5f}" for x in theirs["loss"]])
    print("largest difference", max(gap))
    assert len(gap) == STEPS
    assert max(gap) < 1e-4


def _path() -> str:
    return ":".join([str(ROOT), *sys.path])
