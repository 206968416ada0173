"""Best state, early stop, and both after a resume: the run goes on as if it had not been interrupted."""

import json

import pytest
from harness import Bench, Run

WHOLE = ["train.max_steps=30", "eval.every_steps=1", "eval.early_stop=3", "checkpoint.best=true", "checkpoint.keep=2"]
WHOLE += ["checkpoint.every_steps=4", "optim.learning_rate=0.1", 'schedule.name="constant"', "train.micro_batch_size=2", 'engine.name="fsdp2"']


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
