"""Memory that runs out, planted: exit code 9, the phase named, and advice that the planner has tried."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.first_hour import inputs, trained
from benchmarks.first_hour.phase import Context, Measured, Phase, Step, StepFailed, Table

CODE = 9
MIB = 2**20


def steps(context: Context) -> Iterator[Step]:
    yield Step(name="planted", run=lambda: _planted(context), least_s=5)


def _planted(context: Context) -> Measured:
    """Logits of a step's tokens over a large vocabulary, all at once, beyond a limit on the process."""
    recipe = inputs.train_recipe(context.work, toy=context.toy)
    large = inputs.TRAINED[True] | {"vocab_size": 65536}
    folder = context.work / "large-vocabulary"
    folder.mkdir(parents=True, exist_ok=True)
    import json

    (folder / "config.json").write_text(json.dumps(large), encoding="utf-8")
    settings = ['name="oom"', f'model.path="{folder}"', 'model.init="random"', 'model.tokenizer="demo:tiny-llama"']
    settings += ['model.cross_entropy="full"', 'data.loss_on="all"', "data.max_length=1024"]
    settings += ["train.micro_batch_size=2", "train.global_batch_size=2", "train.max_steps=4"]
    arguments = [text for setting in settings for text in ("--set", setting)]
    told = {"recipe": str(recipe), "arguments": ["--resume", "never", *arguments], "limit_bytes": 450 * MIB}
    path = context.work / "oom.told.json"
    path.write_text(json.dumps(told), encoding="utf-8")
    command = [*context.python(1), "-m", "benchmarks.first_hour.work", "out_of_memory", str(path), str(path)]
    code = context.run(command, "oom.log")
    ended = trained.ended(context.work / "runs/oom")
    said = (context.work / "oom.log").read_text(encoding="utf-8", errors="replace")
    if not ended:
        raise StepFailed(f"exit code {code} and no exit.json: {context.last_line('oom.log')}")
    return {
        "code": code,
        "reason": ended["reason"],
        "recognised": code == CODE == ended["code"] and "memory ran out" in ended["reason"],
        "advice": "--set" in said,
        "printed": said[-1500:],
    }


def show(measured: dict[str, Measured]) -> Iterator[Table | str]:
    said = measured["planted"]
    rows = [
        ("exit code", f"{said['code']} ({'as it should be' if said['code'] == CODE else f'NOT {CODE}'})"),
        ("recognised", "yes" if said["recognised"] else "NO"),
        ("advice to paste", "yes" if said["advice"] else "NO"),
        ("reason", said["reason"].splitlines()[0]),
    ]
    yield Table(caption="memory that runs out in a step", heads=("what", "found"), rows=rows)


def wrong(measured: dict[str, Measured]) -> Iterator[str]:
    said = measured.get("planted", {"recognised": True, "advice": True})
    if not said["recognised"]:
        yield f"memory ran out and the run ended with {said['code']}: {said['reason'].splitlines()[0]}"
    if not said["advice"]:
        yield "no advice was printed"


PHASE = Phase(name="oom", title="Out of memory, planted", share=1, steps=steps, show=show, wrong=wrong)
