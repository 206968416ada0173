"""Tokens that a recipe adds, under several processes: the losses of one, a resume bit for bit, and who loads them."""

import json
import sys
from pathlib import Path

import pytest
from final_cards import LOSSES
from harness import Bench, Run, relative, run
from safetensors.torch import load_file

TOLERANCE = 1e-5
ADDED = ['model.add_tokens=["timeout", "queue"]', 'model.add_special_tokens=["<|region|>"]']
"""Two words of the rows, and a token that no row has."""
TIED = ['model.path="{folder}/tied"']
LORA = 'method={{name="lora", r=4{}}}'
CASES: dict[str, list[str]] = {
    "full": [*ADDED, "model.pad_vocabulary=16"],
    "full-tied": [*ADDED, *TIED, 'model.new_rows="mean"'],
    "lora": [*ADDED, LORA.format(""), "optim.learning_rate=3e-3"],
    "lora-tied": [*ADDED, *TIED, LORA.format(', trainable_tokens=["Ġdisk"]'), "optim.learning_rate=3e-3"],
    "lora-pissa": [*ADDED, LORA.format(', init="pissa"'), "optim.learning_rate=1e-3"],
    "existing": [LORA.format(', trainable_tokens=["Ġdisk", "Ġusers"]'), "optim.learning_rate=3e-3"],
}


def cases(bench: Bench, engine: str) -> dict[str, list[str]]:
    more = [f'engine.name="{engine}"', "checkpoint.every_steps=3"]
    return {
        name: [text.replace("{folder}", str(bench.folder)) for text in overrides] + more
        for name, overrides in CASES.items()
    }


@pytest.fixture(scope="session")
def solo(bench: Bench) -> dict[str, Run]:
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(bench.folder / "model")
    lm.config.tie_word_embeddings = True
    lm.tie_weights()
    lm.save_pretrained(bench.folder / "tied")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bench.folder / "tied" / name).write_bytes((bench.folder / "model" / name).read_bytes())
    far = [*ADDED, LORA.format(""), "optim.learning_rate=2e-2", 'engine.name="solo"']
    runs = bench.launch(1, {**cases(bench, "solo"), "far": far}, tag="t1")
    assert not any(ended.error for ended in runs.values()), {name: ended.error for name, ended in runs.items()}
    return runs


def apart(one: Run, other: Run) -> float:
    return max(relative(one.column(name), other.column(name)) for name in ("loss", "grad_norm"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2", "ddp"])
def test_two_processes_train_as_one(bench: Bench, solo: dict[str, Run], engine: str) -> None:
    runs = bench.launch(2, cases(bench, engine), tag=f"t-{engine}")
    worst = {name: apart(runs[name], solo[name]) for name in CASES}
    assert max(worst.values()) < TOLERANCE, worst


LOADED = (
    LOSSES
    + """    prompt = tokenizer("disk:", return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False, min_new_tokens=8)
    token = tokenizer.convert_tokens_to_ids("timeout")
    found[name] = {"loss": loss / count, "rows": model.get_input_embeddings().weight.shape[0],
                   "length": len(tokenizer), "id": token, "written": written[0].tolist(),
                   "text": tokenizer("queue timeout", add_special_tokens=False)["input_ids"],
                   "special": tokenizer.decode(tokenizer("<|region|> disk")["input_ids"], skip_special_tokens=True)}
print(json.dumps(found))
"""
)


@pytest.mark.slow
def test_final_is_what_was_trained_to_whoever_reads_its_card(bench: Bench, solo: dict[str, Run]) -> None:
    """In a fresh process, without this package: transformers, and PEFT, which lets the base grow."""
    finals = {name: str(run.folder / "final") for name, run in solo.items() if run.folder}
    done = run([sys.executable, "-c", LOADED, json.dumps(finals), str(bench.folder / "valid.jsonl")], PYTHONPATH="")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    worst = {name: abs(found[name]["loss"] / solo[name].evals[-1]["eval_loss"] - 1) for name in CASES}
    assert max(worst.values()) < TOLERANCE, worst
    for name in CASES:
        got = found[name]
        added = name != "existing"
        assert got["length"] == 1024 + 3 * added
        assert got["rows"] == {"full": 1040, "full-tied": 1088, "existing": 1024}.get(name, 1027)
        assert (len(got["text"]) < 4) == added
        assert ("region" in got["special"]) != added
    assert {1024, 1025} & {*found["far"]["written"]}, "a run that goes far enough writes a new token"


@pytest.mark.slow
def test_only_new_rows_are_trained_under_adapters(bench: Bench, solo: dict[str, Run]) -> None:
    for name, count in (("lora", 2 * 3), ("lora-tied", 3 + 1), ("existing", 2 * 2)):
        tensors = load_file(solo[name].folder / "final/adapter_model.safetensors")
        rows = {key: tensor for key, tensor in tensors.items() if "lora_" not in key}
        assert sum(len(tensor) for tensor in rows.values()) == count, {key: t.shape for key, t in rows.items()}
        assert all("trainable_tokens_delta" in key for key in rows)


def later(run: Run) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in run.steps if record["step"] > 3]


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits(bench: Bench, solo: dict[str, Run]) -> None:
    extra = {name: {"resume": str(solo[name].folder / "checkpoints/step-00000003")} for name in CASES}
    again = bench.launch(1, cases(bench, "solo"), tag="t-again", extra=extra)
    for name, resumed in again.items():
        assert not resumed.error, resumed.error
        assert later(resumed) == later(solo[name]), name
        for file in ("adapter_model.safetensors", "model.safetensors"):
            ours, theirs = (Path(ended.folder) / "final" / file for ended in (resumed, solo[name]))
            assert ours.exists() == theirs.exists()
            assert not ours.exists() or ours.read_bytes() == theirs.read_bytes(), name
