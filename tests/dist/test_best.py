"""Best state, early stop, and both after a resume: the run goes on as if it had not been interrupted."""

import json

import pytest
from harness import WHOLE_GRIDS, Bench, Run

WHOLE = ["train.max_steps=30", "eval.every_steps=1", "eval.early_stop=3", "checkpoint.best=true", "checkpoint.keep=2"]
WHOLE += [
    "checkpoint.every_steps=4",
    "optim.learning_rate=0.1",
    'schedule.name="constant"',
    "train.micro_batch_size=2",
    'engine.name="fsdp2"',
]


@pytest.fixture(scope="module")
def runs(bench: Bench) -> dict[str, Run]:
    """A learning rate that overshoots: the held-out loss turns soon. The cut one is killed by an error afterwards."""
    whole = bench.launch(2, {"whole": WHOLE}, tag="best")["whole"]
    best = json.loads((whole.folder / "checkpoints/best.json").read_text())
    fault = {"cut": {"fault": f"raise:point=step,step={best['step'] + 2}"}}
    cut = bench.launch(2, {"cut": WHOLE}, tag="best", extra=fault)["cut"]
    assert "InjectedFault" in cut.error
    again = bench.launch(2, {"cut": WHOLE}, tag="best")["cut"]
    return {"whole": whole, "again": again}


@pytest.mark.row(46)
def test_training_ends_when_no_evaluation_is_better_and_the_best_state_is_kept(runs: dict[str, Run]) -> None:
    whole = runs["whole"]
    figures = {record["step"]: record["eval_loss"] for record in whole.evals}
    lowest = min((step for step in figures if step), key=figures.__getitem__)
    best = json.loads((whole.folder / "checkpoints/best.json").read_text())
    assert best == {"step": lowest, "eval_loss": figures[lowest]}
    assert whole.steps[-1]["step"] == lowest + 3 < 30, "three evaluations without a better one"
    assert (whole.folder / f"checkpoints/step-{lowest:08d}/MANIFEST.json").is_file(), "retention spares it"
    ended = json.loads((whole.folder / "exit.json").read_text())
    assert (ended["code"], ended["step"]) == (0, lowest + 3)
    assert (whole.folder / "final/model.safetensors").is_file()


@pytest.mark.row(46)
def test_after_a_resume_patience_and_best_go_on(runs: dict[str, Run]) -> None:
    whole, again = runs["whole"], runs["again"]
    assert again.column("loss") == whole.column("loss")
    assert [r["eval_loss"] for r in again.evals] == [r["eval_loss"] for r in whole.evals]
    for name in ("checkpoints/best.json", "final/model.safetensors"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


LOADED = [
    *WHOLE,
    "train.load_best=true",
    "schedule.warmup_steps=1",
    'eval.answers=[{name="asked", max_new_tokens=8, scores=[{name="exact_match"}]}]',
]
CASES: dict[str, list[str]] = {"fsdp2": []}
if WHOLE_GRIDS:
    CASES["lora"] = ['engine.name="zero3"', 'method.name="lora"', "method.r=4", "optim.learning_rate=0.4"]
    CASES["zero3"] = ['engine.name="zero3"']


@pytest.fixture(scope="module")
def loaded(bench: Bench) -> dict[str, Run]:
    """For each case `NAME`: a run that goes back to its best state; and `NAME-short`, which ends there."""
    found = bench.launch(2, {name: [*LOADED, *more] for name, more in CASES.items()}, tag="load-best")
    short = {}
    for name, more in CASES.items():
        assert not found[name].error, found[name].error
        best = json.loads((found[name].folder / "checkpoints/best.json").read_text())["step"]
        short[f"{name}-short"] = [
            *WHOLE,
            *more,
            f"train.max_steps={best}",
            "schedule.warmup_steps=1",
            "eval.early_stop=",
        ]
    last = found["fsdp2"].steps[-1]["step"]
    fault = {"stopped": {"fault": f"term:rank=1,point=restore,step={last}"}}
    stopped = bench.launch(2, {"stopped": LOADED, **short}, tag="load-best", extra=fault)
    again = bench.launch(2, {"stopped": LOADED}, tag="load-best")["stopped"]
    return found | stopped | {"again": again}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_final_holds_the_best_state_and_it_is_looked_at(loaded: dict[str, Run], name: str) -> None:
    run, short = loaded[name], loaded[f"{name}-short"]
    assert not short.error, short.error
    best = json.loads((run.folder / "checkpoints/best.json").read_text())
    last = run.steps[-1]["step"]
    assert 0 < best["step"] == last - 3
    tensors = "final/adapter_model.safetensors" if name == "lora" else "final/model.safetensors"
    assert (run.folder / tensors).read_bytes() == (short.folder / tensors).read_bytes(), "bit for bit"
    said = {
        label: json.loads((run.folder / f"eval/{label}/held_out.json").read_text())
        for label in ("before", "after", "best")
    }
    assert (said["after"]["step"], said["best"]["step"]) == (last, best["step"])
    assert said["best"]["loss"] == best["eval_loss"] < said["after"]["loss"]
    assert json.loads((run.folder / "eval/best/asked.json").read_text())["step"] == best["step"]
    (entry,) = json.loads((run.folder / "eval/summary.json").read_text())["sets"]
    assert (entry["after"]["step"], entry["best"]["step"]) == (last, best["step"])
    card = (run.folder / "final/README.md").read_text()
    assert f"| steps | {best['step']} of {last}: the best state |" in card
    assert f"| held-out rows | loss | {said['before']['loss']:.4g} | {best['eval_loss']:.4g} |" in card


@pytest.mark.slow
def test_a_stop_on_the_way_back_keeps_the_last_state(loaded: dict[str, Run]) -> None:
    """The engine holds the best state's weights by then: they must not be saved as the last step's."""
    whole, stopped, again = loaded["fsdp2"], loaded["stopped"], loaded["again"]
    last = whole.steps[-1]["step"]
    assert f"after step {last}; the state is saved" in stopped.error
    assert not again.error, again.error
    state = [
        json.loads((one.folder / f"checkpoints/step-{last:08d}/MANIFEST.json").read_text()) for one in (whole, again)
    ]
    tensors = [{told["path"]: told["sha256"] for told in one["files"] if "distcp" in told["path"]} for one in state]
    assert tensors[0] == tensors[1] != {}
    for name in ("checkpoints/best.json", "final/model.safetensors"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert not (again.folder / f"checkpoints/step-{last + 1:08d}").exists(), "nothing was trained after enough"
