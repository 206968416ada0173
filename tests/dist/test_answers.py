"""What a model answers does not depend on engine, processes, ranks or batches, and asking it changes no training."""

import json
from pathlib import Path

import pytest
from harness import WHOLE_GRIDS, Bench, Run, run, torchrun
from lm_tasks import need_library, task_files

from distft.eval.command import evaluate
from distft.eval.subject import choose, read

GREEDY = 'name = "greedy", max_new_tokens = 9, every_steps = 2, stop = ["e", "z"], scores = [{ name = "exact_match" }]'
DRAWN = 'name = "drawn", max_new_tokens = 9, temperature = 1.0, top_p = 0.9, scores = [{ name = "normalised_match" }]'
CHOSEN = 'name = "chosen", path = "spot:general", max_rows = 5, scores = [{ name = "multiple_choice" }]'
SETS = ("greedy", "drawn", "chosen")
LORA = ['method.name="lora"', "method.r=4", "method.dropout=0.1", "optim.learning_rate=3e-3"]
QLORA = ['method.name="qlora"', "method.r=4", "optim.learning_rate=3e-3"]
STOPS = {
    # name: (asked in the middle of the answers before the first step and after the last one, what the run says)
    "stopped-before": ("term:rank=1,point=eval,step=0,skip=4", "stopped by SIGTERM after step 0; nothing was trained"),
    "stopped-after": ("term:rank=0,point=eval,step=7,skip=4", "stopped by SIGTERM after step 6; the state is saved"),
}
if not WHOLE_GRIDS:
    STOPS.clear()
ENGINES = ("ddp", "zero3", "fsdp2") if WHOLE_GRIDS else ("zero3",)
TASK_ENGINES = ("zero3", "fsdp2")
SHARED = ["train.micro_batch_size=2", "eval.every_steps=3", "checkpoint.every_steps=3"]


def asked(batch_size: str) -> list[str]:
    return [f"eval.answers=[{', '.join(f'{{ {one}, batch_size = {batch_size} }}' for one in (GREEDY, DRAWN, CHOSEN))}]"]


def tasks(bench: Bench, engine: str) -> list[str]:
    """Tasks of lm-eval alone, nothing held out."""
    need_library()
    files = task_files(bench.folder)
    sets = ", ".join(f'{{ name = "{name}", path = "lm-eval:{path}", every_steps = 1 }}' for name, path in files.items())
    best = ["checkpoint.best=true", "checkpoint.every_steps=1", 'eval.best_by="text.bits_per_byte"']
    return [
        f'engine.name="{engine}"',
        f"eval.answers=[{sets}]",
        "data.eval=[]",
        "train.max_steps=2",
        "schedule.warmup_steps=1",
        *best,
    ]


def case(engine: str, *more: str, batch_size: str = '"auto"') -> list[str]:
    return [f'engine.name="{engine}"', *SHARED, *asked(batch_size), *more]


@pytest.fixture(scope="module")
def alone(bench: Bench) -> dict[str, Run]:
    cases = {
        "full": case("solo", "checkpoint.best=true", 'eval.best_by="greedy.exact_match"'),
        "full-one": case("solo", batch_size="1"),
        "full-silent": ['engine.name="solo"', *SHARED],
        "lora": case("solo", *LORA),
        "lora-silent": ['engine.name="solo"', *SHARED, *LORA],
    }
    if WHOLE_GRIDS:
        cases |= {"qlora": case("solo", *QLORA), "tasks": tasks(bench, "solo")}
    return _well(bench.launch(1, cases, tag="alone"))


@pytest.fixture(scope="module")
def two(bench: Bench) -> dict[str, Run]:
    """Two rows at a time of nine: in the last round one rank has nothing to do, and must not be missed."""
    cases = {f"full-{engine}": case(engine, batch_size="2") for engine in ENGINES}
    cases["lora-fsdp2"] = case("fsdp2", *LORA, batch_size="2")
    cases["unwritable"] = case("fsdp2")
    (bench.folder / "runs/two-unwritable").mkdir(parents=True)
    (bench.folder / "runs/two-unwritable/eval").write_text("a file where the folder should be")
    if WHOLE_GRIDS:
        cases["lora-zero3"] = case("zero3", *LORA, batch_size="2")
        cases["qlora-fsdp2"] = case("fsdp2", *QLORA, batch_size="2")
        cases |= {f"tasks-{engine}": tasks(bench, engine) for engine in TASK_ENGINES}
    extra: dict[str, dict[str, str]] = {}
    for name, (fault, _) in STOPS.items():
        cases[name] = case("fsdp2")
        extra[name] = {"fault": fault}
        cases[f"{name}-again"] = [*case("fsdp2"), f'name="two-{name}"']
    found = bench.launch(2, cases, tag="two", extra=extra)
    ended = {name: found[name] for name in (*STOPS, "unwritable")}
    return _well({name: run for name, run in found.items() if name not in ended}) | ended


def _well(runs: dict[str, Run]) -> dict[str, Run]:
    for name, found in runs.items():
        assert not found.error, f"{name}: {found.error}"
    return runs


def answers(found: Run, label: str, name: str) -> list[dict]:
    assert found.folder is not None
    return [json.loads(line) for line in (found.folder / f"eval/{label}/{name}.jsonl").read_text().splitlines()]


def texts(found: Run, label: str) -> dict[str, list[tuple[str, str]]]:
    return {name: [(line["id"], line["answer"]) for line in answers(found, label, name)] for name in SETS}


def tokens(found: Run, label: str) -> list[int]:
    return [json.loads((found.folder / f"eval/{label}/{name}.json").read_text())["answer_tokens"] for name in SETS]


def test_two_processes_answer_as_one(alone: dict[str, Run], two: dict[str, Run]) -> None:
    for name, found in two.items():
        if name in (*STOPS, "unwritable") or name.startswith("tasks"):
            continue
        one = alone["full" if "stopped" in name else name.split("-")[0]]
        for label in ("before", "step-00000002", "after"):
            if label == "step-00000002":
                assert answers(found, label, "greedy") == answers(one, label, "greedy"), name
                continue
            assert texts(found, label) == texts(one, label), (name, label)
            assert tokens(found, label) == tokens(one, label), (name, label)
            for mine, theirs in zip(answers(found, label, "chosen"), answers(one, label, "chosen"), strict=True):
                assert mine["logprobs"] == pytest.approx(theirs["logprobs"], rel=1e-4), (name, label)


@pytest.mark.skipif(not WHOLE_GRIDS, reason="part of the whole grid: make test-all")
def test_tasks_of_lm_eval_come_out_the_same(alone: dict[str, Run], two: dict[str, Run]) -> None:
    for engine in TASK_ENGINES:
        name = f"tasks-{engine}"
        for label in ("before", "step-00000001", "after"):
            for task in ("write", "choose", "text"):
                mine, theirs = answers(two[name], label, task), answers(alone["tasks"], label, task)
                assert [(line["prompt"], line["answer"]) for line in mine] == [
                    (line["prompt"], line["answer"]) for line in theirs
                ]
                assert len(mine) == 6
        mine, theirs = (
            json.loads((one.folder / "eval/summary.json").read_text()) for one in (two[name], alone["tasks"])
        )
        assert [one["figure"] for one in mine["sets"]] == ["acc", "acc_norm", "bits_per_byte", "exact_match"]
        for one, other in zip(mine["sets"], theirs["sets"], strict=True):
            for label in ("before", "after"):
                assert one[label]["value"] == pytest.approx(other[label]["value"], rel=1e-5), (name, one["figure"])
        best = [json.loads((one.folder / "checkpoints/best.json").read_text()) for one in (two[name], alone["tasks"])]
        assert best[0]["step"] == best[1]["step"]
        assert best[0]["text.bits_per_byte"] == pytest.approx(best[1]["text.bits_per_byte"], rel=1e-5)


@pytest.mark.skipif(not WHOLE_GRIDS, reason="part of the whole grid: make test-all")
def test_a_stop_among_the_answers_is_granted_and_the_same_command_finishes(two: dict[str, Run]) -> None:
    for name, (_, said) in STOPS.items():
        assert said in two[name].error
        assert len(two[f"{name}-again"].steps) == 6
        assert two[f"{name}-again"].column("loss") == two["full-fsdp2"].column("loss")


def test_answers_that_cannot_be_kept_end_all_ranks(bench: Bench, two: dict[str, Run]) -> None:
    """At once and with one code: rank 1 does not wait for rank 0 until the watch finds out."""
    assert "eval/before/held_out.json: cannot be written" in two["unwritable"].error
    told = json.loads((bench.folder / "runs/two-unwritable/exit.json").read_text())
    assert (told["code"], told["rank"]) == (8, 0)
    assert "held_out.json: cannot be written" in told["reason"]


def test_some_answers_end_early_and_differ(alone: dict[str, Run]) -> None:
    """Else the test above would prove little."""
    written, drawn = answers(alone["full"], "before", "greedy"), answers(alone["full"], "before", "drawn")
    lengths = {len(line["answer"]) for line in written}
    assert len(lengths) > 3
    assert not any("e" in line["answer"] or "z" in line["answer"] for line in written), "stop texts are left out"
    assert len({line["answer"] for line in drawn}) == len(drawn) == 9
    assert texts(alone["full"], "before") != texts(alone["full"], "after")


def test_batches_change_no_answer(alone: dict[str, Run]) -> None:
    for label in ("before", "after"):
        assert texts(alone["full"], label) == texts(alone["full-one"], label)
        assert tokens(alone["full"], label) == tokens(alone["full-one"], label)


def test_asking_changes_no_training(alone: dict[str, Run]) -> None:
    for method in ("full", "lora"):
        one, silent = alone[method], alone[f"{method}-silent"]
        for column in ("loss", "grad_norm"):
            assert one.column(column) == silent.column(column), (method, column)
        name = "model" if method == "full" else "adapter_model"
        assert (one.folder / f"final/{name}.safetensors").read_bytes() == (
            silent.folder / f"final/{name}.safetensors"
        ).read_bytes()


def test_figures_are_in_the_metrics_and_the_summary(alone: dict[str, Run]) -> None:
    found = alone["full"]
    lines = [json.loads(line) for line in (found.folder / "metrics.jsonl").read_text().splitlines()]
    looked = {line["step"]: line for line in lines if "loss" not in line}
    assert sorted(looked) == [0, 2, 3, 4, 6]
    assert "greedy.exact_match" in looked[2]
    assert "eval_loss" not in looked[2], "the loss is measured every three steps"
    assert "eval_loss" in looked[3]
    assert {"eval_perplexity", "greedy.exact_match", "drawn.f1", "chosen.acc"} <= set(looked[6])
    summary = json.loads((found.folder / "eval/summary.json").read_text())
    assert summary["held_out"]["after"]["loss"] == looked[6]["eval_loss"]
    shown = {(one["name"], one["figure"]): one for one in summary["sets"]}
    assert {name for name, _ in shown} == set(SETS)
    chosen = shown["chosen", "acc"]
    assert chosen["after"]["value"] == looked[6]["chosen.acc"]
    assert chosen["change"]["difference"]["value"] == pytest.approx(looked[6]["chosen.acc"] - looked[0]["chosen.acc"])
    assert (chosen["before"]["step"], chosen["after"]["step"]) == (0, 6)


def test_a_run_is_looked_at_again(
    bench: Bench, alone: dict[str, Run], two: dict[str, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`distft eval` on what a run left: its base, its final folder, a checkpoint. The rows it was trained on are gone,
    and so is what was prepared of them."""
    (bench.folder / "train.jsonl").rename(bench.folder / "gone.jsonl")
    (bench.folder / "cache").rename(bench.folder / "cache-gone")
    try:
        _look_again(alone)
    finally:
        (bench.folder / "gone.jsonl").rename(bench.folder / "train.jsonl")


def _look_again(alone: dict[str, Run]) -> None:
    for name in ("full", "lora"):
        found = alone[name]
        for model, label, like in (("base", "base-again", "before"), ("final", "final-again", "after")):
            _look(found, model, label)
            assert texts(found, label) == texts(found, like), (name, model)
        _look(found, "6", "six")
        assert texts(found, "six") == texts(found, "after"), name


def _look(found: Run, model: str, label: str) -> None:
    assert found.folder is not None
    recipe, folder = read(str(found.folder), [], None)
    evaluate(choose(recipe, folder, model, label))


@pytest.mark.slow
def test_a_run_is_looked_at_by_two_processes(two: dict[str, Run]) -> None:
    found = two["full-zero3"]
    command = [*torchrun(2), "-m", "distft.eval", str(found.folder), "--model", "final", "--label", "again", "--json"]
    task = task_files(found.folder)["write"]
    done = run([*command, "--set", 'engine={name="fsdp2"}', "--lm-eval", str(task), "--limit", "3"])
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout)
    assert said["label"] == "again"
    assert texts(found, "again") == texts(found, "after")
    assert len(answers(found, "again", "lm-eval-write")) == 3
    assert 0 <= said["figures"]["lm-eval-write.exact_match"] <= 1
    assert said["figures"]["chosen.acc"] == json.loads(Path(said["folder"], "chosen.json").read_text())["scores"][0][
        "scored"]["totals"]["acc"]  # fmt: skip
