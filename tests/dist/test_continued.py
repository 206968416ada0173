"""Training that goes on from an adapter: from where it stood, with that adapter as the reference of preferences."""

import json
import math
from pathlib import Path

import pytest
from harness import Bench, Run

pytestmark = pytest.mark.slow
FIRST: dict[str, str] = {
    "lora": '{{name="lora", r=4{more}}}',
    "qlora": '{{name="qlora", r=4{more}}}',
    "ia3": '{{name="ia3"{more}}}',
    "vera": '{{name="vera", r=8{more}}}',
    "peft": '{{name="peft", type="HRA", r=4{more}}}',
    "prompt": '{{name="prompt_tuning", num_virtual_tokens=5{more}}}',
    "prefix": '{{name="prefix_tuning", num_virtual_tokens=5{more}}}',
    "bottleneck": '{{name="bottleneck", size=8{more}}}',
}
SLOWLY = ["optim.learning_rate=1e-3", "train.max_steps=4"]
RATE = ["optim.learning_rate=0.02", "train.max_steps=4"]


@pytest.fixture(scope="module")
def first(bench: Bench) -> dict[str, Run]:
    cases = {name: [f"method={method.format(more='')}", *RATE] for name, method in FIRST.items()}
    pissa = ['method={name="lora", r=2, alpha=16.0, init="pissa"}', *RATE]
    return bench.launch(1, {**cases, "pissa": pissa}, tag="first")


@pytest.fixture(scope="module")
def second(bench: Bench, first: dict[str, Run]) -> dict[str, Run]:
    def start(name: str, more: str = "") -> str:
        return FIRST[more or name].format(more=f', start="{first[name].folder}"')

    cases = {name: [f"method={start(name)}", *SLOWLY] for name in FIRST}
    cases["pissa"] = [f"method={start('pissa', 'lora')}", *SLOWLY]
    pairs = bench.folder / "pairs.jsonl"
    rows = [json.loads(line) for line in (bench.folder / "train.jsonl").read_text().splitlines()]
    pairs.write_text(
        "".join(
            json.dumps({"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}) + "\n"
            for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
            if row["completion"] != other["completion"]
        )
    )
    dpo = ['objective={name="dpo"}', f'data.train.0.path="{pairs}"', "data.eval=[]", "data.max_length=192", *SLOWLY]
    for name in ("lora", "prefix"):
        cases[f"dpo-{name}"] = [f"method={start(name)}", *dpo]
    cases["dpo-pissa"] = ['method={name="lora", r=2, init="pissa"}', *dpo]
    wrong = {
        "rank": '{name="lora", r=8, START}',
        "targets": '{name="lora", r=4, target_modules=["q_proj"], START}',
        "method": '{name="ia3", START}',
        "count": '{name="lora", r=4, start="nowhere/at/all"}',
    }
    for name, method in wrong.items():
        start_of_lora = f'start="{first["lora"].folder}"'
        cases[f"wrong-{name}"] = [f"method={method.replace('START', start_of_lora)}", *RATE]
    moved = bench.folder / "moved"
    moved.mkdir()
    for file in (first["lora"].folder / "final").iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/another/base"}))
    cases["wrong-base"] = [f'method={{name="lora", r=4, start="{moved}"}}', *RATE]
    return bench.launch(1, cases, tag="second")


@pytest.mark.parametrize("name", [*FIRST, "pissa"])
def test_it_goes_on_from_where_the_adapter_stood(first: dict[str, Run], second: dict[str, Run], name: str) -> None:
    assert not second[name].error, second[name].error
    stood, began, ended = first[name].evals[-1], second[name].evals[0], second[name].evals[-1]
    assert math.isclose(began["eval_loss"], stood["eval_loss"], rel_tol=1e-5)
    assert abs(first[name].evals[0]["eval_loss"] - stood["eval_loss"]) > 1e-3, "that is not where everything starts"
    assert ended["eval_loss"] < began["eval_loss"]


@pytest.mark.parametrize("name", ["dpo-lora", "dpo-prefix", "dpo-pissa"])
def test_the_reference_of_preferences_is_the_model_before_training(second: dict[str, Run], name: str) -> None:
    """With the adapter that it went on from, frozen: so the first loss is ln 2, whatever that adapter had learned."""
    assert not second[name].error, second[name].error
    steps = second[name].steps
    assert math.isclose(steps[0]["loss"], math.log(2), rel_tol=1e-5)
    assert steps[-1]["loss"] != pytest.approx(math.log(2), rel=1e-4), "and then it moves"


WRONG = {
    "rank": "[method] start: its settings are not the recipe's: r: 4 there, 8 here",
    "targets": 'target_modules: ["model.layers.0.mlp.down_proj"',
    "method": 'peft_type: "LORA" there, "IA3" here',
    "count": '"nowhere/at/all" holds no adapter_config.json',
    "base": "it was trained on /another/base, and [model] path is",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(second: dict[str, Run], name: str) -> None:
    said = second[f"wrong-{name}"].error
    assert said.startswith("RecipeError"), said
    assert WRONG[name] in said, said


def test_the_folder_of_the_run_is_left_alone(first: dict[str, Run], second: dict[str, Run]) -> None:
    assert (Path(first["lora"].folder or "") / "final/adapter_model.safetensors").is_file()
